import itertools

import pytest
import torch
from oracle import meaning, processes

from diffdistill.prediction import Prediction, conversion, convert
from diffdistill.process import VE, Rectified, Trig

float64 = torch.float64
KINDS = list(Prediction)
every_process = pytest.mark.parametrize("process", processes(), ids=str)


def example(process, number=200, dimension=3):
    generator = torch.Generator().manual_seed(1)
    t = (0.01 + 0.98 * torch.rand(number, generator=generator, dtype=float64)) * process.t_max
    x0 = torch.randn(number, dimension, generator=generator, dtype=float64)
    eps = torch.randn(number, dimension, generator=generator, dtype=float64)
    return x0, eps, t, process.perturb(x0, eps, t)


@every_process
@pytest.mark.parametrize(("source", "to"), list(itertools.product(KINDS, KINDS)), ids=lambda kind: kind.value)
def test_convert_agrees_with_the_definitions(process, source, to):
    x0, eps, t, x_t = example(process)
    given, wanted = (meaning(kind, x0, x_t, t, process) for kind in (source, to))
    result = convert(given, x_t, t, process, source=source, to=to)
    # relative to the noise-to-signal ratio, up to 1e4 here, that separates eps from x0
    torch.testing.assert_close(result, wanted, rtol=1e-10, atol=1e-10)


@every_process
@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(KINDS, 2)), ids=lambda kind: kind.value)
def test_converting_there_and_back_changes_nothing(process, first, second):
    _, _, t, x_t = example(process)
    given = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(2), dtype=float64)
    there = convert(given, x_t, t, process, source=first, to=second)
    back = convert(there, x_t, t, process, source=second, to=first)
    torch.testing.assert_close(back, given, rtol=1e-10, atol=1e-10)


@every_process
def test_coefficients_say_what_a_prediction_is_made_of(process):
    x0, eps, t, x_t = example(process)
    for kind in KINDS:
        a, b = kind.coefficients(t, process)
        torch.testing.assert_close(a[:, None] * x0 + b[:, None] * eps, meaning(kind, x0, x_t, t, process))


def test_f_is_edms_preconditioning():
    """Karras et al. 2022, table 1: D = c_skip x + c_out F, with the constants written out."""
    process = VE(sigma_data=0.5)
    _, _, sigma, x = example(process)
    output = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=float64)
    s = sigma[:, None]
    c_skip = 0.5**2 / (s**2 + 0.5**2)
    c_out = s * 0.5 / (0.5**2 + s**2) ** 0.5
    ours = convert(output, x, sigma, process, source=Prediction.F, to=Prediction.X0)
    torch.testing.assert_close(ours, c_skip * x + c_out * output, rtol=1e-13, atol=1e-13)


def test_f_is_trigflows_network_up_to_its_sign():
    """Lu and Song 2024: f = cos(t) x - sin(t) sigma_data F; theirs is minus EDM's."""
    process = Trig(sigma_data=0.5)
    _, _, t, x = example(process)
    output = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=float64)
    theirs = t.cos()[:, None] * x - t.sin()[:, None] * 0.5 * output
    ours = convert(-output, x, t, process, source=Prediction.F, to=Prediction.X0)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_velocity_of_the_straight_path_is_noise_minus_data():
    x0, eps, t, x_t = example(Rectified())
    result = convert(eps - x0, x_t, t, Rectified(), source=Prediction.VELOCITY, to=Prediction.X0)
    torch.testing.assert_close(result, x_t - t[:, None] * (eps - x0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result, x0, rtol=1e-12, atol=1e-12)


@every_process
def test_bounded_predictions_convert_at_both_ends(process):
    ends = torch.tensor([0.0, process.t_max], dtype=float64)
    for source in (Prediction.V, Prediction.VELOCITY, Prediction.F):
        assert all(scalar.isfinite().all() for scalar in conversion(ends, process, source=source, to=Prediction.X0))


@every_process
def test_predictions_that_know_nothing_are_infinite_at_the_data(process):
    zero = torch.zeros(1, dtype=float64)
    for source, to in ((Prediction.X0, Prediction.EPS), (Prediction.EPS, Prediction.SCORE)):
        on_p, _ = conversion(zero, process, source=source, to=to)
        assert not on_p.isfinite().any()


@every_process
def test_every_prediction_of_a_float32_sample_is_float32(process):
    x0, eps, t, x_t = (tensor.float() if tensor.ndim == 2 else tensor for tensor in example(process))
    for source, to in itertools.product(KINDS, KINDS):
        assert convert(x0, x_t, t, process, source=source, to=to).dtype == torch.float32
