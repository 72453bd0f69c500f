"""What a run says about itself: readings that add up exactly, and warnings that fire on spoiled runs alone."""

import copy
import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from oracle import denoiser
from test_dmd2 import (
    CORNERS,
    GAN,
    Batched,
    start,  # noqa: F401  a fixture
)

from diffdistill import checkpoint
from diffdistill.critic import Critic, DiscriminatorHead
from diffdistill.generator import Generator
from diffdistill.health import Alert, Watch, alerts_of
from diffdistill.method import Networks, Sample
from diffdistill.methods import METHODS
from diffdistill.player import ConstantDecay, LearningRate, Player
from diffdistill.teacher import Teacher
from diffdistill.times import Uniform
from diffdistill.trainer import Schedule, Trainer


class Corners:
    """The streams of the 2-D mixture."""

    def __init__(self):
        self._real = CORNERS.sample(20_000, seed=5).float()

    def draw(self, rng):
        return {"conditions": Sample(), "images": Sample(x0=self._real[rng.integers(len(self._real))])}


def corners_run(
    start,  # noqa: F811
    output,
    *,
    name="dmd2",
    steps=100,
    generator=2e-3,
    critic=2e-3,
    decay=0.0,
    save_every=0,
    resume=False,
    **config,
):
    """The log of a real run on the 2-D mixture with an exact teacher."""
    kind = METHODS[name]

    def new_critic():
        if not kind.discriminates(kind.Config(**config)):
            return Critic(copy.deepcopy(start))
        return Critic(copy.deepcopy(start), head=DiscriminatorHead([(64,)]), taps=("layers.0",))

    AcceleratorState._reset_state()
    torch.manual_seed(1)
    teacher = Teacher(denoiser(CORNERS, start.process))
    networks = Networks(lambda: Generator(copy.deepcopy(start), (10.0,)), new_critic, teacher)
    method = kind(kind.Config(**config), networks)
    rates, decays = {"generator": generator, "critic": critic}, {"generator": decay, "critic": 0.0}
    players = {}
    for role, spec in method.players().items():
        optimizer = torch.optim.AdamW(
            list(spec.parameters.values()), lr=1.0, betas=(0.0, 0.999), weight_decay=decays[role], fused=True
        )
        players[role] = Player(spec, optimizer, LearningRate(rates[role]), max_norm=10.0, reduce=None)
    players["generator"].average("slow", ConstantDecay(0.98))
    schedule = Schedule(steps=steps, batch=256, log_every=10, save_every=save_every)
    trainer = Trainer(method, players, Corners(), Accelerator(cpu=True), schedule, seed=0, output=output)
    trainer._rng = lambda key, slots: Batched(key, slots)  # one draw for all slots, for speed
    if resume:
        trainer.resume(checkpoint.latest(output))
    trainer.run()
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def warned(log):
    return {line["warning"] for line in log if line["kind"] == "warning"}


GOOD = {
    "dmd2": {"ratio": 2},
    "dmd2 with few critic updates": {"ratio": 1},
    "dmd2 with a gan": {"ratio": 2, **GAN},
    "sid": {"name": "sid", "ratio": 2, "alpha": 0.5, "normalised": False},
}
HEAVY = {"gan_weight": 0.1, "gan_critic_weight": 30.0}
SPOILED = {
    "critic_lagging": {"critic": 2e-6},
    "saturation": {"generator": 5e-2},
    "collapse": {"decay": 20.0},
    "exploding_direction": {"critic": 0.3},
    "discriminator_winning": {"generator": 1e-6, "gan_times": Uniform(0.0, 0.5), **HEAVY},
}


@pytest.mark.parametrize("name", GOOD)
def test_a_good_run_is_not_warned_of(start, name, tmp_path):  # noqa: F811
    log = corners_run(start, tmp_path, **GOOD[name])
    assert warned(log) == set()
    assert {line["kind"] for line in log} == {"reference", "train"}


@pytest.mark.parametrize("warning", SPOILED)
def test_a_spoiled_run_is_warned_of_in_one_line_and_its_log_tells_the_same(start, warning, tmp_path, capsys):  # noqa: F811
    log = corners_run(start, tmp_path, **{"ratio": 1, **SPOILED[warning]})
    assert warning in warned(log)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    lines = [line for line in log if line["kind"] == "warning"]
    assert said == [f"step {line['step']}: {line['text']}" for line in lines]
    keep = ("warning", "reading", "value", "limit", "text")
    told = [(line["step"], Alert(**{name: line[name] for name in keep})) for line in lines]
    assert alerts_of(line for line in log if line["kind"] != "warning") == told


def line(step, **readings):
    return {"kind": "train", "step": step, **{name.replace("__", "/"): value for name, value in readings.items()}}


REFERENCE = {"g/match/spread": 1.0, "g/match/rms": 1.0, "g/match/peak": 1.0}


@pytest.mark.parametrize(
    ("reading", "fine", "bad", "warning"),
    [
        ("g/match/agreement", 2.9, 3.1, "critic_lagging"),
        ("g/match/agreement", 0.31, 0.29, "critic_lagging"),
        ("critic/fit/score", 1.4, 1.6, "critic_lagging"),
        ("g/match/peak", 1.29, 1.31, "saturation"),
        ("g/match/rms", 1.29, 1.31, "saturation"),
        ("g/match/spread", 0.76, 0.74, "collapse"),
        ("critic/fit/accuracy", 0.89, 0.91, "discriminator_winning"),
        ("critic/fit/logit_gap", 2.9, 3.1, "discriminator_winning"),
        ("g/match/direction", 2.9, 3.1, "exploding_direction"),
        ("g/match/difference/2_to_8", 0.9, 1.1, "exploding_direction"),
    ],
)
def test_a_warning_comes_right_beyond_its_limit(reading, fine, bad, warning):
    for value, expected in ((fine, []), (bad, [warning])):
        watch = Watch(start=20)
        for step in range(1000, 10_000, 1000):  # so far apart that each line stands for itself
            assert (
                watch.see(step, {"g/match/rms": 1.0, reading: 0.5 if "accuracy" in reading else 1.0}, REFERENCE) == []
            )
        seen = watch.see(10_000, {"g/match/rms": 1.0, reading: value}, REFERENCE)
        assert [alert.warning for alert in seen] == expected


def test_a_start_that_is_blurred_and_rises_is_no_collapse_and_one_that_stays_is():
    rising, flat = ({step: value(step) for step in range(10, 210, 10)} for value in (lambda s: s / 400, lambda s: 0.3))
    for spread, expected in ((rising, set()), (flat, {"collapse"})):
        log = [line(step, g__match__spread=value) for step, value in spread.items()]
        found = alerts_of([{"kind": "reference", "step": 0, "g/match/spread": 1.0}, *log])
        assert {alert.warning for _, alert in found} == expected


def test_nothing_is_said_of_a_warm_up_nor_twice_before_the_run_is_twice_as_long():
    log = [line(step, g__match__agreement=100.0) for step in range(10, 500, 10)]
    assert [step for step, _ in alerts_of(log, start=40)] == [50, 100, 200, 400]


def test_lines_that_were_seen_already_are_passed_over():
    log = [line(step, critic__fit__score=1.0 + step / 1000) for step in range(10, 300, 10)]
    assert alerts_of([*log[:9], *log]) == alerts_of(log) == []


def test_a_short_spike_is_smoothed_and_a_lasting_one_is_not():
    log = [line(step, critic__fit__score=1.0) for step in range(1, 100)]
    spike = [line(100, critic__fit__score=5.0), *(line(step, critic__fit__score=1.0) for step in range(101, 120))]
    lasting = [line(step, critic__fit__score=2.5) for step in range(100, 120)]
    assert alerts_of([*log, *spike]) == []
    assert [alert.warning for _, alert in alerts_of([*log, *lasting])] == ["critic_lagging"]


@pytest.mark.parametrize("cut", [3, 12, 23])
def test_a_watch_goes_on_from_its_state_bit_for_bit(cut):
    generator = torch.Generator().manual_seed(0)
    names = ("g/match/agreement", "critic/fit/score", "g/match/spread", "g/match/direction")
    values = (3 * torch.randn(40, 4, generator=generator, dtype=torch.float64)).exp().tolist()
    log = [(10 * (i + 1), dict(zip(names, row, strict=True))) for i, row in enumerate(values)]
    whole, first = Watch(), Watch()
    expected = [whole.see(step, readings, REFERENCE) for step, readings in log]
    found = [first.see(step, readings, REFERENCE) for step, readings in log[:cut]]
    second = Watch()
    second.load(json.loads(json.dumps(first.state())))
    assert vars(second) == vars(first)
    found += [second.see(step, readings, REFERENCE) for step, readings in log[cut:]]
    assert found == expected and any(expected)


def test_an_interrupted_spoiled_run_says_what_an_uninterrupted_one_says(start, tmp_path):  # noqa: F811
    spoiled = {"ratio": 1, "steps": 60, "generator": 5e-2}
    whole = corners_run(start, tmp_path / "whole", **spoiled)
    corners_run(start, tmp_path / "parts", save_every=40, **{**spoiled, "steps": 40})
    resumed = corners_run(start, tmp_path / "parts", resume=True, save_every=40, **spoiled)
    assert warned(whole)
    for ours, theirs in zip(resumed, whole, strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
