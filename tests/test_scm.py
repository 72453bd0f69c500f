"""sCM against closed forms: where its tangent vanishes, what it is elsewhere, and what it leads to."""

import copy

import pytest
import torch
from oracle import Mixture, denoiser, finite_set, gaussian, point_mass
from test_dmd2 import (
    CORNERS,
    assert_reaches_the_law,
    start,  # noqa: F401  a fixture
    train,
)
from test_tangents import FAMILIES, LAW, STD, Clock, points
from torch import nn

from diffdistill.backbones.mlp import MLP
from diffdistill.critic import Critic
from diffdistill.denoiser import CLOCKS, Denoiser
from diffdistill.generator import Generator
from diffdistill.losses import consistency_tangent, normalised_tangent
from diffdistill.method import Networks, Sample
from diffdistill.methods.continuous import ContinuousConsistency
from diffdistill.methods.scm import SCM
from diffdistill.methods.sct import SCT
from diffdistill.prediction import Prediction
from diffdistill.process import VE, Trig, lift
from diffdistill.rng import Rng, drawn_from, replace_dropout
from diffdistill.tangents import Central, Exact, Rotational, Semi, directional
from diffdistill.teacher import Teacher
from diffdistill.times import LogNormal, TimeSampler

float64 = torch.float64
AT_ONCE = {"warmup_steps": 0}
STUDENTS = pytest.mark.parametrize("family", [name for name in FAMILIES if name != "x0"])


def network(process=None, *, seed=0, std=STD, dropout=0.0) -> Denoiser:
    """A small network with random weights everywhere."""
    torch.manual_seed(seed)
    backbone = MLP(width=16, depth=2, dropout=dropout).double()
    nn.init.normal_(backbone.leave.weight, std=0.2)
    process = Trig(sigma_data=std) if process is None else process
    return Denoiser(backbone, process, Prediction.F, clock="log_ratio", scale_input=True)


def made(student: Denoiser, teacher: Denoiser | None, *, kind=SCM, guidance=1.0, **config) -> ContinuousConsistency:
    frozen = None if teacher is None else Teacher(teacher, guidance=guidance)
    networks = Networks(
        lambda: Generator(student, (student.process.t_max,)), lambda: Critic(copy.deepcopy(teacher)), frozen
    )
    return kind(kind.Config(**config), networks)


def exact_pair(law: Mixture, family: str, **config) -> SCM:
    """The exact consistency function as a student, and the exact teacher, both of one family."""
    native, source, scaled = FAMILIES[family]
    student = denoiser(law, native, source, scaled=scaled, answer="consistency")
    return made(student, denoiser(law, native, source, scaled=scaled), **config)


def tangent(method: ContinuousConsistency, x, t, *, step=10**9, velocity=None) -> torch.Tensor:
    """g of the method at points x, t of TrigFlow."""
    none = torch.zeros_like(x)
    velocity = method.velocity(x, t, none, none, {}) if velocity is None else velocity
    with torch.no_grad():
        student = method._student(x, t, {}, to=Prediction.VELOCITY)
        return method.tangent(x, t, velocity, student, {}, step)


@STUDENTS
def test_at_the_exact_consistency_function_the_tangent_vanishes(family):
    x, t = points(0.05, 0.7, 1.2, 1.5)
    assert tangent(exact_pair(LAW, family), x, t).abs().max() < 1e-8  # eps near pi / 2 divides by cos t


def test_and_it_does_on_a_law_whose_trajectories_bend():
    """A mixture in one dimension, whose consistency function is the monotone map."""
    law = Mixture([0.3, 0.7], [[-1.0], [0.8]], [[[0.1]], [[0.3]]])
    native, source, scaled = FAMILIES["edm"]
    student = denoiser(law, native, source, scaled=scaled, answer="consistency")
    x, t = points(0.3, 0.7, 1.2)
    # the oracle knows its own slope in x by the law of densities, and in t not at all: hence differences
    methods = (made(student, denoiser(law, native, source, scaled=scaled), tangents=Central(h)) for h in (0.02, 0.01))
    far, near = (tangent(method, x[:, :1], t).norm().item() for method in methods)
    assert far < 1e-4 and far / near == pytest.approx(4, abs=0.1)  # of step^2, and so 0 without it


@STUDENTS
def test_the_boundary_holds_in_every_family_but_x0(family):
    """f(x, t) - x = O(t) for a network that knows nothing: half the time, half the difference."""
    native, source, scaled = FAMILIES[family]
    torch.manual_seed(0)
    backbone = MLP(width=16, depth=2).double()
    nn.init.normal_(backbone.leave.weight)
    model = Denoiser(backbone, native, source, clock="thousand", scale_input=scaled)
    f = model.seen_in(Trig(sigma_data=STD))
    x, t = points(1e-5)
    # only the times of the coefficients shrink: the network's own goes on changing what it says
    far, near = (f(x, time) - x for time in (t, t / 100))
    assert near.norm() < 0.02 * far.norm() < 0.02 * 1e-3


def test_a_network_that_predicts_x0_is_refused():
    native, source, scaled = FAMILIES["x0"]
    student = denoiser(LAW, native, source, scaled=scaled, answer="consistency")
    with pytest.raises(ValueError, match="predicts x0, which at t = 0 is not x by itself.*start from a network with"):
        made(student, denoiser(LAW, native, source, scaled=scaled))


def test_the_tangent_is_cos_t_df_dt_along_the_teachers_trajectory():
    """For a network that knows nothing, df/dt by a central difference of fourth order."""
    method = made(network(), denoiser(LAW, VE(sigma_data=STD)), **AT_ONCE)
    x, t = points(0.2, 0.8, 1.4)
    dx, h = method.velocity(x, t, x, x, {}), 2e-4
    f = {k: method._student(x + k * h * dx, t + k * h, {}) for k in (-2, -1, 1, 2)}
    change = (f[-2] - 8 * f[-1] + 8 * f[1] - f[2]) / (12 * h)
    torch.testing.assert_close(tangent(method, x, t), (lift(t.cos(), x) * change).detach(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_warm_up_leaves_the_share_of_the_velocities_difference(share):
    """B2b: at the exact consistency function g_r = -(1 - r) cos^2 t (F - dx/dt)."""
    method = exact_pair(LAW, "edm", warmup_steps=1000)
    x, t = points(0.1, 0.7, 1.3)
    gap = method._student(x, t, {}, to=Prediction.VELOCITY) - method.velocity(x, t, x, x, {})
    expected = -(1 - share) * lift(t.cos() ** 2, x) * gap
    torch.testing.assert_close(tangent(method, x, t, step=int(1000 * share)), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("tangents", [Exact(), Rotational(0.3), Central(0.3)])
@pytest.mark.parametrize("step", [0, 3, 10])
def test_on_a_point_mass_the_tangent_vanishes_at_every_warm_up(step, tangents):
    """B4: teacher and consistency function are one network there."""
    one = denoiser(point_mass([0.3, -0.8]), VE(sigma_data=STD), Prediction.F, scaled=True)
    method = made(copy.deepcopy(one), one, warmup_steps=10, tangents=tangents)
    x, t = points(0.1, 0.7, 1.3)
    assert tangent(method, x, t, step=step).abs().max() < 1e-9


def test_the_warm_up_is_linear_and_ends():
    method = made(network(), denoiser(LAW, VE()), warmup_steps=4)
    assert [method.warmup(step) for step in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0]
    assert made(network(), denoiser(LAW, VE()), **AT_ONCE).warmup(0) == 1.0


@pytest.mark.parametrize("step", [0.05, 0.5])
def test_the_discrete_tangent_is_the_difference_of_the_ends_at_every_distance(step):
    """Q1: sin h g = cos t (f(x_t, t) - f(x_(t-h), t - h)), x_(t-h) by a DDIM step of the teacher."""
    method = made(network(), denoiser(LAW, VE(sigma_data=STD)), discrete=True, tangents=Rotational(step), **AT_ONCE)
    x, t = points(0.2, 0.8, 1.4)
    h = step * t.sin() * t.cos()
    before = method._guide.solve(x, (t, t - h), {}, solver="ddim")
    change = method._student(x, t, {}) - method._student(before, t - h, {})
    ours = lift(h.sin(), x) * tangent(method, x, t)
    torch.testing.assert_close(ours, (lift(t.cos(), x) * change).detach(), rtol=1e-10, atol=1e-12)


def test_the_discrete_tangent_comes_to_the_continuous_one_at_first_order():
    """Q2."""
    x, t = points(0.3, 0.8, 1.3)
    teacher = denoiser(LAW, VE(sigma_data=STD))
    exact = tangent(made(network(), teacher, **AT_ONCE), x, t)

    def error(step):
        config = AT_ONCE | {"discrete": True, "tangents": Rotational(step)}
        return (tangent(made(network(), teacher, **config), x, t) - exact).norm().item()

    assert error(0.01) / error(0.005) == pytest.approx(2, abs=0.05)


def gradients(value: torch.Tensor, model: Denoiser) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()), allow_unused=True)])


def test_the_weighted_distance_of_two_near_times_has_the_tangent_for_a_gradient():
    """Q3: |f(x_t) - sg f(x_(t-h))|^2 / (2 h sigma_data tan t) and -F . g have one gradient, as h goes to 0."""
    model = network()
    method = made(model, denoiser(LAW, VE(sigma_data=STD)), **AT_ONCE)
    x, t = points(0.3, 0.8, 1.3)
    g = tangent(method, x, t)
    ours = gradients(-(method._student(x, t, {}, to=Prediction.VELOCITY) / STD * g).sum(), model)

    def apart(h):
        before = method._guide.solve(x, (t, t - h), {}, solver="ddim")
        gap = method._student(x, t, {}) - method._student(before, t - h, {}).detach()
        theirs = gradients((gap.square().sum(1) / (2 * h * STD * t.tan())).sum(), model)
        return ((theirs - ours).norm() / ours.norm()).item()

    assert apart(1e-3) < 5e-3 and apart(1e-3) / apart(5e-4) == pytest.approx(2, abs=0.1)


def test_the_tangent_of_training_has_that_of_distillation_as_its_mean():
    """D1: over the pairs behind x_t; two points, whose weights behind x_t are known. Normalised it is not so (D2)."""
    law, model = finite_set([[1.0, 0.2], [-0.5, -0.8]]), network()
    distilled = made(model, denoiser(law, VE(sigma_data=STD)), **AT_ONCE)
    trained = made(model, None, kind=SCT, **AT_ONCE)
    x, t = points(1.0, 1.4)
    offset = x[:, None] - lift(t.cos(), x)[:, None] * law.means
    weights = torch.softmax(-offset.square().sum(2) / (2 * (STD * t.sin()) ** 2)[:, None], dim=1)
    assert (weights.min(dim=1).values > 0.1).sum() >= 3
    each = []
    for place in law.means:
        x0 = place.expand_as(x)
        z = (x - lift(t.cos(), x) * x0) / lift(t.sin(), x)
        each.append(tangent(trained, x, t, velocity=trained.velocity(x, t, x0, z, {})))
    goal = tangent(distilled, x, t)
    torch.testing.assert_close(sum(w[:, None] * g for w, g in zip(weights.T, each, strict=True)), goal)
    normalised = [normalised_tangent(g, by="l2", constant=0.1) for g in each]
    mean = sum(w[:, None] * g for w, g in zip(weights.T, normalised, strict=True))
    assert (mean - normalised_tangent(goal, by="l2", constant=0.1)).norm(dim=1).max() > 0.05


def test_the_tangent_is_in_the_datas_units():
    """Data and sigma_data k times as large: so is g before it is normalised, for the same network F."""
    k, (x, t) = 3.0, points(0.2, 0.8, 1.4)
    wide = gaussian((k * LAW.means[0]).tolist(), k**2 * LAW.covariances[0].numpy())
    small = made(network(), denoiser(LAW, Trig(sigma_data=STD)), **AT_ONCE)
    large = made(network(std=k * STD), denoiser(wide, Trig(sigma_data=k * STD)), **AT_ONCE)
    # the clock must not see sigma_data, as TrigFlow's own does not
    small._student.clock = large._student.clock = "thousand"
    torch.testing.assert_close(tangent(large, k * x, t), k * tangent(small, x, t), rtol=1e-10, atol=1e-12)


def test_a_guided_teacher_guides_the_trajectory():
    law = Mixture([0.5, 0.5], [[-1.0, 0.0], [1.0, 0.5]], [[[0.1, 0.0], [0.0, 0.2]]] * 2)
    teacher = denoiser(law, VE(sigma_data=STD))
    method = made(network(), teacher, guidance=3.0, **AT_ONCE)
    x, t = points(0.5, 1.0)
    cond = {"label": torch.arange(len(x)) % 2}
    both = [
        teacher.seen_in(method.process)(x, t, c, to=Prediction.VELOCITY) for c in (cond, teacher.backbone.null(cond))
    ]
    torch.testing.assert_close(method.velocity(x, t, x, x, cond), both[1] + 3 * (both[0] - both[1]), rtol=1e-10, atol=0)


class Noisiest(TimeSampler):
    """All times beyond the last."""

    def __call__(self, u, process):
        return torch.full_like(u, 1.5707)


@pytest.mark.parametrize("tangents", [Exact(), Rotational(0.05), Central(0.05), Semi(0.05)])
@STUDENTS
def test_at_the_noisiest_time_the_clock_still_moves(family, tangents):
    """A network that says its time: beyond the last its native time stands still, and so would the derivative."""
    native, source, scaled = FAMILIES[family]
    model = Denoiser(Clock(), native, source, clock="log_ratio", scale_input=scaled)
    method = made(model, denoiser(LAW, native), times=Noisiest(), tangents=tangents)
    t = method.config.times(torch.ones(1, dtype=float64), method.process).clamp(max=method._last)
    one = torch.ones(1, 1, dtype=float64)

    def time(x, t):
        return CLOCKS["log_ratio"](native.time_of(method.process.ratio(t)), native)[:, None]

    assert 4 * tangents(time, one, t, 0 * one) == pytest.approx(1.0, rel=0.2)  # d log ratio / d log tan t


SLOTS = range(5)


def term(method: ContinuousConsistency, number: int = 0, *, step: int = 0):
    return method.plan(step)[0].terms[number]


def draws(*key) -> Rng:
    return Rng((0, *key), SLOTS, dtype=float64)


def batch() -> dict[str, Sample]:
    return {"images": Sample(x0=draws("data").normal((2,)))}


@pytest.mark.parametrize(("by", "size"), [("l2", 1.0), ("rms", 0.5), ("clip", 0.5), ("none", 0.5)])
def test_the_gradient_of_the_loss_is_the_normalised_tangent_through_the_network(by, size):
    """-2 (dF/dtheta) . g, in the norm that g is normalised by: a sum over a sample, or its mean."""
    model = network(VE(sigma_data=STD))
    method = made(model, denoiser(LAW, VE(sigma_data=STD)), normalisation=by, constant=0.3, **AT_ONCE)
    loss = term(method).loss(batch(), draws("loss"))
    ours = gradients(loss.value.sum(), model)
    rng = draws("loss")
    t = method.config.times(rng.uniform(), method.process)
    x_t = method.process.perturb(batch()["images"].x0, rng.normal((2,)), t)
    raw = tangent(method, x_t, t)
    norms = raw.norm(dim=1, keepdim=True)
    g = {
        "l2": raw / (norms + 0.3),
        "rms": raw / (norms / 2**0.5 + 0.3),
        "clip": raw.clamp(-1, 1),
        "none": raw,
    }[by]
    torch.testing.assert_close(loss.value, size * g.square().sum(1), rtol=1e-10, atol=0)
    F = method._student(x_t, t, {}, to=Prediction.VELOCITY) / STD
    torch.testing.assert_close(ours, gradients(-2 * size * (F * g).sum(), model), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("by", ["l2", "rms", "clip", "none"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e200])
def test_a_tangent_that_is_not_finite_is_never_made_so(by, value):
    """Nor one whose norm overflows, of which 0 would be left; the other samples are as they were."""
    g = torch.tensor([[0.3, value], [0.1, -0.2]], dtype=float64)
    ours = normalised_tangent(g, by=by, constant=0.1)
    assert ours[0].isnan().all()
    torch.testing.assert_close(ours[1:], normalised_tangent(g[1:], by=by, constant=0.1), rtol=0, atol=0)


def test_value_and_tangent_have_one_dropout_mask():
    """With half of the units dropped: the value that the tangent's pass has is the one that carries the gradient."""
    model = network(dropout=0.5)
    method = made(model, denoiser(LAW, VE(sigma_data=STD)), **AT_ONCE)
    dropouts = replace_dropout(model)
    x, t = points(0.4, 1.0)

    def field(x, t):
        return method._student(x, t, {}, to=Prediction.VELOCITY)

    with drawn_from(dropouts, Rng(("mask",), range(len(x)), dtype=float64)):
        first, value = tangent(method, x, t), field(x, t).detach()
        primal, _ = directional(field, x, t, x, t)
        assert torch.equal(tangent(method, x, t), first)
    torch.testing.assert_close(primal, value, rtol=1e-12, atol=1e-14)
    with drawn_from(dropouts, Rng(("another",), range(len(x)), dtype=float64)):
        assert not torch.allclose(tangent(method, x, t), first)
        assert not torch.allclose(field(x, t), value)


def test_the_weight_learns_minus_the_logarithm_of_the_error():
    """Both terms: the generator's loss is e^w E, and that of the weight is at rest where w = -log E."""
    method = made(network(), denoiser(LAW, VE(sigma_data=STD)), adaptive=True, **AT_ONCE)
    assert list(method.players()) == ["generator", "weight"]
    plain = made(network(), denoiser(LAW, VE(sigma_data=STD)), **AT_ONCE)
    expected = term(plain).loss(batch(), draws("loss")).value
    nn.init.constant_(method.weight.sum.bias, 0.7)
    update = method.plan(0)[0]
    value = update.terms[0].loss(batch(), draws("loss")).value
    torch.testing.assert_close(value, expected * torch.tensor(0.7).double().exp())
    torch.testing.assert_close(
        update.terms[1].loss(batch(), draws("weigh")).value, value.detach() - 0.7, rtol=1e-7, atol=0
    )
    nn.init.constant_(method.weight.sum.bias, -expected.mean().log().item())
    update.terms[0].loss(batch(), draws("loss"))
    rest = update.terms[1].loss(batch(), draws("weigh")).value.mean()
    (slope,) = torch.autograd.grad(rest, method.weight.sum.bias)
    assert abs(slope.item()) < 1e-7


def test_the_prior_weight_is_once_more_alpha_over_sigma():
    plain, prior = (made(network(), denoiser(LAW, VE(sigma_data=STD)), prior=flag, **AT_ONCE) for flag in (False, True))
    t = plain.config.times(draws("loss").uniform(), plain.process)
    values = [term(method).loss(batch(), draws("loss")).value for method in (plain, prior)]
    torch.testing.assert_close(values[1], values[0] / (STD * t.tan()))


def test_training_reads_no_teacher_and_its_velocity_is_that_of_the_pair():
    method = made(network(), None, kind=SCT, **AT_ONCE)
    x0, t = points(0.3, 1.2)
    z = torch.randn(x0.shape, generator=torch.Generator().manual_seed(3), dtype=float64)
    path = torch.func.jvp(lambda t: lift(t.cos(), x0) * x0 + lift(t.sin(), x0) * z, (t,), (torch.ones_like(t),))
    torch.testing.assert_close(method.velocity(path[0], t, x0, z, {}), path[1])
    assert term(method).loss(batch(), draws("loss")).value.isfinite().all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"warmup_steps": -1}, "method.warmup_steps must not be negative, got -1; 0 is no warm-up"),
        ({"constant": 0.0}, "method.constant must be positive"),
        ({"discrete": True}, "method.discrete compares two times.*rotational, step: 0.1"),
        ({"discrete": True, "tangents": Semi()}, "method.discrete compares two times"),
    ],
)
def test_settings_without_a_meaning_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        SCM.Config(**config)


def test_a_consistency_function_is_no_field_to_follow():
    model = network(VE())
    networks = Networks(
        lambda: Generator(model, (80.0, 1.0), step_rule="heun"), lambda: Critic(model), Teacher(denoiser(LAW, VE()))
    )
    with pytest.raises(ValueError, match="generator.step_rule=heun follows an ODE.*give step_rule: renoise"):
        SCM(SCM.Config(), networks)


def test_the_tangent_refuses_an_unknown_norm():
    with pytest.raises(ValueError, match="l2, rms, clip or none, got 'max'"):
        normalised_tangent(torch.ones(1, 2), by="max", constant=0.1)


def test_the_tangent_keeps_no_graph():
    x = torch.ones(2, 2, requires_grad=True)
    assert not consistency_tangent(x, x, x, x, torch.ones(2, dtype=float64)).requires_grad


TOY = {"warmup_steps": 100, "times": LogNormal(-0.4, 1.6)}


@pytest.mark.parametrize(
    ("steps", "rate", "config"),
    [
        (1000, 1e-3, {}),
        (600, 2e-3, {"tangents": Rotational(0.1), "discrete": True}),
        (800, 2e-3, {"tangents": Central(0.1)}),
    ],
    ids=["exact", "discrete", "central"],
)
def test_scm_reaches_the_law_of_an_exact_teacher_in_one_step_and_in_two(start, steps, rate, config):  # noqa: F811
    """Mean and covariance within 5 percent, and every mode with its share, by one network for both."""
    student = copy.deepcopy(start)
    method = made(student, denoiser(CORNERS, student.process), **TOY, **config)
    train(method, steps, generator=rate)
    for grid in ((10.0,), (10.0, 1.0)):
        assert_reaches_the_law(Generator(student, grid))
