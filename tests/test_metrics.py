"""The numbers beside the Frechet distance: against closed forms, brute force and what the reference libraries gave."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from diffdistill.evaluation import metrics
from diffdistill.evaluation.convention import InputConvention
from diffdistill.evaluation.diversity import perceptual_diversity
from diffdistill.evaluation.extractors import module_extractor
from diffdistill.evaluation.extrapolation import (
    _in_turns,
    _jackknife,
    extrapolated_distance,
    extrapolates,
    kernel_distance_error,
)
from diffdistill.evaluation.frechet import Moments, frechet_distance, moments
from diffdistill.evaluation.inception_score import inception_score
from diffdistill.evaluation.kid import kernel_distance
from diffdistill.evaluation.manifold import overlap
from diffdistill.evaluation.metrics import Reference, class_accuracies, evaluate_features


def wavy(count: int, seed: int, shift: float) -> torch.Tensor:
    """Features (count, 6) that anyone can make again, without a generator of random numbers."""
    places = torch.arange(count * 6, dtype=torch.float64).reshape(count, 6)
    chaotic = (1e3 * (places * (seed + 1) + seed).sin()).sin()
    return chaotic * (1 + 0.3 * torch.arange(6, dtype=torch.float64) / 6) + shift


REAL, MADE = wavy(120, 1, 0.0), wavy(90, 2, 0.15)


class Itself(nn.Module):
    """Gives what it takes, as torchmetrics asks of a feature network."""

    num_features = 6

    def forward(self, features):
        return features


def test_the_frechet_distance_is_that_of_clean_fid_and_torchmetrics():
    found = frechet_distance(moments(MADE), moments(REAL))
    assert found == pytest.approx(0.3920744308764377, rel=1e-6)  # frechet_distance of clean-fid 0.1.35
    theirs = FrechetInceptionDistance(feature=Itself(), input_img_size=(6,)).set_dtype(torch.float64)
    theirs.update(REAL, real=True)
    theirs.update(MADE, real=False)
    assert found == pytest.approx(theirs.compute().item(), rel=1e-6)


def test_kid_is_that_of_clean_fid_and_torchmetrics_when_one_subset_is_everything():
    found = kernel_distance(REAL[:90], MADE)
    assert found == pytest.approx(0.12975269021049105, rel=1e-6)  # kernel_distance of clean-fid 0.1.35, one subset
    theirs = KernelInceptionDistance(feature=Itself(), subsets=1, subset_size=90).set_dtype(torch.float64)
    theirs.update(REAL[:90], real=True)
    theirs.update(MADE, real=False)
    assert found == pytest.approx(theirs.compute()[0].item(), rel=1e-6)


def test_precision_recall_density_and_coverage_are_those_of_prdc():
    """Version 0.2, of the authors of density and coverage, which has one k for all four."""
    three, five = overlap(REAL, MADE, k=3, density_k=3), overlap(REAL, MADE, k=5, density_k=5)
    assert dataclasses.astuple(three) == pytest.approx((82 / 90, 113 / 120, 0.9333333333333332, 0.8), rel=1e-6)
    assert dataclasses.astuple(five) == pytest.approx((85 / 90, 1.0, 0.9066666666666667, 0.9), rel=1e-6)


def gaussian(count: int, width: int, *, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, width, generator=generator, dtype=torch.float64) + shift


def standard(width: int) -> Moments:
    return Moments(torch.zeros(width, dtype=torch.float64), torch.eye(width, dtype=torch.float64), 10**6)


def test_the_extrapolated_distance_is_that_of_endless_samples_and_its_error_is_right():
    """Of 8 features, scaled by 1.2 and shifted by 0.1: 8 (0.2^2 + 0.1^2) = 0.4. From 200 samples over and over."""
    width, truth, repeats = 8, 8 * (0.2**2 + 0.1**2), 150
    runs = [gaussian(200, width, seed=seed, scale=1.2, shift=0.1) for seed in range(repeats)]
    found = torch.tensor([extrapolated_distance(run, standard(width)) for run in runs], dtype=torch.float64)
    plain = torch.tensor([frechet_distance(moments(run), standard(width)) for run in runs], dtype=torch.float64)
    error_of_mean = found[:, 0].std() / math.sqrt(repeats)
    assert (plain.mean() - truth) > 8 * error_of_mean
    assert (found[:, 0].mean() - truth).abs() < 3 * error_of_mean
    # A jackknife of 8 groups tells the deviation within sqrt(2 / 7) / sqrt(150) = 4 %, and tends to overstate it.
    assert 0.9 < found[:, 1].square().mean().sqrt() / found[:, 0].std() < 1.35


def test_too_few_samples_to_extrapolate_are_refused():
    assert extrapolates(32, 8, groups=8) == (32 >= 2 * 10 * 8 / 7) and not extrapolates(20, 8)
    with pytest.raises(ValueError, match="20 samples are too few to extrapolate the distance of 8 features .*take 23"):
        extrapolated_distance(gaussian(20, 8, seed=0), standard(8))
    extrapolated_distance(gaussian(23, 8, seed=0), standard(8))


def test_kids_error_is_its_deviation_over_repeated_samples():
    real = gaussian(300, 4, seed=1000)
    runs = [gaussian(160, 4, seed=seed, shift=0.3) for seed in range(100)]
    values = torch.tensor([kernel_distance(real, run) for run in runs])
    errors = torch.tensor([kernel_distance_error(real, run) for run in runs])
    assert 0.85 < errors.square().mean().sqrt() / values.std() < 1.2  # 100 repeats tell a deviation within 7 %


@pytest.mark.parametrize("chunk_points", [7, 1000])
def test_kids_error_leaves_out_one_group_at_a_time(chunk_points):
    groups = torch.arange(90).tensor_split(8)
    without = [kernel_distance(REAL, MADE[torch.cat([*groups[:i], *groups[i + 1 :]])]) for i in range(8)]
    found = kernel_distance_error(REAL, MADE, chunk_points=chunk_points)
    assert found == pytest.approx(_jackknife(without), rel=1e-9)


def test_the_jackknife_of_a_mean_is_the_error_of_a_mean():
    values = torch.tensor([1.0, 4.0, 2.0, 8.0], dtype=torch.float64)
    without = [(values.sum() - value).item() / 3 for value in values]
    assert _jackknife(without) == pytest.approx((values.std() / 2).item(), rel=1e-12)


@pytest.mark.parametrize("labels", [[0] * 10 + [1] * 10 + [2] * 20, [0, 1] * 20, [5] * 8])
def test_consecutive_parts_have_as_good_a_share_of_each_class(labels):
    labels = torch.tensor(labels)
    order = _in_turns(labels)
    assert sorted(order.tolist()) == list(range(len(labels)))
    for part in labels[order].tensor_split(4):
        share = part.bincount(minlength=6).double() / len(part)
        whole = labels.bincount(minlength=6).double() / len(labels)
        assert ((share - whole) * len(part)).abs().max() <= 1


def test_the_inception_score_is_1_for_a_classifier_that_knows_nothing_and_the_classes_for_a_sure_one():
    assert inception_score(torch.zeros(40, 5)) == pytest.approx((1.0, 0.0))
    sure = 100 * torch.eye(5).repeat(20, 1)
    assert inception_score(sure) == pytest.approx((5.0, 0.0))
    assert inception_score(sure[:1].repeat(40, 1))[0] == pytest.approx(1.0)  # sure, and always of the same class


def test_the_inception_score_is_that_of_torchmetrics():
    logits = 2 * wavy(80, 3, 0.0)
    theirs = InceptionScore(feature=Itself(), splits=1)  # which shuffles: one part is the same in any order
    theirs.update(logits)
    assert inception_score(logits, splits=1)[0] == pytest.approx(theirs.compute()[0].item(), rel=1e-6)
    parts = torch.tensor([inception_score(part, splits=1)[0] for part in logits.tensor_split(4)])
    expected = (parts.mean().item(), parts.std(correction=0).item())
    assert inception_score(logits, splits=4) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.zeros(4, 3), r"of 10 parts needs logits \(N, classes\) with N >= 10, got \(4, 3\)"),
        (torch.zeros(40), r"got \(40,\)"),
        (torch.full((40, 2), torch.nan), "NaN or infinity"),
    ],
)
def test_logits_without_a_score_are_refused(logits, message):
    with pytest.raises(ValueError, match=message):
        inception_score(logits)


def test_perceptual_diversity_is_the_mean_over_neighbours_of_one_class():
    images = torch.arange(6.0).reshape(6, 1, 1, 1).expand(-1, 3, 2, 2)
    labels = torch.tensor([0, 1, 0, 1, 0, 2])  # pairs (0, 2), (2, 4), (1, 3)

    def apart(a, b):
        return (a - b).abs().flatten(1).mean(1)

    assert perceptual_diversity(images, labels, apart, batch_pairs=2) == pytest.approx((2 + 2 + 2) / 3)
    assert perceptual_diversity(images, None, apart) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="3 samples of 3 classes make no pair"):
        perceptual_diversity(images[:3], torch.tensor([0, 1, 2]), apart)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(12)[:, :6])

    def forward(self, images):
        features = images.flatten(1) @ self.weight
        return features, features[:, :3]


def extractor(**changes):
    made = module_extractor(Plain().double(), name="plain", input=InputConvention(2, 2), knows_classes=True)
    return dataclasses.replace(made, **changes)


def evaluated(count=90, **changes):
    used = extractor(**{name: value for name, value in changes.items() if name in ("knows_classes", "published")})
    reference = Reference(REAL, moments(REAL), "content", used.checksum, torch.arange(120) % 3)
    made, labels = MADE[:count], torch.arange(count) * 3 // count
    return evaluate_features(made, made[:, :3], labels, reference, used, errors=changes.get("errors", False))


def test_only_inception_at_fifty_thousand_samples_is_called_fid(monkeypatch):
    assert "fid" not in evaluated() and "fid" not in evaluated(published=True)
    assert metrics.FID_SAMPLES == 50_000
    monkeypatch.setattr(metrics, "FID_SAMPLES", 90)
    assert "fid" not in evaluated()
    found = evaluated(published=True)
    assert found["fid"] == found["frechet_distance"]


def test_accuracy_is_told_only_by_a_classifier_of_the_same_classes():
    assert "class_accuracy" in evaluated() and "class_accuracy" not in evaluated(knows_classes=False)
    assert evaluated(knows_classes=False)["inception_score"] == evaluated()["inception_score"] > 1


def test_the_errors_of_few_samples_are_told_when_asked():
    names = {"kid_error", "extrapolated_distance", "extrapolated_error"}
    plain, errors = evaluated(), evaluated(errors=True)
    assert names.isdisjoint(plain) and set(errors) == set(plain) | names
    labels = torch.arange(90) // 30
    expected = extrapolated_distance(MADE, moments(REAL), labels=labels)
    assert (errors["extrapolated_distance"], errors["extrapolated_error"]) == expected
    assert errors["kid_error"] == kernel_distance_error(REAL, MADE, labels=labels)
    assert set(evaluated(12, errors=True)) & names == set()  # too few for either


def test_each_class_has_its_accuracy():
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [1.0, 3.0]])
    assert class_accuracies(logits, torch.tensor([0, 0, 0, 1])) == {0: pytest.approx(2 / 3), 1: 1.0}
