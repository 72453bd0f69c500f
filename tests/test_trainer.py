"""The loop: what is logged and when, hooks, signals, precision, recomputation, and stops."""

import copy
import dataclasses
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from cases import CASES, UNET, all_tensors, make_trainer
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from diffdistill import checkpoint
from diffdistill.method import Loss, Term, Update
from diffdistill.player import only
from diffdistill.rng import Rng, drawn_from
from diffdistill.trainer import Budget, Every, NonFinite, Schedule

OTHERS = "/difference/|/agreement$|/spread$|/gap/"
SCHEDULE = Schedule(steps=6, batch=4, log_every=2, save_every=0)


def lines(run):
    found = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] != "reference"]


def test_logs_are_means_since_the_last_line(tmp_path):
    each = make_trainer(CASES["dmd2"], tmp_path / "each", schedule=dataclasses.replace(SCHEDULE, log_every=1))
    some = make_trainer(CASES["dmd2"], tmp_path / "some", schedule=dataclasses.replace(SCHEDULE, log_every=4))
    each.run()
    some.run()
    assert [line["step"] for line in lines(some.output)] == [4, 6]
    per_step = lines(each.output)
    for line, group in zip(lines(some.output), (per_step[:4], per_step[4:]), strict=True):
        # of the others some are weighted, some no means, and gaps are those of the moment: tests/test_readings.py
        for key in (k for k in line.keys() - {"kind", "step", "seconds"} if not re.search(OTHERS, k)):
            assert line[key] == pytest.approx(sum(entry[key] for entry in group) / len(group), rel=1e-12)


def test_hooks_run_at_their_interval_and_after_the_last_step_and_are_logged(tmp_path):
    hooks = [Every(4, lambda trainer, step: [{"steps_seen": float(step)}]), Every(0, lambda trainer, step: 1 / 0)]
    trainer = make_trainer(CASES["denoise"], tmp_path, schedule=SCHEDULE, hooks=hooks)
    trainer.run()
    assert [line["step"] for line in lines(tmp_path) if line["kind"] == "evaluate"] == [0, 4, 6]
    assert all(line["steps_seen"] == line["step"] for line in lines(tmp_path) if line["kind"] == "evaluate")


def test_hooks_sample_without_dropout(tmp_path):
    seen = []

    def sample(trainer, step):
        generator, rng = trainer.method.generator, Rng((0,), range(4), dtype=torch.float64)
        pairs = [generator.sample(generator.prior(rng), {"label": torch.zeros(4).long()}, rng) for rng in (rng, rng)]
        twin = copy.deepcopy(generator.denoiser).eval()
        t, x = torch.ones(4, dtype=torch.float64), pairs[0]
        cond = {"label": torch.zeros(4).long()}
        seen.append(torch.equal(generator.denoiser(x, t, cond), twin(x, t, cond)))

    make_trainer(CASES["denoise"], tmp_path, schedule=SCHEDULE, hooks=[Every(3, sample)]).run()
    assert seen == [True] * 3


@pytest.mark.parametrize("behind", [0, 1], ids=["host reads at once", "host reads a step later"])
@pytest.mark.parametrize("every", [{}, {"log_every": 1}, {"save_every": 1}], ids=str)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_and_handlers_are_restored(number, every, behind, tmp_path):
    before, schedule = signal.getsignal(number), dataclasses.replace(SCHEDULE, **every)
    trainer = make_trainer(CASES["denoise"], tmp_path, schedule=schedule)
    trainer._behind = behind  # on CUDA it is 1
    draw = trainer.data.draw

    class Signalling:
        def draw(self, rng):
            if trainer.step == 2:
                os.kill(os.getpid(), number)
            return draw(rng)

    trainer.data = Signalling()
    assert trainer.run() == number
    assert signal.getsignal(number) == before
    assert checkpoint.read_state(checkpoint.latest(tmp_path))["step"] == 3 + behind
    resumed = make_trainer(CASES["denoise"], tmp_path, schedule=schedule)
    resumed.resume(checkpoint.latest(tmp_path))
    assert resumed.run() is None
    assert [line["step"] for line in lines(tmp_path)] == [s for s in range(1, 7) if s % schedule.log_every == 0]


def test_log_lines_after_the_checkpoint_are_dropped_and_a_short_log_is_refused(tmp_path):
    schedule = dataclasses.replace(SCHEDULE, save_every=4)
    trainer = make_trainer(CASES["denoise"], tmp_path, schedule=schedule)
    trainer.run()
    whole = (tmp_path / "log.jsonl").read_text()
    folder = tmp_path / "checkpoints" / "step-00000004"
    resumed = make_trainer(CASES["denoise"], tmp_path, schedule=schedule)
    resumed.resume(folder)
    assert [line["step"] for line in lines(tmp_path)] == [2, 4]
    assert whole.startswith((tmp_path / "log.jsonl").read_text())
    os.truncate(tmp_path / "log.jsonl", 10)
    with pytest.raises(checkpoint.CheckpointError, match="has 10 bytes but had"):
        resumed.resume(folder)
    (tmp_path / "log.jsonl").unlink()
    resumed.resume(folder)
    resumed.run()
    assert [line["step"] for line in lines(tmp_path)] == [6]


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"train.batch=4 must be divisible .* train.accumulate=3; choose a multiple of 3"
    ):
        make_trainer(CASES["denoise"], tmp_path, schedule=dataclasses.replace(SCHEDULE, accumulate=3))


def poison(trainer, *, step: int, index: int) -> dict[str, torch.Tensor]:
    """Make one sample of one update infinite; gives what everything was before that update, once it has come."""
    draw, kept = trainer.data.draw, {}

    class Poisoned:
        def draw(self, rng):
            batch = draw(rng)
            if rng.key[2:4] == (step, index):
                kept.update(all_tensors(trainer) if not kept else {})
                batch["images"].x0[-1] = float("inf")
            return batch

    trainer.data = Poisoned()
    return kept


DENOISE = (CASES["denoise"], 0, "term denoise of player generator")
CRITIC = dataclasses.replace(
    CASES["dmd2-alternating-gan"], options=CASES["dmd2-alternating-gan"].options | {"ratio": 3}
)
DMD2 = (CRITIC, 1, "term fit of player critic")  # a third update of the same step is finite, and must not happen


@pytest.mark.parametrize("behind", [0, 1], ids=["host reads at once", "host reads a step later"])
@pytest.mark.parametrize("every", [{"log_every": 1}, {"save_every": 1, "log_every": 0}, {"log_every": 0}], ids=str)
@pytest.mark.parametrize(("case", "index", "culprit"), [DENOISE, DMD2], ids=["denoise", "dmd2"])
def test_an_infinite_sample_is_named_and_changes_nothing(case, index, culprit, every, behind, tmp_path):
    schedule = dataclasses.replace(SCHEDULE, accumulate=2, **every)
    trainer = make_trainer(case, tmp_path, schedule=schedule)
    trainer._behind = behind  # on CUDA it is 1
    before = poison(trainer, step=3, index=index)
    with pytest.raises(NonFinite, match=f"step 3: {culprit} was not finite"):
        trainer.run()
    after = all_tensors(trainer)
    assert all(torch.equal(after[key], before[key]) for key in before)
    if schedule.log_every:
        assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
        assert "NaN" not in (tmp_path / "log.jsonl").read_text()
    if schedule.save_every:
        good = make_trainer(case, tmp_path, schedule=schedule)
        good.resume(checkpoint.latest(tmp_path))
        assert good.step == 3
        assert all(tensor.isfinite().all() for tensor in all_tensors(good).values())


def poison_first(trainer, *, attempts: int) -> None:
    """Make a sample of step 3 infinite in the first attempts."""
    draw = trainer.data.draw

    class Poisoned:
        def draw(self, rng):
            batch = draw(rng)
            if rng.key[1] < attempts and rng.key[2] == 3:
                batch["images"].x0[-1] = float("inf")
            return batch

    trainer.data = Poisoned()


RETRIED = dataclasses.replace(SCHEDULE, save_every=2, log_every=1, retries=2)


def told(folder: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines(folder)]


def test_a_run_that_is_not_finite_goes_back_for_other_draws(tmp_path):
    case = CASES["denoise"]
    trainer = make_trainer(case, tmp_path / "a", schedule=RETRIED)
    poison_first(trainer, attempts=2)
    assert trainer.run() is None and (trainer.step, trainer.attempt) == (6, 2)
    (retry,) = [line for line in told(tmp_path / "a") if line["kind"] == "retry"]  # the first one's line went with it
    assert (retry["step"], retry["attempt"]) == (2, 2) and "step 3: term denoise of player generator" in retry["text"]
    assert [line["step"] for line in lines(tmp_path / "a") if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    earlier, newest = checkpoint.checkpoints(tmp_path / "a")
    assert checkpoint.read_state(newest)["attempt"] == 2
    weights = [load_file(folder / "generator.weights.safetensors") for folder in (earlier, newest)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])  # it trains on


def test_a_run_that_died_while_it_went_back_ends_as_if_it_had_not(tmp_path):
    case, ends = CASES["dmd2-alternating-gan"], []
    for name in ("whole", "killed"):
        trainer = make_trainer(case, tmp_path / name, schedule=RETRIED)
        poison_first(trainer, attempts=1)
        if name == "killed":
            trainer._retry = lambda folder, error: (_ for _ in ()).throw(KeyboardInterrupt)
            with pytest.raises(KeyboardInterrupt):
                trainer.run()
            trainer = make_trainer(case, tmp_path / name, schedule=RETRIED)
            poison_first(trainer, attempts=1)
            trainer.resume(checkpoint.latest(tmp_path / name))
        trainer.run()
        ends.append((all_tensors(trainer), told(tmp_path / name)))
    (ours, log), (theirs, other_log) = ends
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert log == other_log and any(line["kind"] == "retry" for line in log)


@pytest.mark.parametrize("changes", [{"retries": 1}, {"retries": 0}, {"retries": 9, "save_every": 0}])
def test_retries_come_to_an_end(changes, tmp_path):
    trainer = make_trainer(CASES["denoise"], tmp_path, schedule=dataclasses.replace(RETRIED, **changes))
    poison_first(trainer, attempts=2)
    with pytest.raises(NonFinite, match="step 3: term denoise"):
        trainer.run()
    assert trainer.attempt == (1 if changes["retries"] == 1 else 0)


class Reads(TorchDispatchMode):
    """Counts what would make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
        ):
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CASES)
def test_nothing_in_a_step_waits_for_the_device(name, tmp_path):
    trainer = make_trainer(CASES[name], tmp_path, schedule=SCHEDULE)
    trainer.one_step()
    with Reads() as reads:
        trainer.one_step()
        assert reads.seen == []
        trainer.step * torch.ones(()).item()
    assert reads.seen  # the counter counts


def test_recomputing_activations_changes_no_gradient(tmp_path):
    plain = make_trainer(UNET, tmp_path / "plain", schedule=SCHEDULE)
    recomputing = make_trainer(UNET, tmp_path / "recomputing", schedule=SCHEDULE)
    for player in recomputing.players.values():
        assert player.dropouts
    recomputing.method.generator.denoiser.backbone.network.enable_gradient_checkpointing()
    recomputing.method.critic.denoiser.backbone.network.enable_gradient_checkpointing()
    for trainer in (plain, recomputing):
        trainer.one_step()
    ours, theirs = all_tensors(recomputing), all_tensors(plain)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_bf16_computes_low_and_keeps_masters_and_losses_in_float32(tmp_path):
    trainer = make_trainer(CASES["dmd2"], tmp_path, schedule=SCHEDULE, dtype=torch.float32, mixed_precision="bf16")
    outputs = []
    trainer.method.generator.denoiser.backbone.leave.register_forward_hook(lambda m, i, out: outputs.append(out.dtype))
    trainer.one_step()
    assert set(outputs) == {torch.bfloat16}
    assert {tensor.dtype for tensor in all_tensors(trainer).values()} == {torch.float32}


def test_bf16_a_pass_without_gradient_leaves_the_next_ones_gradient(tmp_path):
    """autocast may hand the weights that it cast under no_grad to the pass that trains, which then has no gradient."""
    trainer = make_trainer(CASES["dmd2"], tmp_path, schedule=SCHEDULE, dtype=torch.float32, mixed_precision="bf16")
    generator, player = trainer.method.generator, trainer.players["generator"]
    x = torch.randn(4, 2)
    cond, t = {"label": torch.zeros(4).long()}, torch.ones(4, dtype=torch.float64)

    def loss(batch, rng):
        if "before" in batch:
            with torch.no_grad():
                generator.denoiser(x, t, cond)
        return Loss(generator.denoiser(x, t, cond).square().mean(1))

    gradients = []
    for batch in ({}, {"before": None}):
        with only("generator", trainer.players), drawn_from(player.dropouts, Rng((0,), range(4))):
            trainer._backward(Term("generator", "test", loss), batch, Rng((0,), range(4)))
        gradients.append([parameter.grad for parameter in player.parameters])
        player.optimizer.zero_grad(set_to_none=True)
    assert all(g is not None for g in gradients[0])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_loss_must_be_one_value_per_sample(tmp_path):
    trainer = make_trainer(CASES["denoise"], tmp_path, schedule=SCHEDULE)
    parameter = trainer.players["generator"].parameters[0]
    term = Term("generator", "sum", lambda batch, rng: Loss(parameter.sum()))
    with pytest.raises(ValueError, match=r"term sum of player generator must give one value per sample, 4 here"):
        trainer.update(0, Update((term,)))


def test_a_budget_of_steps_ends_a_run_like_its_last_step_and_a_later_start_goes_on_bit_for_bit(tmp_path):
    schedule = dataclasses.replace(SCHEDULE, save_every=4, log_every=4)
    hooks = [Every(4, lambda trainer, step: [{"steps_seen": float(step)}])]
    whole = make_trainer(CASES["dmd2"], tmp_path / "whole", schedule=schedule)
    whole.run()
    short = make_trainer(CASES["dmd2"], tmp_path / "short", schedule=schedule, hooks=hooks)
    assert short.run(Budget(steps=3)) is None
    assert [(line["kind"], line["step"]) for line in lines(short.output)] == [
        ("evaluate", 0),
        ("train", 3),
        ("evaluate", 3),
    ]
    assert checkpoint.latest(short.output).name == "step-00000003"
    later = make_trainer(CASES["dmd2"], tmp_path / "short", schedule=schedule, hooks=hooks)
    later.resume(checkpoint.latest(short.output))
    later.run(Budget(steps=100))  # beyond the recipe, which ends first
    ours, theirs = all_tensors(later), all_tensors(whole)
    assert later.step == 6 and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("behind", [0, 1], ids=["host reads at once", "host reads a step later"])
def test_a_budget_of_time_counts_the_steps_alone_and_over_all_starts(tmp_path, behind, monkeypatch):
    """On a clock of our own, that goes on by a millisecond at each look, and by far more in a hook."""
    pause, now = 1000.0, [0.0]

    def look() -> float:
        now[0] += 1e-3
        return now[0]

    def rest(trainer, step):
        now[0] += pause

    monkeypatch.setattr(time, "perf_counter", look)

    def start(budget):
        trainer = make_trainer(CASES["dmd2"], tmp_path, schedule=schedule, hooks=[Every(1, rest)])
        trainer._behind = behind  # on CUDA it is 1
        if (found := checkpoint.latest(tmp_path)) is not None:
            trainer.resume(found)
        trainer.run(budget)
        return trainer

    schedule = dataclasses.replace(SCHEDULE, steps=100, save_every=100, log_every=1)
    first = start(Budget(seconds=1e-9))
    assert first.step == 1 + behind
    assert 0 < first.training_seconds < pause  # and there were at least two pauses
    assert checkpoint.read_state(checkpoint.latest(tmp_path))["training_seconds"] == first.training_seconds
    again = start(Budget(seconds=first.training_seconds))
    assert (again.step, again.training_seconds) == (first.step, first.training_seconds)  # there is nothing left to do
    more = start(Budget(seconds=first.training_seconds + 1e-9))
    assert more.step == first.step + 1 + behind and more.training_seconds > first.training_seconds
    logged = [line["seconds"] for line in lines(tmp_path)]
    assert logged == sorted(logged) and logged[-1] == round(more.training_seconds, 3)


def test_a_run_that_did_not_keep_its_time_has_no_budget_of_time(tmp_path):
    trainer = make_trainer(CASES["denoise"], tmp_path, schedule=dataclasses.replace(SCHEDULE, steps=4, save_every=2))
    trainer.run(Budget(steps=2))
    file = checkpoint.latest(tmp_path) / "state.json"
    state = json.loads(file.read_text())
    del state["training_seconds"]  # as versions before wrote it
    file.write_text(json.dumps(state))
    later = make_trainer(CASES["denoise"], tmp_path, schedule=dataclasses.replace(SCHEDULE, steps=4, save_every=2))
    later.resume(checkpoint.latest(tmp_path))
    with pytest.raises(ValueError, match="no budget of time"):
        later.run(Budget(seconds=9.0))
    later.run(Budget(steps=4))
    assert checkpoint.read_state(checkpoint.latest(tmp_path))["training_seconds"] is None


@pytest.mark.parametrize("wrong", [{"seconds": 0.0}, {"seconds": float("nan")}, {"steps": 0}])
def test_an_empty_budget_is_refused(wrong):
    with pytest.raises(ValueError, match="must be positive"):
        Budget(**wrong)
