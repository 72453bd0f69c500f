import math

import diffusers
import pytest
import torch
from oracle import processes

from diffdistill.process import VE, VP, Rectified, Trig

float64 = torch.float64


def zero_snr() -> VP:
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
    return VP(scheduler.alphas_cumprod.double())


LAWS = [*processes(), VP.scaled_linear(), VP.cosine(), zero_snr()]
NAMES = ["vp linear", "ve", "rectified", "trig", "vp scaled", "vp cosine", "vp zero snr"]
every_law = pytest.mark.parametrize("process", LAWS, ids=NAMES)


def times(process, number=2001):
    """Times inside (0, t_max), none of them an entry of a VP table, where the path has a kink."""
    return (torch.arange(number, dtype=float64) + 0.3719) / number * process.t_max


@every_law
def test_derivatives_are_those_of_autograd(process):
    t = times(process).requires_grad_(True)
    for value, derivative in ((process.alpha, process.d_alpha), (process.sigma, process.d_sigma)):
        (expected,) = torch.autograd.grad((value(t) + 0 * t).sum(), t)
        # both exact up to the rounding of float64; alpha of a cosine table falls to 5e-5, but its slope is not tiny
        torch.testing.assert_close(derivative(t), expected, rtol=1e-12, atol=1e-12)


def test_derivative_at_an_entry_of_the_table_is_the_mean_of_both_sides():
    process, entries, step = VP.linear(), torch.arange(2, 1000, dtype=float64), 1e-6
    for value, derivative in ((process.alpha, process.d_alpha), (process.sigma, process.d_sigma)):
        expected = (value(entries + step) - value(entries - step)) / (2 * step)
        # central difference: rounding 1e-16 / 1e-6, and second order in the step
        torch.testing.assert_close(derivative(entries), expected, rtol=1e-6, atol=1e-9)


@every_law
def test_time_of_inverts_the_ratio(process):
    t = torch.cat([torch.tensor([process.t_max * 1e-9], dtype=float64), times(process)])
    # relative: small times must keep their digits. Near an alpha of 0 the ratio itself only holds 1e-16 of t_max
    torch.testing.assert_close(process.time_of(process.ratio(t)), t, rtol=1e-10, atol=0)


@every_law
def test_time_of_ends_at_t_max_and_starts_at_zero(process):
    ratio = torch.tensor([0.0, math.inf], dtype=float64)
    assert process.time_of(ratio).tolist() == [0.0, process.t_max]


@every_law
def test_time_of_takes_float32_ratios(process):
    ratio = process.ratio(times(process, 50))
    exact = process.time_of(ratio)
    torch.testing.assert_close(process.time_of(ratio.float()).double(), exact, rtol=2e-5, atol=0)


@every_law
def test_the_data_is_free_of_noise_and_the_path_is_monotone(process):
    zero = torch.zeros(1, dtype=float64)
    assert process.alpha(zero) == 1 and process.sigma(zero) == 0
    t = torch.linspace(0, process.t_max, 4001, dtype=float64)
    assert (process.ratio(t).diff() > 0).all()


@every_law
def test_transition_composes_and_gives_the_law_of_perturb(process):
    generator = torch.Generator().manual_seed(0)
    t = torch.rand(3, 400, generator=generator, dtype=float64).sort(dim=0).values * 0.999 * process.t_max
    u, s, t = t
    a_su, b_su = process.transition(u, s)
    a_ts, b_ts = process.transition(s, t)
    a_tu, b_tu = process.transition(u, t)
    torch.testing.assert_close(a_ts * a_su, a_tu, rtol=1e-10, atol=0)
    torch.testing.assert_close(b_ts**2 + a_ts**2 * b_su**2, b_tu**2, rtol=1e-10, atol=1e-12)
    # x_s noised on is x0 noised at once: the mean's coefficient and the variance agree
    torch.testing.assert_close(a_ts * process.alpha(s), process.alpha(t), rtol=1e-12, atol=0)
    variance = a_ts**2 * process.sigma(s) ** 2 + b_ts**2
    torch.testing.assert_close(variance, process.sigma(t) ** 2, rtol=1e-10, atol=0)


@every_law
def test_transition_to_the_same_time_is_exactly_nothing_and_backwards_is_refused(process):
    t = times(process, 300)
    a, b = process.transition(t, t)
    assert (a == 1).all() and (b == 0).all()
    assert process.transition(t[1:], t[:-1])[1].isnan().all()
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        process.transition(t[:2], t[:3])


def test_transition_of_the_straight_path_has_its_published_numbers():
    s, t = torch.tensor([0.5], dtype=float64), torch.tensor([0.6], dtype=float64)
    a, b = Rectified().transition(s, t)
    assert a.item() == pytest.approx(0.8, rel=1e-12) and b.item() == pytest.approx(0.2**0.5, rel=1e-12)


@pytest.mark.parametrize(
    ("ours", "schedule", "options"),
    [
        (VP.linear(), "linear", {}),
        (VP.scaled_linear(), "scaled_linear", {"beta_start": 0.00085, "beta_end": 0.012}),
        (VP.cosine(), "squaredcos_cap_v2", {}),
    ],
    ids=["linear", "scaled_linear", "cosine"],
)
def test_tables_are_those_of_diffusers(ours, schedule, options):
    theirs = diffusers.DDPMScheduler(beta_schedule=schedule, **options).alphas_cumprod.double()
    t = torch.arange(1, 1001, dtype=float64)  # index n of the table is t = n + 1
    # theirs is a product of a thousand float32 numbers: up to 1000 roundings of 6e-8
    torch.testing.assert_close(ours.alpha(t) ** 2, theirs, rtol=6e-5, atol=0)
    torch.testing.assert_close(VP(theirs).alpha(t) ** 2, theirs, rtol=1e-11, atol=0)


def test_a_table_that_ends_at_zero_snr_ends_in_pure_noise():
    process = zero_snr()
    end = torch.tensor([1000.0], dtype=float64)
    assert process.ends_at_zero_snr
    assert process.alpha(end).item() == pytest.approx(0, abs=1e-16) and process.sigma(end).item() == 1
    assert process.d_alpha(end).item() < 0
    around = torch.tensor([999 - 1e-9, 999 + 1e-9], dtype=float64)
    assert process.alpha(around).diff().abs().item() < 1e-9  # continuous where the two rules meet


def test_tables_that_are_none_are_refused():
    for table in ([0.5], [0.5, 0.6], [1.0, 0.5], [0.5, -0.1], [[0.5, 0.4]]):
        with pytest.raises(ValueError, match="alphas_cumprod"):
            VP(table)


def test_grids_are_the_published_ones():
    assert VP.linear().grid(4) == (1000, 750, 500, 250)
    assert Rectified(shift=5).grid(4) == pytest.approx((1, 0.9375, 0.8333333333, 0.625), rel=1e-9)
    assert Rectified(shift=3).grid(4) == pytest.approx((1, 0.9, 0.75, 0.5), rel=1e-12)
    steps = 18
    karras = [(80 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(steps)]
    assert VE().grid(steps) == pytest.approx(karras, rel=1e-12)
    assert VE().grid(1) == pytest.approx((80,))
    assert Trig().grid(2) == pytest.approx((math.pi / 2, math.pi / 4))


@pytest.mark.parametrize("size", [0.3, 1.1, 1.7, 3.0, 7.3, 10.0, 13.7, 80.0])
def test_customary_times_end_exactly_at_t_max(size):
    """One rounding above it and a grid would be refused as outside the process."""
    for process in (VE(sigma_max=size), Rectified(shift=size), Trig(), VP.linear()):
        assert process.warp(torch.ones(1, dtype=float64)).item() == process.grid(3)[0] == process.t_max


def test_shift_multiplies_the_noise_to_signal_ratio():
    u = times(Rectified())
    plain, shifted = Rectified(), Rectified(shift=5)
    torch.testing.assert_close(shifted.ratio(shifted.warp(u)), 5 * plain.ratio(u), rtol=1e-11, atol=0)


def test_the_prior_is_the_noise_at_the_first_time():
    assert VE().prior_std(80.0) == 80 and VE().prior_std(2.5) == 2.5
    assert VP.scaled_linear().prior_std(1000.0) == 1  # not the last sigma of the table, 0.9977
    assert Rectified().prior_std(1.0) == 1 and Trig(sigma_data=0.5).prior_std(math.pi / 2) == 0.5


def test_stable_diffusions_noise_levels():
    """Index 625 of its table is the sigma of 2.5 at which SiD starts; each to the digits it is quoted with."""
    ratio = VP.scaled_linear().ratio(torch.tensor([400, 626, 1000], dtype=float64))
    assert ratio[:2].tolist() == pytest.approx([1.161, 2.502], abs=5e-4)
    assert ratio[2].item() == pytest.approx(14.6, abs=0.05)


def test_same_law_tells_laws_apart_and_ignores_the_spacing_of_times():
    assert Rectified(shift=5).same_law(Rectified())
    assert VP.linear().same_law(VP.linear(sigma_data=0.5))
    assert not VP.linear().same_law(VP.cosine())
    assert not VE().same_law(VE(sigma_max=100.0))
    assert not Trig().same_law(Trig(sigma_data=0.5))
    assert not Rectified().same_law(Trig())
    assert not Rectified().same_law(VE(sigma_max=1.0))  # one sigma and one t_max, another alpha
