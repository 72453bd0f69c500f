"""DMD: what its regression adds to DMD2."""

import pytest
import torch
from cases import CASES, Case, all_tensors, make_trainer
from oracle import Quadrature
from test_dmd2 import MU, SD, SIGMA, A, M, assert_reaches_the_law, distilled, gradients, start  # noqa: F401  a fixture
from test_score import exact

from diffdistill.distances import PseudoHuber, Squared
from diffdistill.method import Sample
from diffdistill.methods.dmd import DMD
from diffdistill.trainer import Schedule


def test_without_its_regression_it_is_dmd2(tmp_path):
    """18.2.3: bit for bit."""
    ours, theirs = (
        make_trainer(Case(name, options, grid=(20.0,)), tmp_path / name, schedule=Schedule(steps=3, batch=12))
        for name, options in (("dmd", {"regression_weight": 0.0}), ("dmd2", {"ratio": 1}))
    )
    assert "pairs" not in ours.method.streams() and "pairs" in CASES["dmd"].make().streams()
    ours.run()
    theirs.run()
    ours, theirs = all_tensors(ours), all_tensors(theirs)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_beside_its_regression_it_keeps_the_golden_direction():
    """T1 and T2, the regression on: the term is DMD2's, whose normaliser is undone as in test_dmd2.py."""
    method = exact("dmd", regression_weight=0.25)
    assert [term.name for term in method.plan(0)[0].terms] == ["match", "regress", "fit"]
    rng = Quadrature(2, 60)
    x = method.generator.rollout(method.generator.prior(rng), None, rng, stop=0)
    x_t, t, _ = method.noised(x, rng)
    normaliser = (x - method.teacher(x_t, t)).abs().flatten(1).mean(1).detach()
    (match, *_) = method.plan(0)[0].terms
    rng = Quadrature(2, 60)
    weights = rng.weights
    ours = gradients((weights * normaliser * match.loss({"conditions": Sample()}, rng).value).sum(), method)
    assert ours == pytest.approx((0.18846154, 0.14764448), abs=5e-9)
    assert [g / SIGMA**2 for g in ours] == pytest.approx((0.38461538, 0.30131527), abs=1e-8)  # T2: 1 / SIGMA^2 = 2.04


@pytest.mark.parametrize("distance", [Squared(), PseudoHuber(0.2)])
def test_its_regression_has_the_closed_gradient(distance):
    """The generator M + A z against the end points MU + SD z: 2 w E d, 2 w E d z; and E d / sqrt(d^2 + c^2) by sums."""
    method = exact("dmd", regression_weight=0.3, distance=distance)
    rng = Quadrature(1, 200)
    z = rng.normal((1,))
    batch = {"conditions": Sample(), "pairs": Sample(x0=MU + SD * z, noise=80 * z)}
    _, regress, *_ = method.plan(0)[0].terms
    assert (regress.player, regress.name) == ("generator", "regress")
    ours = gradients((rng.weights * regress.loss(batch, rng).value).sum(), method)
    if distance == Squared():
        assert ours == pytest.approx((0.6 * (M - MU), 0.6 * (A - SD)), rel=1e-10)
    else:
        d = M - MU + (A - SD) * z[:, 0]
        slope = 0.3 * d / (d**2 + 0.2**2).sqrt()
        expected = [(rng.weights * slope * inner).sum().item() for inner in (1, z[:, 0])]
        assert ours == pytest.approx(expected, rel=1e-10)


def test_several_steps_are_refused():
    with pytest.raises(ValueError, match="dmd has one step.*generator.grid has 2 times"):
        Case("dmd", {}, grid=(20.0, 1.0)).make()


def test_it_reaches_the_law_of_an_exact_teacher(start):  # noqa: F811
    assert_reaches_the_law(distilled(start, (10.0,), steps=300, kind=DMD, ratio=5))
