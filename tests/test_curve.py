"""The evaluate command: features in parts that are made once, rows side by side, their cost, what a student lost."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import CASES
from safetensors.torch import load_file, save_file
from test_api import write_images
from tiny import refused, student_recipe, teacher_recipe, write_clip, write_vgg16
from torch import nn

from diffdistill import api
from diffdistill.cli import main
from diffdistill.config import ConfigError
from diffdistill.evaluation.convention import InputConvention
from diffdistill.evaluation.cost import cost_of, evaluations_per_sample, timed
from diffdistill.evaluation.diversity import perceptual_diversity
from diffdistill.evaluation.extractors import module_extractor
from diffdistill.evaluation.frechet import moments
from diffdistill.evaluation.front import on_front, table
from diffdistill.evaluation.metrics import Reference, evaluate_features, quantise
from diffdistill.evaluation.modes import class_overlaps, lost_classes, paired_distances, squared
from diffdistill.evaluation.pretrained import ClipScorer
from diffdistill.evaluation.sampling import Solved, fingerprint, sample_images
from diffdistill.evaluation.stream import Drawn, look_at
from diffdistill.exporting import StockPipeline
from diffdistill.exporting.opened import seed_of
from diffdistill.exporting.seeds import Seeds
from diffdistill.generator import Generator
from diffdistill.memory import LiveBytes, peak_of
from diffdistill.perceptual import read_lpips
from diffdistill.teacher import Teacher

FEATURES = Path(__file__).parents[1] / "checkpoints" / "fashion-features"


class Colours(nn.Module):
    """Features: means of quarters of the picture; as many logits as classes."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images):
        features = nn.functional.adaptive_avg_pool2d(images, 2).flatten(1) * self.weight
        return features, features[:, :3]


def small_denoiser():
    """A random UNet of pictures of 8 pixels a side, of 3 classes, in float64."""
    return CASES["mean_flow-unet"].make().teacher.denoiser


def colours(dtype=torch.float64):
    return module_extractor(Colours().to(dtype), name="colours", input=InputConvention(8, 8), knows_classes=True)


def pictures(key="a", classes=3) -> Drawn:
    """Pictures that are a function of seed, slot and label; `made` has the slots of each call."""
    made: list[list[int]] = []

    def images(slots, labels, seed):
        made.append(list(slots))
        slots = torch.tensor(slots, dtype=torch.float64)
        steps = torch.arange(192, dtype=torch.float64).reshape(3, 8, 8)
        told = 0 if labels is None else labels[:, None, None, None]
        return (100 * (slots[:, None, None, None] * (seed + 1) + steps).sin() + told).sin()

    found = Drawn(key, range(classes), images)
    images.made = made
    return found


def test_features_in_parts_are_those_of_all_images(tmp_path, monkeypatch):
    monkeypatch.setattr("diffdistill.evaluation.stream.CHUNK", 10)
    source = pictures()
    seen = look_at(source, colours(), 24, seed=5, batch=4, cache=tmp_path)
    labels = torch.arange(24) % 3
    features, logits = colours()(quantise(source.images(range(24), labels, 5)))
    assert torch.equal(seen.features, features) and torch.equal(seen.logits, logits)
    assert torch.equal(seen.labels, labels)
    without = look_at(pictures(classes=0), colours(), 5, seed=5, batch=4, cache=tmp_path / "without")
    assert without.labels is None and len(without.features) == 5


def test_what_was_made_is_not_made_again_and_more_samples_add_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr("diffdistill.evaluation.stream.CHUNK", 10)

    def slots(count, **options):
        source = pictures(options.get("key", "a"))
        look_at(source, colours(), count, seed=options.get("seed", 0), batch=10, cache=tmp_path)
        return [slot for call in source.images.made for slot in call]

    assert slots(20) == list(range(20))
    assert slots(20) == [] and slots(10) == []
    assert slots(30) == list(range(20, 30))
    assert slots(20, key="b") == list(range(20)) and slots(20, seed=1) == list(range(20))
    parts = sorted(tmp_path.rglob("*.safetensors"))
    parts[0].unlink()  # as if it had been interrupted
    assert len(slots(20, key=["a", "b"][0])) + len(slots(20, key="b")) + len(slots(20, seed=1)) == 10
    assert not list(tmp_path.rglob("*.partial"))


def test_processes_make_a_part_each_and_have_all(tmp_path, monkeypatch):
    monkeypatch.setattr("diffdistill.evaluation.stream.CHUNK", 10)
    together, sources = threading.Barrier(2, timeout=60), [pictures(), pictures()]

    def one(rank):
        place = {"rank": rank, "ranks": 2, "wait": together.wait}
        return look_at(sources[rank], colours(), 40, seed=0, batch=10, cache=tmp_path, **place)

    with ThreadPoolExecutor(2) as pool:
        ours, theirs = pool.map(one, range(2))
    assert torch.equal(ours.features, theirs.features) and len(ours.features) == 40
    made = [[slots[0] for slots in source.images.made] for source in sources]
    assert made == [[0, 20], [10, 30]]


def test_a_damaged_part_is_named(tmp_path):
    look_at(pictures(), colours(), 8, seed=0, batch=8, cache=tmp_path)
    (part,) = tmp_path.rglob("*.safetensors")
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="could not be read: .*; delete it, and it will be computed again"):
        look_at(pictures(), colours(), 8, seed=0, batch=8, cache=tmp_path)
    part.write_bytes(whole)
    columns = load_file(part)
    save_file({name: column[:5].clone() for name, column in columns.items()}, part)
    with pytest.raises(ValueError, match="does not hold 8 samples; delete it"):
        look_at(pictures(), colours(), 8, seed=0, batch=8, cache=tmp_path)


WORKER = """
import sys
from pathlib import Path
import torch
from accelerate import PartialState
sys.path.insert(0, {tests!r})
from test_curve import colours, small_denoiser
from diffdistill.evaluation import stream
from diffdistill.generator import Generator
stream.CHUNK = 16
state = PartialState(cpu=True)
place = dict(rank=state.process_index, ranks=state.num_processes, wait=state.wait_for_everyone)
generator = Generator(small_denoiser().to(torch.{dtype}), (20.0, 1.0))
seen = stream.look_at(generator, colours(torch.{dtype}), 100, seed=3, batch=32, cache=Path({cache!r}), **place)
torch.save((seen.features, seen.logits, seen.labels), {cache!r} + f"/seen-{{state.process_index}}.pt")
"""


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 2e-3)])
def test_the_score_is_that_of_any_batch_and_number_of_processes(dtype, tolerance, tmp_path, monkeypatch):
    """Two processes at batch 32 against one at 7. In float32 rounding moves a pixel by a level now and then: of 48 in
    each picture a hundredth part, so that a mean over 12 pixels moves by 2 / 255 / 12 in few of 100 pictures."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(tests=str(Path(__file__).parent), dtype=dtype, cache=str(tmp_path / "two")))
    (tmp_path / "two").mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join([root, str(Path(root) / "kernels"), str(Path(root) / "tests")])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    monkeypatch.setattr("diffdistill.evaluation.stream.CHUNK", 16)
    kind = getattr(torch, dtype)
    generator = Generator(small_denoiser().to(kind), (20.0, 1.0))
    one = look_at(generator, colours(kind), 100, seed=3, batch=7, cache=tmp_path / "one")
    scores = []
    for rank in range(2):
        features, logits, labels = torch.load(tmp_path / "two" / f"seen-{rank}.pt")
        assert torch.equal(labels, one.labels)
        scores.append(score(features, logits, labels, kind))
    ours = score(one.features, one.logits, one.labels, kind)
    for other in scores:
        assert other["num_samples"] == ours["num_samples"] == 100
        for name in ("frechet_distance", "kid", "diversity"):
            assert other[name] == pytest.approx(ours[name], rel=tolerance), name


def score(features, logits, labels, dtype):
    used = colours(dtype)
    real = torch.sin(torch.arange(120 * 12, dtype=torch.float64) ** 1.3).reshape(120, 12)
    reference = Reference(real, moments(real), "content", used.checksum, torch.arange(120) % 3)
    return evaluate_features(features, logits, labels, reference, used)


def test_streamed_samples_are_those_of_sample_images(tmp_path):
    generator = Generator(small_denoiser(), (20.0, 1.0))
    images, labels = sample_images(generator, 10, seed=3, batch=4)
    seen = look_at(generator, colours(torch.float32), 10, seed=3, batch=10, cache=tmp_path)
    torch.testing.assert_close(seen.features, colours(torch.float32)(quantise(images))[0], rtol=0, atol=2 / 255)
    assert torch.equal(seen.labels, labels)


def test_a_source_is_told_by_weights_times_and_rule():
    def key(grid=(20.0, 1.0), rule="renoise", shift=0.0):
        model = small_denoiser()
        next(model.parameters()).data += shift
        return fingerprint(Generator(model, grid, step_rule=rule))

    assert key() == key()
    assert len({key(), key(grid=(20.0, 2.0)), key(rule="ddim"), key(shift=1e-6)}) == 4
    teacher = Teacher(small_denoiser())
    keys = {fingerprint(Solved(teacher, steps, solver)) for steps in (2, 3) for solver in ("heun", "euler")}
    assert len(keys) == 4


def test_what_a_sample_costs_is_counted(monkeypatch):
    model = small_denoiser()
    two = Generator(model, (20.0, 1.0))
    assert evaluations_per_sample(two) == 2
    assert evaluations_per_sample(Solved(Teacher(model), 3)) == 5  # Heun's second half of each step but the last
    cost = cost_of(two, largest_batch=4)
    assert cost.num_parameters == sum(p.numel() for p in model.parameters()) and cost.evaluations == 2
    assert cost.milliseconds > 0 and cost.images_per_second > 0 and cost.best_batch in (1, 2, 4) and cost.peak_bytes > 0


def test_the_best_batch_is_the_one_that_no_larger_one_beats(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr("diffdistill.evaluation.cost.time.perf_counter", lambda: now[0])

    def make(batch):
        calls.append(batch)
        now[0] += 1.0 if batch <= 4 else batch / 4  # as fast per call up to 4, and then no faster

    assert timed(make, torch.device("cpu")) == (1000.0, 4.0, 4)
    assert max(calls) == 8

    def full(batch):
        if batch > 2:
            raise torch.OutOfMemoryError("full")
        now[0] += 1.0

    assert timed(full, torch.device("cpu")) == (1000.0, 2.0, 2)


def test_memory_at_its_peak_is_what_tensors_held_at_once():
    before = torch.zeros(1000, dtype=torch.float64)

    def act():
        a = before + 1  # 8,000 bytes
        b = a * 2  # 8,000 more
        del a
        c = b[:500]  # of the same storage
        return c + 1  # 4,000

    assert peak_of(act, torch.device("cpu")) == 16_000
    assert peak_of(lambda: before.add_(1), torch.device("cpu")) == 0
    with LiveBytes() as live:
        kept = act()
    assert live.live == 4_000 == kept.nbytes and live.peak == 16_000


ROWS = [
    {"name": "a", "evaluations": 1, "frechet_distance": 3.0},
    {"name": "b", "evaluations": 2, "frechet_distance": 2.0},
    {"name": "c", "evaluations": 2, "frechet_distance": 2.5, "recall": 0.5},
    {"name": "d", "evaluations": 4, "frechet_distance": 2.0},
    {"name": "e", "evaluations": 35, "frechet_distance": 0.5},
    {"name": "f", "evaluations": 1, "frechet_distance": 3.0},
]


def test_the_front_is_what_nothing_beats():
    assert on_front(ROWS) == [True, True, False, False, True, True]
    shown = table(ROWS).splitlines()
    assert [line[0] for line in shown[1:]] == ["*", "*", " ", " ", "*", "*"]
    assert shown[0].split() == ["evaluations", "FD", "recall"] and shown[1].split() == ["*", "a", "1", "3", "-"]


def test_lost_classes_have_less_than_half_of_the_teachers_recall():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(60, 4, generator=generator)
    labels = torch.arange(60) // 20
    teacher = real + 0.1 * torch.randn(60, 4, generator=generator)
    student = teacher.clone()
    student[20:40] = student[20] + 1e-3 * torch.randn(20, 4, generator=generator)  # one mode of class 1
    ours, theirs = (class_overlaps(real, labels, made, labels) for made in (student, teacher))
    assert lost_classes(ours, theirs) == [1]
    assert theirs[1]["recall"] > 0.8 and ours[0] == theirs[0]
    recalls = ({label: {"recall": value} for label, value in enumerate(side)} for side in ((0.3, 0.2), (0.5, 0.5)))
    assert lost_classes(*recalls) == [1]
    assert class_overlaps(real[:45], labels[:45], teacher, labels).keys() == {0, 1}  # five of class 2 are too few


def test_student_and_teacher_begin_with_the_same_noise():
    """A student that is its teacher's one step is 0 away from it, at any batch."""
    model = small_denoiser()
    teacher = Solved(Teacher(model), 1, "euler")
    student = Generator(model, teacher.times)
    for batch in (3, 10):
        found = paired_distances(student, teacher, 10, seed=1, batch=batch, distances={"squared": squared})
        assert found == {"squared": pytest.approx(0.0, abs=1e-12)}
    other = paired_distances(Generator(model, (5.0,)), teacher, 10, seed=1, batch=10, distances={"squared": squared})
    sources = (Generator(model, (5.0,)), teacher)
    images = [sample_images(source, 10, seed=1, batch=10)[0].clamp(-1, 1) for source in sources]
    assert other["squared"] == pytest.approx((images[0] - images[1]).square().mean().item(), rel=1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Path]:
    """A teacher's folder and a student's run of 28 pixels a side, from real runs of a few steps, and an export."""
    folder = tmp_path_factory.mktemp("curve")
    data = {"name": "folder", "path": str(write_images(folder / "real.npz", size=28))}
    recipe = teacher_recipe(folder) | {"data": data}
    recipe["generator"]["network"]["options"]["sample_size"] = 28
    teacher = api.export_denoiser(api.distill(recipe, say=lambda line: None), folder / "exported")
    student = student_recipe(folder, teacher) | {"data": data}
    student["evaluate"] = {"samples": 24, "features": str(FEATURES)}
    run = api.distill(student, say=lambda line: None)
    api.export(run, folder / "pipeline")
    return {"teacher": teacher, "run": run, "pipeline": folder / "pipeline", "data": Path(data["path"])}


def test_one_command_measures_runs_teachers_and_pipelines_side_by_side(trained, tmp_path, capsys):
    out = tmp_path / "table.json"
    command = ["evaluate", trained["run"], trained["pipeline"], "--teacher-steps", "1,3", "--no-cost", "--out", out]
    assert main([str(word) for word in command]) == 0
    rows = json.loads(out.read_text())
    assert [row["name"] for row in rows] == ["student", "pipeline", "exported, 1 step", "exported, 3 steps"]
    assert [row["evaluations"] for row in rows] == [1, 1, 1, 5]
    assert all(row["num_samples"] == 24 and row["extractor"] == "fashion-features-64" for row in rows)
    assert rows[0]["num_parameters"] == rows[1]["num_parameters"] and "milliseconds" not in rows[0]
    assert [row["front"] for row in rows] == on_front(rows)
    shown = capsys.readouterr().out
    assert "student" in shown and "* none is better at as few evaluations. fashion-features-64, 24 samples" in shown
    grids = ["evaluate", trained["run"], "--grid", "20", "--grid", "20,1", "--no-cost", "--out", out]
    assert main([str(word) for word in grids]) == 0
    again = json.loads(out.read_text())
    assert [row["name"] for row in again] == ["student at 20", "student at 20,1"]
    assert again[0]["frechet_distance"] == rows[0]["frechet_distance"] and again[1]["evaluations"] == 2


def test_a_pipelines_image_is_a_function_of_its_seed_and_its_label(trained):
    """And that of the generator from the same noise, clamped: one step, exported."""
    found = StockPipeline(trained["pipeline"])
    labels = torch.tensor([2, 0, 1])
    images = found.images([5, 6, 7], labels, 3)
    torch.testing.assert_close(found.images([6], labels[1:2], 3), images[1:2], rtol=0, atol=1e-5)
    generator, noise = api.load(trained["run"]), Seeds.of([seed_of(3, slot) for slot in (5, 6, 7)])
    expected = generator.sample(generator.prior(noise), {"label": labels}, noise)
    torch.testing.assert_close(images, expected.clamp(-1, 1), rtol=0, atol=1e-4)
    assert (found.images([5], labels[:1], 4) - images[:1]).abs().max() > 1e-3


def test_one_source_is_told_with_its_classes_costs_and_teacher(trained, capsys):
    assert main(["evaluate", str(trained["run"]), "--cost", "--against-teacher", "2"]) == 0
    shown = capsys.readouterr().out
    for words in ("frechet_distance", "milliseconds", "classes 0: ", "same_noise: squared", "teacher_set: recall"):
        assert words in shown, words
    found = api.evaluate(trained["run"], against_teacher=2)
    assert found["same_noise"]["num_samples"] == 24 and isinstance(found["lost_classes"], list)


def test_lpips_and_clip_are_told_of_the_first_samples(trained, tmp_path):
    """With a VGG16 and a CLIP of random weights: as the functions tell them of the same pictures."""
    clip = write_clip(tmp_path / "clip")
    settings = {"lpips": str(write_vgg16(tmp_path / "vgg16.safetensors")), "lpips_size": 32, "clip": str(clip)}
    settings["prompts"] = prompts = ["a cat", "a dog", "a bird"]
    for source in (trained["run"], trained["pipeline"]):
        found = api.evaluate(source, settings=settings | {"features": str(FEATURES), "samples": 24},
                             data={"name": "folder", "path": str(trained["data"])})  # fmt: skip
        assert found["num_pictures"] == 24
        if source == trained["run"]:
            images, labels = sample_images(api.load(source), 24, seed=1000, batch=24)
        else:
            labels = torch.arange(24) % 3
            images = StockPipeline(source).images(range(24), labels, 1000)
        images = quantise(images)
        network = read_lpips(Path(settings["lpips"]), size=32)
        expected = perceptual_diversity(images, labels, network)
        assert found["lpips_diversity"] == pytest.approx(expected, rel=1e-3)
        scores = ClipScorer(str(clip)).scores(images, [prompts[label] for label in labels.tolist()])
        assert found["clip_score"] == pytest.approx(scores.mean().item(), rel=1e-3)
    with pytest.raises(ConfigError, match="evaluate.prompts has 2 prompts, and the samples 3 classes; give one for"):
        api.evaluate(trained["run"], settings=settings | {"prompts": prompts[:2]})
    with pytest.raises(ConfigError, match="go together; give both, or neither"):
        api.evaluate(trained["run"], settings={"clip": str(clip)})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{pipeline}", "--grid", "20"], r"is a stock pipeline, where grid=\(20.0,\) has no meaning; leave it out"),
        (["{run}", "call.num_inference_steps=1"], "is no stock pipeline, so it is not called; leave out num_inference"),
        (["{teacher}", "--against-teacher", "2"], "is no run with a teacher to compare with"),
        (["{run}", "{run}", "--against-teacher", "2"], "--against-teacher is for one source"),
        (["{run}", "evaluate.features=nowhere"], "there is no feature extractor at nowhere; give a folder"),
        (["{teacher}", "{teacher}"], "does not say which real images to compare with"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, message, trained, capsys):
    shared = ["evaluate.features=" + str(FEATURES), "data.name=folder", f"data.path={trained['data']}"]
    needs = "{teacher}" in words and "--against-teacher" in words
    given = [word.format(**trained) for word in words] + (shared if needs or "{pipeline}" in words else [])
    assert re.search(message, refused(capsys, "evaluate", *given))


def test_a_pipeline_that_does_not_say_how_it_is_called_is_told_how_to(trained, tmp_path, capsys):
    shutil.copytree(trained["pipeline"], tmp_path / "bare")
    (tmp_path / "bare" / "verify.json").unlink()
    shared = ["evaluate.features=" + str(FEATURES), "data.name=folder", f"data.path={trained['data']}"]
    said = refused(capsys, "evaluate", tmp_path / "bare", *shared)
    assert "does not say how it is called (verify.json is missing); say it, e.g. call.num_inference_steps=1" in said
