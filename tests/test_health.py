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
from test_ladd import TAPS

from diffdistill import checkpoint
from diffdistill.critic import Critic, Discriminator, DiscriminatorHead
from diffdistill.generator import Generator
from diffdistill.health import Alert, Watch, alerts_of
from diffdistill.method import Networks, Sample
from diffdistill.methods import METHODS
from diffdistill.player import ConstantDecay, LearningRate, Player
from diffdistill.teacher import Teacher
from diffdistill.times import LogNormal, Uniform
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
    discriminator=4e-3,
    decay=0.0,
    grid=(10.0,),
    step_rule="renoise",
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
    if name in ("ladd", "phased_dmd"):
        teacher = Teacher(copy.deepcopy(start))  # a network, as in life: it has features, and the critic starts as it

    def new_discriminator():
        heads = [DiscriminatorHead([(64,)]) for _ in TAPS]
        return Discriminator(heads, taps=TAPS, trunk=teacher.denoiser)

    def new_generator():
        return Generator(copy.deepcopy(start), grid, step_rule=step_rule)

    method = kind(kind.Config(**config), Networks(new_generator, new_critic, teacher, new_discriminator))
    rates = {"generator": generator, "critic": critic, "discriminator": discriminator}
    players = {}
    for player, spec in method.players().items():
        role = player.rpartition("/")[2]
        optimizer = torch.optim.AdamW(
            list(spec.parameters.values()),
            lr=1.0,
            betas=(0.0, 0.999),
            weight_decay=decay if role == "generator" else 0.0,
            fused=True,
        )
        players[player] = Player(spec, optimizer, LearningRate(rates[role]), max_norm=10.0, reduce=None)
    for player in method.generator.parts:
        players[player].average("slow", ConstantDecay(0.98))
    schedule = Schedule(steps=steps, batch=256, log_every=10, save_every=save_every)
    trainer = Trainer(method, players, Corners(), Accelerator(cpu=True), schedule, seed=0, output=output)
    trainer._rng = lambda key, slots: Batched(key, slots)  # one draw for all slots, for speed
    if resume:
        trainer.resume(checkpoint.latest(output))
    trainer.run()
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def warned(log):
    return {line["warning"] for line in log if line["kind"] == "warning"}


PHASED = {"name": "phased_dmd", "steps_per_phase": (60,), "steps": 120, "grid": (10.0, 1.0), "step_rule": "euler"}
LADD = {"name": "ladd", "loss": "softplus", "discriminator_times": LogNormal(0.0, 1.0), "generator": 5e-4}
GOOD = {
    "dmd2": {"ratio": 2},
    "dmd2 with few critic updates": {"ratio": 1},
    "dmd2 with a gan": {"ratio": 2, **GAN},
    "dmd2 with 300 times the gan": {"ratio": 1, "gan_weight": 1.0, "gan_critic_weight": 1e-2},
    "sid": {"name": "sid", "ratio": 2, "alpha": 0.5, "normalised": False},
    "phased_dmd": {**PHASED, "ratio": 2},
    "ladd": LADD,
}
HEAVY = {"gan_weight": 0.1, "gan_critic_weight": 30.0}
SPOILED = {
    "critic_lagging": {"critic": 2e-6},
    "saturation": {"generator": 5e-2},
    "collapse": {"decay": 20.0},
    "exploding_direction": {"critic": 0.3},
    "discriminator_winning": {"generator": 1e-6, "gan_times": Uniform(0.0, 0.5), **HEAVY},
    # after 200 steps its covariance is 52 percent off; that of the good run with a tenth of its weight, 5 percent
    "gan_dominating": {"gan_weight": 10.0, "gan_critic_weight": 1e-2},
    "critic_lagging of phased_dmd": {**PHASED, "generator": 5e-4, "critic": 2e-6},
    "saturation of phased_dmd": {**PHASED, "generator": 5e-2},
    "saturation of ladd": {**LADD, "generator": 5e-2},
    "discriminator_winning of ladd": {**LADD, "generator": 1e-6, "discriminator_times": Uniform(0.0, 0.5)},
}


@pytest.mark.parametrize("name", GOOD)
def test_a_good_run_is_not_warned_of(start, name, tmp_path):  # noqa: F811
    log = corners_run(start, tmp_path, **GOOD[name])
    assert warned(log) == set()
    assert {line["kind"] for line in log} == {"reference", "train"}


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_run_is_warned_of_in_one_line_and_its_log_tells_the_same(start, name, tmp_path, capsys):  # noqa: F811
    ratio = {} if SPOILED[name].get("name") == "ladd" else {"ratio": 1}
    log = corners_run(start, tmp_path, **ratio, **SPOILED[name])
    assert name.split(" of ")[0] in warned(log)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    lines = [line for line in log if line["kind"] == "warning"]
    assert said == [f"step {line['step']}: {line['text']}" for line in lines]
    keep = ("warning", "reading", "value", "limit", "text")
    told = [(line["step"], Alert(**{name: line[name] for name in keep})) for line in lines]
    assert alerts_of(line for line in log if line["kind"] != "warning") == told


@pytest.mark.parametrize("name", ["phased_dmd", "ladd"])
def test_every_reading_of_samples_has_the_teachers_beside_it_and_every_average_its_gap(start, name, tmp_path):  # noqa: F811
    reference, *log = corners_run(start, tmp_path, **{**GOOD[name], "steps": 100})
    seen = {reading for line in log for reading in line}
    told = {reading for reading in seen if reading.rpartition("/")[2] in ("rms", "peak", "spread")}
    assert told == reference.keys() - {"kind", "step", "seconds"} and len(told) == 3 * (1 + (name == "phased_dmd"))
    gaps = {f"{part}generator/gap/slow" for part in (["0/", "1/"] if name == "phased_dmd" else [""])}
    assert gaps <= seen
    judged = {"discriminator/judge/accuracy", "discriminator/judge/logit_gap"}
    learnt = {"0/critic/fit/score", "1/generator/match/agreement", "0/generator/match/edge_agreement"}
    assert (judged if name == "ladd" else learnt) <= seen


def line(step, **readings):
    return {"kind": "train", "step": step, **{name.replace("__", "/"): value for name, value in readings.items()}}


REFERENCE = {"g/match/spread": 1.0, "g/match/rms": 1.0, "g/match/peak": 1.0}


@pytest.mark.parametrize(
    ("reading", "fine", "bad", "warning"),
    [
        ("g/match/agreement", 2.9, 3.1, "critic_lagging"),
        ("g/match/agreement", 0.31, 0.29, "critic_lagging"),
        ("0/g/match/edge_agreement", 2.9, 3.1, "critic_lagging"),
        ("critic/fit/score", 1.4, 1.6, "critic_lagging"),
        ("g/match/peak", 1.29, 1.31, "saturation"),
        ("g/match/rms", 1.29, 1.31, "saturation"),
        ("g/match/spread", 0.76, 0.74, "collapse"),
        ("critic/fit/accuracy", 0.89, 0.91, "discriminator_winning"),
        ("critic/fit/logit_gap", 2.9, 3.1, "discriminator_winning"),
        ("g/match/gan_share", 0.59, 0.61, "gan_dominating"),
        ("g/match/direction", 2.9, 3.1, "exploding_direction"),
        ("g/match/difference/2_to_8", 0.9, 1.1, "exploding_direction"),
    ],
)
def test_a_warning_comes_right_beyond_its_limit(reading, fine, bad, warning):
    for value, expected in ((fine, []), (bad, [warning])):
        watch = Watch(start=20)
        for step in range(1000, 10_000, 1000):  # so far apart that each line stands for itself
            assert (
                watch.see(
                    step,
                    {"g/match/rms": 1.0, reading: 0.5 if "accuracy" in reading or "share" in reading else 1.0},
                    REFERENCE,
                )
                == []
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


def test_a_player_that_joins_later_has_a_warm_up_of_its_own():
    first = [line(step, g__match__agreement=1.0) for step in range(10, 200, 10)]
    later = [line(step, h__match__agreement=100.0) for step in range(200, 300, 10)]
    assert [step for step, _ in alerts_of([*first, *later], start=40)] == [240]


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


def test_a_warning_names_the_settings_of_the_method_inside_and_is_told_for_each_player():
    watch = Watch(start=20, settings="method.inside")
    found = []
    for step in range(1000, 20_000, 1000):
        value = 1.0 if step < 10_000 else 5.0
        readings = {f"{k}/{name}": value for k in (0, 1) for name in ("critic/fit/score", "generator/match/direction")}
        found += watch.see(step, readings, {})
    told = {(alert.warning, alert.reading) for alert in found}
    assert told == {
        (kind, f"{k}/{name}")
        for k in (0, 1)
        for kind, name in (
            ("critic_lagging", "critic/fit/score"),
            ("exploding_direction", "generator/match/direction"),
        )
    }
    assert any("method.inside.ratio" in alert.text for alert in found)
    assert not any("method.ratio" in alert.text for alert in found)
