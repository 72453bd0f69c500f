"""The export of several students: stock pipelines behind one manifest, against Routed.sample from the same noise."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from test_export import TOLERANCE, edm, steps, unet

from diffdistill.api import load_routed
from diffdistill.exporting import Refusal, RoutedPipelines, write_routed
from diffdistill.exporting.routed import compare_routed
from diffdistill.exporting.seeds import Seeds
from diffdistill.generator import Generator
from diffdistill.prediction import Prediction
from diffdistill.routed import Routed

TABLE = (0, 1, 1, 0, 2, 2)


def students(make) -> Routed:
    """Three students of different weights on six classes in no order."""
    made = {}
    for number in range(3):
        made[number] = make(unet(classes=6))
        with torch.no_grad():
            for parameter in made[number].denoiser.parameters():
                parameter.mul_(1 + 0.05 * number)
        made[number].denoiser.eval()
    return Routed(made, TABLE)


ROUTED = {
    "edm, one step": lambda: students(lambda network: Generator(edm(network), (80.0,))),
    "edm, two steps": lambda: students(lambda network: Generator(edm(network), (80.0, 1.5))),
    "vp v, two steps": lambda: students(lambda network: Generator(steps(network, Prediction.V), (1000.0, 600.0))),
    "vp v, two ddim steps": lambda: students(
        lambda network: Generator(steps(network, Prediction.V), (1000.0, 600.0), step_rule="ddim")
    ),
}


@pytest.mark.parametrize("name", ROUTED)
def test_pipelines_behind_the_router_sample_as_the_students_do(name, tmp_path):
    sampler = ROUTED[name]()
    report = write_routed(sampler, tmp_path / "out")
    assert report.difference < TOLERANCE and all(student.difference < TOLERANCE for student in report.students)
    pipelines = load_routed(tmp_path / "out")
    for pipeline in pipelines.pipelines:
        assert type(pipeline).__module__.startswith("diffusers.") and type(pipeline.unet).__module__.startswith(
            "diffusers."
        )
    labels, seed = [5, 0, 2, 2, 4, 3, 1], 11
    draws = Seeds.of(range(seed, seed + len(labels)))
    ours = sampler.sample(sampler.prior(draws), {"label": torch.tensor(labels)}, draws)
    torch.testing.assert_close(pipelines.states(labels, seed=seed), ours, rtol=0, atol=TOLERANCE)
    pictures = np.stack([np.asarray(picture) for picture in pipelines(labels, seed=seed, batch=2)])
    expected = ((ours / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1)
    assert (torch.from_numpy(pictures.copy()) - expected).abs().max() < 0.51  # rounded to whole levels


def test_another_table_or_swapped_students_would_be_noticed(tmp_path):
    sampler = ROUTED["edm, one step"]()
    write_routed(sampler, tmp_path / "out")
    pipelines = RoutedPipelines(tmp_path / "out")
    assert compare_routed(pipelines, sampler) < TOLERANCE
    assert compare_routed(pipelines, Routed(sampler.students, (0, 1, 1, 0, 2, 1))) > 100 * TOLERANCE
    swapped = {0: sampler.students[1], 1: sampler.students[0], 2: sampler.students[2]}
    assert compare_routed(pipelines, Routed(swapped, TABLE)) > 100 * TOLERANCE


def test_the_weights_on_disk_may_be_halves(tmp_path):
    report = write_routed(ROUTED["edm, one step"](), tmp_path / "out", dtype=torch.float16)
    assert report.difference < TOLERANCE


def test_a_damaged_missing_or_foreign_file_is_refused(tmp_path):
    folder = tmp_path / "out"
    write_routed(ROUTED["edm, one step"](), folder)
    manifest = (folder / "router.json").read_text()
    (folder / "router.json").write_text(manifest.replace('"version": 1', '"version": 2'))
    with pytest.raises(ValueError, match="router' of version 2, and this reads 'diffdistill router' of version 1"):
        load_routed(folder)
    (folder / "router.json").write_text(manifest[:50])
    with pytest.raises(ValueError, match="is damaged"):
        load_routed(folder)
    (folder / "router.json").write_text(manifest)
    config = folder / "student-1" / "scheduler" / "scheduler_config.json"
    before = config.read_text()
    config.write_text(before.replace("80.0", "79.0"))
    with pytest.raises(ValueError, match="student-1.*is missing or not the file that was exported"):
        load_routed(folder)
    config.unlink()
    with pytest.raises(ValueError, match="is missing"):
        load_routed(folder)
    with pytest.raises(ValueError, match="has no router.json"):
        load_routed(tmp_path)
    config.write_text(before)
    for labels in ([6], [-1], []):
        with pytest.raises(ValueError, match=r"labels must lie in 0 ... 5"):
            load_routed(folder)(labels)


def test_an_export_that_fails_leaves_nothing_and_one_that_stands_is_not_overwritten(tmp_path):
    whole = ROUTED["edm, one step"]()
    part = Routed({1: whole.students[1]}, TABLE)
    with pytest.raises(Refusal, match=re.escape("student [0, 2] is trained by another run")):
        write_routed(part, tmp_path / "out")
    nested = Routed({**whole.students, 2: Routed({0: whole.students[2]}, (0,) * 6)}, TABLE)
    with pytest.raises(Refusal, match="student 2 samples with several generators"):
        write_routed(nested, tmp_path / "out")
    heun = Generator(whole.students[2].denoiser, (80.0, 1.5), step_rule="heun")
    with pytest.raises(Refusal, match="adds fresh noise between its steps"):
        write_routed(Routed({**whole.students, 2: heun}, TABLE), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    write_routed(whole, tmp_path / "out")
    with pytest.raises(ValueError, match="exists"):
        write_routed(whole, tmp_path / "out")
    write_routed(whole, tmp_path / "out", replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_cards_script_without_diffdistill_makes_the_routers_picture(tmp_path):
    folder = tmp_path / "out"
    write_routed(ROUTED["edm, two steps"](), folder)
    with_it, without = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert "diffdistill" in with_it
    without += "import sys\nassert not any(name.startswith('diffdistill') for name in sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", without], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    picture = load_routed(folder)([0, len(TABLE) - 1], seed=0)[1]
    assert np.array_equal(np.asarray(Image.open(folder / "sample.png")), np.asarray(picture))
    assert json.loads((folder / "router.json").read_text())["router"] == list(TABLE)
