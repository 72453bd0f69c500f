"""Pairs of noise and end point: what they are, that interrupted work goes on, and that DMD's regression reads them."""

import dataclasses
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cases import CASES
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from oracle import denoiser, gaussian
from safetensors.torch import load_file, save, save_file
from test_api import toy_denoiser
from tiny import NUM_CLASSES, refused, student_recipe, teacher_recipe, write_recipe

from diffdistill import api, build, coupling
from diffdistill.cli import main
from diffdistill.config import ConfigError
from diffdistill.data.fashion_mnist import load_fashion_mnist
from diffdistill.data.image_set import ImageSet
from diffdistill.data.pairs import beside, fingerprint, read_pairs, read_recipe, shard_path
from diffdistill.data.pairs import write_recipe as write_recipe_of_pairs
from diffdistill.evaluation.sampling import Solved
from diffdistill.generator import Generator
from diffdistill.losses import pair_distance
from diffdistill.process import VE
from diffdistill.recipe import load_config
from diffdistill.rng import Rng
from diffdistill.teacher import Teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A teacher's folder, from a real run of a few steps."""
    folder = tmp_path_factory.mktemp("coupling")
    return api.export_denoiser(api.distill(teacher_recipe(folder), say=lambda line: None), folder / "exported")


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("pairs*"))}


def made(source, folder: Path, *, count: int = 10, seed: int = 0, shard: int = 4, batch: int = 3):
    recipe = coupling.recipe_of(source, count=count, seed=seed, shard=shard)
    coupling.begin(recipe, folder)
    coupling.make_pairs(source, recipe, folder, batch=batch, numbers=range(recipe.num_shards), bar=False)
    return read_pairs(folder, torch.device("cpu"))


@pytest.mark.parametrize("start", [0.0, 2.0])
def test_a_pair_is_a_noise_and_the_end_of_the_ode_from_it(start, tmp_path):
    frozen = Teacher(toy_denoiser(), guidance=1.5)
    source = Solved(frozen, 6, "heun", start)
    recipe, pairs = made(source, tmp_path)
    assert recipe.start == (start or 5.0) == source.times[0] and len(source.times) == 6
    assert len(pairs.noise) == len(pairs.x0) == 10 and pairs.noise.dtype == pairs.x0.dtype == torch.float32
    assert pairs.labels.tolist() == [i % NUM_CLASSES for i in range(10)]
    noise = recipe.noise_std * Rng((0, "pairs"), range(10), dtype=torch.float64).normal((2,))
    assert torch.equal(pairs.noise, noise.float())
    end = frozen.solve(noise, (*source.times, 0.0), {"label": pairs.labels}, solver="heun")
    torch.testing.assert_close(pairs.x0, end.float(), rtol=1e-6, atol=1e-6)  # rounded to float32 on the way to disk


def test_a_later_start_keeps_the_customary_spacing_below_it():
    process = toy_denoiser().process
    times = Solved(Teacher(toy_denoiser()), 6, "heun", 2.0).times
    u = [t ** (1 / process.rho) for t in times]  # evenly spaced by Karras et al. 2022
    assert times[0] == 2.0 and times[-1] == pytest.approx(process.sigma_min, rel=1e-9)
    assert [a - b for a, b in zip(u, u[1:], strict=False)] == pytest.approx([(u[0] - u[-1]) / 5] * 5, rel=1e-6)


def test_pairs_do_not_depend_on_batch_shards_or_count(tmp_path):
    source = Solved(Teacher(toy_denoiser()), 4)
    _, whole = made(source, tmp_path / "a")
    _, parts = made(source, tmp_path / "b", count=7, shard=2, batch=1)
    assert torch.equal(parts.noise, whole.noise[:7]) and torch.equal(parts.labels, whole.labels[:7])
    torch.testing.assert_close(parts.x0, whole.x0[:7], rtol=1e-6, atol=1e-6)
    _, other = made(source, tmp_path / "c", seed=1)
    assert not (other.noise == whole.noise).any()


def test_processes_that_share_the_files_make_those_of_one(tmp_path):
    source = Solved(Teacher(toy_denoiser()), 4)
    made(source, tmp_path / "one")
    recipe = coupling.recipe_of(source, count=10, seed=0, shard=4)
    coupling.begin(recipe, tmp_path / "two")
    for rank in range(2):
        coupling.make_pairs(source, recipe, tmp_path / "two", batch=3, numbers=range(rank, 3, 2), bar=False)
    assert digests(tmp_path / "one") == digests(tmp_path / "two") and len(digests(tmp_path / "two")) == 4


def test_a_run_is_coupled_on_its_own_grid(tmp_path):
    source = Generator(toy_denoiser(), [5.0, 1.0])
    recipe, pairs = made(source, tmp_path, batch=10, shard=10)
    assert (recipe.steps, recipe.solver, recipe.start) == (0, "", 5.0)
    rng = Rng((0, "pairs"), range(10), dtype=torch.float64)
    noise = source.prior(rng)
    assert torch.equal(pairs.noise, noise.float())
    assert torch.equal(pairs.x0, source.sample(noise, {"label": pairs.labels}, rng).float())


def test_a_killed_command_goes_on_and_ends_in_the_same_files(teacher, tmp_path):
    """Killed as soon as its third file is there; some later one is then not there, or half written."""
    line = [
        sys.executable,
        "-m",
        "diffdistill",
        "couple",
        str(teacher),
        *("--count", "400", "--steps", "4", "--shard", "10", "--batch", "5"),
    ]
    root = Path(__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    first = subprocess.Popen([*line, "--out", str(tmp_path / "killed")], env=environment, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 120
    while not shard_path(tmp_path / "killed", 2).exists():
        assert first.poll() is None and time.monotonic() < limit
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not shard_path(tmp_path / "killed", 39).exists()
    with pytest.raises(ValueError, match="run the same `diffdistill couple` again"):
        read_pairs(tmp_path / "killed", torch.device("cpu"))
    options = {"count": 400, "steps": 4, "shard": 10, "batch": 5}
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("pairs-*")}
    api.couple(teacher, tmp_path / "killed", **options)
    assert all((tmp_path / "killed" / name).stat().st_mtime_ns == when for name, when in before.items())  # kept
    api.couple(teacher, tmp_path / "whole", **options)
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole") and len(digests(tmp_path / "whole")) == 41


def test_a_process_killed_while_it_wrote_the_recipe_goes_on(teacher, tmp_path):
    whole = api.couple(teacher, tmp_path / "whole", count=4, steps=2)
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / ".lock").touch()
    beside(killed / "pairs.json").write_text('{"source": "4f')
    assert digests(api.couple(teacher, killed, count=4, steps=2)) == digests(whole)
    assert not list(killed.glob(".pairs*"))


def test_two_processes_make_what_is_missing_as_one_would(teacher, tmp_path):
    """By torchrun's own launcher, gloo, and the command line."""
    options = {"count": 22, "steps": 2, "shard": 4, "batch": 3}
    whole = api.couple(teacher, tmp_path / "whole", **options)
    shared = Path(shutil.copytree(whole, tmp_path / "shared"))
    for number in (0, 2, 4):  # all of the first process, had they not been dealt out anew
        shard_path(shared, number).unlink()
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "diffdistill"]
    line += ["couple", str(teacher), "--out", str(shared)]
    line += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert digests(shared) == digests(whole) and len(digests(whole)) == 7


def test_what_was_being_written_at_a_kill_is_written_again(tmp_path, monkeypatch):
    source = Solved(Teacher(toy_denoiser()), 2)
    made(source, tmp_path / "whole")
    recipe = coupling.recipe_of(source, count=10, seed=0, shard=4)
    folder = tmp_path / "killed"
    coupling.begin(recipe, folder)

    def killed_halfway(columns: dict, path: Path) -> None:
        path.write_bytes(save(columns)[:100])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(coupling, "save_file", killed_halfway)
        coupling.make_pairs(source, recipe, folder, batch=3, numbers=[0, 1, 2], bar=False)
    assert coupling.missing(recipe, folder) == [0, 1, 2] and len(list(folder.glob(".pairs*"))) == 1
    coupling.make_pairs(source, recipe, folder, batch=3, numbers=[0, 1, 2], bar=False)
    assert digests(folder) == digests(tmp_path / "whole") and not list(folder.glob(".pairs*"))


def test_a_full_disk_is_one_clear_error_and_leaves_nothing_half_written(tmp_path):
    """A limit on the size of files stands for the full disk: the kernel refuses the write in the same place."""
    source = Solved(Teacher(toy_denoiser()), 2)
    recipe = coupling.recipe_of(source, count=100, seed=0, shard=100)
    coupling.begin(recipe, tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))
    try:
        with pytest.raises(ValueError, match="could not write .*pairs-00000.*free some space"):
            coupling.make_pairs(source, recipe, tmp_path, batch=100, numbers=[0], bar=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert coupling.missing(recipe, tmp_path) == [0] and [path.name for path in tmp_path.iterdir()] == ["pairs.json"]


@pytest.mark.parametrize("change", [{"clock": "log_ratio"}, {"process": {"rho": 5.0}}, {"prediction": "eps"}], ids=str)
def test_the_same_weights_with_another_meaning_are_another_recipe(change, teacher, tmp_path, capsys):
    """Such as a teacher whose denoiser.json was wrong, and has been put right since."""
    folder = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    pairs = api.couple(folder, tmp_path / "pairs", count=4, steps=2)
    said = json.loads((folder / "denoiser.json").read_text())
    for key, value in change.items():
        said[key] = {**said[key], **value} if isinstance(value, dict) else value
    (folder / "denoiser.json").write_text(json.dumps(said))
    complaint = refused(capsys, "couple", folder, "--out", pairs, "--count", 4, "--steps", 2)
    assert "meaning was 'f of VE" in complaint and "source was" not in complaint


def test_a_pipelines_folder_and_a_run_are_sources_too(teacher, tmp_path):
    network = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    DDIMPipeline(unet=network, scheduler=DDIMScheduler()).save_pretrained(tmp_path / "pipeline")
    api.couple(tmp_path / "pipeline", tmp_path / "a", count=3, steps=2, solver="ddim")
    recipe, pairs = read_pairs(tmp_path / "a", torch.device("cpu"))
    assert recipe.meaning.startswith("eps of VP, seen in VP") and recipe.noise_std == pytest.approx(1, abs=1e-4)
    assert pairs.x0.shape == (3, 3, 8, 8) and pairs.labels is None

    trained = teacher.parent / "teacher"  # the run that the teacher's folder was exported from
    api.couple(trained, tmp_path / "b", count=3)
    recipe, pairs = read_pairs(tmp_path / "b", torch.device("cpu"))
    sampler = api.load(trained)
    rng = Rng((0, "pairs"), range(3))
    noise = sampler.prior(rng)
    with torch.no_grad():
        end = sampler.sample(noise, {"label": pairs.labels}, rng)
    assert recipe.steps == 0 and torch.equal(pairs.noise, noise)
    torch.testing.assert_close(pairs.x0, end, rtol=1e-5, atol=1e-5)


def test_a_folder_of_another_recipe_is_refused_with_every_key_that_differs(teacher, tmp_path, capsys):
    api.couple(teacher, tmp_path / "pairs", count=4, steps=2)
    said = refused(
        capsys, "couple", teacher, "--out", tmp_path / "pairs", "--count", 5, "--steps", 2, "--solver", "euler"
    )
    assert "solver was 'heun' and is 'euler'" in said and "count was 4 and is 5" in said and "steps was" not in said
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("my only copy")
    assert "is not empty and holds no pairs" in refused(
        capsys, "couple", teacher, "--out", tmp_path / "full", "--count", 5
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--count", "0"], "count and shard must be at least 1"),
        (["--count", "4", "--start", "21"], r"the start must lie in \(0, 20\]"),
        (["--count", "4", "--steps", "-1"], "at least 1 step"),
        (["--count", "4", "--guidance", "2"], "trained without an unconditional label"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_written(options, said, teacher, tmp_path, capsys):
    assert re.search(said, refused(capsys, "couple", teacher, "--out", tmp_path / "pairs", *options))
    assert not (tmp_path / "pairs").exists()


def test_the_command_makes_pairs_that_a_dmd_run_reads(teacher, tmp_path, capsys):
    assert main(["couple", str(teacher), "--out", str(tmp_path / "pairs"), "--count", "12", "--steps", "3"]) == 0
    assert "12 pairs in" in capsys.readouterr().out
    assert load_file(shard_path(tmp_path / "pairs", 0)).keys() == {"noise", "x0", "label"}
    recipe = student_recipe(tmp_path, teacher)
    recipe["method"] = {"name": "dmd"}
    del recipe["critic"]
    without = write_recipe(tmp_path / "without.yaml", recipe)
    assert "reads pairs, and data.pairs is missing" in refused(capsys, "train", without)
    recipe["data"]["pairs"] = str(tmp_path / "pairs")
    api.distill(recipe, say=lambda line: None)


def test_a_run_draws_from_all_the_folders_it_names(teacher, tmp_path):
    """As RF++ mixes inverted images with sampled pairs; a folder that does not fit is named."""
    folders = [api.couple(teacher, tmp_path / name, count=n, steps=2, seed=n) for name, n in (("a", 3), ("b", 5))]
    recipe = student_recipe(tmp_path, teacher)
    recipe["method"], recipe["data"]["pairs"] = {"name": "dmd"}, [str(folder) for folder in folders]
    del recipe["critic"]
    run = api.distill(recipe, say=lambda line: None)
    config = load_config(run / "config.yaml")
    pairs = build.pair_stream(config, build.method(config, torch.device("cpu")), torch.device("cpu"), unit_noise=False)
    each = [read_pairs(folder, torch.device("cpu"))[1] for folder in folders]
    assert torch.equal(pairs.noise, torch.cat([part.noise for part in each])) and len(pairs.x0) == 8
    assert torch.equal(pairs.x0[3:], each[1].x0) and torch.equal(pairs.labels[3:], each[1].labels)
    drawn = pairs.draw(Rng((0, "draw"), range(64)))
    assert len({tuple(x.flatten().tolist()) for x in drawn.x0}) == 8
    write_recipe_of_pairs(dataclasses.replace(read_recipe(folders[1]), guidance=2.0), folders[1] / "pairs.json")
    with pytest.raises(ConfigError, match=r"data\.pairs=.*/b has guidance 2\.0, and this run needs 1\.0"):
        api.distill({**recipe, "output": str(tmp_path / "again")}, say=lambda line: None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"source": "0" * 64}, "has source '000.*', and this run needs"),
        ({"meaning": "eps of VP"}, "has meaning 'eps of VP', and this run needs 'f of VE, seen in VE, "),
        ({"guidance": 2.0}, "has guidance 2.0, and this run needs 1.0"),
        ({"start": 5.0}, "has start 5.0, and this run needs 20.0"),
        ({"num_classes": 4}, "has num_classes 4, and this run needs 3"),
    ],
)
def test_pairs_that_do_not_fit_the_run_are_refused(change, said, teacher, tmp_path):
    folder = api.couple(teacher, tmp_path / "pairs", count=4, steps=2)
    write_recipe_of_pairs(dataclasses.replace(read_recipe(folder), **change), folder / "pairs.json")
    recipe = student_recipe(tmp_path, teacher)
    recipe["method"], recipe["data"]["pairs"] = {"name": "dmd"}, str(folder)
    del recipe["critic"]
    with pytest.raises(ConfigError, match=said):
        api.distill(recipe, say=lambda line: None)
    assert not (tmp_path / "student").exists()


def test_a_fingerprint_tells_weights_and_not_their_precision():
    model = toy_denoiser()
    half = toy_denoiser().to(torch.float16)
    assert fingerprint(half) == fingerprint(toy_denoiser().to(torch.float16).double()) != fingerprint(model)
    with torch.no_grad():
        next(half.parameters()).view(-1)[0] += 1
    assert fingerprint(half) != fingerprint(toy_denoiser().to(torch.float16))


def test_damaged_pairs_are_refused(teacher, tmp_path):
    folder = api.couple(teacher, tmp_path / "pairs", count=4, steps=2)
    columns = load_file(shard_path(folder, 0))
    for other in (
        {**columns, "x0": columns["x0"][:3]},
        {**columns, "noise": columns["noise"].half()},
        {"noise": columns["noise"], "x0": columns["x0"]},
    ):
        save_file(other, shard_path(folder, 0))
        with pytest.raises(ValueError, match=r"is not of pairs.json: (x0|noise|label) is .* delete it"):
            read_pairs(folder, torch.device("cpu"))
    shard_path(folder, 0).write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot be read"):
        read_pairs(folder, torch.device("cpu"))
    (folder / "pairs.json").write_text("{}")
    with pytest.raises(ValueError, match="is damaged"):
        read_recipe(folder)


def test_the_distance_of_a_pair():
    made, target = torch.tensor([[1.0, 2.0], [0.0, 0.0]]).double(), torch.tensor([[0.0, 0.0], [0.0, 0.0]]).double()
    assert pair_distance(made, target, huber=None).tolist() == [2.5, 0.0]
    assert pair_distance(made, target, huber=0.5).tolist() == pytest.approx([2.75**0.5 - 0.5, 0.0], rel=1e-12)


def pictures(*, classes: int = 3, size: int = 8) -> ImageSet:
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (12, 3, size, size), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.arange(12) % max(classes, 1), classes)


def toy_pictures_teacher() -> Teacher:
    return Teacher(CASES["mean_flow-unet"].make().teacher.denoiser.float(), guidance=1.0)


def test_inverted_pairs_are_images_and_what_the_ode_makes_of_them_backwards(tmp_path):
    frozen, images = toy_pictures_teacher(), pictures()
    solved = Solved(frozen, 5, "heun")
    recipe, pairs = made(coupling.Inverted(solved, images), tmp_path, count=10)
    x0, labels = images.select(torch.arange(10))
    assert torch.equal(pairs.x0, x0) and torch.equal(pairs.labels, labels)
    up = solved.times[::-1]
    assert list(up) == sorted(up) and up[-1] == recipe.start == 20.0
    noise = frozen.solve(x0, up, {"label": labels}, solver="heun")
    torch.testing.assert_close(pairs.noise, noise, rtol=1e-5, atol=1e-4)


def test_the_ode_backwards_is_the_closed_form_and_comes_back():
    law, process = gaussian([0.4, -0.7], [[0.5, 0.2], [0.2, 0.3]]), VE(sigma_min=0.02)
    teacher, x0 = Teacher(denoiser(law, process)), law.sample(6)
    ends = [torch.full((6,), t, dtype=torch.float64) for t in (0.02, 80.0)]
    expected = law.flow(x0, *((torch.ones_like(t), t) for t in ends))
    errors = []
    for steps in (100, 200):
        times = process.grid(steps)
        errors.append((teacher.solve(x0, times[::-1], solver="heun") - expected).norm().item())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)  # second order
    assert errors[1] < 1e-3 * expected.norm()
    back = teacher.solve(teacher.solve(x0, times[::-1], solver="heun"), times, solver="heun")
    torch.testing.assert_close(back, x0, rtol=0, atol=1e-3)


def test_inverted_pairs_of_other_images_are_other_pairs_and_those_of_before_are_read(tmp_path):
    solved, images = Solved(toy_pictures_teacher(), 2), pictures()
    recipe = coupling.recipe_of(coupling.Inverted(solved, images), count=4, seed=0, shard=4)
    coupling.begin(recipe, tmp_path)
    other = ImageSet(images.images.flip(0), images.labels, 3)
    for source in (solved, coupling.Inverted(solved, other)):
        with pytest.raises(ValueError, match="pairs of another recipe: images was"):
            coupling.refuse_another(tmp_path, coupling.recipe_of(source, count=4, seed=0, shard=4))
    values = json.loads((tmp_path / "pairs.json").read_text())
    del values["images"]
    (tmp_path / "pairs.json").write_text(json.dumps(values))
    assert read_recipe(tmp_path) == dataclasses.replace(recipe, images="")


@pytest.mark.parametrize(
    ("images", "count", "message"),
    [
        (lambda: pictures(size=16), 4, r"shape \(3, 16, 16\), and the teacher's samples \(3, 8, 8\)"),
        (lambda: pictures(classes=0), 4, "the images have 0 classes, and the teacher 3"),
        (pictures, 13, "count=13 is more than the 12 images"),
    ],
)
def test_images_that_cannot_be_inverted_are_refused(images, count, message):
    with pytest.raises(ValueError, match=message):
        source = coupling.Inverted(Solved(toy_pictures_teacher(), 2), images())
        coupling.recipe_of(source, count=count, seed=0, shard=4)


def test_the_command_inverts_images_by_keys_of_data_and_a_flow_trains_on_them(tmp_path, capsys):
    """With the shipped teacher and data; two images in two steps."""
    shipped = Path(__file__).parents[1] / "checkpoints" / "fashion-edm"
    command = ["couple", str(shipped), "--out", str(tmp_path / "pairs"), "--count", "2", "--steps", "2"]
    assert main([*command, "data.name=fashion_mnist"]) == 0
    recipe, pairs = read_pairs(tmp_path / "pairs", torch.device("cpu"))
    real = load_fashion_mnist(None, "train")
    assert torch.equal(pairs.x0, real.select(torch.arange(2))[0]) and recipe.images
    assert main([*command, "data.nome=fashion_mnist"]) == 2
    assert "unknown key data.nome" in capsys.readouterr().err


def test_a_smaller_student_is_reflowed_by_annealing_and_distilled(teacher, tmp_path):
    """SlimFlow from YAML: pairs, the smaller network's annealing reflow, and its guided distillation; then sampled."""
    api.couple(teacher, tmp_path / "pairs", count=12, steps=3, shard=8)
    made_anew = teacher_recipe(tmp_path)["generator"]
    made_anew["network"]["options"] |= {"block_out_channels": [4, 8]}
    data = {"pairs": str(tmp_path / "pairs")}
    common = {
        "data": data,
        "players": {"generator": {"learning_rate": 1e-3}},
        "train": {"steps": 4, "batch": 6, "log_every": 2, "save_every": 2, "device": "cpu", "threads": 1},
    }
    flow = common | {
        "output": str(tmp_path / "flow"),
        "method": {"name": "reflow", "anneal_steps": 3, "flip": True, "straightness_every": 2},
        "generator": made_anew | {"grid": [20.0], "step_rule": "euler"},
    }
    straightened = api.distill(flow, say=lambda line: None)
    distilled = common | {
        "output": str(tmp_path / "student"),
        "teacher": {"path": str(teacher)},
        "method": {"name": "reflow_distill", "guided_weight": 0.5, "guided_from": "teacher"},
        "generator": flow["generator"] | {"init_from": str(straightened)},
    }
    student = api.load(api.distill(distilled, say=lambda line: None))
    size = sum(parameter.numel() for parameter in student.denoiser.parameters())
    assert size < 0.7 * sum(parameter.numel() for parameter in api.load(teacher).denoiser.parameters())
    rng = Rng(("slim",), range(3))
    assert student.sample(student.prior(rng), {"label": torch.arange(3)}, rng).isfinite().all()
    with pytest.raises(ConfigError, match="reflow needs no teacher and the generator starts as"):
        api.check(flow | {"teacher": {"path": str(teacher)}, "output": str(tmp_path / "another")})
