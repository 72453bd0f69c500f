"""What holds between the score methods, between noise levels, and at every noise level, on exact laws and on networks.

The Gaussian fixture is that of test_score.py; `AllLevels` adds the noise level to its quadrature.
"""

import math

import numpy as np
import pytest
import torch
from oracle import Quadrature
from test_dmd2 import DATA, FAKE, GAN, MU, SD, A, M, backward, batch, gradients, rng, touched, toy
from test_score import ALONE, ANY_RATIO, DEFINITIONS, SCORE_METHODS, closed_sid, exact, gradient, matched
from torch import nn

from diffdistill.divergences import DIVERGENCES, Divergence
from diffdistill.losses import gan_generator
from diffdistill.methods import METHODS
from diffdistill.prediction import Prediction
from diffdistill.times import TimeSampler

float64 = torch.float64


def levels(number: int, highest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes and weights of an integral over the variance sigma^2 from 0 to `highest`, possibly infinite.

    In v = sigma^2 / (1 + sigma^2) the integrands are smooth up to v = 1, so that Gauss and Legendre's rule converges
    geometrically.
    """
    node, weight = np.polynomial.legendre.leggauss(number)
    end = 1.0 if math.isinf(highest) else highest / (1 + highest)
    v, weight = torch.from_numpy(end * (node + 1) / 2), torch.from_numpy(end * weight / 2)
    return v / (1 - v), weight / (1 - v) ** 2


class Levels(TimeSampler):
    """Each sample's own noise level."""

    def __init__(self, sigmas):
        self.sigmas = sigmas

    def __call__(self, u, process):
        return self.sigmas


class LogRatioAt(nn.Module):
    """The optimal discriminator at each sample's own noise level."""

    def __init__(self, sigmas):
        super().__init__()
        self.sigmas = sigmas

    def forward(self, features):
        (x_t,), alpha = features, torch.ones_like(self.sigmas)
        return DATA.log_density(x_t, alpha, self.sigmas) - FAKE.log_density(x_t, alpha, self.sigmas)


class AllLevels(Quadrature):
    """z, eps and the noise level, all at once: `weights` are those of (z, eps) times d sigma^2."""

    def __init__(self, nodes: int, variances: torch.Tensor, shares: torch.Tensor):
        super().__init__(2, nodes)
        points, number = len(self.weights), len(variances)
        self.nodes = [node.repeat(number, 1) for node in self.nodes]
        self.sigmas = variances.sqrt().repeat_interleave(points)
        self.weights = self.weights.repeat(number) * shares.repeat_interleave(points)
        self.slots = range(points * number)


def divergence_of(f, mean, scale, real_mean, real_variance, nodes=200):
    """E_fake f(real / fake) for Gaussians, differentiable in the mean and scale of the fake one."""
    node, weight = np.polynomial.hermite_e.hermegauss(nodes)
    z, weight = torch.from_numpy(node), torch.from_numpy(weight / weight.sum())
    x = mean + scale * z
    log_real = -((x - real_mean) ** 2) / (2 * real_variance) - 0.5 * math.log(real_variance)
    log_fake = -(z**2) / 2 - scale.log()
    return (weight * f((log_real - log_fake).exp())).sum()


def test_a_divergence_of_the_data_is_the_integral_of_its_expansion():
    """T10 to its digits, and the identity: 1/2 int E_fake h(r) |S_fake - S_real|^2 d sigma^2 is D_f without noise minus
    D_f at the highest level, sigma^2 = 400; through the real teacher, critic and divergences, to 1e-9."""
    golden = {
        "forward_kl": 0.1554256,
        "reverse_kl": 0.2552153,
        "jensen_shannon": 0.0882634,
        "pearson": 0.2542095,
        "jeffreys": 0.4106410,
        "squared_hellinger": 0.0469681,
    }
    method, highest = exact("sid"), 400.0
    variances, shares = levels(60, highest)
    z, weight = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(120))
    x_t = M + (A**2 + variances).sqrt()[:, None] * z
    sigmas = variances.sqrt().repeat_interleave(len(z))
    x_t, weights = x_t.reshape(-1, 1), (shares[:, None] * weight / weight.sum()).reshape(-1)
    score, alpha = Prediction.SCORE, torch.ones_like(sigmas)
    gap = method.critic(x_t, sigmas, to=score) - method.teacher(x_t, sigmas, to=score)
    log_ratio = DATA.log_density(x_t, alpha, sigmas) - FAKE.log_density(x_t, alpha, sigmas)
    for name, divergence in DIVERGENCES.items():
        expansion = 0.5 * (weights * divergence.h(log_ratio) * gap.square()[:, 0]).sum()
        ends = [
            divergence_of(DEFINITIONS[name], M, torch.tensor(A**2 + v, dtype=float64).sqrt(), MU, SD**2 + v)
            for v in (0.0, highest)
        ]
        assert expansion.item() == pytest.approx((ends[0] - ends[1]).item(), rel=1e-9), name
        if name in golden:
            assert expansion.item() == pytest.approx(golden[name], abs=5e-8), name


def integrated(name: str, *, nodes: int, **config) -> list[float]:
    """The gradients of a method that compares scores as denoised samples, as those of scores: sigma^-4 times as large,
    integrated over all noise levels."""
    draws = AllLevels(nodes, *levels(40, math.inf))
    method = exact(name, times=Levels(draws.sigmas), head=LogRatioAt(draws.sigmas), **config)
    fake = method.generator.rollout(method.generator.prior(draws), None, draws, stop=0)
    value = method.match(fake, {}, draws).value
    return gradients((draws.weights / draws.sigmas**4 * value).sum(), method)


def test_fisher_divergences_add_up_to_the_reverse_kl():
    """T11: through SiD at alpha = 1/2, which is exact in the generator; ((m - mu)/sd^2, a/sd^2 - 1/a)."""
    ours = integrated("sid", alpha=0.5, normalised=False, nodes=4)  # polynomials of the second degree
    assert ours == pytest.approx(((M - MU) / SD**2, A / SD**2 - 1 / A), rel=1e-9)
    assert ours == pytest.approx((0.61728, 0.64815), abs=5e-6)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jensen_shannon", "jeffreys", "squared_hellinger"])
def test_uni_instruct_over_all_levels_is_the_gradient_of_the_divergence_of_the_data(divergence):
    """What the paper promises: the exact gradient of D_f between clean laws, which are all that is compared with."""
    ours = integrated("uni_instruct", divergence=divergence, normalised=False, ratio_range=ANY_RATIO, nodes=56)
    m, a = (torch.tensor(value, dtype=float64, requires_grad=True) for value in (M, A))
    true = torch.autograd.grad(divergence_of(DEFINITIONS[divergence], m, a, MU, SD**2), (m, a))
    assert ours == pytest.approx([g.item() for g in true], rel=1e-6)  # the ratio is no polynomial: 56 nodes give 1e-7


GAUSSIANS = [(m, a, sigma) for m in (-1.5, -0.2, 0.4) for a in (0.2, 0.9, 4.0) for sigma in (0.05, 0.7, 9.0)]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0, 1.2])
def test_sid_has_its_closed_form_on_every_gaussian_and_at_every_level(alpha):
    """Section 18.3, with the sign of both gradients for alpha in [1/2, 1]."""
    for m, a, sigma in GAUSSIANS:
        ours = gradient(exact("sid", m=m, a=a, alpha=alpha, normalised=False, sigma=sigma), points=6)
        assert ours == pytest.approx(closed_sid(m, a, sigma, alpha), rel=1e-8, abs=1e-12), (m, a, sigma)
        if 0.5 <= alpha <= 1:
            assert ours[0] * (m - MU) >= -1e-12 and ours[1] * (a - SD) >= -1e-12


@pytest.mark.parametrize("name", SCORE_METHODS)
def test_the_gradient_vanishes_where_the_generator_has_the_teachers_law_at_every_level(name):
    for sigma in (0.05, 0.7, 9.0):
        assert matched(exact(name, m=MU, a=SD, same=True, sigma=sigma)) == pytest.approx((0, 0), abs=1e-11)


DETACHED = {"dmd", "dmd2", "diff_instruct", "f_distill", "rcm"}
NEEDS_GAN = {"f_distill", "uni_instruct"}


def network_gradients(method, value) -> torch.Tensor:
    """All of the generator's gradients in one tensor."""
    parameters = list(method.generator.denoiser.parameters())
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]
    )


def compared(name: str, **options) -> torch.Tensor:
    """The gradient of the comparison of scores alone, on real networks."""
    config = GAN if name in NEEDS_GAN else ALONE.get(name, {})
    method = toy(kind=METHODS[name], **{**config, **options})
    cond, draws = batch()["conditions"].cond, rng("match")
    fake = method.generator.rollout(method.generator.prior(draws), cond, draws, stop=0)
    return network_gradients(method, method.match(fake, cond, draws).value.mean())


@pytest.mark.parametrize("name", SCORE_METHODS)
def test_with_the_teachers_weights_for_the_critic_there_is_no_gradient(name):
    """Exactly none where both scores are constants; where gradient flows through both networks the two terms cancel, to
    rounding against the gradient that one of them alone would give."""
    same, other = compared(name, same=True), compared(name)
    if name in DETACHED:
        assert (same == 0).all()
    assert same.norm() <= 1e-12 * other.norm()


@pytest.mark.parametrize("name", SCORE_METHODS)
def test_guidance_alone_makes_a_gradient(name):
    assert compared(name, same=True, guidance=2.0).norm() > 1e-3 * compared(name).norm()


@pytest.mark.parametrize("name", SCORE_METHODS)
def test_the_term_of_the_generator_trains_it_alone_and_that_of_the_critic_the_critic(name):
    method = toy(kind=METHODS[name], **ALONE.get(name, {}), **GAN)
    generate, fit = method.plan(0)[0].terms
    backward(method, generate)
    assert len(touched(method.generator.denoiser)) == len(list(method.generator.denoiser.parameters()))
    assert not touched(method.critic) and not touched(method.teacher.denoiser)
    backward(method, fit)
    assert len(touched(method.critic)) == len(list(method.critic.parameters()))
    assert not touched(method.generator.denoiser) and not touched(method.teacher.denoiser)


@pytest.mark.parametrize("name", SCORE_METHODS)
@pytest.mark.parametrize(("time_scale", "fits"), [("interleaved", 50), ("alternating", 40)])
def test_every_method_keeps_the_published_order_of_updates(name, time_scale, fits):
    config = GAN if name in NEEDS_GAN else ALONE.get(name, {})
    method = toy(kind=METHODS[name], time_scale=time_scale, ratio=5, **config)
    players = [player for step in range(10) for update in method.plan(step) for player in update.players]
    assert players.count("generator") == 10 and players.count("critic") == fits


def assert_same_gradient(ours: torch.Tensor, theirs: torch.Tensor, *, times: float = 1.0) -> None:
    """Equal but for the order of operations, and not trivially so."""
    assert theirs.norm() > 1e-6
    torch.testing.assert_close(ours, times * theirs, rtol=1e-10, atol=1e-12 * theirs.norm().item())


def test_f_distill_with_the_reverse_kl_is_dmd2():
    assert_same_gradient(compared("f_distill", divergence="reverse_kl"), compared("dmd2"))


def test_f_distill_with_the_reverse_kl_and_no_normaliser_is_diff_instruct():
    times = toy(kind=METHODS["diff_instruct"]).config.match_times
    ours = compared("f_distill", divergence="reverse_kl", normalised=False, match_times=times)
    assert_same_gradient(ours, compared("diff_instruct"))


def test_dmd_without_its_regression_is_dmd2_at_ratio_one():
    """The whole step: every term's value and gradient."""
    ours, theirs = toy(kind=METHODS["dmd"], regression_weight=0.0), toy(ratio=1)
    for our_update, their_update in zip(ours.plan(0), theirs.plan(0), strict=True):
        for our_term, their_term in zip(our_update.terms, their_update.terms, strict=True):
            assert torch.equal(backward(ours, our_term).value, backward(theirs, their_term).value)
            for our_spec, their_spec in zip(ours.players().values(), theirs.players().values(), strict=True):
                for name, parameter in our_spec.parameters.items():
                    other = their_spec.parameters[name].grad
                    assert (parameter.grad is None) == (other is None)
                    assert other is None or torch.equal(parameter.grad, other)


def test_sim_with_squares_is_twice_sid_at_one():
    """As denoised samples are compared: SIM's kappa^2 is dropped, and its loss is 2 kappa^2 that of SiD."""
    assert_same_gradient(compared("sim", distance="squared"), compared("sid", normalised=False), times=2.0)


@pytest.mark.parametrize("normalised", [False, True])
def test_uni_instruct_with_the_reverse_kl_is_sid_at_one_half(normalised):
    ours = compared("uni_instruct", divergence="reverse_kl", normalised=normalised)
    assert_same_gradient(ours, compared("sid", alpha=0.5, normalised=normalised))


def test_uni_instruct_with_h_one_and_its_sampling_law_held_fixed_is_sid_at_one(monkeypatch):
    """h = 1 and alpha = 1: no f has both, since h = 1 makes alpha 1/2 where the samples' law is differentiated."""
    fixed = Divergence(1.0, torch.ones_like, torch.ones_like)
    monkeypatch.setitem(DIVERGENCES, "held_fixed", fixed)
    ours = compared("uni_instruct", divergence="held_fixed", normalised=False)
    assert_same_gradient(ours, compared("sid", alpha=1.0, normalised=False))
    assert_same_gradient(compared("sim", distance="squared"), ours, times=2.0)


@pytest.mark.parametrize("name", SCORE_METHODS)
def test_both_terms_reach_the_generator_as_if_they_were_one_and_their_share_is_told(name):
    """Taken at the samples and handed on there, the gradients are those of the weighted sum, differentiated whole."""
    config = {"match_weight": 0.7, "gan_weight": 0.3, "gan_critic_weight": 0.1}
    method = toy(kind=METHODS[name], **config, **ALONE.get(name, {}))
    loss = method.plan(0)[0].terms[0].loss(batch(), rng("generator"))
    ours = network_gradients(method, loss.value.sum())
    draws, cond = rng("generator"), batch()["conditions"].cond
    draws.shared.integer(1)
    fake = method.generator.rollout(method.generator.prior(draws), cond, draws, stop=0)
    matched = 0.7 * method.match(fake, cond, draws).value
    t, eps = method.config.gan_times(draws.uniform(), method.generator.process), draws.normal(fake.shape[1:])
    logits = method.critic.logits(method.generator.process.perturb(fake, eps, t), t, cond)
    adversarial = 0.3 * gan_generator(logits)
    torch.testing.assert_close(loss.value, matched + adversarial, rtol=1e-12, atol=1e-14)
    norms = [
        torch.autograd.grad(v.sum(), fake, retain_graph=True)[0].flatten(1).norm(dim=1).sum()
        for v in (matched, adversarial)
    ]
    told = loss.readings["gan_share"]
    torch.testing.assert_close(told.numerator.sum() / told.denominator.sum(), norms[1] / sum(norms), rtol=1e-10, atol=0)
    assert_same_gradient(ours, network_gradients(method, (matched + adversarial).sum()))
