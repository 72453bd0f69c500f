"""The score methods against closed forms on a Gaussian: golden gradients of the generator's mean and scale.

The generator is M + A z, the data N(MU, SD^2), one noise level SIGMA; teacher and critic are exact, and (z, eps) runs
over a product of Gauss-Hermite rules, so that expectations are sums.
"""

import pytest
import torch
from oracle import Affine, Quadrature, denoiser, gaussian
from test_dmd2 import DATA, FAKE, MU, SD, SIGMA, A, Always, M, gradients

from diffdistill.critic import Critic
from diffdistill.denoiser import Denoiser
from diffdistill.generator import Generator
from diffdistill.method import Networks, Sample
from diffdistill.methods import METHODS
from diffdistill.methods.score import ScoreMethod
from diffdistill.prediction import Prediction
from diffdistill.process import VE
from diffdistill.teacher import Teacher

SCORE_METHODS = sorted(name for name, kind in METHODS.items() if issubclass(kind, ScoreMethod))


def exact(name: str, *, m=M, a=A, same=False, **config) -> ScoreMethod:
    """A method with an exact teacher, an exact critic of the generator m + a z, and that generator."""
    process, times = VE(), Always(SIGMA)
    law = DATA if same else FAKE if (m, a) == (M, A) else gaussian([m], [[a**2]])
    networks = Networks(
        lambda: Generator(Denoiser(Affine(m, a, 80.0), process, Prediction.X0, clock="thousand"), (80.0,)),
        lambda: Critic(denoiser(law, process)),
        Teacher(denoiser(DATA, process)),
    )
    kind = METHODS[name]
    return kind(kind.Config(match_times=times, critic_times=times, **config), networks)


def gradient(method: ScoreMethod, points: int = 60) -> list[float]:
    """Of the method's own term: with respect to the mean and the scale of the generator."""
    (term, *_) = method.plan(0)[0].terms
    rng = Quadrature(2, points)
    weights = rng.weights
    return gradients((weights * term.loss({"conditions": Sample()}, rng).value).sum(), method)


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
    assert gradient(exact(name, m=MU, a=SD, same=True)) == pytest.approx((0, 0), abs=1e-12)


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
