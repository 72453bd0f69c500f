import math

import pytest
import torch
from oracle import processes

from diffdistill.process import VE, VP, Rectified, Trig
from diffdistill.times import LogNormal, Uniform, UShaped

U = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000  # an even net: averages are integrals
every_process = pytest.mark.parametrize("process", processes(), ids=str)


@every_process
@pytest.mark.parametrize("sampler", [Uniform(0.02, 0.98), LogNormal(), UShaped()], ids=lambda s: type(s).__name__)
def test_times_are_inside_and_increase_with_u(process, sampler):
    t = sampler(U, process)
    assert t.shape == U.shape and t.dtype == torch.float64
    assert (t > 0).all() and (t <= process.t_max).all()
    assert (t.diff() >= 0).all()


def test_uniform_draws_the_karras_levels_on_ve():
    """The ends of DMD2's generator times: levels 20 and 980 of 1000, sigma 0.00323 and 72.05 in its code; the levels
    there are counted over 999 intervals, so that ours, at 2 and 98 percent, lie within a thousandth of the way."""
    low, high = Uniform(20 / 999, 980 / 999)(torch.tensor([0.0, 1.0], dtype=torch.float64), VE()).tolist()
    assert low == pytest.approx(0.00323, abs=5e-6) and high == pytest.approx(72.05, abs=5e-3)


def test_uniform_is_uniform_over_the_steps_of_vp_and_shifted_on_a_shifted_flow():
    torch.testing.assert_close(Uniform()(U, VP.linear()), 1000 * U)
    torch.testing.assert_close(Uniform()(U, Rectified(shift=5)), 5 * U / (1 + 4 * U))


@every_process
def test_log_normal_has_the_moments_of_its_log_ratio(process):
    ratio = process.ratio(LogNormal(-0.4, 0.8)(U, process)).log()
    assert ratio.mean().item() == pytest.approx(-0.4, abs=1e-5)
    assert ratio.std().item() == pytest.approx(0.8, abs=1e-3)  # the net cuts the tails off at 4.4 deviations


def test_log_normal_is_the_published_time_law_of_trigflow_and_of_a_flow():
    normal = torch.special.ndtri(U)
    torch.testing.assert_close(LogNormal(-1, 1.4)(U, Trig(sigma_data=0.5)), ((-1 + 1.4 * normal).exp() / 0.5).atan())
    torch.testing.assert_close(LogNormal(0, 1)(U, Rectified()), normal.sigmoid())


def test_u_shape_has_its_density():
    t = UShaped(4.0)(U, Rectified())
    density = torch.histc(t, bins=50, min=0, max=1) / len(t) * 50
    middle = (torch.arange(50, dtype=torch.float64) + 0.5) / 50
    expected = 4 * (4 * (middle - 0.5)).cosh() / (2 * math.sinh(2))
    torch.testing.assert_close(density, expected, rtol=1e-2, atol=0)  # bins of width 1/50


def test_nonsense_is_refused():
    for make in (lambda: Uniform(0.5, 0.5), lambda: Uniform(-0.1, 1), lambda: LogNormal(0, 0), lambda: UShaped(0)):
        with pytest.raises(ValueError, match="needs"):
            make()
