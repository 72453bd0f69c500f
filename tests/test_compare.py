"""The comparison: trained under one budget, measured alike, told on a page that says what its data say."""

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_pages import Reader
from tiny import large_teacher, refused, student_recipe, write_images, write_recipe

from diffdistill import api, checkpoint
from diffdistill.cli import main, parse
from diffdistill.comparing.history import history
from diffdistill.comparing.measuring import evaluations_per_sample
from diffdistill.evaluation.diversity import spread
from diffdistill.evaluation.sampling import Solved

ROOT = Path(__file__).parents[1]
FEATURES = ROOT / "checkpoints" / "fashion-features"
MEASURE = ("--features", FEATURES, "--samples", 12, "--teacher-steps", 2)


def command(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def recipe(folder: Path, name: str, method: dict, **changes) -> Path:
    """A student of folder/exported, on images of the extractor's size."""
    made = student_recipe(folder, folder / "exported") | {"method": method, "averages": changes.pop("averages", {})}
    del made["critic"]
    made["data"] = {"name": "folder", "path": str(folder / "large.npz")}
    made["train"] |= {"steps": 6, "batch": 2, "save_every": 3} | changes.pop("train", {})
    return write_recipe(folder / f"{name}.yaml", made | changes)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A teacher, recipes, and a finished comparison of two of them; read, never written."""
    folder = tmp_path_factory.mktemp("compare")
    large_teacher(folder)
    recipe(folder, "one", {"name": "dmd2", "ratio": 1}, averages={"fast": {"name": "constant", "beta": 0.5}})
    recipe(folder, "two", {"name": "diff_instruct"}, generator={"grid": [20.0, 2.0]})
    command(*line(folder, folder / "out"))
    return folder


def line(folder: Path, output: Path) -> list:
    sources = folder / "one.yaml", folder / "two.yaml"
    return ["compare", *sources, "--steps", 4, "--out", output, *MEASURE, "evaluate.every=2", "train.log_every=1"]


def results(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())


def test_each_is_trained_for_the_budget_and_measured_alike(chain):
    found = results(chain / "out")
    teacher, one_step, one, two = found["rows"]
    assert [row["name"] for row in found["rows"]] == ["teacher, 2 steps", "teacher, 1 step", "one", "two"]
    assert [row["updates"] for row in (one, two)] == [4, 4] and one["steps"] == 6
    assert [row["evaluations"] for row in found["rows"]] == [3, 1, 1, 2]  # Heun's last step is Euler's
    assert one["weights"] == "fast" and two["weights"] == "raw"
    for row in (one, two):
        assert row["clocked"] and row["seconds_per_update"] == row["training_seconds"] / 4 > 0
        assert 100 * 2**20 < row["peak_bytes"] < 100 * 2**30
        settings = {"features": str(FEATURES), "samples": 12, "seed": 1000}
        measured = api.evaluate(chain / "out" / "runs" / row["name"], settings=settings)
        assert measured.keys() - row["metrics"].keys() == {"classes", "evaluations", "num_parameters"}
        for name in row["metrics"]:
            value = measured[name]
            assert row["metrics"][name] == (
                pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value
            )
        assert [samples for _, _, samples in row["distances"]] == [12, 12, 12]  # at steps 0, 2 and 4
        assert row["distances"][-1][1] == pytest.approx(row["metrics"]["frechet_distance"], rel=1e-4)
        assert [len(points) for points in row["losses"].values()] == [4, 4]
    config = api.run.read_config(chain / "out/runs/one")
    assert config.train.steps == 6 and config.evaluate.samples == 12  # the recipe's own end stays


def test_the_page_says_what_the_results_say_and_loads_nothing(chain):
    page = (chain / "out/index.html").read_text()
    found, reader = results(chain / "out"), Reader(page)
    assert reader.open == [] and not re.search(r"<script|<link|@import|url\(|https?://", page)
    for tag, attributes in reader.tags:
        for name in {"src", "href", "srcset", "data", "poster"} & attributes.keys():
            assert tag == "img" and attributes[name].startswith("data:image/png;base64,")
    values = [attributes.get("data-value") for tag, attributes in reader.tags if tag == "td"]
    metrics = ("frechet_distance", "class_accuracy", "precision", "recall", "diversity")
    costs = ("evaluations", "updates", "training_seconds", "seconds_per_update", "peak_bytes", "num_parameters")
    for row, number in zip(found["rows"], range(4), strict=True):
        shown = values[number * 11 : number * 11 + 11]
        wanted = [row["metrics"][name] for name in metrics] + [row.get(name) for name in costs]
        assert [None if text is None else float(text) for text in shown] == wanted
    text = "".join(reader.text)
    assert f"diffdistill compare {chain / 'one.yaml'}" in text
    said = found["made"]["hardware"], found["made"]["torch"], found["ruler"]["checksum"][:16], "noises of seed 1000"
    assert all(words in text for words in said)
    assert [tag for tag, _ in reader.tags].count("details") == 2 and "grid:\n  - 20.0\n  - 2.0" in text


def test_pictures_are_of_the_same_noises_and_have_words(chain):
    page, found = (chain / "out/index.html").read_text(), results(chain / "out")
    images = [attributes for tag, attributes in Reader(page).tags if tag == "img"]
    assert len(images) == 4 and all(image["alt"] for image in images)
    opened = [Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))) for image in images]
    assert {picture.size for picture in opened} == {(9 * 58 - 2, 2 * 58 - 2)}  # 9 columns: three times three classes
    assert found["rows"][0]["columns"] == 9


def test_what_is_done_is_not_done_again(chain, capsys):
    output = chain / "out"
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    told = results(output)
    command(*line(chain, output))
    said = capsys.readouterr()
    assert "one is complete" in said.out and "training" not in said.out and "step/s" not in said.err
    changed = {path.name for path, when in before.items() if path.stat().st_mtime_ns != when}
    assert changed <= {"index.html", "results.json", "budget.json", ".lock"}
    assert {**results(output), "made": 0} == {**told, "made": 0}


def test_killed_it_goes_on_where_it_was_and_tells_the_same(chain, tmp_path):
    words = [sys.executable, "-m", "diffdistill", *map(str, line(chain, tmp_path / "out"))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    log, deadline = tmp_path / "out/runs/two/log.jsonl", time.monotonic() + 120
    while not log.is_file():
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    said = first.communicate(timeout=60)[1]
    assert first.returncode == 128 + signal.SIGTERM and "run the same command again" in said.splitlines()[-1]
    assert not (tmp_path / "out/index.html").exists()
    stopped = checkpoint.latest(tmp_path / "out/runs/two")
    trained = (tmp_path / "out/runs/one/log.jsonl").stat().st_mtime_ns
    command(*line(chain, tmp_path / "out"))
    assert (tmp_path / "out/runs/one/log.jsonl").stat().st_mtime_ns == trained
    assert stopped is not None and stopped.name != "step-00000000"
    for ours, theirs in zip(results(tmp_path / "out")["rows"], results(chain / "out")["rows"], strict=True):
        assert ours["metrics"] == theirs["metrics"]


def test_finished_runs_are_measured_as_they_are(chain, tmp_path, capsys):
    runs = [chain / "out/runs" / name for name in ("one", "two")]
    before = {path: path.stat().st_mtime_ns for run in runs for path in run.rglob("*")}
    command("compare", *runs, "--out", tmp_path / "again", *MEASURE)
    assert {path: path.stat().st_mtime_ns for run in runs for path in run.rglob("*")} == before
    found = results(tmp_path / "again")
    assert found["budget"] is None and "not under one clock: one, two" in (tmp_path / "again/index.html").read_text()
    for ours, theirs in zip(found["rows"], results(chain / "out")["rows"], strict=True):
        assert ours["metrics"] == theirs["metrics"]
    assert "leave out --budget" in refused(
        capsys, "compare", *runs, "--out", tmp_path / "x", *MEASURE, "--budget", "1m"
    )
    assert "leave out seed=1" in refused(capsys, "compare", *runs, "--out", tmp_path / "x", *MEASURE, "seed=1")
    assert not (tmp_path / "x").exists()


def test_a_run_that_fails_stands_in_the_table_with_its_reason(chain, tmp_path, capsys):
    players = {name: {"learning_rate": 1e30, "epsilon": 1e-30} for name in ("generator", "critic")}
    wild = write_recipe(
        tmp_path / "wild.yaml", json.loads((chain / "one.yaml").read_text()) | {"players": players, "averages": {}}
    )
    line = ["compare", wild, chain / "out/runs/two", "--steps", 4, "--out", tmp_path / "out", *MEASURE]
    assert main([str(word) for word in line]) == 1
    assert "wild failed, as" in capsys.readouterr().err
    found = {row["name"]: row for row in results(tmp_path / "out")["rows"]}
    assert "was not finite" in found["wild"]["failure"] and "metrics" in found["two"]
    text = "".join(Reader((tmp_path / "out/index.html").read_text()).text)
    assert f"failed: {found['wild']['failure']}" in text


def other(chain, tmp_path, name="other", **changes) -> Path:
    return write_recipe(tmp_path / f"{name}.yaml", json.loads((chain / "one.yaml").read_text()) | changes)


def test_what_cannot_be_compared_is_refused_before_anything_is_written(chain, tmp_path, capsys):
    out, one = tmp_path / "out", chain / "one.yaml"

    def answer(*words, budget=("--steps", 4)):
        said = refused(capsys, "compare", *words, "--out", out, *MEASURE, *budget)
        assert not out.exists()
        return said

    teacher = {"path": str(chain / "exported"), "guidance": 2.0}
    assert "teacher.guidance is 1.0 in the one and 2.0 in the other" in answer(
        one, other(chain, tmp_path, teacher=teacher)
    )
    elsewhere = {"name": "folder", "path": str(write_images(tmp_path / "else.npz", size=28))}
    assert "have different data" in answer(one, other(chain, tmp_path, data=elsewhere))
    assert "would both be called one" in answer(one, other(chain, tmp_path, name="one"))
    assert "there is no configuration at" in answer(one, tmp_path / "nowhere.yaml")
    assert "holds no run" in answer(one, tmp_path)
    assert "is unknown (did you mean sim?)" in answer(one, other(chain, tmp_path, method={"name": "simm"}))
    assert "method needs" not in answer(one, other(chain, tmp_path, players={"generator": {"learning_rate": 0.1}}))
    assert "players must have exactly" in answer(other(chain, tmp_path, players={"generator": {"learning_rate": 0.1}}))
    assert "has no teacher" in answer(one, chain / "teacher")
    assert "--budget 10m, or --steps" in answer(one, budget=())
    assert "beyond train.steps=6" in answer(one, budget=("--steps", 7))
    assert "save_every=0" in answer(one, "train.save_every=0")
    assert "give --features, --samples or --seed" in answer(one, "evaluate.samples=3")
    assert "unknown key train.stepz" in answer(one, "train.stepz=3")
    assert "no real images are named" in answer(other(chain, tmp_path, data={"name": "none"}))
    said = refused(capsys, "compare", one, "--out", out, "--steps", 4)
    assert "no feature extractor is named" in said


def test_a_smaller_budget_or_another_recipe_in_the_same_folder_is_refused(chain, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(chain / "out", output)
    words = line(chain, output)
    assert "trained with a budget of 4 steps, and 2 steps is asked for" in refused(
        capsys, *["2" if word == 4 else word for word in words]
    )
    assert "seed was 0 and is 1" in refused(capsys, *words, "seed=1")


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("2h", 7200), ("1.5m", 90)])
def test_a_budget_is_a_time_with_a_unit(text, seconds):
    for name in ("train", "compare"):
        words = [name, "a.yaml", "--budget", text, *(["--out", "b"] if name == "compare" else [])]
        assert parse(words).budget == seconds


@pytest.mark.parametrize("text", ["10", "m", "0s", "-3m", "1d", "10 m"])
def test_a_time_without_a_unit_is_one_line(text, capsys):
    with pytest.raises(SystemExit):
        parse(["train", "a.yaml", f"--budget={text}"])
    assert "e.g. 90s, 10m or 2h" in capsys.readouterr().err


def test_train_leaves_at_its_budget_and_says_so(chain, tmp_path, capsys):
    command("train", chain / "one.yaml", f"output={tmp_path / 'run'}", "--steps", 2)
    assert "step 2 of 6" in (said := capsys.readouterr().out) and "at the end of its budget" in said
    command("train", chain / "one.yaml", f"output={tmp_path / 'run'}", "--steps", 4)
    assert checkpoint.read_state(checkpoint.latest(tmp_path / "run"))["step"] == 4


def test_the_log_of_an_earlier_version_gives_the_time_of_an_update_by_its_median(tmp_path):
    folder = tmp_path / "checkpoints" / "step-00000040"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"step": 40, "files": {"critic.weights.safetensors": ""}}))
    times = [(10, 5.0), (20, 10.0), (25, 97.0), (30, 3.0), (40, 9.0), (50, 14.0)]  # a pause, a new start, a lost step
    lines = [
        {"kind": "train", "step": step, "critic/fit": 1.0, "critic/gradient_norm": 2.0, "seconds": at}
        for step, at in times
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    found = history(tmp_path)
    assert not found["clocked"] and found["peak_bytes"] is None
    assert found["seconds_per_update"] == pytest.approx(0.6)  # of 0.5, 17.4 and 0.6; 50 is beyond the checkpoint
    assert found["losses"] == {
        "critic/fit": [[step * found["seconds_per_update"], 1.0] for step in (10, 20, 25, 30, 40)]
    }


def test_evaluations_are_counted_with_both_branches_of_guidance():
    from test_api import toy_denoiser

    teacher = api.Teacher(toy_denoiser(), guidance=1.0)
    assert [evaluations_per_sample(Solved(teacher, 4, solver)) for solver in ("heun", "euler", "ddim")] == [7, 4, 4]
    assert evaluations_per_sample(Solved(api.Teacher(toy_denoiser(), guidance=2.0), 4)) == 14


@pytest.mark.parametrize("labelled", [True, False])
def test_spread_is_the_distance_between_two_samples_of_a_class(labelled):
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(60, 5, generator=rng, dtype=torch.float64) * torch.arange(1, 6)
    labels = torch.arange(60) % 3 if labelled else torch.zeros(60).long()
    features += 100 * labels[:, None]  # classes far apart do not count as diverse
    alike = labels[:, None] == labels[None]
    squares = (features[:, None] - features[None]).square().sum(2)[alike & ~torch.eye(60).bool()]
    assert spread(features, labels if labelled else None) == pytest.approx(squares.mean().sqrt().item(), rel=1e-12)
    assert spread(features[:1].repeat(6, 1), None) == 0
    with pytest.raises(ValueError, match="take more samples"):
        spread(features[:3], torch.arange(3))
