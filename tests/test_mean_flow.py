"""MeanFlow and shortcuts against closed forms: flow maps of Gaussians, identities of mean velocities, a 2-D mixture."""

import copy

import pytest
import torch
from cases import Case
from oracle import denoiser, gaussian
from test_dmd2 import CORNERS, assert_reaches_the_law, start, train  # noqa: F401  a fixture
from test_scm import STD, network
from torch import nn

from diffdistill.denoiser import Denoiser
from diffdistill.generator import Generator
from diffdistill.losses import denoising
from diffdistill.method import Networks, Sample
from diffdistill.methods.flow_map import FlowMapMethod, chosen
from diffdistill.methods.mean_flow import MeanFlow, MeanFlowTraining
from diffdistill.methods.scm import SCM
from diffdistill.methods.shortcut import Shortcut
from diffdistill.prediction import Prediction
from diffdistill.process import VE, VP, Process, Rectified, Trig, lift
from diffdistill.rng import Rng
from diffdistill.solvers import at
from diffdistill.teacher import Teacher
from diffdistill.times import LogNormal, Uniform

float64 = torch.float64
LAW = gaussian([0.4, -0.7], [[0.5, 0.2], [0.2, 0.3]])
PROCESSES = [VE(), Rectified(shift=3.0, sigma_data=0.8), Trig(sigma_data=0.6), VP.linear(sigma_data=0.7)]
every_process = pytest.mark.parametrize("process", PROCESSES, ids=str)
TIMES = {"times": LogNormal(0.0, 1.5), "far": 1.0}


def draws(*key, slots=5) -> Rng:
    return Rng((0, *key), range(slots), dtype=float64)


def told(process: Process, *, seed=0, **options) -> Denoiser:
    """A small network with random weights that is told spans, and to which they matter."""
    model = network(process, seed=seed, **options)
    model.backbone.tell("span")
    nn.init.normal_(model.backbone.told["span"].leave.weight, std=0.3)
    return model


def made(student: Denoiser, *, kind=MeanFlow, teacher: Denoiser | None = None, grid=None, **config) -> FlowMapMethod:
    grid = (student.process.t_max,) if grid is None else grid
    teacher = None if teacher is None else Teacher(teacher)
    return kind(kind.Config(**config), Networks(lambda: Generator(student, grid, step_rule="flow_map"), None, teacher))


def exact(process: Process, *, kind=MeanFlow, **config) -> FlowMapMethod:
    """The flow map of the law as a student, and its denoiser as the teacher."""
    return made(denoiser(LAW, process, answer="flow_map"), kind=kind, teacher=denoiser(LAW, process), **config)


def states(method: FlowMapMethod, count=6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_t of the rectified flow of the law, t, and r < t, among them r = 0."""
    x0, rng = LAW.sample(count, seed=1), draws("states", slots=count)
    t = torch.linspace(0.1, 0.97, count, dtype=float64)
    r = t * torch.linspace(0.0, 0.9, count, dtype=float64)
    return method.flow.process.perturb(x0, rng.normal((2,)), t), t, r


@every_process
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_an_exact_flow_map_reaches_the_end_of_the_ode_in_any_number_of_steps(process, steps):
    """A8: the average velocity through the wrapper of every process."""
    generator = Generator(
        denoiser(LAW, process, answer="flow_map"), process.grid(steps + 1)[:steps], step_rule="flow_map"
    )
    x, first = generator.prior(draws("x")), at(generator.grid[0], torch.zeros(5))
    expected = LAW.consistency(x, process.alpha(first), process.sigma(first))
    found = generator.sample(x, None, draws("unused"))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@every_process
def test_at_the_exact_flow_map_the_target_is_the_mean_velocity(process):
    """T-F: u = v - (t - r) du/dt."""
    method = exact(process, **TIMES)
    x, t, r = states(method)
    velocity, _ = method.lesson(x, t, x, x, {}, draws("none"))
    target = method.target(x, t, r, velocity, {}, draws("dropout", slots=6), range(6))
    mean = method.mean_velocity(x, t, r, {})
    tolerance = 1e-4 if isinstance(process, VP) else 1e-8  # the table's kinks are in its clock's derivative
    torch.testing.assert_close(target, mean, rtol=tolerance, atol=tolerance)
    assert (mean - velocity).abs().amax(1)[:-1].min() > 1e-3  # and it is not the velocity


def test_the_derivative_is_along_the_flow_at_a_fixed_end():
    method = made(told(VE(sigma_data=STD)), teacher=denoiser(LAW, VE(sigma_data=STD)), **TIMES)
    x, t, r = states(method)
    v, _ = method.lesson(x, t, x, x, {}, draws("none"))
    target = method.target(x, t, r, v, {}, draws("dropout", slots=6), range(6))
    h = 2e-5

    def ahead(k: int) -> torch.Tensor:
        return method.mean_velocity(x + k * h * v, t + k * h, r, {})

    slope = (8 * (ahead(1) - ahead(-1)) - ahead(2) + ahead(-2)) / (12 * h)
    torch.testing.assert_close(target, v - lift(t - r, x) * slope, rtol=1e-7, atol=1e-9)


@every_process
def test_times_beyond_the_noisiest_are_taken_as_that_one(process):
    """And there the derivative does not stand still."""
    method = exact(process, times=LogNormal(30.0, 1.0), ends=Uniform(0.0, 0.5), far=1.0)
    t, r, _ = method.times(draws("late"))
    end = torch.tensor([process.t_max], dtype=float64)
    noisiest = method.flow.process.time_of(process.ratio(end))
    torch.testing.assert_close(t, noisiest.expand(5), rtol=1e-3, atol=0)
    assert (t < noisiest).all()
    rng = draws("state")
    x = method.flow.process.perturb(LAW.sample(5), rng.normal((2,)), t)
    velocity, _ = method.lesson(x, t, x, x, {}, draws("none"))
    target = method.target(x, t, r, velocity, {}, draws("dropout"), range(5))
    torch.testing.assert_close(target, method.mean_velocity(x, t, r, {}), rtol=1e-3, atol=1e-3)


@every_process
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_two_times_come_to_the_derivative_as_they_near(process, solver, order):
    """The error of their target at the exact flow map, over their distance, falls by 2^order when it halves."""
    errors = []
    for step in (0.04, 0.02):
        method = exact(process, step=step, solver=solver, **TIMES)
        x, t, r = states(method)
        velocity, _ = method.lesson(x, t, x, x, {}, draws("none"))
        target = method.target(x, t, r, velocity, {}, draws("dropout", slots=6), range(6))
        errors.append((target - method.mean_velocity(x, t, r, {})).norm().item() / step)
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)


def test_two_times_never_pass_the_end():
    """Where the step is longer than the way, the target is the mean velocity of the teacher alone."""
    method = exact(VE(), step=50.0, solver="heun", **TIMES)
    x, t, r = states(method)
    r = r + 0.05
    v, _ = method.lesson(x, t, x, x, {}, draws("none"))
    target = method.target(x, t, r, v, {}, draws("dropout", slots=6), range(6))
    torch.testing.assert_close(target, method.between(x, t, r, v, {}), rtol=1e-12, atol=1e-12)
    target = method.target(x, t, t, v, {}, draws("dropout", slots=6), range(6))
    torch.testing.assert_close(target, v, rtol=1e-12, atol=1e-12)


@every_process
def test_without_a_step_it_is_flow_matching_with_the_same_draws(process):
    """T-F: at r = t the target is v, and the network an ordinary denoiser."""
    student = told(process)
    method = made(student, kind=MeanFlowTraining, times=LogNormal(-0.4, 1.0), far=0.25, power=0.0)
    batch = {"images": Sample(x0=LAW.sample(5))}
    ((term,),) = (update.terms for update in method.plan(0))
    rng = draws("same")
    t, _, far = method.times(rng)
    x0, eps = batch["images"].x0, rng.normal((2,))
    expected = denoising(method.flow, x0, eps, t, {}, space=Prediction.VELOCITY) * 2  # its mean as the paper's sum
    found = term.loss(batch, draws("same")).value
    near = [place for place in range(5) if place not in far]
    assert len(near) == 4
    torch.testing.assert_close(found[near], expected[near], rtol=1e-12, atol=0)
    assert abs(found[far[0]] - expected[far[0]]) > 1e-3


def test_at_the_data_its_residual_is_the_tangent_of_scm():
    """A10: g = -cos t dtau/dt (u - u_target) for r = 0, tau the rectified flow's time at the angle t."""
    native = VE(sigma_data=STD)
    student = network(native)
    student.backbone.tell("span")  # by layers that are zero: the same network for sCM
    teacher = denoiser(LAW, native)
    method = made(student, teacher=teacher, **TIMES)
    scm = SCM(SCM.Config(warmup_steps=0), Networks(lambda: Generator(student, (80.0,)), None, Teacher(teacher)))
    x, t, _ = states(method)
    velocity, _ = method.lesson(x, t, x, x, {}, draws("none"))
    none = torch.zeros_like(t)
    target = method.target(x, t, none, velocity, {}, draws("dropout", slots=6), range(6))
    residual = method.mean_velocity(x, t, none, {}) - target

    trig, angle = scm.process, torch.atan(t / (1 - t) / STD)
    seen = lift(angle.cos() + STD * angle.sin(), x) * x
    speed = scm.velocity(seen, angle, seen, seen, {})
    with torch.no_grad():
        F = student.seen_in(trig)(seen, angle, to=Prediction.VELOCITY)
    g = scm.tangent(seen, angle, speed, F, {}, 1)
    pace = STD / (angle.cos() + STD * angle.sin()).square()
    torch.testing.assert_close(g, -lift(angle.cos() * pace, x) * residual, rtol=1e-8, atol=1e-10)


def test_the_loss_divides_by_a_power_of_its_own_error():
    plain, weighted = (
        made(told(VE()), teacher=denoiser(LAW, VE()), power=p, constant=0.3, **TIMES) for p in (0.0, 0.75)
    )
    batch = {"images": Sample(x0=LAW.sample(5))}
    results = []
    for method in (plain, weighted):
        ((term,),) = (update.terms for update in method.plan(0))
        value = term.loss(batch, draws("w")).value
        results.append((value.detach(), torch.autograd.grad(value[2], list(method.generator.denoiser.parameters()))))
    (error, slopes), (found, weighted_slopes) = results
    factor = (error + 0.3) ** -0.75
    torch.testing.assert_close(found, error * factor, rtol=1e-12, atol=0)
    for a, b in zip(weighted_slopes, slopes, strict=True):
        torch.testing.assert_close(a, factor[2] * b, rtol=1e-10, atol=1e-14)


def test_a_share_of_the_slots_has_a_step_however_they_are_split():
    assert chosen(range(8), 0.25) == [3, 7]
    assert chosen(range(4, 8), 0.25) == [3]
    assert chosen([6, 7, 1], 0.25) == [1]
    assert chosen(range(6), 1.0) == list(range(6))
    assert len(chosen(range(1000), 0.3)) == 300
    assert len(chosen(range(64), 0.75)) == 48


def test_the_ends_are_of_their_own_law_where_one_is_given():
    """py-meanflow's CIFAR-10: t and r of two laws; without, the two of one law are sorted."""
    sorted_, apart = (
        made(told(VE()), kind=MeanFlowTraining, times=Uniform(), far=1.0, ends=e) for e in (None, Uniform(0, 0.1))
    )
    rng = draws("t", slots=4000)
    t, r, _ = sorted_.times(rng)
    assert t.mean().item() == pytest.approx(2 / 3, abs=0.02) and r.mean().item() == pytest.approx(1 / 3, abs=0.02)
    t, r, _ = apart.times(draws("t", slots=4000))
    assert t.mean().item() == pytest.approx(1 / 2, abs=0.02) and r.max() <= 0.1 and (r <= t).all()


def test_guidance_mixes_what_the_network_says_with_and_without_a_class():
    process = VE()
    student = denoiser(CORNERS, process)
    student.backbone.tell("span")
    config = {"guidance": 0.4, "mixing": 0.5, "guided_from": 0.3, "guided_to": 0.8, "condition_dropout": 0.4}
    method = made(student, kind=MeanFlowTraining, **TIMES, **config)
    rng = draws("guided", slots=40)
    x0, eps, t = CORNERS.sample(40), rng.normal((2,)), rng.uniform()
    cond, x = {"label": rng.integers(3)}, method.flow.process.perturb(x0, eps, t)
    velocity, under = method.lesson(x, t, x0, eps, cond, draws("lesson", slots=40))
    dropped = draws("lesson", slots=40).uniform() < 0.4
    assert torch.equal(under["label"], torch.where(dropped, 3, cond["label"])) and dropped.any()
    kept, free = (method.flow(x, t, c, to=Prediction.VELOCITY) for c in (cond, {"label": torch.full((40,), 3)}))
    guided = 0.4 * (eps - x0) + 0.5 * kept + 0.1 * free
    inside = ((t >= 0.3) & (t <= 0.8) & ~dropped)[:, None]
    assert inside.any() and not inside.all()
    torch.testing.assert_close(velocity, torch.where(inside, guided, eps - x0), rtol=1e-12, atol=1e-12)


@every_process
def test_at_the_exact_flow_map_a_step_is_the_mean_of_its_halves(process):
    """T-SC, F3."""
    method = exact(process, kind=Shortcut, target_decay=0.0)
    x, t, r = states(method)
    torch.testing.assert_close(method.halves(x, t, t - r, {}), method.mean_velocity(x, t, r, {}), rtol=1e-8, atol=1e-8)


def test_the_average_takes_the_half_steps():
    method = made(told(VE()), kind=Shortcut, target_decay=0.9)
    x, t, r = states(method)
    before = method.halves(x, t, t - r, {})
    with torch.no_grad():
        for parameter in method.generator.denoiser.parameters():
            parameter.add_(1.0)
    assert torch.equal(method.halves(x, t, t - r, {}), before)
    assert method.averages()["target"].decay(7) == 0.9
    assert not made(told(VE()), kind=Shortcut, target_decay=0.0).averages()


def test_steps_and_times_are_of_the_grid_of_their_level():
    process = VE(sigma_max=3.0)  # in the flow the first time is 3 / 4
    method = made(told(process), kind=Shortcut, levels=3, bootstrap=0.5, target_decay=0.0)
    t, step, long = method.times(draws("levels", slots=2000))
    assert long == list(range(1, 2000, 2))
    places = t / step
    torch.testing.assert_close(places, places.round(), rtol=0, atol=1e-9)
    assert t.max() <= 0.75 + 1e-12 and (t - step > -1e-12).all()
    assert set(step[long].tolist()) == {0.75, 0.375, 0.1875}
    short = [place for place in range(2000) if place not in set(long)]
    assert set(step[short].tolist()) == {0.75 / 8}
    assert len(set(places[short].round().tolist())) == 8


def test_the_others_learn_the_velocity_under_the_smallest_step():
    method = made(told(VE()), kind=Shortcut, levels=3, bootstrap=0.2)
    batch = {"images": Sample(x0=LAW.sample(5))}
    ((term,),) = (update.terms for update in method.plan(0))
    found = term.loss(batch, draws("fm")).value
    rng = draws("fm")
    t, step, long = method.times(rng)
    x0, eps = batch["images"].x0, rng.normal((2,))
    x = method.flow.process.perturb(x0, eps, t)
    made_, halves = method.mean_velocity(x, t, t - step, {}), method.halves(x, t, step, {})
    expected = (made_ - (eps - x0)).square().mean(1)
    expected[long] = (made_ - halves).square().mean(1)[long]
    assert long == [4]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", [MeanFlow, Shortcut])
def test_a_part_of_the_batch_sees_its_own_dropout_masks(kind):
    """The derivative, or the half steps, of one sample are those that it would have in the whole batch."""
    from diffdistill.rng import drawn_from, replace_dropout

    model = told(VE(), dropout=0.5)
    dropouts = replace_dropout(model)
    config = {"far": 0.4} if kind is MeanFlow else {"bootstrap": 0.4, "target_decay": 0.0}
    method = made(model, kind=kind, teacher=denoiser(LAW, VE()), **config)
    ((term,),) = (update.terms for update in method.plan(0))
    x0 = LAW.sample(5)

    def value(slots) -> torch.Tensor:
        rng = Rng((0, "mask"), slots, dtype=float64)
        with drawn_from(dropouts, rng):
            return term.loss({"images": Sample(x0=x0[list(slots)])}, rng).value

    whole = value(range(5))
    alone = torch.cat([value([slot]) for slot in range(5)])
    torch.testing.assert_close(alone, whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        (MeanFlow, {"far": 0.0}, r"method.far must be in \(0, 1\]"),
        (MeanFlow, {"step": -0.1}, "method.step must not be negative"),
        (MeanFlow, {"power": -1.0}, "method.power must not be negative"),
        (MeanFlow, {"constant": 0.0}, "method.constant must be positive"),
        (MeanFlowTraining, {"mixing": 1.0}, r"method.mixing must be in \[0, 1\)"),
        (MeanFlowTraining, {"guided_from": 0.5, "guided_to": 0.4}, "method.guided_from and method.guided_to"),
        (MeanFlowTraining, {"condition_dropout": 1.0}, "method.condition_dropout must be in"),
        (Shortcut, {"levels": 0}, "method.levels must be at least 1"),
        (Shortcut, {"bootstrap": 1.0}, r"method.bootstrap must be in \(0, 1\)"),
        (Shortcut, {"target_decay": 1.0}, r"method.target_decay must be in \[0, 1\)"),
        (Shortcut, {"clip": -1.0}, "method.clip must not be negative"),
    ],
)
def test_settings_without_a_meaning_are_refused_by_name(kind, config, message):
    with pytest.raises(ValueError, match=message):
        kind.Config(**config)


@pytest.mark.parametrize(
    ("name", "options", "grid"),
    [
        *((name, {}, (20.0,)) for name in ("consistency", "consistency_training", "denoise", "scm", "sct", "rcm")),
        *((name, {}, (20.0,)) for name in ("reflow", "reflow_distill", "score_matching")),
        ("rcm", {"consistency_weight": 0.0}, (20.0,)),
        ("dmd2", {"inputs": "noised"}, (20.0, 1.0)),
        ("ladd", {"inputs": "noised"}, (20.0, 1.0)),
    ],
)
def test_a_method_that_tells_no_spans_is_not_sampled_by_telling_them(name, options, grid):
    """Its network would be asked in sampling about spans that it never learnt."""
    more = {"trunk": "teacher", "guidance": 1.0} if name == "ladd" else {}
    with pytest.raises(ValueError, match="generator.step_rule=flow_map tells.* take another step_rule"):
        Case(name, options, grid=grid, step_rule="flow_map", **more).make()


def test_a_network_that_cannot_be_told_or_guided_is_refused_by_name():
    with pytest.raises(ValueError, match="needs a network that is told where a step leads"):
        Generator(network(VE()), (80.0,), step_rule="flow_map")
    with pytest.raises(ValueError, match="step_rule=renoise tells the network one time"):
        Shortcut(Shortcut.Config(), Networks(lambda: Generator(told(VE()), (80.0,)), None))
    with pytest.raises(ValueError, match="need a network with classes"):
        made(told(VE()), kind=MeanFlowTraining, guidance=0.2, mixing=0.5)
    model = network(VE())
    with pytest.raises(ValueError, match="is not told where a flow map leads"):
        model(torch.zeros(1, 2, dtype=float64), torch.ones(1, dtype=float64), toward=torch.zeros(1, dtype=float64))


def flow_map(start, grid, *, kind, steps, **config) -> Generator:  # noqa: F811
    student = copy.deepcopy(start)
    torch.manual_seed(2)
    student.backbone.tell("span")
    method = made(student, kind=kind, teacher=denoiser(CORNERS, start.process), grid=grid, **config)
    train(method, steps)
    return method.generator


def test_mean_flow_reaches_the_law_of_an_exact_teacher_in_one_step_and_in_two(start):  # noqa: F811
    times = {"times": LogNormal(0.5, 1.5), "ends": LogNormal(-5.0, 2.0)}
    one = flow_map(start, (10.0,), kind=MeanFlow, steps=1600, **times, far=0.9, power=0.5, step=0.3)
    assert_reaches_the_law(one)
    assert_reaches_the_law(Generator(one.denoiser, (10.0, 1.0), step_rule="flow_map"))


def test_shortcuts_reach_the_law_in_one_step_and_in_two_halves(start):  # noqa: F811
    one = flow_map(start, (10.0,), kind=Shortcut, steps=2800, bootstrap=0.5, target_decay=0.0)
    assert_reaches_the_law(one)
    halfway = 5 / 6  # half of 10 / 11, the flow's time at sigma 10
    assert_reaches_the_law(Generator(one.denoiser, (10.0, halfway), step_rule="flow_map"))
