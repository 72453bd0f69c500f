"""Checkpoints: exact, whole or absent, and refused with one clear line where they do not fit."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CASES, all_tensors, make_player, make_trainer
from safetensors.torch import load_file, save_file
from torch import nn

from diffdistill import checkpoint
from diffdistill.checkpoint import CheckpointError
from diffdistill.method import PlayerSpec
from diffdistill.player import ConstantDecay
from diffdistill.trainer import Schedule

SCHEDULE = Schedule(steps=3, batch=4, log_every=2, save_every=0)


def trained(tmp_path: Path, steps: int = 2):
    trainer = make_trainer(CASES["dmd2"], tmp_path, schedule=SCHEDULE)
    for _ in range(steps):
        trainer.one_step()
    return trainer


def saved(trainer) -> Path:
    trainer.save()
    return checkpoint.latest(trainer.output)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_checkpoint_restores_everything_exactly(steps, tmp_path):
    trainer = trained(tmp_path, steps)
    folder, expected = saved(trainer), all_tensors(trainer)
    fresh = make_trainer(CASES["dmd2"], tmp_path, schedule=SCHEDULE, seed=7)
    for player in fresh.players.values():
        for parameter in player.parameters:
            nn.init.normal_(parameter)
    fresh.resume(folder)
    ours = all_tensors(fresh)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in ours)
    assert fresh.step == steps


def test_saving_changes_nothing(tmp_path):
    trainer = trained(tmp_path)
    before = all_tensors(trainer)
    trainer.save()
    after = all_tensors(trainer)
    assert all(torch.equal(before[key], after[key]) for key in before)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


WEIGHTS = "critic.weights.safetensors"
DAMAGE = {
    "truncated weights": (lambda f: truncate(f / WEIGHTS), "critic.weights.safetensors is damaged: its SHA-256"),
    "one bit of a moment": (lambda f: flip_a_bit(f / "critic.optimizer.safetensors"), "is damaged: its SHA-256"),
    "missing weights": (lambda f: (f / WEIGHTS).unlink(), "critic.weights.safetensors is missing"),
    "missing state": (lambda f: (f / "state.json").unlink(), "holds no checkpoint"),
    "truncated state": (lambda f: truncate(f / "state.json"), "state.json is damaged"),
    "binary state": (lambda f: (f / "state.json").write_bytes(b"\xff\x00\xfe"), "state.json is damaged"),
    "other state": (lambda f: (f / "state.json").write_text("[1]"), "does not list its files"),
    "missing folder": (shutil.rmtree, "holds no checkpoint"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_one_clear_error_and_changes_nothing(damage, message, tmp_path):
    trainer = trained(tmp_path)
    folder = saved(trainer)
    damage(folder)
    fresh = make_trainer(CASES["dmd2"], tmp_path, schedule=SCHEDULE, seed=1)
    fresh.one_step()
    before = all_tensors(fresh)
    with pytest.raises(CheckpointError, match=message) as raised:
        fresh.resume(folder)
    assert "\n" not in str(raised.value)
    after = all_tensors(fresh)
    assert fresh.step == 1
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_checkpoint_of_another_method_is_refused(tmp_path):
    folder = saved(trained(tmp_path))
    other = make_trainer(CASES["denoise"], tmp_path / "other", schedule=SCHEDULE)
    with pytest.raises(CheckpointError, match="this run has no use for .*critic"):
        other.resume(folder)
    (tmp_path / "denoise").mkdir()
    other.output = tmp_path / "denoise"
    with pytest.raises(CheckpointError, match="it has no critic.weights.safetensors"):
        trained(tmp_path / "third").resume(saved(other))


def test_a_checkpoint_in_another_precision_is_refused(tmp_path):
    folder = saved(trained(tmp_path))
    single = make_trainer(CASES["dmd2"], tmp_path / "single", schedule=SCHEDULE, dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"of torch.float64 there and .* of torch.float32 here"):
        single.resume(folder)


def test_a_last_file_that_does_not_fit_leaves_the_first_ones_unfilled(tmp_path):
    trainer = trained(tmp_path)
    folder, file = saved(trainer), "critic.weights.safetensors"
    tensors = load_file(folder / file)
    save_file({key: value[:1].clone() for key, value in tensors.items()}, folder / file)
    state = json.loads((folder / "state.json").read_text())
    state["files"][file] = hashlib.sha256((folder / file).read_bytes()).hexdigest()
    (folder / "state.json").write_text(json.dumps(state))
    fresh = make_trainer(CASES["dmd2"], tmp_path, schedule=SCHEDULE, seed=1)
    before = all_tensors(fresh)
    with pytest.raises(CheckpointError, match="critic.weights.safetensors does not fit"):
        fresh.resume(folder)
    after = all_tensors(fresh)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_filling_is_strict_by_name_shape_and_dtype(tmp_path):
    here = {"a": torch.zeros(2), "b": torch.zeros(3)}
    good = {"a": torch.ones(2), "b": torch.ones(3)}
    for stored, message in (
        ({"a": good["a"]}, r"1 tensors are missing \['b'\]"),
        ({**good, "c": torch.ones(1)}, r"1 are unknown \['c'\]"),
        ({**good, "b": torch.ones(1)}, r"b is \(1,\)"),
        ({**good, "b": torch.ones(3).half()}, "float16 there"),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.fill(here, stored, source=Path("x"))
        assert not any(tensor.any() for tensor in here.values())
    checkpoint.fill(here, good, source=Path("x"))
    assert all(torch.equal(here[name], good[name]) for name in here)


def test_initialising_takes_weights_alone_and_casts_them(tmp_path):
    trainer = trained(tmp_path)
    folder = saved(trainer)
    stored = load_file(folder / "generator.average-constant.safetensors")
    parameters = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in stored.items()}
    checkpoint.initialise(parameters, folder, player="generator", weights="constant")
    assert all(torch.equal(parameters[name], value.float()) for name, value in stored.items())
    with pytest.raises(
        CheckpointError, match="has no generator.average-best; it has critic.weights, generator.average-c"
    ):
        checkpoint.initialise(parameters, folder, player="generator", weights="best")
    with pytest.raises(CheckpointError, match="tensors are missing"):
        checkpoint.initialise({"w": torch.zeros(1)}, folder, player="generator")


def make_checkpoints(run: Path, *steps: int) -> None:
    for step in steps:
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / checkpoint.STATE).write_text("{}")


def test_keep_leaves_the_last_ones_and_multiples(tmp_path):
    make_checkpoints(tmp_path, 5, 10, 15, 20, 25, 99_999_999, 100_000_000)
    checkpoint.keep(tmp_path, last=2, every=10)
    steps = [int(path.name[5:]) for path in checkpoint.checkpoints(tmp_path)]
    assert steps == [10, 20, 99_999_999, 100_000_000]
    checkpoint.keep(tmp_path, last=1, every=0)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-100000000"]
    with pytest.raises(ValueError, match="keep_last must be at least 1"):
        checkpoint.keep(tmp_path, last=0, every=0)


def test_the_latest_checkpoint_is_the_newest_whole_one(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    make_checkpoints(tmp_path, 5, 10)
    (tmp_path / "checkpoints" / ".step-00000015.writing").mkdir()
    (tmp_path / "checkpoints" / "step-00000020").mkdir()
    assert checkpoint.latest(tmp_path).name == "step-00000010"


def test_saving_over_a_checkpoint_replaces_it_and_clears_what_was_left_behind(tmp_path):
    trainer = trained(tmp_path)
    first = saved(trainer)
    for name in (".step-00000001.writing", ".step-00000001.deleted"):
        (first.parent / name).mkdir()
    trainer.players["critic"].parameters[0].data.add_(1)
    saved(trainer)
    assert [path.name for path in first.parent.iterdir()] == ["step-00000002"]
    trained(tmp_path).resume(first)
    first.rename(first.with_name(".step-00000002.replaced"))  # as a kill between two renames leaves it
    trainer.step = 3
    trainer.save()
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]


def test_resuming_clears_what_was_left_behind_by_a_run_that_saves_no_more(tmp_path):
    folder = saved(trained(tmp_path))
    (folder.parent / ".step-00000001.deleted").mkdir()  # as a kill within the last tidying leaves it
    trained(tmp_path).resume(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["step-00000002"]


class Killed(BaseException):
    """Ends the code as a kill does: no handler of errors sees it."""


def fail_at_rename(monkeypatch, number: int, error: BaseException) -> None:
    """The number-th renaming from here on does not happen."""
    real, calls = Path.rename, []

    def rename(self, target):
        calls.append(target)
        if len(calls) == number:
            raise error
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)


def test_a_checkpoint_is_whole_before_one_rename_makes_it_appear(tmp_path, monkeypatch):
    trainer = trained(tmp_path, 1)
    first = saved(trainer)
    trainer.one_step()
    fail_at_rename(monkeypatch, 1, Killed())
    with pytest.raises(Killed):
        trainer.save()
    monkeypatch.undo()
    assert checkpoint.checkpoints(tmp_path) == [first]
    written = tmp_path / "written"
    shutil.copytree(first.parent / ".step-00000002.writing", written)  # which resuming clears away
    fresh = trained(tmp_path, 0)
    fresh.resume(checkpoint.latest(tmp_path))
    assert fresh.step == 1
    second = first.with_name("step-00000002")
    written.rename(second)  # the rename that the kill forestalled
    fresh.resume(second)
    ours, expected = all_tensors(fresh), all_tensors(trainer)
    assert fresh.step == 2 and all(torch.equal(ours[key], expected[key]) for key in expected)


@pytest.mark.parametrize("error", [Killed(), OSError("no space left")], ids=["killed", "refused"])
def test_a_checkpoint_is_set_aside_until_its_successor_is_in_place(error, tmp_path, monkeypatch):
    trainer = trained(tmp_path, 1)
    first = saved(trainer)
    trainer.one_step()
    second, expected = saved(trainer), all_tensors(trainer)
    trainer.players["critic"].parameters[0].data.add_(1)
    fail_at_rename(monkeypatch, 2, error)
    with pytest.raises(Killed if isinstance(error, Killed) else CheckpointError):
        trainer.save()
    monkeypatch.undo()
    if isinstance(error, Killed):
        assert checkpoint.checkpoints(tmp_path) == [first]
        trained(tmp_path, 0).resume(first)
        third = first.with_name("step-00000003")
        checkpoint.save(third, trainer.players, {}, writes=True)  # brings back what was set aside
        assert checkpoint.checkpoints(tmp_path) == [first, second, third]
    assert checkpoint.checkpoints(tmp_path)[:2] == [first, second]
    fresh = trained(tmp_path, 0)
    fresh.resume(second)
    ours = all_tensors(fresh)
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


SMALL_DISK = """
import resource, sys
from pathlib import Path
import torch
from torch import nn
from diffdistill import checkpoint
from diffdistill.method import PlayerSpec
from diffdistill.player import LearningRate, Player

torch.set_num_threads(1)
spec = PlayerSpec.of(nn.Linear(100, 100))
optimizer = torch.optim.AdamW(spec.parameters.values(), fused=True)
player = Player(spec, optimizer, LearningRate(1.0), max_norm=1.0, reduce=None)
folder = Path(sys.argv[1]) / "checkpoints"
checkpoint.save(folder / "step-00000001", {"a": player}, {}, writes=True)
for limit in (30_000, 60_000):  # the weights do not fit; the weights fit, the moments do not
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    for step in (1, 2):
        try:
            checkpoint.save(folder / f"step-{step:08d}", {"a": player}, {}, writes=True)
        except checkpoint.CheckpointError as error:
            print(error)
"""


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    """A limit on the size of files stands for the full disk: the kernel refuses the write in the same place."""
    done = subprocess.run([sys.executable, "-c", SMALL_DISK, tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and all("could not write checkpoint" in line and "untouched" in line for line in lines)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    spec = PlayerSpec.of(nn.Linear(100, 100))
    checkpoint.load(tmp_path / "checkpoints" / "step-00000001", {"a": make_player(spec)})


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path):
    trainer = trained(tmp_path / "run")
    trainer.output = tmp_path / "file"
    trainer.output.write_text("in the way")
    with pytest.raises(CheckpointError, match="could not write checkpoint .*change output"):
        trainer.save()
    with pytest.raises(CheckpointError, match="could not write .*log.jsonl"):
        trainer.log("train", {"a": 1.0})


def test_the_format_is_plain_safetensors_and_json(tmp_path):
    player = make_player(PlayerSpec.of(nn.Linear(2, 3)))
    player.average("slow", ConstantDecay(0.9))
    checkpoint.save(tmp_path / "step-1", {"a": player}, {"note": 1}, writes=True)
    state = json.loads((tmp_path / "step-1" / "state.json").read_text())
    assert state["note"] == 1
    assert sorted(state["files"]) == [f"a.{part}.safetensors" for part in ("average-slow", "optimizer", "weights")]
    assert load_file(tmp_path / "step-1" / "a.optimizer.safetensors").keys() == {
        f"{kind}/{name}" for kind in ("step", "exp_avg", "exp_avg_sq") for name in ("weight", "bias")
    }
