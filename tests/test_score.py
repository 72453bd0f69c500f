"""The score methods against closed forms on a Gaussian: golden gradients of the generator's mean and scale.

The generator is M + A z, the data N(MU, SD^2), one noise level SIGMA; teacher and critic are exact, and (z, eps) runs
over a product of Gauss-Hermite rules, so that expectations are sums.
"""

import pytest
import torch
from oracle import Affine, Quadrature, denoiser, gaussian
from test_dmd2 import (
    DATA,
    FAKE,
    GAN,
    MU,
    SD,
    SIGMA,
    A,
    Always,
    LogRatio,
    M,
    assert_reaches_the_law,
    backward,
    batch,
    distilled,
    gradients,
    start,  # noqa: F401  a fixture
    toy,
)

from diffdistill.critic import Critic
from diffdistill.denoiser import Denoiser
from diffdistill.divergences import DIVERGENCES
from diffdistill.generator import Generator
from diffdistill.method import Networks, Sample
from diffdistill.methods import METHODS
from diffdistill.methods.score import ScoreMethod
from diffdistill.prediction import Prediction
from diffdistill.process import VE
from diffdistill.teacher import Teacher

SCORE_METHODS = sorted(name for name, kind in METHODS.items() if issubclass(kind, ScoreMethod))
# What leaves a method's comparison of scores, and the adversarial term, without anything beside them.
ALONE = {
    "dmd": {"regression_weight": 0.0},
    "rcm": {"consistency_weight": 0.0, "score_weight": 1.0, "reduction": "mean", "drawn_steps": 0},
}


def exact(name: str, *, m=M, a=A, same=False, sigma=SIGMA, times=None, head=None, **config) -> ScoreMethod:
    """A method with an exact teacher, an exact critic of the generator m + a z, and that generator."""
    process, times = VE(), Always(sigma) if times is None else times
    law = DATA if same else FAKE if (m, a) == (M, A) else gaussian([m], [[a**2]])
    networks = Networks(
        lambda: Generator(Denoiser(Affine(m, a, 80.0), process, Prediction.X0, clock="thousand"), (80.0,)),
        lambda: Critic(denoiser(law, process), head=LogRatio() if head is None else head, taps=("entrance",)),
        Teacher(denoiser(DATA, process)),
    )
    kind, config = METHODS[name], {**ALONE.get(name, {}), **config}
    return kind(kind.Config(match_times=times, critic_times=times, **config), networks)


def gradient(method: ScoreMethod, points: int = 60) -> list[float]:
    """Of the method's own term: with respect to the mean and the scale of the generator."""
    (term, *_) = method.plan(0)[0].terms
    rng = Quadrature(2, points)
    weights = rng.weights
    return gradients((weights * term.loss({"conditions": Sample()}, rng).value).sum(), method)


def matched(method: ScoreMethod) -> list[float]:
    """Of the comparison of scores alone, without the adversarial term."""
    rng = Quadrature(2, 160)
    weights = rng.weights
    fake = method.generator.rollout(method.generator.prior(rng), None, rng, stop=0)
    return gradients((weights * method.match(fake, {}, rng).value).sum(), method)


def test_diff_instruct_is_the_weighted_score_difference():
    """T1."""
    assert gradient(exact("diff_instruct")) == pytest.approx((0.18846154, 0.14764448), abs=5e-9)


@pytest.mark.parametrize(
    ("alpha", "golden"),
    [
        (0.0, (0.09422326, 0.11130122)),
        (0.5, (0.0710355, 0.09313548)),
        (1.0, (0.04784775, 0.07496974)),
        (1.2, (0.03857265, 0.06770344)),
    ],
)
def test_sid_has_its_golden_gradient(alpha, golden):
    """T3, and the closed form: the digits given, and what they are the digits of."""
    ours = gradient(exact("sid", alpha=alpha, normalised=False))
    assert ours == pytest.approx(golden, abs=5e-9)
    assert ours == pytest.approx(closed_sid(M, A, SIGMA, alpha), rel=1e-10)


def closed_sid(m: float, a: float, sigma: float, alpha: float) -> tuple[float, float]:
    fake, real = a**2 + sigma**2, SD**2 + sigma**2
    slope, own = SD**2 / real - a**2 / fake, SD**2 / real
    shift = -(sigma**2) * (m - MU) / real
    return shift * (own - 1 + slope * (1 - 2 * alpha)), 2 * a * slope * (own - 1 - alpha * slope)


def test_sid_at_one_half_is_the_gradient_of_the_fisher_divergence():
    """T4: E |S_fake - S_real|^2 in closed form, differentiated, its sampling law with it."""
    m, a = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (M, A))
    fake, real = a**2 + SIGMA**2, SD**2 + SIGMA**2
    fisher = (1 / real - 1 / fake) ** 2 * fake + ((m - MU) / real) ** 2
    true = [g.item() for g in torch.autograd.grad(fisher, (m, a))]
    ours = [2 / SIGMA**4 * g for g in gradient(exact("sid", alpha=0.5, normalised=False))]
    assert ours == pytest.approx(true, rel=1e-10)
    assert ours == pytest.approx((0.59171598, 0.77580574), abs=5e-9)


def test_sim_with_squares_is_sid_at_one():
    """T5: the Fisher divergence with its sampling law held fixed."""
    ours = [SIGMA**-4 * g for g in gradient(exact("sim", distance="squared"))]
    assert ours == pytest.approx((0.39856517, 0.6244876), abs=5e-9)
    sid = [2 / SIGMA**4 * g for g in gradient(exact("sid", alpha=1.0, normalised=False))]
    assert ours == pytest.approx(sid, rel=1e-10)


def test_sim_with_pseudo_huber_keeps_the_graph_in_all_three_places():
    """T6, in score space with c = 0.3. With y detached the second is 0.18115776; with all networks detached, 0."""
    in_scores = SIGMA**-2
    ours = [in_scores * g for g in gradient(exact("sim", huber=0.3 / in_scores), points=200)]
    assert ours == pytest.approx((0.30144522, 0.36231551), abs=2e-8)


IN_SCORES = SIGMA**-2  # of a denoised sample's error, the score's
ANY_RATIO = (1e-12, 1e12)
PLAIN = {"ratio_normalised": False, "weight_normalised": False}


@pytest.mark.parametrize(
    ("divergence", "golden"),
    [
        ("forward_kl", (0.25906736, 0.12241939)),
        ("jensen_shannon", (0.14272269, 0.0794142)),
        ("softened_reverse_kl", (0.2418927, 0.22190106)),
        ("neyman", (1.23900391, 2.0802158)),
        ("squared_hellinger", (0.30073422, 0.17973717)),
        ("jeffreys", (0.64368274, 0.42373466)),
        ("reverse_kl", (0.38461538, 0.30131527)),
    ],
)
def test_f_distill_weights_the_score_difference(divergence, golden):
    """T7 in score space; with the reverse KL it is T2."""
    method = exact("f_distill", divergence=divergence, ratio_range=ANY_RATIO, normalised=False, **PLAIN)
    assert [IN_SCORES * g for g in matched(method)] == pytest.approx(golden, abs=2e-8)


ONE = (1 - 1e-12, 1 + 1e-12)  # a range that makes every ratio 1


def test_the_ratio_is_clamped_to_its_range():
    """With every ratio 1, f-distill is DMD2 (T2), and Uni-Instruct a multiple of SiD at one alpha."""
    method = exact("f_distill", divergence="forward_kl", ratio_range=ONE, normalised=False, **PLAIN)
    assert [IN_SCORES * g for g in matched(method)] == pytest.approx((0.38461538, 0.30131527), abs=5e-9)
    options = {"normalised": False, "ratio_range": ONE, "ratio_grad": "detached"}
    ours = matched(exact("uni_instruct", divergence="pearson", **options))
    divergence, one = DIVERGENCES["pearson"], torch.zeros((), dtype=torch.float64)
    sid = matched(exact("sid", alpha=(1 + divergence.slope(one).item()) / 2, normalised=False))
    assert ours == pytest.approx([divergence.h(one).item() * g for g in sid], rel=1e-9)


def test_the_weights_of_the_terms_scale_them():
    plain, double = (gradient(exact("diff_instruct", match_weight=weight)) for weight in (1.0, 2.0))
    assert double == pytest.approx([2 * g for g in plain], rel=1e-12)
    method = toy(gan_weight=3e-3, gan_critic_weight=0.25)
    generate, fit = method.plan(0)[0].terms
    backward(method, generate)
    loss = backward(method, fit)
    torch.testing.assert_close(loss.value, loss.readings["score"] + 0.25 * loss.readings["gan"], rtol=1e-12, atol=0)


def test_real_and_generated_are_judged_under_their_own_conditions_and_times():
    method, data = toy(**GAN), batch()
    ones = {"label": torch.ones_like(data["images"].cond["label"])}
    data |= {"images": Sample(x0=torch.full_like(data["images"].x0, 1e6), cond=ones)}
    data |= {"conditions": Sample(cond={"label": torch.zeros_like(ones["label"])})}
    seen, judged = [], method.critic.logits

    def judge(x_t, t, cond):
        seen.append((x_t, t, cond["label"]))
        return judged(x_t, t, cond)

    generate, fit = method.plan(0)[0].terms
    backward(method, generate, data=data)
    method.critic.logits = judge
    backward(method, fit, data=data)
    ((x_t, t, labels),) = seen
    real = x_t.abs().amax(1) > 1e5
    assert real.sum() == len(real) // 2 and torch.equal(labels == 1, real)
    assert not torch.allclose(t[real], t[~real])


@pytest.mark.parametrize("name", ["sid", "uni_instruct"])
def test_the_normaliser_is_a_constant_of_each_sample(name):
    """The gradient is that of the plain value, each sample over its own mean |x - mu_real|."""
    rng = Quadrature(2, 40)
    weights = rng.weights
    method, plain = (exact(name, normalised=flag) for flag in (True, False))
    ours = method.generator.rollout(method.generator.prior(rng), None, rng, stop=0)
    gradient_of_ours = gradients((weights * method.match(ours, {}, rng).value).sum(), method)
    rng = Quadrature(2, 40)
    fake = plain.generator.rollout(plain.generator.prior(rng), None, rng, stop=0)
    value = plain.match(fake, {}, rng).value
    again = Quadrature(2, 40)
    again.normal((1,))
    x_t, t, _ = plain.noised(fake, again)
    sizes = (fake - plain.teacher(x_t, t)).abs().mean(1).detach()
    assert gradient_of_ours == pytest.approx(gradients((weights * value / sizes).sum(), plain), rel=1e-9)


@pytest.mark.parametrize(
    ("divergence", "golden"),
    [
        ("forward_kl", (0.26846358, 0.25371895)),
        ("reverse_kl", (0.59171598, 0.77580574)),
        ("jensen_shannon", (0.15700364, 0.16073913)),
        ("pearson", (0.44705807, 0.34372646)),
        ("jeffreys", (0.86017956, 1.02952469)),
        ("squared_hellinger", (0.0894639, 0.09721032)),
    ],
)
def test_uni_instruct_is_the_gradient_of_the_weighted_fisher_divergence(divergence, golden):
    """T9: with the ratio's gradient injected, d/d(m, a) E_fake h(r) |S_fake - S_real|^2."""
    method = exact("uni_instruct", divergence=divergence, normalised=False, ratio_range=ANY_RATIO)
    assert [2 * IN_SCORES**2 * g for g in matched(method)] == pytest.approx(golden, abs=2e-8)


@pytest.mark.parametrize(
    ("divergence", "golden"),
    [
        ("forward_kl", (0.26846358, 0.43910327)),
        ("jensen_shannon", (0.17854482, 0.24354501)),
        ("pearson", (0.24335563, 0.8050288)),
    ],
)
def test_uni_instruct_with_a_detached_ratio_has_the_known_bias(divergence, golden):
    """T9b."""
    options = {"normalised": False, "ratio_range": ANY_RATIO, "ratio_grad": "detached"}
    method = exact("uni_instruct", divergence=divergence, **options)
    assert [2 * IN_SCORES**2 * g for g in matched(method)] == pytest.approx(golden, abs=2e-8)


DEFINITIONS = {
    "reverse_kl": lambda r: -r.log(),
    "forward_kl": lambda r: r * r.log(),
    "jensen_shannon": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "softened_reverse_kl": lambda r: (1 + r) * (1 + 1 / r).log(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "squared_hellinger": lambda r: 1 - r.sqrt(),
    "neyman": lambda r: (r - 1) ** 2 / r,
    "pearson": lambda r: (r - 1) ** 2,
}


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_h_and_its_slope_come_of_f(name):
    """h = f'' r^2 up to an affine part of f, and d log h / d log r, by autograd from the divergences' definitions."""
    log_ratio = torch.linspace(-3, 3, 13, dtype=torch.float64, requires_grad=True)
    r = log_ratio.exp()
    (first,) = torch.autograd.grad(DEFINITIONS[name](r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r, create_graph=True)
    torch.testing.assert_close(DIVERGENCES[name].h(log_ratio), second * r**2, rtol=1e-10, atol=1e-12)
    (slope,) = torch.autograd.grad(DIVERGENCES[name].h(log_ratio).log().sum(), log_ratio, allow_unused=True)
    slope = torch.zeros_like(r) if slope is None else slope
    torch.testing.assert_close(DIVERGENCES[name].slope(log_ratio), slope, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.5, 0.75, 1.0])
def test_sid_points_towards_the_teacher_for_alpha_up_to_one(alpha):
    """Section 18.3: for alpha in [1/2, 1] both gradients have the sign of what they must undo."""
    for m in (-1.5, 0.4):
        for a in (0.3, 3.0):
            by_mean, by_scale = gradient(exact("sid", m=m, a=a, alpha=alpha, normalised=False))
            assert by_mean * (m - MU) > 0 and by_scale * (a - SD) > 0


def test_sid_above_one_can_push_away_an_over_dispersed_generator():
    m, a = 0.4, 30.0
    by_mean, _ = gradient(exact("sid", m=m, a=a, alpha=1.2, normalised=False))
    assert by_mean * (m - MU) < 0


@pytest.mark.parametrize("name", SCORE_METHODS)
def test_with_the_teachers_law_for_the_critic_there_is_no_gradient(name):
    """The two Jacobian terms of the attached methods cancel; the detached ones are zero term by term."""
    assert matched(exact(name, m=MU, a=SD, same=True)) == pytest.approx((0, 0), abs=1e-12)


def test_dmd2_without_its_normaliser_is_diff_instruct():
    method, plain = exact("dmd2"), exact("diff_instruct")
    (term, *_), (plain_term, *_) = method.plan(0)[0].terms, plain.plan(0)[0].terms
    rng = Quadrature(2, 60)
    x = method.generator.rollout(method.generator.prior(rng), None, rng, stop=0)
    x_t, t, _ = method.noised(x, rng)
    normaliser = (x - method.teacher(x_t, t)).abs().flatten(1).mean(1).detach()
    ours = term.loss({"conditions": Sample()}, Quadrature(2, 60)).value * normaliser
    weights = Quadrature(2, 60).weights
    theirs = plain_term.loss({"conditions": Sample()}, Quadrature(2, 60)).value
    assert gradients((weights * ours).sum(), method) == pytest.approx(
        gradients((weights * theirs).sum(), plain), rel=1e-10
    )


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("diff_instruct", {}),
        ("f_distill", {"divergence": "forward_kl", "steps": 400}),
        ("f_distill", {"divergence": "jensen_shannon", "steps": 400}),
        ("f_distill", {"divergence": "forward_kl", **PLAIN}),
        ("f_distill", {"divergence": "jensen_shannon", **PLAIN}),
        ("sid", {"alpha": 0.5, "normalised": False}),
        ("sid", {"alpha": 1.0, "normalised": False}),
        ("sim", {"distance": "pseudo_huber"}),
        ("sim", {"distance": "squared"}),
        ("uni_instruct", {"divergence": "forward_kl", "normalised": False}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(map(str, value.values())),
)
def test_it_reaches_the_law_of_an_exact_teacher(start, name, config):  # noqa: F811
    """On a 2-D mixture. SiD's normaliser depends on the sample, and in two dimensions biases it: 6 to 9 percent."""
    generator = distilled(start, (10.0,), kind=METHODS[name], ratio=5, **{"steps": 300} | config)
    assert_reaches_the_law(generator)
