"""Evaluation while training: several weights on the same noises, the best checkpoint, patience, and the trackers."""

import io
import json
import math
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_api import write_images
from tiny import refused, teacher_recipe, write_recipe
from wandb.proto import wandb_internal_pb2

from diffdistill import api
from diffdistill.best import BETTER, Best, Found
from diffdistill.checkpoint import checkpoints
from diffdistill.cli import main
from diffdistill.config import ConfigError
from diffdistill.trainer import Budget

FEATURES = Path(__file__).parents[1] / "checkpoints" / "fashion-features"


def recipe(folder: Path, **changes) -> dict:
    """A teacher's run of 28 pixels a side that is evaluated at every step."""
    made = teacher_recipe(folder)
    made["generator"]["network"]["options"]["sample_size"] = 28
    made["data"] = {"name": "folder", "path": str(write_images(folder / "real.npz", size=28))}
    made["averages"] = {"slow": {"name": "constant", "beta": 0.5}}
    made["players"] = {"generator": {"learning_rate": 0.02}}
    made["train"] |= {"steps": 5, "log_every": 1, "save_every": 5, "keep_last": 1}
    made["evaluate"] = {"every": 1, "samples": 12, "features": str(FEATURES), **changes}
    return made


def quiet(line):
    pass


def evaluations(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "evaluate"]


def test_raw_weights_and_averages_are_measured_on_the_same_noises(tmp_path):
    run = api.distill(recipe(tmp_path, weights=["slow", "raw"]), say=quiet)
    found = evaluations(run)
    assert [(line["step"], line["weights"]) for line in found] == [(s, w) for s in range(6) for w in ("slow", "raw")]
    slow, raw = ({k: v for k, v in line.items() if k != "weights"} for line in found[:2])
    assert slow == raw  # before the first step they are the same, and so are the noises
    assert found[-2]["frechet_distance"] != found[-1]["frechet_distance"]
    for line in found[-2:]:
        told = api.evaluate(run, weights=line["weights"])
        assert told["frechet_distance"] == pytest.approx(line["frechet_distance"], rel=1e-4)


def test_the_best_checkpoint_is_kept_and_can_be_opened(tmp_path, capsys):
    said = []
    run = api.distill(recipe(tmp_path, keep_best="recall", weights=["raw"]), say=said.append)
    values = {line["step"]: line["recall"] for line in evaluations(run)}
    best = max(values, key=lambda step: (values[step], -step))  # the first of equals
    assert {int(path.name[5:]) for path in checkpoints(run)} == {best, 5}
    assert f"best recall: {values[best]:.4g} at step {best}, which --at best opens" in said
    found = api.evaluate(run, weights="raw", at="best")
    assert found["recall"] == pytest.approx(values[best], abs=1 / 50)
    parameters = [list(api.load(run, weights="raw", at=at).denoiser.parameters()) for at in ("best", str(best), "")]
    assert all(torch.equal(a, b) for a, b in zip(parameters[0], parameters[1], strict=True))
    assert (best == 5) == all(torch.equal(a, b) for a, b in zip(parameters[0], parameters[2], strict=True))
    assert main(["sample", str(run), "--at", "best", "--out", str(tmp_path / "best.png"), "--count", "4"]) == 0
    capsys.readouterr()
    assert "must be best, or a step of" in refused(capsys, "sample", run, "--at", "last", "--out", tmp_path / "x.png")
    assert "has no checkpoint of step 77; it has those of" in refused(
        capsys, "sample", run, "--at", "77", "--out", tmp_path / "x.png"
    )


def test_a_run_without_a_best_checkpoint_says_so(tmp_path):
    made = recipe(tmp_path)
    made["train"]["steps"] = 1
    run = api.distill(made, say=quiet)
    with pytest.raises(ConfigError, match=r"kept no best checkpoint; train with evaluate\.keep_best=frechet_distance"):
        api.load(run, at="best")


def worse_and_worse(folder: Path, **changes) -> dict:
    """A run that a huge learning rate ruins."""
    made = recipe(folder, keep_best="frechet_distance", patience=2, weights=["raw"], **changes)
    made["players"]["generator"]["learning_rate"] = 0.5
    made["train"]["steps"] = 12
    return made


def test_a_run_ends_when_its_patience_does_and_stays_at_its_end(tmp_path):
    made, said = worse_and_worse(tmp_path), []
    run = api.distill(made, say=said.append)
    values = [line["frechet_distance"] for line in evaluations(run)]
    best = min(range(len(values)), key=values.__getitem__)
    assert len(values) - 1 == best + 2 < 12
    assert any("at its end after 2 evaluations in which frechet_distance did not get better" in line for line in said)
    again = []
    api.distill(made, say=again.append)
    assert any("at its end after 2 evaluations" in line for line in again)
    assert [line["frechet_distance"] for line in evaluations(run)] == values


def test_a_resumed_run_knows_its_best(tmp_path):
    """Bit for bit: the checkpoints that are there in the end, and the log but for its times."""

    def end(folder: Path, budgets) -> tuple:
        folder.mkdir()
        made = recipe(folder, keep_best="frechet_distance", weights=["slow", "raw"])
        for budget in budgets:
            run = api.distill(made, budget=budget, say=quiet)
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        told = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
        return [path.name for path in checkpoints(run)], told

    once = end(tmp_path / "once", [Budget()])
    twice = end(tmp_path / "twice", [Budget(steps=2), Budget(steps=3), Budget()])
    assert once == twice


def test_the_best_is_told_by_the_log_alone(tmp_path):
    def found(values, metric="frechet_distance", weights=""):
        lines = [{"kind": "train", "step": 0, "generator/evaluate": 1.0}]
        lines += [{"kind": "evaluate", "step": 10 * place, metric: value} for place, value in enumerate(values)]
        lines += [{"kind": "evaluate", "step": 5, metric: -1.0 if BETTER[metric] < 0 else 9.0, "weights": "raw"}]
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return Best(metric, weights).found(tmp_path)

    assert found([3.0, 2.0, 2.0, 2.5]) == Found(10, 2.0, 2)
    assert found([0.1, 0.3, 0.2], "recall") == Found(10, 0.3, 1)
    assert found([]) is None and found([1.0], weights="raw") == Found(5, -1.0, 0)
    assert Best("recall").found(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_best": "beauty"}, "evaluate.keep_best='beauty' is unknown; known are frechet_distance"),
        ({"patience": 2}, "evaluate.patience=2 needs keep_best, the metric that is waited for"),
        ({"keep_best": "recall", "every": 0}, "evaluate.keep_best=recall needs evaluate.every"),
        ({"weights": ["fast"]}, "evaluate.weights='fast' is unknown; known here are raw, slow"),
        ({"features": "nowhere"}, "nowhere"),
    ],
)
def test_mistakes_are_refused_before_training(changes, message, tmp_path, capsys):
    config = write_recipe(tmp_path / "recipe.yaml", recipe(tmp_path, **changes))
    assert message in refused(capsys, "train", config)
    assert not (tmp_path / "teacher").exists()


def tracked(folder: Path, tracker: str) -> Path:
    """A run with pictures that was stopped once and went on."""
    made = recipe(folder, weights=["slow", "raw"])
    made |= {"trackers": [tracker], "pictures": {"every": 2, "count": 4, "columns": 2, "scale": 1}}
    made["train"] |= {"steps": 4, "save_every": 2, "keep_last": 2}
    api.distill(made, budget=Budget(steps=3), say=quiet)
    for path in checkpoints(folder / "teacher"):  # as if it had died before the checkpoint of step 3
        if path.name.endswith("3"):
            shutil.rmtree(path)
    return api.distill(made, say=quiet)


def scalars_of(run: Path) -> dict[str, dict[int, float]]:
    """What log.jsonl has, by the names that trackers see."""
    found: dict[str, dict[int, float]] = {}
    for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()):
        under = "/".join([line["kind"], *([line["weights"]] if "weights" in line else [])])
        for name, value in line.items():
            if name not in ("kind", "step", "seconds") and isinstance(value, float):
                found.setdefault(f"{under}/{name}", {})[line["step"]] = value
    return found


def test_tensorboard_has_the_scalars_the_pictures_and_the_config_of_a_run_that_went_on(tmp_path):
    run = tracked(tmp_path, "tensorboard")
    folder = run / "diffdistill"
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    expected = scalars_of(run)
    assert set(expected) <= set(events.Tags()["scalars"])
    for name, values in expected.items():
        seen = {event.step: event.value for event in events.Scalars(name)}
        assert seen.keys() == values.keys(), name
        assert all(math.isclose(seen[step], values[step], rel_tol=1e-6, abs_tol=1e-30) for step in values), name
    pictures = {event.step: event for event in events.Images("samples")}
    assert set(pictures) == {0, 2, 4}
    shown = np.asarray(Image.open(io.BytesIO(pictures[4].encoded_image_string)))
    assert np.array_equal(shown, np.asarray(Image.open(run / "samples" / "step-00000004.png")))
    (text,) = {path.read_text() for path in folder.rglob("hparams.yml")}
    assert "train.batch: " in text and 'evaluate.weights: \'["slow", "raw"]\'' in text


def records(file: Path) -> Iterator[wandb_internal_pb2.Record]:
    """The records of wandb's offline file: 7 bytes, then blocks of 32 KiB of pieces (checksum, length, kind, bytes)."""
    data, place, whole = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        piece, place = data[place + 7 : place + 7 + length], place + 7 + length
        whole = piece if kind in (1, 2) else whole + piece
        if kind in (1, 4):  # all of it, or its last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record


def values_of(items) -> dict:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_wandb_has_the_scalars_the_pictures_and_the_config_under_one_name(tmp_path):
    run = tracked(tmp_path, "wandb")
    seen: dict[str, dict[int, float]] = {}
    names, config, pictures = set(), {}, set()
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for record in records(file):
            if record.HasField("run"):
                names.add(record.run.run_id)
                config |= values_of(record.run.config.update)
            if record.HasField("config"):
                config |= values_of(record.config.update)
            if record.HasField("history"):
                values = values_of(record.history.item)
                for name, value in values.items():
                    seen.setdefault(name, {})[values["_step"]] = value
        pictures |= {path.name for path in (file.parent / "files" / "media" / "images").rglob("*.png")}
    assert names == {(run / ".tracker-id").read_text().strip()}
    for name, values in scalars_of(run).items():
        assert {step: seen[name][step] for step in values} == pytest.approx(values, rel=1e-9), name
    assert len(pictures) >= 3 and config["train.batch"] == 6 and config["evaluate.weights"] == '["slow", "raw"]'
