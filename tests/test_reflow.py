"""Rectified flows against closed forms: Gaussian couplings, straightness, distillation, and a 2-D mixture."""

import copy
import math

import pytest
import torch
from cases import Case
from oracle import Affine, Mixture, Quadrature, denoiser, finite_set, gaussian
from test_dmd2 import CORNERS, Always, Batched, assert_reaches_the_law, start  # noqa: F401  a fixture
from torch import nn

from diffdistill.backbones.mlp import MLP
from diffdistill.denoiser import Backbone, Denoiser
from diffdistill.distances import Lpips, PseudoHuber, Squared
from diffdistill.generator import Generator
from diffdistill.method import Method, Networks, Sample
from diffdistill.methods.denoise import Denoise
from diffdistill.methods.reflow import Reflow
from diffdistill.methods.reflow_distill import ReflowDistill
from diffdistill.prediction import Prediction
from diffdistill.process import VE, VP, Process, Rectified, Trig
from diffdistill.rng import Rng
from diffdistill.solvers import at
from diffdistill.straightness import rectified, straightness
from diffdistill.teacher import Teacher
from diffdistill.times import Uniform

float64 = torch.float64
MEAN, K = 0.4, 0.5
PROCESSES = [VP.linear(sigma_data=0.7), VE(), Rectified(sigma_data=0.8), Rectified(shift=3.0), Trig(sigma_data=0.6)]
every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: f"{p}-{getattr(p, 'shift', '')}")


def line_velocity(x, t, correlation: float, k: float = K, mean: float = MEAN):
    """Of the coupling x0 = mean + k y, where y and eps are standard normal with this correlation: E[eps - x0 | x_t]."""
    variance = (1 - t) ** 2 * k**2 + t**2 + 2 * t * (1 - t) * k * correlation
    slope = t - (1 - t) * k**2 + (1 - 2 * t) * k * correlation
    return -mean + slope / variance * (x - (1 - t) * mean)


class Line(Backbone):
    """The flow of that coupling, for one number."""

    sample_shape, condition_names, num_classes = (1,), (), 0

    def __init__(self, correlation: float, k: float = K):
        super().__init__()
        self.correlation, self.k = correlation, k

    def forward(self, x, time, cond):
        return line_velocity(x, time[:, None] / 1000, self.correlation, self.k)

    def null(self, cond):
        raise ValueError("no unconditional branch")

    def blocks(self):
        return []


def line(correlation: float, k: float = K) -> Denoiser:
    return Denoiser(Line(correlation, k), Rectified(), Prediction.VELOCITY, clock="thousand")


def affine(process: Process, *, grid=None, mean=0.3, scale=1.2, **config) -> Reflow:
    """Reflow of the generator mean + scale x, in its process."""
    model = Denoiser(Affine(mean, scale, 1.0), process, Prediction.X0, clock="log_ratio")
    grid = (process.t_max,) if grid is None else grid
    return Reflow(Reflow.Config(**config), Networks(lambda: Generator(model, grid), None))


def trained(method: Reflow, ends, *, draws: int) -> Reflow:
    """The method at the minimum of its loss, which is quadratic in mean and scale, so that Newton's step leads there.

    Args:
        ends: the batch of a standard normal column, which the quadrature integrates over.
        draws: of further normal numbers, by the loss itself.
    """
    backbone = method.generator.denoiser.backbone
    rng = Quadrature(1 + draws, 12)
    weights, batch = rng.weights, ends(rng.normal((1,)))
    (term,) = method.plan(0)[0].terms
    value = (weights * term.loss(batch, rng).value).sum()
    parameters = (backbone.mean, backbone.scale)
    first = torch.stack(torch.autograd.grad(value, parameters, create_graph=True))
    second = torch.stack([torch.stack(torch.autograd.grad(one, parameters, retain_graph=True)) for one in first])
    with torch.no_grad():
        for parameter, move in zip(parameters, torch.linalg.solve(second, first), strict=True):
            parameter -= move
    return method


def paired(x):
    return {"pairs": Sample(x0=MEAN + K * x, noise=x)}


def unpaired(x):
    return {"images": Sample(x0=MEAN + K * x)}


@every_process
@pytest.mark.parametrize("time", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("coupling", ["independent", "pairs", "annealed"])
def test_the_loss_is_least_at_the_velocity_of_its_coupling(process, time, coupling):
    """G2 and U1, through every wrapper: the first flow, the second one, and the one annealed half way between."""
    config, ends, draws, correlation = {
        "independent": ({"coupling": "independent"}, unpaired, 1, 0.0),
        "pairs": ({}, paired, 0, 1.0),
        "annealed": ({"anneal_steps": 4}, paired, 1, 0.0),  # beta is 1 at the first step: wholly fresh noise
    }[coupling]
    method = trained(affine(process, times=Always(time), **config), ends, draws=draws)
    x, t = torch.linspace(-2, 2, 5, dtype=float64)[:, None], torch.full((5,), time, dtype=float64)
    ours = method.flow(x, t, to=Prediction.VELOCITY)
    torch.testing.assert_close(ours, line_velocity(x, t[:, None], correlation), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("step", range(5))
def test_annealed_noise_has_the_velocity_of_its_correlation(step):
    """U1: sqrt(1 - beta^2) of the pair's noise and beta of a fresh one correlate with the data by sqrt(1 - beta^2)."""
    method = affine(Rectified(), times=Always(0.3), anneal_steps=4)
    beta = [1.0, 0.75, 0.5, 0.25, 0.0][step]
    assert method.fresh_share(step) == beta
    plan = method.plan
    method.plan = lambda now: plan(step)
    trained(method, paired, draws=int(beta > 0))
    x, t = torch.linspace(-2, 2, 5, dtype=float64)[:, None], torch.full((5,), 0.3, dtype=float64)
    expected = line_velocity(x, t[:, None], math.sqrt(1 - beta**2))
    torch.testing.assert_close(method.flow(x, t, to=Prediction.VELOCITY), expected, rtol=1e-9, atol=1e-9)


def test_annealing_is_a_pure_function_of_the_step():
    linear, cosine = (affine(VE(), anneal_steps=8, anneal=rule).fresh_share for rule in ("linear", "cosine"))
    assert [linear(step) for step in (0, 2, 8, 9, 100)] == [1.0, 0.75, 0.0, 0.0, 0.0]
    assert [cosine(step) for step in (0, 8, 9)] == [1.0, 0.0, 0.0]
    assert cosine(4) == pytest.approx(math.sqrt(0.5), rel=1e-15)
    assert [affine(VE()).fresh_share(step) for step in (0, 5)] == [0.0, 0.0]


def test_one_step_of_the_first_flow_is_the_mean_of_any_data():
    """G1: the loss at t = 1 is least there, though the data are skewed; and so says the exact flow of points."""
    method = affine(Rectified(), times=Always(1.0), coupling="independent")
    trained(method, lambda x: {"images": Sample(x0=x**2 + 0.3 * x**3)}, draws=1)
    noise = torch.linspace(-3, 3, 7, dtype=float64)[:, None]
    made = method.generator.sample(noise, None, Rng(("none",), range(7)))
    torch.testing.assert_close(made, torch.ones_like(noise), rtol=1e-9, atol=1e-9)
    points = finite_set([[-1.0, 2.0], [0.5, 0.0], [3.0, 1.0]])
    exact = Generator(denoiser(points, Rectified()), (1.0,))
    noise = torch.randn(7, 2, generator=torch.Generator().manual_seed(0), dtype=float64)
    made = exact.sample(noise, None, Rng(("none",), range(7)))
    torch.testing.assert_close(made, points.mean.expand(7, 2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grid", [(1.0,), (1.0, 0.5), (1.0, 0.7, 0.1)], ids=str)
def test_one_step_of_the_second_flow_is_exact_and_so_are_more(grid):
    """G2, G3: from eps to the end of its pair, MEAN + K eps."""
    noise = torch.linspace(-3, 3, 7, dtype=float64)[:, None]
    made = Generator(line(1.0), grid, step_rule="euler").sample(noise, None, Rng(("none",), range(7)))
    torch.testing.assert_close(made, MEAN + K * noise, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("k", "digits"), [(0.5, 0.2146), (0.25, 0.1073), (0.8, 0.3434)])
def test_the_first_flow_of_a_gaussian_has_its_straightness(k, digits):
    """G4: k (2 - pi / 2). The error falls with the square of the steps, so that two of them tell the limit. At eps = 1
    the integrand is its mean."""
    model, noise = denoiser(gaussian([MEAN], [[k**2]]), Rectified()), torch.ones(1, 1, dtype=float64)
    coarse, fine = (straightness(model, noise, steps=steps).item() for steps in (200, 400))
    exact = k * (2 - math.pi / 2)
    assert (coarse - exact) / (fine - exact) == pytest.approx(4, abs=0.1)
    assert fine + (fine - coarse) / 3 == pytest.approx(exact, abs=1e-6)
    assert k * (2 - math.pi / 2) == pytest.approx(digits, abs=5e-5)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.6, 0.9, 1.0])
def test_an_annealed_flow_has_its_straightness(beta):
    """U2: k (2 (1 - sqrt(1 - beta^2)) - beta asin beta), from 0 of the second flow to k (2 - pi / 2) of the first."""
    expected = K * (2 * (1 - math.sqrt(1 - beta**2)) - beta * math.asin(beta))
    noise = torch.tensor([[1.0], [-1.0], [2.0]], dtype=float64)
    ours = straightness(line(math.sqrt(1 - beta**2)), noise, steps=400)
    # it grows with the square of the noise, along whose direction a trajectory bends
    assert ours.tolist() == pytest.approx([expected, expected, 4 * expected], abs=1e-4 if beta else 1e-24)


@pytest.mark.parametrize("process", [VP.linear(), VE(sigma_max=80.0), Trig(sigma_data=0.6)], ids=str)
def test_straightness_is_that_of_the_flow_whatever_the_process(process):
    """Up to what lies beyond the last noise level, where a network knows nothing: 1 / 81 of the time for EDM."""
    model, noise = denoiser(gaussian([0.0], [[K**2]]), process), torch.ones(1, 1, dtype=float64)
    assert straightness(model, noise, steps=200).item() == pytest.approx(K * (2 - math.pi / 2), abs=2e-3)


def test_two_points_make_a_flow_that_is_straight_after_one_reflow():
    """G5: in one dimension trajectories keep their order, so that the second flow of any data is straight; the first of
    this mixture has straightness 0.650 (0.651 in |eps| < 3), with a jump in eps, across which this is a sum."""
    law = Mixture([0.4, 0.6], [[-1.0], [1.5]], [[[0.15**2]], [[0.15**2]]])
    noise = torch.linspace(-6, 6, 2001, dtype=float64)[:, None]
    density = (-noise[:, 0].square() / 2).exp()
    first = straightness(denoiser(law, Rectified()), noise, steps=200)
    assert (density * first).sum() / density.sum() == pytest.approx(0.650, abs=2e-3)
    ends = Teacher(denoiser(law, Rectified())).solve(noise, (*Rectified().grid(200), 0.0))
    assert (ends[:, 0].diff() > 0).all()


@every_process
@pytest.mark.parametrize("source", [Prediction.X0, Prediction.EPS, Prediction.V, Prediction.F])
def test_a_teacher_of_any_kind_begins_as_its_exact_flow(process, source):
    """RF++'s start: the wrapped teacher's velocity is the closed form of a Gaussian, as far as its noise reaches."""
    model = denoiser(gaussian([MEAN], [[K**2]]), process, source, scaled=source is Prediction.F)
    flow = rectified(model)
    last = process.ratio(torch.tensor([process.t_max], dtype=float64)).clamp(max=1e4)
    t = torch.linspace(0.01, (last / (1 + last)).item(), 50, dtype=float64)
    x = torch.linspace(-2, 2, 50, dtype=float64)[:, None]
    expected = line_velocity(x, t[:, None], 0.0)
    # eps and v say little of x0 where alpha is 1e-4
    torch.testing.assert_close(flow(x, t, to=Prediction.VELOCITY), expected, rtol=1e-9, atol=1e-7)
    assert all(ours is theirs for ours, theirs in zip(flow.parameters(), model.parameters(), strict=True))


def network(process: Process) -> Denoiser:
    torch.manual_seed(0)
    backbone = MLP(width=16, depth=2).double()
    nn.init.normal_(backbone.leave.weight, std=0.1)
    return Denoiser(backbone, process, Prediction.F, clock="log_ratio", scale_input=True)


def draws(seed=0, count=8) -> Sample:
    rng = Rng((seed, "pairs"), range(count), dtype=float64)
    return Sample(x0=rng.normal((2,)), noise=rng.normal((2,)))


def test_the_first_loss_of_a_start_from_a_teacher_is_the_teachers_own_on_the_pairs():
    model = network(VE())
    method = Reflow(Reflow.Config(), Networks(lambda: Generator(copy.deepcopy(model), (80.0,)), None))
    pairs, rng = draws(), Rng((0,), range(8), dtype=float64)
    (term,) = method.plan(0)[0].terms
    loss = term.loss({"pairs": pairs}, rng)
    t = Uniform(1e-3)(Rng((0,), range(8), dtype=float64).uniform(), Rectified())
    sigma = t / (1 - t)
    x = pairs.x0 + sigma[:, None] * pairs.noise
    x0 = model(x, sigma)
    eps = (x - x0) / sigma[:, None]
    expected = (eps - x0 - (pairs.noise - pairs.x0)).square().mean(1)
    torch.testing.assert_close(loss.value, expected, rtol=1e-8, atol=0)  # 1 - t cancels digits near the noise


def test_with_independent_ends_it_is_flow_matching():
    """Bit for bit what `denoise` is in the space of velocities."""
    times = Uniform(1e-3)
    losses = []
    for kind, config in (
        (Reflow, {"coupling": "independent", "times": times}),
        (Denoise, {"space": Prediction.VELOCITY, "times": times}),
    ):
        method = kind(kind.Config(**config), Networks(lambda: Generator(network(Rectified()), (1.0,)), None))
        (term,) = method.plan(0)[0].terms
        losses.append(term.loss({"images": Sample(x0=draws().x0)}, Rng((0,), range(8), dtype=float64)).value)
    torch.testing.assert_close(*losses, rtol=1e-14, atol=0)


def test_the_terms_of_rf_plus_plus_are_added_with_their_weights():
    """(1 - t) w Huber(v) + d(x0) / t, by hand."""
    config = {
        "distance": PseudoHuber(0.03),
        "weight": 0.2,
        "fading": True,
        "sample_distance": Squared(),
        "sample_over_time": True,
    }
    method = Reflow(
        Reflow.Config(times=Always(0.3), **config), Networks(lambda: Generator(network(VP.linear()), (1000.0,)), None)
    )
    pairs = draws()
    (term,) = method.plan(0)[0].terms
    loss = term.loss({"pairs": pairs}, Rng((0,), range(8), dtype=float64))
    x_t = 0.7 * pairs.x0 + 0.3 * pairs.noise
    v = method.flow(x_t, at(0.3, x_t), to=Prediction.VELOCITY)
    huber = ((v - pairs.noise + pairs.x0).square().mean(1) + 0.03**2).sqrt() - 0.03
    off = (x_t - 0.3 * v - pairs.x0).square().mean(1)
    torch.testing.assert_close(loss.value, 0.7 * 0.2 * huber + off / 0.3, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.readings["velocity"], huber, rtol=1e-12, atol=0)


def test_the_straightness_is_logged_at_its_steps_alone():
    method = affine(Rectified(), straightness_every=3)
    logged = []
    for step in range(6):
        (term,) = method.plan(step)[0].terms
        pairs = {"pairs": Sample(x0=torch.zeros(2, 1, dtype=float64), noise=torch.ones(2, 1, dtype=float64))}
        logged.append(term.loss(pairs, Rng((step,), range(2), dtype=float64)).readings)
    assert ["straightness" in readings for readings in logged] == [False, False, True] * 2
    expected = straightness(method.generator.denoiser, torch.ones(2, 1, dtype=float64), steps=8, solver="euler")
    assert torch.equal(logged[2]["straightness"], expected)


def test_mirrored_pairs_are_mirrored_together_each_by_its_own_draw():
    columns = torch.arange(4.0, dtype=float64).expand(32, 3, 2, 4)
    for kind, method in (("reflow", {"times": Always(0.5)}), ("reflow_distill", {})):
        made = picture_case(kind, flip=True, **method)
        seen = []
        made.generator.denoiser.backbone.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        pairs = Sample(x0=columns, noise=10 + columns, cond={})
        made.plan(0)[0].terms[0].loss({"pairs": pairs}, Rng((0,), range(32), dtype=float64))
        (x,) = seen
        rising = (x.diff(dim=3) > 0).flatten(1)
        assert (rising.all(1) | ~rising.any(1)).all() and 5 < rising.all(1).sum() < 27


class Picture(Affine):
    """An affine generator of pictures."""

    def __init__(self):
        super().__init__(0.0, 0.1, 1.0)
        self.sample_shape = (3, 2, 4)


def picture_case(kind: str, **config) -> Method:
    def new() -> Denoiser:
        return Denoiser(Picture(), Rectified(), Prediction.X0, clock="thousand")

    kinds = {"reflow": Reflow, "reflow_distill": ReflowDistill}
    networks = Networks(lambda: Generator(new(), (1.0,)), None, Teacher(new()))
    return kinds[kind](kinds[kind].Config(**config), networks)


# Distillation: the generator M + A z, pairs (z, MEAN + K z), the exact first flow of N(MEAN, K^2) as teacher.
M, A = 0.3, 1.2


def distil(process: Process, grid=None, **config) -> ReflowDistill:
    grid = (process.t_max,) if grid is None else grid
    model = Denoiser(Affine(M, A, process.prior_std(grid[0])), process, Prediction.X0, clock="log_ratio")
    teacher = Teacher(denoiser(gaussian([MEAN], [[K**2]]), process))
    config = {"distance": Squared(), **config}
    networks = Networks(lambda: Generator(model, grid, step_rule="ddim"), None, teacher)
    return ReflowDistill(ReflowDistill.Config(**config), networks)


def gradients(value, method):
    backbone = method.generator.denoiser.backbone
    return [gradient.item() for gradient in torch.autograd.grad(value, [backbone.mean, backbone.scale])]


@every_process
def test_one_step_is_compared_with_the_end_of_its_pair(process):
    """The gradient of E (M - MEAN + (A - K) z)^2, the noise being what the process begins with."""
    method = distil(process)
    rng = Quadrature(1, 20)
    weights, z = rng.weights, rng.normal((1,))
    (term,) = method.plan(0)[0].terms
    batch = {"pairs": Sample(x0=MEAN + K * z, noise=z)}
    assert gradients((weights * term.loss(batch, rng).value).sum(), method) == pytest.approx(
        (2 * (M - MEAN), 2 * (A - K)), rel=1e-10
    )


@pytest.mark.parametrize("process", [VE(), VP.linear()], ids=str)
@pytest.mark.parametrize("led", ["student", "teacher"])
def test_the_guidance_leads_to_where_the_teacher_sees_the_line_end(process, led):
    """SlimFlow: made = M + A z; the teacher's x0 at the point of the line between z and made (or its own x0 there)."""
    method = distil(process, guided_weight=0.3, guided_times=Always(0.4), guided_from=led)
    regress, guide = method.plan(0)[0].terms
    assert (regress.name, guide.name, guide.player) == ("regress", "guide", "generator")
    rng = Quadrature(2, 20)
    z, weights = rng.nodes[1], rng.weights
    begin = torch.stack([rng.nodes[0], z])  # the uniform draw takes none of them; the first normal draw is the noise
    noise = begin[0]
    made = M + A * noise
    exact = method.teacher
    whole = at(method.generator.grid[0], noise)
    half = made if led == "student" else exact(method.generator.process.prior_std(whole[0].item()) * noise, whole)
    x, t = 0.6 * half + 0.4 * noise, 0.4
    target = x - t * line_velocity(x, t, 0.0)
    off = (made - target)[:, 0]
    expected = [0.6 * (weights * off * inner).sum().item() for inner in (1, noise[:, 0])]
    ours = gradients((weights * guide.loss({"pairs": Sample()}, rng).value).sum(), method)
    assert ours == pytest.approx(expected, rel=1e-9)


def test_a_teacher_whose_lines_are_straight_leads_an_exact_student_nowhere():
    """At the second flow the target of the guidance is what the student makes, whatever the time."""
    model = Denoiser(Affine(MEAN, K, 1.0), Rectified(), Prediction.X0, clock="thousand")
    networks = Networks(lambda: Generator(model, (1.0,)), None, Teacher(line(1.0)))
    method = ReflowDistill(ReflowDistill.Config(distance=Squared(), guided_weight=1.0), networks)
    _, guide = method.plan(0)[0].terms
    loss = guide.loss({"pairs": Sample()}, Rng((0,), range(50), dtype=float64))
    assert loss.value.max() < 1e-25


def test_at_several_times_the_generator_sees_what_its_sampling_sees_on_a_straight_line():
    """Pure noise at the first time, and at later ones the point of the line, in the generator's own process."""
    method = distil(VE(), grid=(80.0, 2.0, 0.5))
    seen = []
    method.generator.denoiser.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    rng = Rng((0,), range(60), dtype=float64)
    z = rng.fork("noise").normal((1,))
    (term,) = method.plan(0)[0].terms
    term.loss({"pairs": Sample(x0=MEAN + K * z, noise=z)}, rng)
    ((x, t, _),) = seen
    clean = torch.where(t == 80, 0.0, 1.0)[:, None] * (MEAN + K * z)
    assert torch.equal(x, clean + t[:, None] * z)
    counts = [int((t == time).sum()) for time in method.generator.grid]
    assert sum(counts) == 60 and min(counts) > 8


def test_the_noise_of_a_teachers_ode_lies_on_its_flow():
    """From sigma_max eps of EDM and from t eps of its flow, t = 80 / 81, one trajectory and one end."""
    model = denoiser(CORNERS, VE())
    eps = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=float64)
    times = VE().grid(60)
    flow_times = [sigma / (1 + sigma) for sigma in times]
    end = Teacher(model).solve(80 * eps, (*times, 0.0), solver="ddim")
    for solver in ("ddim", "euler"):
        ours = Teacher(rectified(model)).solve(80 / 81 * eps, (*flow_times, 0.0), solver=solver)
        torch.testing.assert_close(ours, end, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("message", "method", "options"),
    [
        ("method.weight must not be negative", "reflow", {"weight": -1.0}),
        ("method.anneal_steps must not be negative", "reflow", {"anneal_steps": -1}),
        ("method.weight=0 leaves no loss", "reflow", {"weight": 0.0}),
        ("sample_over_time is about sample_distance", "reflow", {"sample_over_time": True}),
        ("anneal_steps=3 is about pairs", "reflow", {"coupling": "independent", "anneal_steps": 3}),
        ("flip=True is about pairs.*data.flip", "reflow", {"coupling": "independent", "flip": True}),
        ("lpips compares pictures, not velocities", "reflow", {"distance": Lpips("file")}),
        ("guided_weight must not be negative", "reflow_distill", {"guided_weight": -1.0}),
        (r"flip mirrors pictures, and the samples have shape \(2,\)", "reflow", {"flip": True}),
        (r"flip mirrors pictures, and the samples have shape \(2,\)", "reflow_distill", {"flip": True}),
    ],
)
def test_settings_without_a_meaning_are_refused_by_name(message, method, options):
    with pytest.raises(ValueError, match=message):
        Case(method, options, grid=(20.0,), guidance=1.0).make()


@pytest.mark.parametrize("kind", [Reflow, ReflowDistill])
def test_steps_that_leave_the_flow_are_refused(kind):
    for rule, process, message in (
        ("renoise", VE(), "renoise leaves the lines.*step_rule=ddim"),
        ("euler", VP.linear(), "euler on VP is no Euler step of the flow"),
    ):
        networks = Networks(
            lambda rule=rule, process=process: Generator(network(process), (process.t_max, 1.0), step_rule=rule),
            None,
            Teacher(network(process)),
        )
        with pytest.raises(ValueError, match=message):
            kind(kind.Config(), networks)


def test_a_teacher_of_another_law_than_the_generators_is_refused():
    networks = Networks(lambda: Generator(network(VE()), (80.0,)), None, Teacher(network(VP.linear())))
    with pytest.raises(ValueError, match="the teacher speaks VP and the generator VE"):
        ReflowDistill(ReflowDistill.Config(), networks)
