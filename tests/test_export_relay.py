"""Export of experts: stock networks and a stock scheduler reproduce Relay.sample, and what they cannot is refused."""

import json
import re
import subprocess
import sys

import pytest
import torch
from test_export import edm, steps, unet, velocity

from diffdistill.exporting import Refusal
from diffdistill.exporting.relay import RelayPipeline, compare_relay, write_relay
from diffdistill.generator import Generator
from diffdistill.prediction import Prediction
from diffdistill.process import Trig
from diffdistill.relay import Relay


def relay(make, grid, *, phases=(1, 1), rule="euler") -> Relay:
    """Experts of different weights."""
    experts, first = [], 0
    for length in phases:
        denoiser = make()
        with torch.no_grad():
            for parameter in denoiser.parameters():
                parameter.mul_(1 + 0.1 * len(experts))
        experts.append(Generator(denoiser, grid[first : first + length], step_rule=rule))
        first += length
    return Relay(experts)


SUPPORTED = {
    "edm, classes": (lambda: relay(lambda: edm(unet(classes=10)), (80.0, 1.5)), "EDMEulerScheduler"),
    "edm, one channel, four steps in two phases": (
        lambda: relay(lambda: edm(unet(channels=1), sigma_data=1.0), (80.0, 9.7, 1.5, 0.3), phases=(2, 2)),
        "EDMEulerScheduler",
    ),
    "flow, classes, any times": (
        lambda: relay(lambda: velocity(unet(classes=10)), (1.0, 0.9, 0.75, 0.3), phases=(2, 2)),
        "FlowMatchEulerDiscreteScheduler",
    ),
    "flow, ddim": (lambda: relay(lambda: velocity(unet()), (1.0, 0.4), rule="ddim"), "FlowMatchEulerDiscreteScheduler"),
    "vp v, ddim, any whole times": (
        lambda: relay(lambda: steps(unet(classes=3), Prediction.V), (1000.0, 701.0, 300.0), phases=(1, 2), rule="ddim"),
        "DPMSolverMultistepScheduler",
    ),
}


@pytest.mark.parametrize("name", SUPPORTED)
def test_stock_parts_reproduce_the_relay(name, tmp_path):
    make, scheduler = SUPPORTED[name]
    report = write_relay(make(), tmp_path / "out")
    assert report.difference < 1e-5 and report.scheduler == scheduler
    again = compare_relay(RelayPipeline(tmp_path / "out"), make())
    assert again == report.difference
    manifest = json.loads((tmp_path / "out" / "relay.json").read_text())
    sampler = make()
    assert manifest["grid"] == list(sampler.grid)
    assert manifest["boundaries"] == [expert.grid[0] for expert in sampler.experts[1:]]
    assert [expert["times"] for expert in manifest["experts"]] == [list(expert.grid) for expert in sampler.experts]


def test_the_order_of_the_experts_matters_to_the_comparison(tmp_path):
    """It would not pass with the experts exchanged."""
    sampler = SUPPORTED["edm, classes"][0]()
    write_relay(sampler, tmp_path / "out")
    pipeline = RelayPipeline(tmp_path / "out")
    pipeline.experts.reverse()
    assert compare_relay(pipeline, sampler) > 1e-3


def test_a_picture_is_a_function_of_its_label_and_seed(tmp_path):
    write_relay(SUPPORTED["edm, classes"][0](), tmp_path / "out")
    pipeline = RelayPipeline(tmp_path / "out")
    whole, parts = pipeline(5, seed=3), pipeline(5, seed=3, batch=2)
    one = pipeline(1, labels=[4], seed=7)
    assert [p.size for p in whole] == [(8, 8)] * 5
    for ours, theirs in (*zip(whole, parts, strict=True), (whole[4], one[0])):
        difference = torch.tensor(list(ours.tobytes())) - torch.tensor(list(theirs.tobytes()))
        assert difference.abs().max() <= 1  # one level of 255, where rounding falls on the other side
    with pytest.raises(ValueError, match=r"labels must be 2 numbers in \[0, 10\), got \[10, 0\]"):
        pipeline(2, labels=[10, 0])


def test_half_precision_weights_are_compared_rounded(tmp_path):
    report = write_relay(SUPPORTED["edm, classes"][0](), tmp_path / "out", dtype=torch.float16)
    assert report.difference < 1e-5


def test_the_readme_samples_without_diffdistill(tmp_path):
    sampler = SUPPORTED["flow, classes, any times"][0]()
    write_relay(sampler, tmp_path / "out")
    pipeline = RelayPipeline(tmp_path / "out")
    (script,) = [
        b for b in re.findall(r"```python\n(.*?)```", (tmp_path / "out/README.md").read_text(), re.S) if "json" in b
    ]
    script += 'torch.save(x, "x.pt")\nimport sys\nassert "diffdistill" not in sys.modules\n'
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path / "out", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "out/x.pt"), pipeline.states(1, labels=[0]), rtol=0, atol=1e-5)


def test_what_is_damaged_or_in_the_way_is_refused(tmp_path):
    sampler = SUPPORTED["edm, classes"][0]()
    write_relay(sampler, tmp_path / "out")
    with pytest.raises(ValueError, match="exists; choose another folder"):
        write_relay(sampler, tmp_path / "out")
    write_relay(sampler, tmp_path / "out", replace=True)
    config = tmp_path / "out" / "expert-1" / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(ValueError, match=r"expert-1/config.json is missing or not the file that was exported"):
        RelayPipeline(tmp_path / "out")
    (tmp_path / "out" / "relay.json").write_text('{"format": "diffdistill router", "version": 1}')
    with pytest.raises(ValueError, match="is 'diffdistill router' of version 1, and this reads 'diffdistill relay'"):
        RelayPipeline(tmp_path / "out")
    with pytest.raises(ValueError, match="has no relay.json"):
        RelayPipeline(tmp_path)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: relay(lambda: steps(unet(), Prediction.V), (1000.0, 500.0)), "use step_rule ddim"),
        (lambda: relay(lambda: steps(unet(), Prediction.V), (1000.0, 500.5), rule="ddim"), "use whole times"),
        (lambda: relay(lambda: velocity(unet()), (0.9, 0.5)), "let generator.grid begin at t_max"),
        (lambda: relay(lambda: steps(unet(), Prediction.V, Trig()), (1.5, 0.5)), "no stock scheduler of diffusers"),
    ],
)
def test_what_no_stock_scheduler_does_is_refused_and_nothing_is_written(make, reason, tmp_path):
    with pytest.raises(Refusal, match=reason):
        write_relay(make(), tmp_path / "out")
    assert not list(tmp_path.iterdir())
