"""Running means of earlier steps: the same for all samples of a step, however it is parted, stopped or gone on with."""

import dataclasses

import pytest
import torch
from cases import Case, all_tensors, make_trainer
from test_contract import assert_same
from test_score import ANY_RATIO, exact

from diffdistill import checkpoint
from diffdistill.divergences import DIVERGENCES
from diffdistill.methods.f_distill import BINS
from diffdistill.process import VE
from diffdistill.running_means import RunningMeans, by_their_mean
from diffdistill.times import Uniform
from diffdistill.trainer import Schedule

CPU, FINE = torch.device("cpu"), torch.ones(())
MEANS = {
    "f_distill": Case("f_distill", {"ratio": 1, "mean_decay": 0.5}, grid=(20.0,)),
    "uni_instruct": Case("uni_instruct", {"weight_normalised": True}, grid=(20.0,)),
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("decay", [0.0, 0.75])
def test_a_bin_moves_towards_its_samples_and_one_without_keeps_its_mean(decay):
    means = RunningMeans(3.0, bins=4, decay=decay, device=CPU)
    numbers, places = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 2, 2])
    for part in (slice(0, 2), slice(2, 3)):
        means.add(numbers[part], places[part])
        assert means.values.tolist() == [3.0] * 4  # a step sees the means of those before it
    means.fold(FINE)
    moved = [decay * 3.0 + (1 - decay) * mean for mean in (1.0, 4.0)]
    assert means.values.tolist() == [moved[0], 3.0, moved[1], 3.0]
    means.fold(FINE)
    assert means.values.tolist() == [moved[0], 3.0, moved[1], 3.0]


def test_a_step_that_is_not_finite_leaves_the_means_alone_and_nothing_behind():
    means = RunningMeans(3.0, bins=2, decay=0.0, device=CPU)
    means.add(torch.tensor([float("nan")]), torch.tensor([1]))
    means.fold(torch.zeros(()))
    means.fold(FINE)
    assert means.values.tolist() == [3.0, 3.0]


def test_a_decay_of_one_is_refused():
    with pytest.raises(ValueError, match="never leave the start"):
        RunningMeans(1.0, decay=1.0, device=CPU)


def test_the_mean_divides_and_has_no_gradient():
    means = RunningMeans(4.0, decay=0.0, device=CPU)
    numbers = normal(5).exp().requires_grad_(True)
    (gradient,) = torch.autograd.grad(by_their_mean(numbers, means).sum(), numbers)
    assert gradient.tolist() == [0.25] * 5
    means.fold(FINE)
    torch.testing.assert_close(means.values, numbers.detach().mean()[None], rtol=1e-15, atol=0)


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
def test_the_weights_of_a_law_that_stays_have_mean_one_in_every_bin(divergence):
    """A discriminator that leans by 0.7 everywhere, and by t beside it, changes the weights by nothing."""
    levels = {"times": Uniform(0.02, 0.98), "divergence": divergence, "ratio_range": ANY_RATIO, "mean_decay": 0.9}
    plain, leaning = (exact("f_distill", **levels) for _ in range(2))
    shown = []
    for step in range(200):
        u = torch.rand(512, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        t, log_ratio = plain.config.match_times(u, VE()), 0.4 * normal(512, seed=1000 + step)
        weights = [
            method._weight(log_ratio + lean, t)
            for method, lean in ((plain, 0.0), (leaning, 0.7 + (10 * u).floor().clamp(max=9) / 10))
        ]
        for method in (plain, leaning):
            for means in method.means.values():
                means.fold(FINE)
        if step >= 100:
            shown.append(torch.stack([*weights, (10 * u).floor()]))
    one, other, place = torch.cat(shown, dim=1)
    # 51,200 weights whose standard deviation is at most about 1, and means over some 10 steps
    assert one.mean() == pytest.approx(1, abs=0.03)
    torch.testing.assert_close(one, other, rtol=1e-3, atol=0)  # what is left of the start after 100 steps: 0.9^100
    for number in range(BINS):
        assert plain.means["ratio"].values[number] == pytest.approx(0.4**2 / 2 + 1, abs=0.1)
        if divergence == "forward_kl":
            assert one[place == number].mean() == pytest.approx(1, abs=0.03)


def test_bins_are_equally_likely():
    times = Uniform(0.02, 0.98)
    method = exact("f_distill", times=times)
    places = torch.bucketize(times(torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64), VE()), method._edges)
    assert places.bincount().tolist() == [100] * BINS


def test_without_normalisation_nothing_is_kept():
    method = exact("f_distill", ratio_normalised=False, weight_normalised=False)
    assert not method.means and not exact("uni_instruct").means and not exact("dmd2").means
    assert exact("f_distill").means.keys() == {"ratio", "weight"}


@pytest.mark.parametrize("name", MEANS)
@pytest.mark.parametrize("accumulate", [2, 4])
def test_parts_of_a_batch_leave_the_means_of_the_whole(name, accumulate, tmp_path):
    schedule = Schedule(steps=4, batch=12, log_every=0, save_every=0)
    one, many = (
        make_trainer(MEANS[name], tmp_path, schedule=dataclasses.replace(schedule, accumulate=parts))
        for parts in (1, accumulate)
    )
    start = {key: value.clone() for key, value in all_tensors(one).items() if "/means/" in key}
    one.run(), many.run()
    ours, theirs = all_tensors(one), all_tensors(many)
    assert start and all(not torch.equal(ours[key], value) for key, value in start.items())
    assert_same(ours, theirs, rtol=1e-12, atol=1e-12)  # float64: only the order of sums differs


@pytest.mark.parametrize("name", MEANS)
def test_a_run_goes_on_with_its_means_bit_for_bit(name, tmp_path):
    schedule = Schedule(steps=5, batch=12, log_every=0, save_every=3, keep_last=2)
    whole = make_trainer(MEANS[name], tmp_path, schedule=schedule)
    whole.run()
    parts = make_trainer(MEANS[name], tmp_path, schedule=schedule)
    parts.resume(tmp_path / "checkpoints" / "step-00000003")
    middle = [key for key, value in all_tensors(parts).items() if "/means/" in key and (value != 1).any()]
    assert middle
    parts.run()
    assert_same(all_tensors(parts), all_tensors(whole), rtol=0, atol=0)


def test_a_checkpoint_without_means_is_refused_by_a_run_that_has_them(tmp_path):
    schedule = Schedule(steps=1, batch=12, log_every=0, save_every=1)
    off = Case("f_distill", {"ratio": 1, "ratio_normalised": False, "weight_normalised": False}, grid=(20.0,))
    make_trainer(off, tmp_path, schedule=schedule).run()
    later = make_trainer(MEANS["f_distill"], tmp_path, schedule=schedule)
    with pytest.raises(checkpoint.CheckpointError, match=r"no generator\.means"):
        later.resume(checkpoint.latest(tmp_path))
