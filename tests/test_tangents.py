"""The tangents of networks seen in TrigFlow: against closed forms, finite differences, and each other."""

import math
from pathlib import Path

import pytest
import torch
from oracle import denoiser, gaussian, point_mass
from small_networks import DIT, UNET, lively
from torch import nn

from diffdistill.backbones.diffusers import DiffusersBackbone
from diffdistill.backbones.mlp import MLP
from diffdistill.denoiser import Backbone, Denoiser
from diffdistill.networks import read_denoiser, recompute_activations
from diffdistill.prediction import Prediction
from diffdistill.process import VE, VP, Rectified, Trig, lift
from diffdistill.rng import Rng, drawn_from, replace_dropout
from diffdistill.tangents import Central, Exact, Rotational, Semi, directional

float64 = torch.float64
STD = 0.6
FAMILIES = {
    "vp-eps": (VP.linear(sigma_data=STD), Prediction.EPS, False),
    "vp-v": (VP.linear(sigma_data=STD), Prediction.V, False),
    "edm": (VE(sigma_data=STD), Prediction.F, True),
    "flow": (Rectified(sigma_data=STD), Prediction.VELOCITY, False),
    "trig": (Trig(sigma_data=STD), Prediction.F, True),
    "x0": (VE(sigma_data=STD), Prediction.X0, False),
}
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
MEAN, WIDTHS = torch.tensor([0.4, -0.9], dtype=float64), torch.tensor([0.3, 1.1], dtype=float64)
LAW = gaussian(MEAN.tolist(), torch.diag(WIDTHS**2).numpy())
TIMES = (0.02, 0.3, 0.8, 1.3, 1.55)


def seen(family: str, law=LAW) -> Denoiser:
    native, source, scaled = FAMILIES[family]
    return denoiser(law, Trig(sigma_data=STD), source, native=native, scaled=scaled)


def field_of(model: Denoiser, cond=None):
    return lambda x, t: model(x, t, cond, to=Prediction.VELOCITY)


def closed_form(x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """dx/dt and d^2x/dt^2 of the trajectory cos t m + c sqrt(v) through x, with v = k^2 cos^2 t + std^2 sin^2 t."""
    t, gap = t[:, None], STD**2 - WIDTHS**2
    v, first, second = WIDTHS**2 * t.cos() ** 2 + STD**2 * t.sin() ** 2, gap * (2 * t).sin(), 2 * gap * (2 * t).cos()
    c = (x - t.cos() * MEAN) / v.sqrt()
    velocity = -t.sin() * MEAN + c * first / (2 * v.sqrt())
    return velocity, -t.cos() * MEAN + c * (second / (2 * v.sqrt()) - first**2 / (4 * v**1.5))


def points(*times: float, number: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    t = torch.tensor(times, dtype=float64).repeat_interleave(number)
    return torch.randn(len(t), 2, generator=generator, dtype=float64), t


@EVERY_FAMILY
def test_a_wrapped_teacher_has_the_velocity_and_the_acceleration_of_the_closed_form(family):
    x, t = points(*TIMES)
    velocity, acceleration = closed_form(x, t)
    field = field_of(seen(family))
    torch.testing.assert_close(field(x, t), velocity, rtol=1e-9, atol=1e-11)  # near the ends eps and x0 lose digits
    along = Exact()(field, x, t, velocity)
    torch.testing.assert_close(along, lift(t.sin() * t.cos(), x) * acceleration, rtol=1e-8, atol=1e-9)


@EVERY_FAMILY
def test_a_wrapper_leaves_the_trajectories_of_the_ode_unchanged(family):
    """From one noisy sample of the native process: its own flow in closed form, and Runge-Kutta in TrigFlow."""
    native, _, _ = FAMILIES[family]
    model, process = seen(family), Trig(sigma_data=STD)
    x, start = points(1.4, number=4)
    time = native.time_of(process.ratio(start))
    grown = (native.alpha(time) ** 2 + native.sigma(time) ** 2).sqrt() / (
        start.cos() ** 2 + process.sigma(start) ** 2
    ).sqrt()
    expected = LAW.consistency(lift(grown, x) * x, native.alpha(time), native.sigma(time))
    field, steps, t = field_of(model), 200, start
    h = -(start - 1e-6) / steps
    for _ in range(steps):
        wide = lift(h, x)
        a = field(x, t)
        b = field(x + wide / 2 * a, t + h / 2)
        c = field(x + wide / 2 * b, t + h / 2)
        d = field(x + wide * c, t + h)
        x, t = x + wide / 6 * (a + 2 * b + 2 * c + d), t + h
    # the last 1e-6 is not walked: the velocity there is about 1
    torch.testing.assert_close(x, expected, rtol=0, atol=5e-6)


class Clock(Backbone):
    """Its output is what it is told about the time."""

    sample_shape, condition_names, num_classes = (1,), (), 0

    def forward(self, x, time, cond):
        return time[:, None].expand_as(x)

    def null(self, cond):
        raise ValueError("no unconditional branch")

    def blocks(self):
        return []


def test_the_time_of_an_edm_network_has_a_constant_tangent():
    """F = -R, and R is 250 log sigma here: sin t cos t dF/dt = -250 at every t, in units of sigma_data."""
    model = Denoiser(Clock(), VE(sigma_data=STD), Prediction.F, clock="edm", scale_input=True)
    _, t = points(0.001, *TIMES)
    x = torch.ones(len(t), 1, dtype=float64)
    along = Exact()(field_of(model.seen_in(Trig(sigma_data=STD))), x, t, x)
    torch.testing.assert_close(along, torch.full_like(x, -250 * STD), rtol=1e-9, atol=0)


@pytest.mark.parametrize("native", [VP.linear(), VP.cosine(), Rectified(), Rectified(shift=3.0), VE()], ids=str)
def test_a_native_time_moves_by_the_inverse_slope_of_its_log_ratio(native):
    """sin t cos t dtau/dt = 1 / psi'(tau), psi = log(sigma / alpha), whose slope is taken by autograd."""
    process = Trig(sigma_data=STD)
    t = torch.tensor([0.05, 0.4, 1.0, 1.5], dtype=float64)
    _, moved = directional(lambda x, t: native.time_of(process.ratio(t)), t, t, torch.zeros_like(t), t.sin() * t.cos())
    tau = native.time_of(process.ratio(t)).requires_grad_(True)
    (slope,) = torch.autograd.grad(native.ratio(tau).log().sum(), tau)
    torch.testing.assert_close(moved, 1 / slope, rtol=1e-9, atol=0)


class FullTimesteps(nn.Module):
    """The sinusoids of diffusers in the precision of the time; its own are in float32 whatever the network's, which a
    difference over 1e-4 amplifies ten thousand times."""

    def __init__(self, num_channels: int, flip_sin_to_cos: bool, downscale_freq_shift: float):
        super().__init__()
        half = num_channels // 2
        exponent = -math.log(10000) * torch.arange(half, dtype=float64) / (half - downscale_freq_shift)
        self.frequencies, self.flip = exponent.exp(), flip_sin_to_cos

    def forward(self, timesteps):
        angles = timesteps[:, None] * self.frequencies
        parts = [angles.cos(), angles.sin()] if self.flip else [angles.sin(), angles.cos()]
        return torch.cat(parts, dim=1)


def in_full_precision(model: nn.Module) -> None:
    from diffusers.models.embeddings import Timesteps

    for module in list(model.modules()):
        for name, part in module.named_children():
            if isinstance(part, Timesteps):
                full = FullTimesteps(part.num_channels, part.flip_sin_to_cos, part.downscale_freq_shift)
                x = torch.tensor([0.0, 3.5, 250.0])
                torch.testing.assert_close(full(x.double()), part(x).double(), rtol=0, atol=1e-4)
                setattr(module, name, full)


NETWORKS = {
    "mlp": lambda: MLP(width=16, depth=2, num_classes=3, dropout=0.2),
    "unet": lambda: DiffusersBackbone(_made("UNet2DModel", {**UNET, "dropout": 0.2, "num_class_embeds": 3})),
    "dit": lambda: DiffusersBackbone(_made("DiTTransformer2DModel", {**DIT, "dropout": 0.2})),
}


def _made(name: str, options: dict):
    import diffusers

    torch.manual_seed(0)
    return getattr(diffusers, name)(**options)


def assert_exact(model: Denoiser, dropouts=(), *, rtol: float = 1e-5) -> None:
    """The exact tangent against a central difference of fourth order in float64."""
    generator, count = torch.Generator().manual_seed(1), 3
    x, dx = torch.randn(2, count, *model.sample_shape, generator=generator, dtype=float64) * STD
    t = torch.tensor([0.2, 0.8, 1.4], dtype=float64)
    cond = {"label": torch.tensor([0, 1, 2])} if model.backbone.condition_names else None
    field, h = field_of(model.seen_in(Trig(sigma_data=STD)), cond), 1e-4
    with drawn_from(dropouts, Rng(("mask",), range(count), dtype=float64)):
        pace = t.sin() * t.cos()
        value, along = directional(field, x, t, lift(pace, x) * dx, pace)
        assert not (value.requires_grad or along.requires_grad)
        with torch.no_grad():
            near = {k: field(x + k * h * lift(pace, x) * dx, t + k * h * pace) for k in (-2, -1, 1, 2)}
            torch.testing.assert_close(value, field(x, t), rtol=1e-10, atol=1e-12)  # the very mask, and attention
    expected = (near[-2] - 8 * near[-1] + 8 * near[1] - near[2]) / (12 * h)
    assert (along - expected).flatten(1).norm(dim=1) == pytest.approx(0, abs=rtol * expected.norm().item())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("family", ["edm", "vp-eps", "flow"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_exact_tangent_of_a_network_is_its_finite_difference(name, family, training):
    """Attention and group normalisation included; in training with dropout, whose mask is one for value and tangent."""
    native, source, scaled = FAMILIES[family]
    clock = {"edm": "edm", "vp-eps": "steps", "flow": "thousand"}[family] if name != "mlp" else "log_ratio"
    model = Denoiser(lively(NETWORKS[name]()), native, source, clock=clock, scale_input=scaled).double()
    in_full_precision(model)
    dropouts = replace_dropout(model) if training else []
    model.train(training)
    assert len(dropouts) > 0 or not training
    assert_exact(model, dropouts)


def test_the_exact_tangent_of_the_shipped_teacher_is_its_finite_difference():
    model, _ = read_denoiser(Path(__file__).parents[1] / "checkpoints" / "fashion-edm")
    in_full_precision(model.double())
    assert_exact(model.eval())
    assert_exact(model.train())


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_recomputed_activations_leave_the_exact_tangent_as_it_is(name):
    clock = {"unet": "edm", "dit": "thousand"}[name]
    native, source, scaled = FAMILIES[{"unet": "edm", "dit": "flow"}[name]]
    model = Denoiser(lively(NETWORKS[name]()), native, source, clock=clock, scale_input=scaled).double().train()
    in_full_precision(model)
    dropouts = replace_dropout(model)
    recompute_activations(model)
    assert_exact(model, dropouts)


def errors(rule, law, *, step: float) -> torch.Tensor:
    x, t = points(0.3, 0.8, 1.3)
    model = seen("edm", law)
    velocity = model(x, t, to=Prediction.VELOCITY)
    exact = Exact()(field_of(model), x, t, velocity)
    return (rule(step)(field_of(model), x, t, velocity) - exact).norm()


@pytest.mark.parametrize(("rule", "order"), [(Rotational, 1), (Semi, 1), (Central, 2)])
def test_differences_have_their_order(rule, order):
    halved = errors(rule, LAW, step=0.02) / errors(rule, LAW, step=0.01)
    assert math.log2(halved) == pytest.approx(order, abs=0.05)


@pytest.mark.parametrize("rule", [Rotational, Central])
@pytest.mark.parametrize("step", [0.01, 0.5])
def test_differences_along_the_circle_are_exact_on_a_point_mass(rule, step):
    assert errors(rule, point_mass([0.3, -0.5]), step=step) < 1e-10  # rounding, 1 / step times as large


@pytest.mark.parametrize("step", [0.0, 0.6])
def test_a_step_that_reaches_the_ends_is_refused(step):
    with pytest.raises(ValueError, match=r"step must be in \(0, 0.5\]"):
        Central(step)


@pytest.mark.parametrize("step", [0.01, 0.5])
def test_a_central_difference_looks_no_further_ahead_than_it_says(step):
    t = torch.linspace(1e-4, math.pi / 2 - 1e-4, 999, dtype=float64)
    grown = (t + Central(step).spacing(t)).tan() / t.tan()
    assert grown.max() == pytest.approx(1 / (1 - Central(step).ahead), rel=1e-6)
