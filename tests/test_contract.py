"""What every method must keep, at toy size, with dropout on: a new method inherits this by its entries in cases.py."""

import dataclasses
import json
import multiprocessing
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from cases import CASES, UNET, all_tensors, make_trainer

from diffdistill import checkpoint
from diffdistill.method import Action, MethodConfig, Update
from diffdistill.methods import METHODS
from diffdistill.player import RAW
from diffdistill.trainer import NonFinite, Schedule

EVERY_CASE = pytest.mark.parametrize("name", CASES)
SHORT = Schedule(steps=3, batch=12, log_every=3, save_every=0)


def log_lines(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_same(ours: dict, theirs: dict, *, rtol: float, atol: float) -> None:
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(
            ours[key], theirs[key], rtol=rtol, atol=atol, msg=lambda text, key=key: f"{key}: {text}"
        )


def assert_same_lines(ours: list[dict], theirs: list[dict], *, rel: float) -> None:
    assert [line.pop("kind") for line in ours] == [line.pop("kind") for line in theirs]
    assert len(ours) > 0
    for our_line, their_line in zip(ours, theirs, strict=True):
        assert our_line == pytest.approx(their_line, rel=rel, abs=0)


def test_every_method_has_a_case():
    assert {case.method for case in CASES.values()} == METHODS.keys()


@EVERY_CASE
def test_a_method_says_in_words_what_it_reads_and_trains(name):
    method = CASES[name].make()
    assert all(method.source(stream).kind in method.reads for stream in method.streams())
    if any(isinstance(value, MethodConfig) for value in vars(method.config).values()):
        assert "what the method inside trains" in method.trains
    else:
        kinds = dict.fromkeys(name.rpartition("/")[2] for name in method.players())
        assert method.trains.startswith(", ".join(kinds))


@EVERY_CASE
def test_an_update_changes_only_its_own_player(name, tmp_path):
    trainer = make_trainer(CASES[name], tmp_path, schedule=SHORT)
    frozen = {key: value.clone() for key, value in teacher_tensors(trainer.method).items()}
    for index, item in enumerate(trainer.method.plan(0)):
        assert isinstance(item, Update | Action)
        if isinstance(item, Update):
            before = all_tensors(trainer)
            trainer.update(index, item)
            after = all_tensors(trainer)
            for key in before:
                if not any(key.startswith(f"{player}/") for player in item.players):
                    assert torch.equal(before[key], after[key]), key
            for player in item.players:
                parts = [key for key in before if key.startswith(f"{player}/") and "step" not in key]
                changed = [key for key in parts if not torch.equal(before[key], after[key])]
                assert len(changed) > 0.9 * len(parts), sorted(set(parts) - set(changed))
    for key, value in teacher_tensors(trainer.method).items():
        assert torch.equal(value, frozen[key]), key


def teacher_tensors(method) -> dict[str, torch.Tensor]:
    return method.teacher.denoiser.state_dict() if type(method).needs_teacher else {}


@pytest.mark.parametrize("accumulate", [2, 6])
@pytest.mark.parametrize("name", [*CASES, "unet"])
def test_accumulated_small_batches_equal_one_big_one(name, accumulate, tmp_path):
    case = UNET if name == "unet" else CASES[name]
    one, many = (
        make_trainer(case, tmp_path / str(parts), schedule=dataclasses.replace(SHORT, accumulate=parts))
        for parts in (1, accumulate)
    )
    one.run()
    many.run()
    # float64: only the order of sums differs
    assert_same(all_tensors(one), all_tensors(many), rtol=1e-12, atol=1e-12)
    assert_same_lines(log_lines(one.output), log_lines(many.output), rel=1e-12)


@EVERY_CASE
def test_a_plan_is_pure(name, tmp_path):
    trainer = make_trainer(CASES[name], tmp_path, schedule=SHORT)

    def structure(step):
        return [
            item.name if isinstance(item, Action) else [(term.player, term.name) for term in item.terms]
            for item in trainer.method.plan(step)
        ]

    before = all_tensors(trainer)
    first = [structure(step) for step in range(10)]
    assert [structure(step) for step in reversed(range(10))] == first[::-1]
    after = all_tensors(trainer)
    assert all(torch.equal(before[key], after[key]) for key in before)
    trainer.run()
    assert [structure(step) for step in range(10)] == first


@EVERY_CASE
def test_a_value_that_is_not_finite_stops_before_the_optimizer(name, tmp_path):
    """A learning rate of 1e300 sends the weights so far that a later loss overflows."""
    schedule = dataclasses.replace(SHORT, steps=10, save_every=1)
    trainer = make_trainer(CASES[name], tmp_path / "run", schedule=schedule, learning_rate=1e300)
    with pytest.raises(NonFinite) as stopped:
        trainer.run()
    step, player = re.match(r"step (\d+): (?:term \w+|the gradient) of player (\S+) was", str(stopped.value)).groups()
    assert player in trainer.players
    twin = make_trainer(CASES[name], tmp_path / "twin", schedule=schedule, learning_rate=1e300)
    good = updates_until_bad(twin)
    assert twin.step == int(step)
    ours = all_tensors(trainer)
    assert all(torch.equal(ours[key], good[key]) for key in good)
    if int(step):
        saved = checkpoint.latest(tmp_path / "run")
        assert saved.name == f"step-{int(step):08d}"
        checkpoint.load(saved, twin.players)


def updates_until_bad(trainer) -> dict[str, torch.Tensor]:
    """All tensors just before the first update that is not finite."""
    while True:
        for index, item in enumerate(trainer.method.plan(trainer.step)):
            if isinstance(item, Action):
                item.act({name: player.spec for name, player in trainer.players.items()})
                continue
            before = all_tensors(trainer)
            _, flags = trainer.update(index, item)
            if flags.any():
                return before
        trainer.step += 1


@EVERY_CASE
def test_initialising_is_not_resuming(name, tmp_path):
    schedule = dataclasses.replace(SHORT, save_every=3)
    done = make_trainer(CASES[name], tmp_path / "done", schedule=schedule)
    done.run()
    saved = checkpoint.latest(tmp_path / "done")
    weights = all_tensors(done)

    resumed = make_trainer(CASES[name], tmp_path / "resumed", schedule=schedule)
    resumed.resume(saved)
    assert resumed.step == 3
    ours = all_tensors(resumed)
    assert all(torch.equal(ours[key], weights[key]) for key in weights)

    for chosen in (RAW, "power"):
        fresh = make_trainer(CASES[name], tmp_path / "fresh", schedule=schedule)
        before = all_tensors(fresh)
        generators = list(fresh.method.generator.parts)
        for player in generators:
            checkpoint.initialise(fresh.players[player].spec.parameters, saved, player=player, weights=chosen)
        source = "weights" if chosen == RAW else f"average-{chosen}"
        assert fresh.step == 0
        after = all_tensors(fresh)
        for key in before:
            if any(key.startswith(f"{player}/weights/") for player in generators):
                assert torch.equal(after[key], weights[key.replace("/weights/", f"/{source}/")]), key
            else:
                assert torch.equal(after[key], before[key]), key


INTERRUPTED = Schedule(steps=16, batch=12, accumulate=2, log_every=5, save_every=2, keep_last=2)


def run_all(folder: str, save_every: int, started) -> None:
    """In a process of its own: go on with the run of every case, until a signal comes."""
    torch.set_num_threads(1)
    for name, case in CASES.items():
        run = Path(folder) / name
        trainer = make_trainer(case, run, schedule=dataclasses.replace(INTERRUPTED, save_every=save_every))
        found = checkpoint.latest(run)
        if found:
            trainer.resume(found)
        started.set()
        if trainer.run():
            return


def finish(folder: Path, *, save_every: int, how: signal.Signals | None) -> int:
    """Run all cases to the end, interrupting at random moments; the number of interruptions that came in time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "accelerate"])  # a child starts in less than a second
    chance, interruptions = random.Random(), 0
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        started = context.Event()
        process = context.Process(target=run_all, args=(str(folder), save_every, started))
        process.start()
        assert started.wait(60)
        if how is not None and interruptions < 4:
            process.join(chance.uniform(0.0, 0.5))
            if process.is_alive():
                process.kill() if how == signal.SIGKILL else process.terminate()
                interruptions += 1
                process.join(60)
                # a SIGTERM that comes before the loop starts to listen ends the process at once, and loses nothing
                assert process.exitcode in (-how, 0)
                continue
        process.join(60)
        assert process.exitcode == 0
        return interruptions
    raise AssertionError("the runs did not finish in time")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    finish(folder, save_every=1000, how=None)
    return folder


@pytest.mark.parametrize(("how", "save_every"), [(signal.SIGKILL, 2), (signal.SIGTERM, 1000)])
def test_an_interrupted_run_ends_bit_for_bit_like_an_uninterrupted_one(how, save_every, uninterrupted, tmp_path):
    """Weights, moments, averages, running sums and log lines, whether the kill came in a step, a save or a deletion."""
    assert finish(tmp_path, save_every=save_every, how=how) >= 1
    for name in CASES:
        assert log_lines(tmp_path / name) == log_lines(uninterrupted / name)
        ours, theirs = (checkpoint.read_state(checkpoint.latest(run / name)) for run in (tmp_path, uninterrupted))
        assert ours["step"] == theirs["step"] == INTERRUPTED.steps
        assert ours["files"] == theirs["files"]  # SHA-256 of every file
        assert ours["readings"] == theirs["readings"]
        assert not list((tmp_path / name / "checkpoints").glob(".*")), "an interrupted save was not cleared away"
