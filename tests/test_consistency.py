"""Consistency models against closed forms: the exact function has no residual, and the boundary makes it unique."""

import copy
import math
from dataclasses import dataclass

import pytest
import torch
from cases import CASES, make_trainer
from oracle import Affine, Quadrature, denoiser, finite_set, gaussian, point_mass, processes
from test_dmd2 import CORNERS, Batched, assert_reaches_the_law, distilled, start, train  # noqa: F401  start is a fixture
from torch import Tensor, nn

from diffdistill.backbones.mlp import MLP
from diffdistill.denoiser import Backbone, Denoiser
from diffdistill.distances import Absolute, PseudoHuber, Squared
from diffdistill.generator import Generator
from diffdistill.method import Networks, Sample
from diffdistill.methods.consistency import Consistency, ConsistencyConfig, ConsistencyMethod, ConsistencyTraining
from diffdistill.prediction import Prediction
from diffdistill.process import VE, VP
from diffdistill.rng import Rng, drawn_from
from diffdistill.teacher import Teacher
from diffdistill.time_pairs import (
    ContinuousPairs,
    DoublingLevels,
    FixedLevels,
    GrowingLevels,
    LogNormalPairs,
    TimePair,
    TimePairs,
    UniformPairs,
)
from diffdistill.trainer import Schedule

LAW = gaussian([0.4, -0.7], [[0.3, 0.1], [0.1, 0.2]])
NUMBER = 40
SHORT = Schedule(steps=1, batch=4)
EVERY_PROCESS = pytest.mark.parametrize("process", processes(), ids=str)


@dataclass(frozen=True)
class OnePair(TimePairs):
    """The same times for every sample."""

    t: float
    r: float
    ends: bool = False

    def __call__(self, u, process, step):
        return TimePair(*(torch.full_like(u, time) for time in (self.t, self.r)), torch.full(u.shape, self.ends))


class Exact(ConsistencyMethod):
    """x_r by the closed form of the PF-ODE."""

    reference, needs_teacher = "none", False

    def earlier(self, x_t, x0, eps, pair, cond, guidance):
        process = self.generator.process
        first, last = ((process.alpha(t), process.sigma(t)) for t in (pair.t, pair.r))
        return LAW.flow(x_t, first, last)


def method(kind, generator: Denoiser, teacher: Denoiser | None = None, grid=None, **config) -> ConsistencyMethod:
    grid = (generator.process.t_max,) if grid is None else grid
    frozen = None if teacher is None else Teacher(teacher)
    return kind(kind.Config(**config), Networks(lambda: Generator(generator, grid), lambda: None, frozen))


def draws(number: int = NUMBER, key: str = "draws") -> Rng:
    return Rng((key,), range(number), dtype=torch.float64)


def residuals(made: ConsistencyMethod, law=LAW, step: int = 0, number: int = NUMBER) -> Tensor:
    (term,) = made.plan(step)[0].terms
    return term.loss({"images": Sample(x0=law.sample(number))}, draws(number)).value


def pairs_of(process, count: int = 9) -> UniformPairs:
    return UniformPairs(FixedLevels(count))


@EVERY_PROCESS
@pytest.mark.parametrize("distance", [Squared(), Absolute()], ids=lambda d: type(d).__name__)
def test_the_exact_function_has_no_residual_on_exact_trajectories(process, distance):
    """T-CD, and the boundary: where a pair ends, the target is the point itself, and the function's value is too."""
    made = method(Exact, denoiser(LAW, process, answer="consistency"), pairs=pairs_of(process), distance=distance)
    ends = made.config.pairs(draws().uniform(), process, 0).ends
    value = residuals(made)
    assert 0 < ends.sum() < NUMBER
    assert value[~ends].max() < 1e-14
    # VE's grid ends at sigma_min, and the exact function at 0: sigma_min^2 / (2 k^2) of some deviations further
    assert value[ends].max() < (0.002**2 / (2 * 0.1) * 2 if isinstance(process, VE) else 1e-14)


class Shrunk(Backbone):
    """The exact consistency function of LAW, with its distance from the mean times kappa."""

    sample_shape, condition_names, num_classes = (2,), (), 0

    def __init__(self, process, kappa):
        super().__init__()
        self.process, self.kappa = process, kappa

    def forward(self, x, time, cond):
        t = time / 1000
        return LAW.mean + self.kappa * (LAW.consistency(x, self.process.alpha(t), self.process.sigma(t)) - LAW.mean)

    def null(self, cond):
        raise ValueError("no unconditional branch")

    def blocks(self):
        return []


@EVERY_PROCESS
def test_only_the_boundary_tells_the_exact_function_from_its_multiples(process):
    """Section 2.4: m + kappa (x - alpha m) / sqrt(v) is constant along trajectories for every kappa."""
    made = method(
        Exact, Denoiser(Shrunk(process, 0.5), process, Prediction.X0, clock="thousand"), pairs=pairs_of(process)
    )
    pair = made.config.pairs(draws().uniform(), process, 0)
    value = residuals(made)
    assert 0 < pair.ends.sum() < NUMBER
    assert value[~pair.ends].max() < 1e-10
    assert value[pair.ends].min() > 1e-3


@pytest.mark.parametrize(
    ("process", "solver"), [*((process, "ddim") for process in processes()), (VE(), "heun"), (VE(), "euler")], ids=str
)
def test_on_a_point_mass_a_step_is_exact(process, solver):
    """Section 2.2: x0 is the same all along, so ddim's steps are exact, and others where trajectories are straight."""
    law = point_mass([0.3, -0.2])
    exact = denoiser(law, process)
    options = {"pairs": pairs_of(process), "solver": solver, "distance": Squared()}
    made = method(Consistency, exact, denoiser(law, process), **options)
    pair = made.config.pairs(draws().uniform(), process, 0)
    assert residuals(made, law)[~pair.ends].max() < 1e-24


@pytest.mark.parametrize(("solver", "order"), [("ddim", 2), ("euler", 2), ("heun", 3)])
def test_a_step_of_the_teacher_has_the_residual_of_its_order(solver, order):
    """T-CD, B7: per-step relative residual k^2 h^2 / (2 (k^2 + sigma^2)^2) of Euler's step, and O(h^3) of Heun's."""
    process, k, t = VE(), 0.5, 1.0
    law = gaussian([0.0], [[k**2]])
    exact, teacher = denoiser(law, process, answer="consistency"), denoiser(law, process)

    def relative(h: float) -> Tensor:
        made = method(Consistency, exact, teacher, pairs=OnePair(t, t - h), solver=solver, distance=Squared())
        x0, rng = law.sample(NUMBER), draws()
        rng.uniform()
        x_t = x0 + t * rng.normal((1,))
        f = exact(x_t, torch.full((NUMBER,), t, dtype=torch.float64))
        return (residuals(made, law).sqrt() / f.abs()[:, 0]).mean()

    h = 1e-2
    assert relative(h) / relative(h / 2) == pytest.approx(2**order, rel=0.05)
    if order == 2:
        assert relative(1e-4) == pytest.approx(k**2 * 1e-8 / (2 * (k**2 + t**2) ** 2), rel=1e-3)


class Cubic(Affine):
    """mean + scale x^3: no affine function, so that a mean over trajectories does not pass through it."""

    def forward(self, x, time, cond):
        return self.mean + self.scale * x**3


TWO_POINTS = finite_set([[-0.6], [1.0]])


def expected_gradient(kind, backbone, h: float, distance, t: float = 1.0) -> Tensor:
    """Of the mean and the scale, over both points and all noises."""
    process = VE()
    generator = Denoiser(backbone(0.2, 0.7, 1.0), process, Prediction.X0, clock="thousand")
    options = {"solver": "ddim"} if kind is Consistency else {"weight": "uniform"}
    made = method(kind, generator, denoiser(TWO_POINTS, process), pairs=OnePair(t, t - h), distance=distance, **options)
    (term,), total = made.plan(0)[0].terms, 0
    for point in TWO_POINTS.means:
        rng = Quadrature(1, 120)
        weights = rng.weights
        value = term.loss({"images": Sample(x0=point.expand(len(weights), 1))}, rng).value
        total = total + (weights * value).sum() / len(TWO_POINTS.means)
    return torch.stack(torch.autograd.grad(total, list(generator.backbone.parameters())))


@pytest.mark.parametrize("h", [0.1, 0.5, 0.9])
def test_training_is_distillation_in_expectation(h):
    """D1, for squares: exactly for affine functions at any gap, since E[x_r | x_t] is the ddim step."""
    ours = expected_gradient(ConsistencyTraining, Affine, h, Squared())
    torch.testing.assert_close(ours, expected_gradient(Consistency, Affine, h, Squared()), rtol=1e-10, atol=1e-14)


def test_training_tends_to_distillation_where_the_gap_closes():
    """D1 for any function: the gradients go with h, and what parts them with h^2."""

    def apart(h):
        theirs = expected_gradient(Consistency, Cubic, h, Squared())
        return ((expected_gradient(ConsistencyTraining, Cubic, h, Squared()) - theirs).norm() / theirs.norm()).item()

    assert apart(1e-2) / apart(5e-3) == pytest.approx(2, rel=0.05)


def test_a_distance_that_is_no_square_makes_training_another_task():
    """D2: the mean of normalised differences is not the normalised mean, however small the gap."""
    ours, theirs = (
        expected_gradient(kind, Affine, 1e-3, PseudoHuber(1e-6)) for kind in (ConsistencyTraining, Consistency)
    )
    assert (ours - theirs).norm() > 0.1 * theirs.norm()


def test_levels_have_their_published_values():
    growing, doubling = GrowingLevels(2, 150, 800_000), DoublingLevels(10, 1280, 400_000)
    assert [growing(k) for k in (0, 100_000, 400_000, 800_000, 900_000)] == [2, 54, 107, 151, 151]
    assert [doubling(50_000 * k) for k in range(9)] == [11, 21, 41, 81, 161, 321, 641, 1281, 1281]
    assert doubling(49_999) == 11
    # by the formula as it is printed, away from where its root is whole
    for k in range(1, 800_000, 7919):
        assert growing(k) == math.ceil(math.sqrt(k / 800_000 * (151**2 - 4) + 4) - 1) + 1


def test_the_average_slows_as_levels_grow():
    """mu(k) = exp(s0 ln mu0 / N(k)); at the start mu0 itself, since s0 levels are two."""
    config = ConsistencyTraining.Config(
        pairs=UniformPairs(GrowingLevels(2, 150, 800_000)), target_decay=0.9, target_annealed=True
    )
    assert config.decay(0) == pytest.approx(0.9, rel=1e-15)
    for k, levels in ((100_000, 54), (400_000, 107), (800_000, 151)):
        assert config.decay(k) == pytest.approx(math.exp(2 * math.log(0.9) / levels), rel=1e-15)


def test_continuous_pairs_have_their_published_ratios():
    """4.4, q = 2: r / t at t = 5 and at t = 0.1, to the digits given."""
    for t, ratios in ((5.0, (0.473, 0.737, 0.868, 0.934)), (0.1, (0, 0, 0.4, 0.7, 0.85))):
        pairs = ContinuousPairs(stage_steps=10, mean=math.log(t), std=1e-12)
        found = [pairs(torch.full((1,), 0.5, dtype=torch.float64), VE(), 10 * stage) for stage in range(len(ratios))]
        assert [(pair.r / pair.t).item() for pair in found] == pytest.approx(ratios, abs=6e-4)
        assert [pair.ends.item() for pair in found] == [ratio == 0 for ratio in ratios]
        assert pairs(torch.full((1,), 0.5, dtype=torch.float64), VE(), 9).r == found[0].r


def test_continuous_pairs_may_be_kept_apart():
    pair = ContinuousPairs(q=256.0, cap=0.9)(draws().uniform(), VE(), 0)
    assert (pair.r / pair.t).max() <= 0.9 + 1e-12


@EVERY_PROCESS
def test_pairs_lie_in_order_and_on_their_levels(process):
    u = draws(4000).uniform()
    for pairs in (UniformPairs(FixedLevels(9)), LogNormalPairs(FixedLevels(9)), ContinuousPairs()):
        t, r, ends = pairs(u, process, 0)
        assert (r < t).all() and (r >= 0).all() and (t <= process.t_max).all() and ends.any() and not ends.all()
    levels = process.warp(torch.linspace(0, 1, 9, dtype=torch.float64))
    t, r, ends = UniformPairs(FixedLevels(9))(u, process, 0)
    place = torch.cdist(t[:, None], levels[:, None]).argmin(1)
    assert torch.equal(t, levels[place]) and torch.equal(r, levels[place - 1]) and torch.equal(ends, place == 1)
    share = torch.bincount(place, minlength=9)[1:] / len(u)
    assert (share - 1 / 8).abs().max() < 4 * math.sqrt(1 / 8 / len(u))  # four deviations of a binomial


def test_levels_on_ve_are_those_of_karras():
    """3.1, with exact ends."""
    u = (torch.arange(17, dtype=torch.float64) + 0.5) / 17
    t, r, _ = UniformPairs(FixedLevels(18))(u, VE(), 0)
    i = torch.arange(18, dtype=torch.float64)
    karras = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(torch.cat([r[:1], t]), karras.flip(0), rtol=1e-12, atol=0)
    assert t[-1] == 80.0


def test_pairs_skip_through_a_table_as_lcm_does():
    """4.8: indices 19, 39, ..., 999, index n being t = n + 1, and 20 steps below each; the first ends at the data."""
    u = (torch.arange(50, dtype=torch.float64) + 0.5) / 50
    t, r, ends = UniformPairs(FixedLevels(51))(u, VP.scaled_linear(), 0)
    torch.testing.assert_close(t - 1, torch.arange(19, 1000, 20, dtype=torch.float64), rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(t - r, torch.full_like(t, 20), rtol=1e-12, atol=1e-9)
    assert ends.tolist() == [True] + [False] * 49 and r[0] == 0


def test_log_normal_pairs_have_the_published_probabilities():
    """3.1: p_i by the error function, over evenly spread u."""
    number, count = 400_000, 11
    u = (torch.arange(number, dtype=torch.float64) + 0.5) / number
    t, _, _ = LogNormalPairs(FixedLevels(count))(u, VE(), 0)
    levels = VE().warp(torch.linspace(0, 1, count, dtype=torch.float64))
    z = torch.erf((levels.log() + 1.1) / (math.sqrt(2) * 2.0))
    p = z.diff() / z.diff().sum()
    place = torch.cdist(t[:, None], levels[:, None]).argmin(1)
    share = torch.bincount(place, minlength=count)[1:].double() / number
    torch.testing.assert_close(share, p, rtol=0, atol=2 / number)  # each edge falls between two u


def test_weights_multiply_the_distance():
    process, pair = VE(), OnePair(3.0, 2.0)
    model = denoiser(LAW, process)
    plain, gap, c_out = (
        residuals(method(ConsistencyTraining, model, pairs=pair, weight=weight, distance=Squared()))
        for weight in ("uniform", "gap", "c_out")
    )
    torch.testing.assert_close(gap, plain)
    nearer = method(ConsistencyTraining, model, pairs=OnePair(3.0, 2.5), weight="gap", distance=Squared())
    bare = method(ConsistencyTraining, model, pairs=OnePair(3.0, 2.5), weight="uniform", distance=Squared())
    torch.testing.assert_close(residuals(nearer), 2 * residuals(bare))
    torch.testing.assert_close(c_out, plain * (9 + 0.25) / (9 * 0.25))  # Karras et al. 2022, table 1


@pytest.mark.parametrize("mu", [0.0, 0.5])
def test_the_value_at_r_sees_the_masks_of_the_value_at_t(mu, tmp_path):
    """At r = t nothing parts them but dropout; the target's own masks would."""
    trainer = make_trainer(CASES["consistency_training"], tmp_path, schedule=SHORT)
    networks = Networks(lambda: Generator(trainer.method.generator.denoiser, (20.0,)), lambda: None)
    config = ConsistencyTraining.Config(pairs=OnePair(2.0, 2.0), weight="uniform", target_decay=mu, distance=Squared())
    made = ConsistencyTraining(config, networks)
    (term,), rng = made.plan(0)[0].terms, draws()
    batch = {"images": Sample(x0=LAW.sample(NUMBER), cond={"label": torch.zeros(NUMBER, dtype=torch.long)})}
    with drawn_from(trainer.players["generator"].dropouts, rng):
        dropped = made.generator.denoiser(LAW.sample(NUMBER), torch.ones(NUMBER), batch["images"].cond)
        assert torch.equal(term.loss(batch, rng).value, torch.zeros(NUMBER, dtype=torch.float64))
    kept = made.generator.denoiser(LAW.sample(NUMBER), torch.ones(NUMBER), batch["images"].cond)
    assert not torch.equal(dropped, kept)


@pytest.mark.parametrize("name", ["consistency", "consistency_training", "consistency_training-annealed"])
def test_only_the_value_at_t_has_a_graph(name, tmp_path):
    """The gradient is that of the distance from a constant."""
    case = CASES[name]
    made = case.make()
    for network in (made.generator.denoiser, made._target):
        network.eval()
    (term,) = made.plan(0)[0].terms
    batch = {"images": Sample(x0=LAW.sample(NUMBER), cond={"label": torch.zeros(NUMBER, dtype=torch.long)})}
    term.loss(batch, draws()).value.sum().backward()
    seen = [p.grad.clone() for p in made.generator.denoiser.parameters()]
    frozen = [*made._target.parameters()] if made.averages() else []
    frozen += [*made.teacher.denoiser.parameters()] if made.teacher else []
    assert all(p.grad is None and not p.requires_grad for p in frozen)
    made.generator.denoiser.zero_grad()
    rng = draws()
    process, x0 = made.generator.process, batch["images"].x0
    pair, eps = made.config.pairs(rng.uniform(), process, 0), rng.normal((2,))
    x_t = process.perturb(x0, eps, pair.t)
    x_r = made.earlier(x_t, x0, eps, pair, batch["images"].cond, made.guidance(rng)).detach()
    constant = made._value_at_r(x_r, pair, batch["images"].cond, rng).detach()
    far = made._distance(made.generator.denoiser(x_t, pair.t, batch["images"].cond), constant)
    (made._weight(pair) * far).sum().backward()
    for ours, theirs in zip(seen, made.generator.denoiser.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-12, atol=1e-12)


def test_one_guidance_per_sample_is_many_calls():
    process = VE()
    law = gaussian([0.4, -0.7], [[0.3, 0.1], [0.1, 0.2]])
    teacher = Teacher(denoiser(law, process))
    x, t = LAW.sample(3), torch.tensor([0.5, 1.0, 7.0], dtype=torch.float64)
    cond, scales = {"label": torch.zeros(3, dtype=torch.long)}, torch.tensor([1.0, 1.5, 4.0])
    ours = teacher(x, t, cond, guidance=scales)
    alone = [teacher(x, t, cond, guidance=w)[i] for i, w in enumerate(scales.tolist())]
    torch.testing.assert_close(ours, torch.stack(alone), rtol=1e-12, atol=1e-12)


class Wave(Backbone):
    """Any network that is not constant."""

    sample_shape, condition_names, num_classes = (2,), (), 0

    def __init__(self):
        super().__init__()
        self.seen = nn.Identity()

    def forward(self, x, time, cond):
        return (self.seen(x) * 3).sin() + time[:, None] / 500

    def null(self, cond):
        raise ValueError("no unconditional branch")

    def blocks(self):
        return []


def bounded(boundary=0.002, process=None):
    process = VE() if process is None else process
    return Denoiser(Wave(), process, Prediction.F, clock="edm", scale_input=True, boundary=boundary)


def test_a_boundary_has_the_scalings_of_the_released_code():
    """4.1: c_skip and c_out moved by sigma_min, c_in and the root of c_out not; at sigma_min x0 is x to the bit."""
    model, std, low = bounded(), 0.5, 0.002
    x, t = LAW.sample(4), torch.tensor([0.002, 0.01, 1.0, 80.0], dtype=torch.float64)
    inside = x / (t**2 + std**2).sqrt()[:, None]
    network = (inside * 3).sin() + (250 * t.log())[:, None] / 500
    skip = std**2 / ((t - low) ** 2 + std**2)
    out = (t - low) * std / (t**2 + std**2).sqrt()
    torch.testing.assert_close(model(x, t), skip[:, None] * x + out[:, None] * network, rtol=1e-13, atol=1e-13)
    assert torch.equal(model(x, t)[0], x[0])
    velocity = (x - model(x, t)) / t[:, None]
    torch.testing.assert_close(model(x, t, to=Prediction.VELOCITY), velocity, rtol=1e-11, atol=1e-11)
    assert model.seen_in(VP.linear()).boundary == model.bounded(0.01).seen_in(VE()).boundary - 0.008


def test_a_bounded_generator_adds_the_noise_that_is_missing():
    """4.3: sqrt(sigma'^2 - sigma_min^2) z, since x0 has the noise of sigma_min already."""
    low, middle = 0.5, 2.0
    generator = Generator(bounded(low), (80.0, middle))
    x = LAW.sample(NUMBER)
    rng = draws()
    fresh = draws().normal((2,))
    first = generator.denoiser(x, torch.full((NUMBER,), 80.0, dtype=torch.float64))
    moved = first + math.sqrt(middle**2 - low**2) * fresh
    expected = generator.denoiser(moved, torch.full((NUMBER,), middle, dtype=torch.float64))
    torch.testing.assert_close(generator.sample(x, {}, rng), expected, rtol=1e-12, atol=1e-12)


def test_steps_of_the_exact_function_have_the_known_moments():
    """X2, X2b: of one step from noise alone, and of the recursion, which tends to the law."""
    m, k, grid = 1.5, 0.5, (80.0, 3.0)
    generator = Generator(denoiser(gaussian([m], [[k**2]]), VE(), answer="consistency"), grid)
    rng = Quadrature(2, 20)
    weights = rng.weights
    x = generator.sample(generator.prior(rng), {}, rng)[:, 0]
    mean, variance = m * (1 - k / math.hypot(k, 80)), k**2 * 80**2 / (k**2 + 80**2)
    shrink = k / math.hypot(k, 3.0)
    mean, variance = m + shrink * (mean - m), shrink**2 * (variance + 9)
    assert (weights * x).sum() == pytest.approx(mean, rel=1e-12)
    assert (weights * (x - mean) ** 2).sum() == pytest.approx(variance, rel=1e-12)


def told(*, guidance=2.0, grid=(80.0,), **config) -> Consistency:
    """LCM's student: its network is told the scale of guidance."""
    torch.manual_seed(3)
    network = MLP(width=64, depth=2, num_classes=3, told=["scale"]).double()
    process = VE(sigma_min=0.02, sigma_max=grid[0], sigma_data=1.0)
    student = Denoiser(network, process, Prediction.F, clock="log_ratio", scale_input=True)
    networks = Networks(lambda: Generator(student, grid, guidance=guidance), None, Teacher(denoiser(CORNERS, process)))
    return Consistency(Consistency.Config(**config), networks)


def test_the_network_is_told_the_scale_by_which_its_teacher_is_guided():
    """LCM: one scale a sample for the teacher's step, the value at t and its target."""
    made = told(guidance_range=(1.0, 3.0), pairs=UniformPairs(FixedLevels(6)), solver="ddim", distance=Squared())
    seen = []
    made.generator.denoiser.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]["scale"]))
    x0, cond = CORNERS.sample(NUMBER), {"label": draws().integers(3)}
    (term,) = made.plan(0)[0].terms
    value = term.loss({"images": Sample(x0=x0, cond=cond)}, draws()).value
    rng = draws()
    pair, eps = made.config.pairs(rng.uniform(), made.generator.process, 0), rng.normal((2,))
    scale = 1 + 2 * rng.uniform()
    assert len(seen) == 2 and all(torch.equal(each, scale) for each in seen)
    x_t, model = made.generator.process.perturb(x0, eps, pair.t), made.generator.denoiser
    with torch.no_grad():
        x_r = made.teacher.solve(x_t, (pair.t, pair.r), cond, solver="ddim", guidance=scale)
        under = {**cond, "scale": scale}
        target = torch.where(pair.ends[:, None], x_r, model(x_r, pair.r, under))
        expected = (model(x_t, pair.t, under) - target).square().mean(1)
    torch.testing.assert_close(value.detach(), expected, rtol=1e-12, atol=0)


def test_one_network_learns_every_scale():
    """Its samples move with the scale as far as the teacher's do from the same noise."""
    made = told(grid=(10.0,), guidance_range=(1.0, 3.0), pairs=UniformPairs(FixedLevels(18)), distance=Squared())
    parameters = list(made.generator.denoiser.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, betas=(0.9, 0.99), weight_decay=0.0, foreach=True)
    steps = 1500
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        rng = Batched(("scales", step), range(256), dtype=torch.float64)
        batch = {"images": Sample(x0=CORNERS.sample(256, seed=step), cond={"label": rng.integers(3)})}
        (term,) = made.plan(step)[0].terms
        term.loss(batch, rng).value.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    rng = Batched(("judge",), range(2000), dtype=torch.float64)
    noise, cond = made.generator.prior(rng), {"label": rng.integers(3)}
    levels = (*made.generator.process.grid(40), 0.0)
    ends = {w: made.teacher.solve(noise, levels, cond, solver="heun", guidance=w) for w in (1.0, 2.0, 3.0)}
    apart = ends[3.0] - ends[1.0]
    made_at = {
        w: Generator(made.generator.denoiser, (10.0,), guidance=w).sample(noise, cond, rng).detach()
        for w in (1.0, 2.0, 3.0)
    }

    def moved(samples: dict[float, Tensor], w: float) -> Tensor:
        return ((samples[w] - samples[1.0]) * apart).sum() / apart.square().sum()

    assert moved(made_at, 3.0) == pytest.approx(1.0, abs=0.15)  # 0 where it is told nothing
    assert moved(made_at, 2.0) == pytest.approx(moved(ends, 2.0).item(), abs=0.15)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedLevels(1), "count must be at least 2"),
        (lambda: GrowingLevels(1, 5, 10), "first must be at least 2"),
        (lambda: DoublingLevels(10, 1280, 7), "steps=7 must be at least 8"),
        (lambda: ContinuousPairs(q=1.0), "q must be above 1"),
        (lambda: ContinuousPairs(cap=0.0), "cap must be in"),
        (lambda: ConsistencyConfig(target_decay=1.0), "target_decay must be in"),
        (lambda: ConsistencyConfig(target_annealed=True), "give a positive target_decay"),
        (lambda: ConsistencyTraining.Config(target_decay=0.9, target_annealed=True), "on ContinuousPairs"),
        (lambda: Consistency.Config(guidance_range=(3.0, 2.0)), "two scales, the lower first"),
        (lambda: bounded(80.0), "boundary=80.0 must be a noise level below sigma_max"),
        (lambda: Denoiser(Wave(), VE(), Prediction.X0, clock="edm", boundary=0.1), "prediction f, got one with VE"),
        (lambda: Generator(bounded(0.5), (80.0, 0.5)), "generator.grid must lie above generator.boundary=0.5"),
        (lambda: method(ConsistencyTraining, bounded()), "and at 0 for continuous pairs"),
        (lambda: method(Consistency, bounded(0.01), bounded(0)), "boundary=0.01 must be where"),
        (lambda: method(Consistency, bounded(0), bounded(0, VE(sigma_max=70.0))), "one trajectory needs one law"),
        (lambda: method(Consistency, bounded(0), bounded(0), guidance_range=(1.0, 2.0)), r"_range=\[.*no uncond"),
        (lambda: told(guidance_range=(2.5, 9.0)), "generator.guidance=2.0 must be one of the scales that are learnt"),
        (lambda: told(), r"and method.guidance_range is \[\]"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_steps_along_an_ode_are_refused():
    networks = Networks(lambda: Generator(bounded(0), (80.0, 1.0), step_rule="heun"), lambda: None)
    with pytest.raises(ValueError, match="a consistency function leaps to its end; take step_rule renoise"):
        ConsistencyTraining(ConsistencyTraining.Config(), networks)


@pytest.mark.parametrize("mu", [0.0, 0.95])
def test_distillation_reaches_the_law_of_an_exact_teacher(start, mu):  # noqa: F811
    """On a 2-D mixture, in 18 Heun steps and their rounding: 1 percent. Without the weight it is 6."""
    config = {"distance": Squared(), "weight": "gap", "target_decay": mu}
    assert_reaches_the_law(distilled(start, (10.0,), steps=800, kind=Consistency, **config))


def test_tuning_reaches_the_law_of_its_data(start):  # noqa: F811
    """Without a teacher, in five stages: 3 percent. Closer pairs leave less of it out, and add more noise: 5 to 11."""
    pairs = ContinuousPairs(stage_steps=160, mean=-0.4, std=1.5)
    torch.manual_seed(1)
    made = method(
        ConsistencyTraining, copy.deepcopy(start), denoiser(CORNERS, start.process), pairs=pairs, distance=Squared()
    )
    train(made, 800, batch=512, generator=1e-3)
    assert_reaches_the_law(made.generator)
