"""Readings are sums, exact over samples however they are parted, and each means what it says."""

import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from cases import CASES, make_trainer
from oracle import Quadrature
from test_score import SCORE_METHODS, exact

from diffdistill.process import VE, Rectified
from diffdistill.readings import (
    NOISE_LEVELS,
    Ratio,
    Readings,
    Sketch,
    Spread,
    of_difference,
    of_logits,
    of_pulls,
    of_samples,
)
from diffdistill.trainer import Schedule

GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


@pytest.fixture
def readings():
    AcceleratorState._reset_state()
    return Readings(Accelerator(cpu=True))


def added(readings, parts):
    for values, weights in parts:
        readings.add("mean", values[:, 0])
        readings.add("ratio", Ratio(values[:, 0] * weights, weights))
        readings.add("spread", Spread(values))


@pytest.mark.parametrize("sizes", [(24,), (12, 12), (1, 7, 16)])
def test_parts_add_up_to_the_whole(readings, sizes):
    values, weights = 3 + normal(24, 5), (normal(24) > 0).double()
    added(readings, zip(values.split(sizes), weights.split(sizes), strict=True))
    assert readings.flush() == pytest.approx(
        {
            "mean": values[:, 0].mean().item(),
            "ratio": values[weights > 0, 0].mean().item(),
            "spread": values.var(0, correction=0).sum().sqrt().item(),
        },
        rel=1e-12,  # another order of sums
    )
    assert readings.flush() == {}


def test_a_ratio_of_nothing_is_left_out(readings):
    readings.add("empty", Ratio(torch.zeros(3), torch.zeros(3)))
    readings.add("mean", torch.ones(3))
    assert readings.flush() == {"mean": 1.0}


@pytest.mark.parametrize("ranks", [1, 2])
def test_readings_go_on_from_the_state_of_one_rank_or_of_two(readings, ranks):
    values, weights = normal(24, 5), (normal(24) > 0).double()
    states = []
    for part in range(ranks):
        rows = slice(part * 12 // ranks, (part + 1) * 12 // ranks)
        early = Readings(Accelerator(cpu=True))
        added(early, [(values[rows], weights[rows])])
        states += json.loads(json.dumps(early.state()))
    readings.load(states)
    added(readings, [(values[12:], weights[12:])])
    found = readings.flush()
    added(readings, [(values, weights)])
    assert found == pytest.approx(readings.flush(), rel=1e-12)


def test_a_sketch_keeps_the_variance_of_few_values_and_nearly_that_of_many():
    few = normal(50, 3, 2, 2)
    assert Sketch((3, 2, 2))(few).shape == (50, 12)
    variance = few.var(0, correction=0).mean()
    torch.testing.assert_close(
        Sketch((3, 2, 2))(few).var(0, correction=0).sum(), variance, rtol=1e-6, atol=0
    )  # its signs are float32
    many = normal(4000, 1, 20, 20) * torch.linspace(0, 2, 20, dtype=torch.float64)
    sketched = Sketch((1, 20, 20))(many)
    assert sketched.shape == (4000, 16)
    # independent values: the standard error of each of 16 variances is root(2 / 4000)
    assert sketched.var(0, correction=0).sum() == pytest.approx(many.var(0, correction=0).mean().item(), rel=0.03)


def test_samples_that_are_all_alike_have_no_spread(readings):
    x = normal(1, 3, 8, 8).expand(16, 3, 8, 8)
    for name, reading in of_samples(x, Sketch((3, 8, 8))).items():
        readings.add(name, reading)
    found = readings.flush()
    assert found["spread"] < 1e-7  # the root of rounding in float64
    assert found["rms"] == pytest.approx(x[0].square().mean().sqrt().item())
    assert found["peak"] == x[0].abs().flatten().sort().values[190]  # 191 of 192 values are 99 %


@pytest.mark.parametrize("name", SCORE_METHODS)
def test_the_agreement_of_a_perfect_critic_is_one(name):
    """By quadrature; the critic's own law, so that E[x | x_t] is what it says."""
    method, rng = exact(name), Quadrature(2, 160)
    fake = method.generator.rollout(method.generator.prior(rng), None, rng, stop=0)
    found = method.match(fake, {}, rng).readings["agreement"]
    assert (rng.weights * found.numerator).sum() / (rng.weights * found.denominator).sum() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("part", [0.25, 0.5, 2.0])
def test_a_critic_that_went_a_part_of_the_way_has_the_inverse_agreement(part):
    x, real, best = normal(3, 50, 2)
    t = torch.ones(50, dtype=torch.float64)
    whole, partial = (
        of_difference(x, t, real, real + share * (best - real), VE())["agreement"] for share in (1.0, part)
    )
    told = [(reading.numerator.sum() / reading.denominator.sum()).item() for reading in (whole, partial)]
    assert told[1] == pytest.approx(told[0] / part, rel=1e-12)


@pytest.mark.parametrize("process", [VE(), Rectified()], ids=str)
def test_each_sample_counts_at_its_noise_level_alone(process):
    noise = torch.tensor([0.1, 0.4, 1.0, 3.0, 7.0, 100.0], dtype=torch.float64)
    t = process.time_of(noise * process.sigma_data)
    x, real, fake = normal(3, 6, 4, 2)
    found = of_difference(x, t, real, fake, process)
    rms = (real - fake).square().flatten(1).mean(1).sqrt()
    expected = (rms[:2].mean(), rms[2], rms[3:5].mean(), rms[5])
    for level, value in zip(NOISE_LEVELS, expected, strict=True):
        reading = found[f"difference/{level}"]
        torch.testing.assert_close(reading.numerator.sum() / reading.denominator.sum(), value)
    torch.testing.assert_close(found["direction"], (real - fake).abs().flatten(1).mean(1))


def test_the_readings_of_logits():
    found = of_logits(torch.tensor([1.0, -2.0, 3.0]), torch.tensor([-1.0, -1.0, 4.0]))
    assert found["logit_gap"].tolist() == [2.0, -1.0, -1.0]
    assert found["accuracy"].mean() == pytest.approx(4 / 6)


def test_readings_keep_no_graph():
    x = normal(4, 2).requires_grad_(True)
    t = torch.ones(4, dtype=torch.float64)
    found = {**of_samples(x, Sketch((2,))), **of_difference(x, t, x, 2 * x, VE()), **of_logits(x[:, 0], x[:, 1])}
    for reading in found.values():
        match reading:
            case Ratio(numerator, denominator):
                assert not numerator.requires_grad and not denominator.requires_grad
            case Spread(values):
                assert not values.requires_grad
            case _:
                assert not reading.requires_grad


def test_the_gap_of_an_average_is_relative_and_logged(tmp_path):
    trainer = make_trainer(CASES["dmd2"], tmp_path, schedule=Schedule(steps=3, batch=4, log_every=3, save_every=0))
    trainer.run()
    *_, last = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    player = trainer.players["generator"]
    flat = torch.cat([p.detach().flatten() for p in player.parameters])
    for name, average in player.averages.items():
        copy = torch.cat([c.flatten() for c in average.copies])
        assert last[f"generator/gap/{name}"] == pytest.approx(((copy - flat).norm() / flat.norm()).item(), rel=1e-12)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_references_are_the_teachers_samples_once_and_however_they_are_parted(accumulate, tmp_path):
    schedule = Schedule(steps=2, batch=12, accumulate=accumulate, log_every=1, save_every=0)
    trainer = make_trainer(CASES["dmd2"], tmp_path, schedule=schedule)
    trainer.run()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    (found,) = (line for line in lines if line["kind"] == "reference")
    method = trainer.method
    key, slots = (0, 0, 0, "references"), range(64)
    batch = trainer.data.draw(trainer._rng((*key, "data"), slots))
    noise = method.teacher.process.prior_std(20.0) * trainer._rng(key, slots).normal((2,))
    x = method.teacher.solve(noise, (*method.teacher.process.grid(10), 0.0), batch["conditions"].cond)
    assert found["generator/match/rms"] == pytest.approx(x.square().mean(1).sqrt().mean().item(), rel=1e-12)
    assert found["generator/match/spread"] == pytest.approx(x.var(0, correction=0).mean().sqrt().item(), rel=1e-6)
    assert all(f"generator/match/{name}" in lines[-1] for name in ("rms", "peak", "spread"))


def test_no_references_are_made_where_nothing_is_logged(tmp_path):
    trainer = make_trainer(CASES["dmd2"], tmp_path, schedule=Schedule(steps=1, batch=4, log_every=0, save_every=0))
    seen, trainer.method.teacher.solve = [], lambda *args, **options: seen.append(args)
    trainer.run()
    assert seen == [] and not (tmp_path / "log.jsonl").exists()


def test_the_share_of_a_pull_is_that_of_its_norm():
    pull, other = normal(5, 3, 2), normal(5, 3, 2)
    told = of_pulls(pull, other)
    norms = [gradient.flatten(1).norm(dim=1).sum().item() for gradient in (pull, other)]
    assert told.numerator.sum().item() / told.denominator.sum().item() == pytest.approx(
        norms[0] / sum(norms), rel=1e-12
    )
    alone = of_pulls(pull, 0 * other)
    assert torch.equal(alone.numerator, alone.denominator)
