"""Inspection: the noises and samples are those of `api.sample`, predictions those of its steps, and arcs are arcs."""

import math

import pytest
import torch

from diffdistill import api
from diffdistill.backbones.mlp import MLP
from diffdistill.denoiser import Denoiser
from diffdistill.evaluation.inspection import from_noise, noises, predictions, spherical
from diffdistill.evaluation.sampling import Solved
from diffdistill.generator import Generator
from diffdistill.prediction import Prediction
from diffdistill.process import VE
from diffdistill.solvers import at
from diffdistill.teacher import Teacher

LABELS = [0, 1, 2, 0, 1]


def denoiser() -> Denoiser:
    torch.manual_seed(0)
    backbone = MLP(width=16, depth=1, num_classes=3).double()
    return Denoiser(backbone, VE(sigma_max=20.0), Prediction.F, clock="edm", scale_input=True)


def sources() -> dict:
    made = {rule: Generator(denoiser(), [20.0, 5.0, 1.0], step_rule=rule) for rule in ("renoise", "same_noise", "heun")}
    return made | {solver: Solved(Teacher(denoiser()), 4, solver) for solver in ("ddim", "euler")}


@pytest.mark.parametrize("name", sources())
def test_samples_from_the_noises_are_those_of_sample(name):
    source = sources()[name]
    expected, _ = api.sample(source, 5, seed=3, labels=LABELS)
    torch.testing.assert_close(from_noise(source, noises(source, 5, seed=3), LABELS, seed=3), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", sources())
def test_the_last_prediction_is_the_sample_and_the_first_that_of_the_noise(name):
    source = sources()[name]
    noise = noises(source, 5, seed=3)
    times, made = predictions(source, noise, LABELS, seed=3)
    assert made.shape == (len(times), 5, 2)
    network = source.teacher.denoiser if isinstance(source, Solved) else source.denoiser
    with torch.no_grad():
        first = network(noise, at(times[0], noise), {"label": torch.tensor(LABELS)})
    torch.testing.assert_close(made[0], first, rtol=0, atol=0)
    # on VE an Euler step to the data ends in the predicted x0: one rounding apart
    expected = from_noise(source, noise, LABELS, seed=3)
    torch.testing.assert_close(made[-1], expected, rtol=1e-12, atol=1e-12)


def test_an_arc_turns_evenly_and_keeps_the_length_of_equal_ends():
    first, second = torch.tensor([[2.0, 0.0]]).double(), torch.tensor([[0.0, 2.0]]).double()
    places = [0.0, 0.25, 0.5, 1.0]
    angles = torch.tensor(places).double() * math.pi / 2
    expected = 2 * torch.stack([angles.cos(), angles.sin()], 1)[:, None]
    torch.testing.assert_close(spherical(first, second, places), expected, rtol=1e-12, atol=1e-12)


def test_the_length_of_an_arc_goes_from_one_end_to_the_other():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=generator)
    made = spherical(first, second, [0.0, 0.3, 1.0])
    torch.testing.assert_close(made[0], first, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(made[2], second, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(made[1].norm(), 0.7 * first.norm() + 0.3 * second.norm(), rtol=1e-12, atol=0)


def test_what_has_no_arc_or_no_class_is_refused():
    with pytest.raises(ValueError, match="no arc"):
        spherical(torch.ones(2), 2 * torch.ones(2), [0.5])
    with pytest.raises(ValueError, match=r"one shape, got \(2,\) and \(3,\)"):
        spherical(torch.ones(2), torch.ones(3), [0.5])
    source = sources()["heun"]
    for labels in (None, [0, 1], [0, 1, 2, 3, 0]):
        with pytest.raises(ValueError, match=r"labels must be 5 numbers in \[0, 3\)"):
            from_noise(source, noises(source, 5), labels)
