"""LADD against closed forms, its structure, and a 2-D mixture."""

import copy
import math

import pytest
import torch
from oracle import Affine, Quadrature, denoiser
from test_dmd2 import (
    DATA,
    FAKE,
    SIGMA,
    A,
    Always,
    Batched,
    LogRatio,
    M,
    assert_reaches_the_law,
    gradients,
    start,  # noqa: F401  a fixture
    train,
)
from torch import nn

from diffdistill.backbones.mlp import MLP
from diffdistill.critic import Critic, Discriminator, DiscriminatorHead
from diffdistill.denoiser import Denoiser
from diffdistill.generator import Generator
from diffdistill.losses import approximate_r1, hinge_discriminator, hinge_generator
from diffdistill.method import Networks, Sample
from diffdistill.methods.ladd import LADD
from diffdistill.prediction import Prediction
from diffdistill.process import VE, Rectified
from diffdistill.rng import Rng
from diffdistill.teacher import Teacher
from diffdistill.times import LogNormal

float64 = torch.float64
IN_SCORES = (0.2418927, 0.22190106)  # T7 for h = 1 / (1 + r), in score space


class Linear(nn.Module):
    """weight . x_t at the teacher's entrance: a logit whose gradient is known."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=float64))

    def forward(self, features):
        return features[0] @ self.weight


def golden(head: nn.Module, process=None, **config) -> LADD:
    """LADD with an exact teacher, a given head on what the teacher sees, and an affine generator."""
    process = VE() if process is None else process
    teacher = Teacher(denoiser(DATA, process))
    networks = Networks(
        lambda: Generator(Denoiser(Affine(M, A, 80.0), process, Prediction.X0, clock="thousand"), (process.t_max,)),
        lambda: Critic(denoiser(FAKE, process)),
        teacher,
        lambda: Discriminator([head], taps=("entrance",), trunk=teacher.denoiser),
    )
    return LADD(LADD.Config(discriminator_times=Always(SIGMA), **config), networks)


def terms(method, step=0):
    """The first term of each player."""
    return {update.terms[0].player: update.terms[0] for update in method.plan(step)}


def test_at_the_optimal_discriminator_the_generator_follows_the_softened_reverse_kl():
    """T8: at D = log r, softplus gives E[1 / (1 + r) (S_fake - S_real) dx], f-distill's with h = 1 / (1 + r)."""
    method = golden(LogRatio(), loss="softplus")
    rng = Quadrature(2, 120)
    weights = rng.weights
    loss = terms(method)["generator"].loss({"images": Sample(x0=torch.zeros(len(weights), 1, dtype=float64))}, rng)
    assert gradients((weights * loss.value).sum(), method) == pytest.approx(IN_SCORES, abs=5e-8)


def test_at_the_optimal_discriminator_the_hinge_is_the_plain_score_difference():
    """-D has the gradient of KL(fake || real), T2: h = 1."""
    method = golden(LogRatio(), loss="hinge")
    rng = Quadrature(2, 60)
    weights = rng.weights
    loss = terms(method)["generator"].loss({"images": Sample(x0=torch.zeros(len(weights), 1, dtype=float64))}, rng)
    assert gradients((weights * loss.value).sum(), method) == pytest.approx((0.38461538, 0.30131527), abs=5e-9)


def test_the_hinge_has_its_gradients_on_both_sides_of_the_margin():
    logits = torch.tensor([-3.0, -0.5, 0.5, 3.0], dtype=float64, requires_grad=True)
    for loss, slopes in (
        (hinge_generator(logits), [-1, -1, -1, -1]),
        (hinge_discriminator(logits, torch.full_like(logits, -2)), [-1, -1, -1, 0]),
        (hinge_discriminator(torch.full_like(logits, 2), logits), [0, 1, 1, 1]),
    ):
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert gradient.tolist() == slopes
    values = hinge_discriminator(torch.tensor([0.25]), torch.tensor([-0.5]))
    assert values.tolist() == [1.25]


def test_the_approximate_penalty_of_a_linear_logit_is_the_closed_form():
    """E (w . sigma n)^2 = sigma^2 |w|^2, by quadrature over n."""
    weight, sigma = torch.tensor([0.7, -1.1], dtype=float64), 0.3
    rng = Quadrature(2, 10)
    weights = rng.weights
    noise = torch.cat([rng.normal((1,)), rng.normal((1,))], dim=1)
    x = torch.tensor([[0.4, 2.0]], dtype=float64)
    penalty = approximate_r1(x @ weight, (x + sigma * noise) @ weight)
    torch.testing.assert_close((weights * penalty).sum(), sigma**2 * weight.square().sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("process", [VE(), Rectified()], ids=str)
def test_the_penalty_of_the_method_is_the_closed_form_through_the_teacher(process):
    """The step is taken on the clean sample, and both are noised alike: sigma^2 alpha(t)^2 w^2, whatever the noise."""
    weight, r1_sigma = 0.8, 0.2
    method = golden(Linear([weight]), process, r1_sigma=r1_sigma, r1_weight=1.0)
    slots = range(200_000)
    rng = Batched(("penalty",), slots)
    rng.dtype = float64
    loss = terms(method)["discriminator"].loss({"images": Sample(x0=torch.ones(len(slots), 1, dtype=float64))}, rng)
    alpha = process.alpha(torch.tensor([SIGMA], dtype=float64)).item()
    expected = (weight * r1_sigma * alpha) ** 2
    # a mean of 200,000 chi-square values of relative standard deviation sqrt 2: 3 of its standard errors are 1 percent
    assert loss.readings["r1"].mean().item() == pytest.approx(expected, rel=0.01)


def test_the_penalty_only_holds_the_discriminator_back():
    """It adds weight x (D - D')^2 to the value, and without weight nothing of it is computed."""
    data = {"images": Sample(x0=torch.randn(8, 1, generator=torch.Generator().manual_seed(0), dtype=float64))}
    losses = {}
    for r1_weight in (0.0, 2.0):
        method = golden(Linear([0.8]), r1_weight=r1_weight)
        losses[r1_weight] = terms(method)["discriminator"].loss(data, rng("penalty", slots=range(8)))
    assert "r1" not in losses[0.0].readings
    torch.testing.assert_close(
        losses[2.0].value, losses[0.0].value + 2.0 * losses[2.0].readings["r1"], rtol=1e-12, atol=0
    )


NUM_CLASSES, TAPS, SLOTS = 3, ("layers.0", "layers.1"), range(6)
THREE = (5.0, 1.0, 0.2)


def rng(*key, slots=SLOTS):
    return Rng(("ladd", *key), slots, dtype=float64)


def toy(grid=THREE, **config) -> LADD:
    """Small networks of random weights; the generator has 3 steps."""

    def network():
        backbone = MLP(width=16, depth=2, num_classes=NUM_CLASSES).double()
        for parameter in backbone.parameters():
            nn.init.normal_(parameter, std=0.2)
        return Denoiser(backbone, VE(sigma_max=5.0), Prediction.F, clock="edm", scale_input=True)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher, own = Teacher(network()), network()
        heads = [DiscriminatorHead([(16,)]).double() for _ in TAPS]
    networks = Networks(
        lambda: Generator(own, grid),
        lambda: Critic(network()),
        teacher,
        lambda: Discriminator(heads, taps=TAPS, trunk=teacher.denoiser),
    )
    return LADD(LADD.Config(**config), networks)


def batch(slots=SLOTS):
    x0 = torch.stack([torch.tensor([math.sin(slot), math.cos(3 * slot)], dtype=float64) for slot in slots])
    return {"images": Sample(x0=x0, cond={"label": torch.tensor([slot % NUM_CLASSES for slot in slots])})}


def touched(module):
    return [name for name, parameter in module.named_parameters() if parameter.grad is not None]


def test_the_heads_are_all_that_is_trained_beside_the_generator():
    method = toy()
    players = method.players()
    assert list(players) == ["generator", "discriminator"]
    assert players["discriminator"].parameters.keys() == {
        f"heads.{name}" for name in _names(method.discriminator.heads)
    }
    own = {id(parameter) for parameter in method.discriminator.parameters()}
    assert not own & {id(parameter) for parameter in method.teacher.denoiser.parameters()}
    assert method.discriminator.trunk is method.teacher.denoiser  # no copy


def _names(module):
    return [name for name, _ in module.named_parameters()]


def test_the_generators_gradient_comes_through_the_frozen_teacher_and_reaches_nothing_else():
    method = toy()
    for parameter in method.discriminator.parameters():
        parameter.requires_grad_(False)
    terms(method)["generator"].loss(batch(), rng()).value.mean().backward()
    assert touched(method.generator.denoiser) == _names(method.generator.denoiser)
    assert max(parameter.grad.abs().max() for parameter in method.generator.denoiser.parameters()) > 1e-4
    assert not touched(method.teacher.denoiser) and not touched(method.discriminator)


@pytest.mark.parametrize("inputs", ["noised", "simulated"])
def test_the_discriminators_update_keeps_a_graph_of_the_heads_alone(inputs):
    """Even where the generator happens to be trainable: what autograd saves is what heads on constants save."""
    method = toy(inputs=inputs)
    assert all(parameter.requires_grad for parameter in method.generator.denoiser.parameters())
    saved: list[int] = []

    def count(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = terms(method)["discriminator"].loss(batch(), rng())
    ours, saved[:] = sum(saved), []
    features = [torch.randn(3 * len(SLOTS), 16, dtype=float64) for _ in TAPS]
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        torch.stack([head([feature]) for head, feature in zip(method.discriminator.heads, features, strict=True)], 1)
    heads = sum(saved)
    assert heads <= ours <= heads + 20 * len(SLOTS) * len(TAPS)  # the losses keep some numbers per logit
    loss.value.mean().backward()
    assert touched(method.discriminator) == _names(method.discriminator)
    assert not touched(method.generator.denoiser) and not touched(method.teacher.denoiser)


def test_no_head_is_asked_for_an_average_of_logits_before_the_loss():
    """Each head has a loss of its own: within the margin or not is told for each, and not for their mean."""
    method = toy(r1_weight=0.0)
    for head, bias in zip(method.discriminator.heads, (5.0, -5.0), strict=True):
        nn.init.zeros_(head.heads[0][-1].weight)
        nn.init.constant_(head.heads[0][-1].bias, bias)
    loss = terms(method)["discriminator"].loss(batch(), rng())
    assert loss.value.tolist() == [pytest.approx(6.0, rel=1e-12)] * 6  # of logits 5 and -5; of their mean it is 2
    assert loss.readings["logit_real"].abs().max() < 1e-12


def test_the_discriminator_is_updated_as_often_as_asked_and_first():
    for count in (1, 3):
        players = [update.terms[0].player for update in toy(discriminator_updates=count).plan(0)]
        assert players == ["discriminator"] * count + ["generator"]


@pytest.mark.parametrize("same", [True, False], ids=["same noise", "noises of their own"])
def test_real_and_generated_may_share_time_and_noise(same):
    method = toy(grid=(5.0,), same_noise=same, r1_weight=0.0)
    made, shown = [], []
    method.generator.denoiser.register_forward_hook(lambda *call: made.append(call[2]))
    method.teacher.denoiser.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[:2]))
    terms(method)["discriminator"].loss(batch(), rng())
    ((x_t, t),) = shown
    added = (x_t - torch.cat([made[0], batch()["images"].x0])).chunk(2)  # on VE, t times the noise
    assert torch.allclose(*t.chunk(2)) == same and torch.allclose(*added, rtol=1e-10, atol=1e-10) == same


@pytest.mark.parametrize("process", [Rectified(), VE()], ids=str)
def test_the_default_times_are_logit_normal_on_a_rectified_flow_and_its_noise_shares_elsewhere(process):
    """Medians: logit(t) has mean 1 on a rectified flow; sigma / alpha has the same law on VE."""
    u = torch.tensor([0.5, 0.8413447460685429], dtype=float64)  # 0 and 1 standard deviations
    t = LADD.Config().discriminator_times(u, process)
    logits = torch.logit(t) if isinstance(process, Rectified) else t.log()
    torch.testing.assert_close(logits, torch.tensor([1.0, 2.0], dtype=float64), rtol=1e-9, atol=0)


def starts(method, step, slots=range(4000)):
    """The times at which the generator's last evaluations happen, and their inputs, in its own term."""
    seen = []
    handle = method.generator.denoiser.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[:2]))
    with torch.no_grad():
        terms(method, step)["generator"].loss(batch(slots), Batched(("starts", step), slots))
    handle.remove()
    return seen[-1][1], seen[-1][0]


def test_steps_are_drawn_with_their_probabilities_and_begin_at_noised_data():
    options = {"step_probabilities": (0.5, 0.2, 0.3), "first_probabilities": (0.0, 0.0, 1.0), "first_steps": 2}
    method = toy(**options)
    for step, expected in ((0, (0, 0, 1)), (1, (0, 0, 1)), (2, (0.5, 0.2, 0.3))):
        times, inputs = starts(method, step)
        shares = [(times == time).double().mean().item() for time in THREE]
        assert shares == pytest.approx(expected, abs=0.03)  # 4 standard errors of 4000 draws
        x0 = batch(range(4000))["images"].x0
        for time in (time for time, share in zip(THREE, expected, strict=True) if share):
            here = times == time
            residual = (inputs[here] - (0 if time == THREE[0] else 1) * x0[here]).double()
            assert residual.std().item() == pytest.approx(
                time, rel=0.1
            )  # pure noise at the first time, else data + noise
            correlation = torch.corrcoef(torch.stack([residual[:, 0], x0[here][:, 0]]))[0, 1]
            assert abs(correlation) < 0.1


def test_simulated_steps_are_the_generators_own_and_agreed_on_by_all_samples():
    method = toy(inputs="simulated", step_probabilities=(0.0, 0.0, 1.0))
    calls = []
    handle = method.generator.denoiser.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[1]))
    terms(method)["generator"].loss(batch(), rng())
    handle.remove()
    assert [call.unique().tolist() for call in calls] == [[time] for time in THREE]


def test_bad_settings_are_refused_by_name():
    for options, complaint in (
        ({"discriminator_updates": 0}, "discriminator_updates must be at least 1"),
        ({"r1_sigma": 0.0}, "r1_sigma=0.0 positive"),
        ({"r1_weight": -1.0}, "r1_weight=-1.0 must not be negative"),
        ({"step_probabilities": (0.5, 0.6)}, "step_probabilities must not be negative and must sum to 1"),
        ({"first_steps": 3}, "first_steps=3 belong together"),
    ):
        with pytest.raises(ValueError, match=complaint):
            LADD.Config(**options)
    with pytest.raises(ValueError, match="one number for each of the 3 times of generator.grid"):
        toy(step_probabilities=(0.5, 0.5))
    teacher = Teacher(denoiser(DATA, VE()), guidance=2.0)
    with pytest.raises(ValueError, match="guidance=2.0 has no meaning for ladd"):
        LADD(LADD.Config(), Networks(lambda: None, lambda: None, teacher, lambda: None))
    with pytest.raises(ValueError, match="each of the 2 taps needs a head of its own, got 1"):
        Discriminator([Linear([1.0])], taps=TAPS, trunk=teacher.denoiser)


def test_it_reaches_the_law_of_the_data_by_its_discriminator_alone(start):  # noqa: F811
    """Mean and covariance within 5 percent. A discriminator learns the noise of its batch too: with 1024 samples three
    seeds end 2.6, 2.9 and 3.6 percent off in the covariance (the hinge 2.6 to 4.6), with 256 between 1.5 and 11."""
    torch.manual_seed(1)
    teacher = Teacher(copy.deepcopy(start))
    networks = Networks(
        lambda: Generator(copy.deepcopy(start), (10.0,)),
        lambda: Critic(copy.deepcopy(start)),
        teacher,
        lambda: Discriminator([DiscriminatorHead([(64,)]) for _ in TAPS], taps=TAPS, trunk=teacher.denoiser),
    )
    method = LADD(LADD.Config(loss="softplus", discriminator_times=LogNormal(0.0, 1.0)), networks)
    train(method, 300, batch=1024, generator=1e-3, discriminator=4e-3)
    assert_reaches_the_law(method.generator)
