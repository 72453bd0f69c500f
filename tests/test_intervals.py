"""Scores inside a noise interval: transitions, targets and losses against closed forms and quadrature."""

import pytest
import torch
from oracle import Quadrature, denoiser, gaussian, processes

from diffdistill.intervals import Interval
from diffdistill.losses import denoising
from diffdistill.prediction import Prediction, convert
from diffdistill.process import VE, Rectified
from diffdistill.rng import Rng
from diffdistill.times import LogNormal, Uniform, UShaped

float64 = torch.float64
PROCESSES = pytest.mark.parametrize("process", processes(), ids=str)
SPACES = pytest.mark.parametrize("space", list(Prediction), ids=lambda space: space.value)


def times(process, *shares) -> list[torch.Tensor]:
    return [process.t_max * torch.tensor([share], dtype=float64) for share in shares]


@PROCESSES
def test_transitions_compose(process):
    u, s, t = times(process, 0.21, 0.48, 0.77)
    (a_ts, b_ts), (a_su, b_su), (a_tu, b_tu) = (process.transition(*pair) for pair in ((s, t), (u, s), (u, t)))
    torch.testing.assert_close(a_ts * a_su, a_tu, rtol=1e-12, atol=0)
    torch.testing.assert_close(b_ts**2 + a_ts**2 * b_su**2, b_tu**2, rtol=1e-12, atol=0)


def test_the_numbers_of_a_rectified_flow():
    """s = 0.5, t = 0.6."""
    interval, t = Interval(Rectified(), 0.5), torch.tensor([0.6], dtype=float64)
    assert [coefficient.item() for coefficient in interval.transition(t)] == pytest.approx((0.8, 0.4472136), abs=5e-8)
    one, zero = torch.ones(1, 1, dtype=float64), torch.zeros(1, 1, dtype=float64)
    assert interval.target(zero, one, t, Prediction.VELOCITY).item() == pytest.approx(2.236068, abs=5e-7)
    assert interval.target(one, zero, t, Prediction.VELOCITY).item() == pytest.approx(-2, rel=1e-14)


def test_the_regression_onto_the_target_is_unbiased_and_the_naive_one_is_not():
    """Data N(0, 0.7) on a rectified flow, s = 0.5, t = 0.6: the slope of the velocity on x_t, by quadrature."""
    process, rng = Rectified(), Quadrature(3, 6)
    interval = Interval(process, 0.5)
    s, t = (torch.full((len(rng.weights),), time, dtype=float64) for time in (0.5, 0.6))
    x_s, eps = process.perturb(0.7**0.5 * rng.normal((1,)), rng.normal((1,)), s), rng.normal((1,))
    x_t = interval.perturb(x_s, eps, t)

    def slope(target):
        weights = rng.weights[:, None]
        return ((weights * target * x_t).sum() / (weights * x_t**2).sum()).item()

    assert slope(interval.target(x_s, eps, t, Prediction.VELOCITY)) == pytest.approx(0.6779661, abs=5e-8)
    assert slope(interval.target(x_s, eps, t, Prediction.VELOCITY)) == pytest.approx(0.32 / 0.472, rel=1e-12)
    assert slope(eps - x_s) == pytest.approx(0.2271474, abs=5e-8)


@PROCESSES
@SPACES
@pytest.mark.parametrize("clean", [False, True], ids=["a law that is not noised data", "noised data"])
def test_the_targets_mean_is_the_prediction_of_the_diffused_law(process, space, clean):
    """Regression of the target onto x_t and 1 gives the exact denoiser's answer, for a Gaussian x_s of any variance.

    The narrow one has less variance than the noise at s alone, so that no clean law leads to it.
    """
    (s,), (t,) = times(process, 0.4), times(process, 0.7)
    alpha_s, sigma_s = process.alpha(s), process.sigma(s)
    variance = (alpha_s**2 * 0.5 + sigma_s**2) if clean else 0.3 * sigma_s**2
    rng = Quadrature(2, 6)
    interval, at_t = Interval(process, s.item()), t.expand(len(rng.weights))
    x_s, eps = 0.4 + variance.sqrt() * rng.normal((1,)), rng.normal((1,))
    x_t = interval.perturb(x_s, eps, at_t)
    target = interval.target(x_s, eps, at_t, space)
    a, b = interval.transition(t)
    score = -(x_t - a * 0.4) / (a**2 * variance + b**2)
    expected = convert(score, x_t, at_t, process, source=Prediction.SCORE, to=space)
    design = torch.cat([x_t, torch.ones_like(x_t)], dim=1) * rng.weights[:, None].sqrt()
    fitted, wanted = (torch.linalg.lstsq(design, rng.weights[:, None].sqrt() * y).solution for y in (target, expected))
    torch.testing.assert_close(fitted, wanted, rtol=1e-8, atol=1e-9 * wanted.abs().max().item())


@PROCESSES
@SPACES
def test_all_targets_are_one_target_converted(process, space):
    """An identity for every pair (x_s, eps), without any expectation."""
    rng = Rng((0,), range(7), dtype=float64)
    interval, t = Interval(process, 0.4 * process.t_max), process.t_max * (0.45 + 0.5 * rng.uniform())
    x_s, eps = rng.normal((3,)), rng.normal((3,))
    x_t, score = interval.perturb(x_s, eps, t), interval.target(x_s, eps, t, Prediction.SCORE)
    b = interval.transition(t)[1][:, None]
    torch.testing.assert_close(score, -eps / b, rtol=1e-12, atol=0)
    ours = interval.target(x_s, eps, t, space)
    torch.testing.assert_close(
        ours, convert(score, x_t, t, process, source=Prediction.SCORE, to=space), rtol=1e-8, atol=1e-10
    )


@PROCESSES
@SPACES
def test_above_the_data_it_is_denoising(process, space):
    """At s = 0 samples are clean: the same noisy samples, the same targets, the same loss, bit for bit."""
    rng = Rng((0,), range(7), dtype=float64)
    interval, t = Interval(process, 0.0, margin=0.02), Uniform(0.05, 0.95)(rng.uniform(), process)
    x0, eps = rng.normal((1,)), rng.normal((1,))
    assert torch.equal(interval.perturb(x0, eps, t), process.perturb(x0, eps, t))
    a, b = space.coefficients(t, process)
    assert torch.equal(interval.target(x0, eps, t, space), a[:, None] * x0 + b[:, None] * eps)
    critic = denoiser(gaussian([0.3], [[0.4]]), process)
    ours = interval.denoising(critic, x0, eps, t, None, space=space, clamp=None)
    assert torch.equal(ours, denoising(critic, x0, eps, t, None, space=space))


@PROCESSES
@SPACES
def test_the_clamped_weight_is_the_smaller_of_one_and_ten_times_the_added_variance(process, space):
    """b as a share of alpha + sigma, which on a rectified flow is 1."""
    rng = Rng((0,), range(9), dtype=float64)
    interval, t = Interval(process, 0.4 * process.t_max), process.t_max * (0.401 + 0.5 * rng.uniform())
    x_s, eps, critic = rng.normal((2,)), rng.normal((2,)), denoiser(gaussian([0.3, 0.1], [[0.4, 0], [0, 1]]), process)
    clamped, plain = (interval.denoising(critic, x_s, eps, t, None, space=space, clamp=c) for c in (10.0, None))
    share = interval.transition(t)[1] / (process.alpha(t) + process.sigma(t))
    torch.testing.assert_close(clamped / plain, (10 * share**2).clamp(max=1), rtol=1e-8, atol=0)
    if isinstance(process, Rectified):
        torch.testing.assert_close(share, interval.transition(t)[1], rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, float64], ids=str)
def test_the_clamped_loss_is_finite_down_to_the_edge(dtype):
    interval = Interval(Rectified(), 0.5)
    t = torch.cat([torch.tensor([0.5], dtype=float64), 0.5 + torch.logspace(-16, -1, 16, dtype=float64)])
    x_s, eps = torch.ones(len(t), 2, dtype=dtype), torch.ones(len(t), 2, dtype=dtype)
    critic = denoiser(gaussian([0.0, 0.0], torch.eye(2)), interval.process)
    value = interval.denoising(critic, x_s, eps, t, None, space=Prediction.VELOCITY, clamp=10.0)
    assert value.isfinite().all() and value.dtype == dtype and value.max() < 100


@PROCESSES
@pytest.mark.parametrize("law", [Uniform(0.02, 0.98), LogNormal(), UShaped()], ids=lambda law: type(law).__name__)
def test_restricted_times_are_those_above_the_edge_in_the_same_proportions(process, law):
    """The restricted law's quantile p is the whole law's quantile below + p (1 - below)."""
    u = torch.linspace(0.001, 0.999, 999, dtype=float64)
    whole = law(u, process)
    edge = law(torch.tensor([0.6], dtype=float64), process).item()
    ours = Interval(process, edge).restricted(law)(u, process)
    assert (ours >= edge).all() and (ours <= process.t_max).all()
    torch.testing.assert_close(ours, law(0.6 + 0.4 * u, process), rtol=1e-9, atol=0)
    assert torch.equal(Interval(process, 0.0).restricted(law)(u, process), whole)


def test_a_margin_is_a_share_of_the_customary_spacing_and_the_data_needs_none():
    process = VE()
    edge = process.warp(torch.tensor([0.5], dtype=float64)).item()
    restricted = Interval(process, edge, margin=0.02).restricted(Uniform())
    lowest = process.warp(torch.tensor([0.52], dtype=float64))
    torch.testing.assert_close(restricted(torch.tensor([1e-12], dtype=float64), process), lowest, rtol=1e-9, atol=0)
    assert Interval(process, 0.0, margin=0.02).lowest == 0


@pytest.mark.parametrize(
    ("message", "make"),
    [
        (r"edge must lie in \[0, 1\) on Rectified, got 1", lambda: Interval(Rectified(), 1.0)),
        ("margin must lie in", lambda: Interval(Rectified(), 0.5, margin=1.0)),
        ("leaves no times", lambda: Interval(Rectified(), 0.9, margin=0.2)),
        ("has no times above 0.9", lambda: Interval(Rectified(), 0.9).restricted(Uniform(0.0, 0.8))),
    ],
)
def test_intervals_without_times_are_refused(message, make):
    with pytest.raises(ValueError, match=message):
        make()
