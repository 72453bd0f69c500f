"""rCM: its tangent's warm-up, its two limits, its rollouts, and the law that it reaches."""

import copy

import pytest
import torch
from oracle import denoiser, gaussian, point_mass
from test_dmd2 import assert_reaches_the_law, distilled, start  # noqa: F401  a fixture
from test_scm import AT_ONCE, LAW, STD, draws, gradients, network, points, tangent
from test_scm import made as made_scm

from diffdistill.critic import Critic
from diffdistill.denoiser import Denoiser
from diffdistill.generator import Generator
from diffdistill.losses import consistency_tangent, denoising
from diffdistill.method import Networks, Sample
from diffdistill.methods.dmd2 import DMD2
from diffdistill.methods.rcm import RCM
from diffdistill.methods.scm import SCM
from diffdistill.prediction import Prediction
from diffdistill.process import VE, lift
from diffdistill.tangents import Rotational
from diffdistill.teacher import Teacher
from diffdistill.times import LogNormal

float64 = torch.float64
SLOTS = 5


def made(*, student=None, teacher=None, kind=RCM, grid=(80.0,), critic=None, **config):
    """A method of toy networks in VE; the critic begins as another network than teacher and student."""
    native = VE(sigma_data=STD)
    student = network(native) if student is None else student
    teacher = denoiser(LAW, native) if teacher is None else teacher
    critic = network(native, seed=1) if critic is None else critic
    networks = Networks(lambda: Generator(student, grid), lambda: Critic(critic), Teacher(teacher))
    return kind(kind.Config(**config), networks)


def batch() -> dict[str, Sample]:
    return {"images": Sample(x0=draws("data").normal((2,))), "conditions": Sample()}


def value_and_gradient(term, model: Denoiser) -> tuple[torch.Tensor, torch.Tensor]:
    loss = term.loss(batch(), draws("loss"))
    return loss.value, gradients(loss.value.sum(), model)


@pytest.mark.parametrize("step", [0, 3, 10])
def test_on_a_point_mass_the_tangent_vanishes_at_every_warm_up(step):
    """B4, B5."""
    one = denoiser(point_mass([0.3, -0.8]), VE(sigma_data=STD), Prediction.F, scaled=True)
    method = made_scm(copy.deepcopy(one), one, warmup_steps=10, warmup="rcm")
    x, t = points(0.1, 0.7, 1.3)
    assert tangent(method, x, t, step=step).abs().max() < 1e-9


def test_a_warm_up_of_x_alone_would_not_vanish_there():
    """B5b: (1 - r) sin t cos t x is left of it."""
    method = made_scm(network(), denoiser(point_mass([0.3, -0.8]), VE(sigma_data=STD)), **AT_ONCE)
    x, t = points(0.1, 0.7, 1.3)
    velocity, r, pace = method.velocity(x, t, x, x, {}), 0.3, lift(t.sin() * t.cos(), x)
    derivative = -pace * x  # of the exact network, along the trajectory
    right = consistency_tangent(x, velocity, velocity, derivative, t, warmup=r, form="rcm")
    assert right.abs().max() < 1e-12
    of_x_alone = right + r * derivative - derivative
    torch.testing.assert_close(of_x_alone, (1 - r) * pace * x, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("r", [0.0, 0.4, 1.0])
def test_the_warm_up_weighs_the_teachers_part_by_its_own_root(r):
    x, t = points(0.2, 0.8, 1.4)
    velocity, student, derivative = (torch.randn_like(x) for _ in range(3))
    ours = consistency_tangent(x, velocity, student, derivative, t, warmup=r, form="rcm")
    root = lift(t.cos() * (1 - r**2 * t.sin() ** 2).sqrt(), x)
    expected = -root * (student - velocity) - r * (lift(t.sin() * t.cos(), x) * x + derivative)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    if r == 1:
        whole = consistency_tangent(x, velocity, student, derivative, t)
        torch.testing.assert_close(ours, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("warmup_steps", [0, 8])
def test_without_the_score_part_it_is_scm_bit_for_bit(warmup_steps):
    ours = made(score_weight=0.0, consistency_weight=1.0, warmup_steps=warmup_steps, constant=0.3)
    config = {"warmup_steps": warmup_steps, "times": LogNormal(-0.8, 1.6), "constant": 0.3, "warmup": "rcm"}
    theirs = made(kind=SCM, **config)
    for step in (0, 3, 9):
        ((mine,),), ((other,),) = ([update.terms for update in method.plan(step)] for method in (ours, theirs))
        for a, b in zip(
            value_and_gradient(mine, ours.generator.denoiser),
            value_and_gradient(other, theirs.generator.denoiser),
            strict=True,
        ):
            assert torch.equal(a, b)
    assert ours.players().keys() == theirs.players().keys() == {"generator"}
    assert ours.streams() == theirs.streams() == {"images"}


@pytest.mark.parametrize("grid", [(80.0,), (80.0, 1.0)])
def test_without_the_consistency_part_it_is_dmd2_bit_for_bit(grid):
    times = {"match_times": LogNormal(0.0, 1.6), "critic_times": LogNormal(0.0, 1.6), "stops": "rotating"}
    ours = made(grid=grid, consistency_weight=0.0, score_weight=1.0, drawn_steps=0, warmup_steps=5, stops="rotating")
    theirs = made(grid=grid, kind=DMD2, reduction="sum", **times)
    for step in (0, 1):
        ours_plan, theirs_plan = ours.plan(step), theirs.plan(step)
        assert [len(update.terms) for update in ours_plan] == [len(update.terms) for update in theirs_plan]
        for mine, other in zip(ours_plan, theirs_plan, strict=True):
            for a, b in zip(mine.terms, other.terms, strict=True):
                assert (a.player, a.name) == (b.player, b.name)
                one, two = (term.loss(batch(), draws("loss", step)).value for term in (a, b))
                assert torch.equal(one, two)
    assert ours.players().keys() == theirs.players().keys()
    assert ours.streams() == theirs.streams()


def test_the_generator_has_both_gradients_with_their_weights():
    both = made(consistency_weight=3.0, score_weight=0.5, warmup_steps=0)
    agree, match, _ = both.plan(1)[0].terms
    alone = made(consistency_weight=1.0, score_weight=0.0, warmup_steps=0)
    scores = made(consistency_weight=0.0, score_weight=1.0)
    for term, weight, method in ((agree, 3.0, alone), (match, 0.5, scores)):
        expected = value_and_gradient(method.plan(1)[0].terms[0], method.generator.denoiser)
        found = value_and_gradient(term, both.generator.denoiser)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, weight * b, rtol=1e-12, atol=0)


def test_while_the_tangent_warms_up_the_score_part_waits():
    method = made(warmup_steps=3, ratio=4)
    names = [[(term.player, term.name) for update in method.plan(step) for term in update.terms] for step in range(5)]
    agree, match, fit = ("generator", "agree"), ("generator", "match"), ("critic", "fit")
    assert names == [[agree]] * 3 + [[agree, match, *[fit] * 4]] * 2
    assert [len(method.plan(step)) for step in (2, 3)] == [1, 4]  # both of the generator's in one update
    assert method.least_steps() == 4
    assert made(warmup_steps=3, score_weight=0.0).least_steps() == 1


def test_rollouts_take_turns_at_falling_times_and_only_the_last_leap_has_a_gradient():
    method = made(drawn_steps=3, stops="rotating", warmup_steps=0)
    seen: list[tuple[torch.Tensor, bool]] = []

    def note(module, inputs):
        seen.append((inputs[1].detach().clone(), torch.is_grad_enabled()))

    method.generator.denoiser.backbone.register_forward_pre_hook(note)
    for step in range(6):
        seen.clear()
        fake, _ = method._fake(batch(), draws("rollout", step), step)
        assert [graph for _, graph in seen] == [False] * (step % 3) + [True]
        assert fake.requires_grad
        clocks = torch.stack([clock for clock, _ in seen])
        assert (clocks.diff(dim=0) <= 0).all()
        if step % 3:
            assert (clocks[-1] < clocks[0]).all() and clocks[-1].unique().numel() > 1  # each sample its own


def test_random_rollouts_are_as_long_on_all_ranks():
    method, lengths = made(drawn_steps=4, stops="random", warmup_steps=0), set()
    for step in range(30):
        calls: list[int] = []
        handle = method.generator.denoiser.backbone.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        method._fake(batch(), draws("any", step), step)
        handle.remove()
        assert len(calls) == 1 + draws("any", step).shared.integer(4)
        lengths.add(len(calls))
    assert lengths == {1, 2, 3, 4}


def test_the_score_part_moves_a_wrong_mean_towards_the_teachers():
    """T-DMD: f_fake - f_teacher = (m_q - m) sigma_data^2 sin^2 t / v, the same at every x_t, and descent lowers it."""
    k, native = 0.7, VE(sigma_data=STD)
    wrong, mean = torch.tensor([[1.0, -0.2], [0.4, -0.9]], dtype=float64)
    laws = [gaussian(m.tolist(), (k**2 * torch.eye(2, dtype=float64)).numpy()) for m in (wrong, mean)]
    fake, teacher = (denoiser(law, native) for law in laws)
    method = made(teacher=teacher, critic=fake, warmup_steps=0)
    x, t = points(0.2, 0.8, 1.4)
    trig = method._consistency.process
    difference = fake.seen_in(trig)(x, t) - teacher.seen_in(trig)(x, t)
    v = k**2 * t.cos() ** 2 + STD**2 * t.sin() ** 2
    expected = lift(STD**2 * t.sin() ** 2 / v, x) * (wrong - mean)
    torch.testing.assert_close(difference, expected, rtol=1e-10, atol=1e-12)
    samples = (wrong + k * draws("samples").normal((2,))).requires_grad_(True)
    (pull,) = torch.autograd.grad(method.match(samples, {}, draws("match")).value.sum(), samples)
    assert ((pull * (wrong - mean)) > 0).all()  # descent takes it off where the mean is too large


def test_the_critic_learns_the_velocity():
    """T-FS: |x0 - f|^2 / (sigma_data^2 sin^2 t) = |F - v|^2 in units of sigma_data."""
    method, model = made(), network(VE(sigma_data=STD), seed=2)
    assert method.config.critic_space is Prediction.F
    rng = draws("critic")
    x0, eps = rng.normal((2,)), rng.normal((2,))
    t = method.config.critic_times(rng.uniform(), model.process)
    angle = torch.atan(model.process.ratio(t) / STD)
    f = model(model.process.perturb(x0, eps, t), t, {})
    expected = (x0 - f).square().mean(1) / (STD * angle.sin()) ** 2
    found = denoising(model, x0, eps, t, {}, space=method.config.critic_space)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"consistency_weight": 0.0, "score_weight": 0.0}, "are both 0, which leaves no loss"),
        ({"consistency_weight": -1.0}, "method.consistency_weight must not be negative"),
        ({"drawn_steps": -1}, "method.drawn_steps must not be negative"),
        ({"warmup_steps": -1}, "method.warmup_steps must not be negative"),
        ({"discrete": True}, "method.discrete compares two times"),
    ],
)
def test_settings_without_a_meaning_are_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        RCM.Config(**config)


def test_it_reaches_the_law_of_an_exact_teacher(start):  # noqa: F811
    generator = distilled(
        start,
        (10.0,),
        steps=500,
        kind=RCM,
        warmup_steps=50,
        consistency_weight=1.0,
        score_weight=1.0,
        drawn_steps=1,
        discrete=True,
        tangents=Rotational(0.3),
    )
    assert_reaches_the_law(generator)
