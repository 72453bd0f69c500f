"""What the Frechet distance and KID of few samples tell of endless ones: the value there, and its error."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from diffdistill.evaluation.features import check_pair
from diffdistill.evaluation.frechet import Moments, frechet_distance
from diffdistill.evaluation.kid import polynomial_kernel_sum


def extrapolated_distance(
    features: Tensor, reference: Moments, *, labels: Tensor | None = None, groups: int = 8
) -> tuple[float, float]:
    """The Frechet distance as it would be from endless samples, and its standard error.

    From N samples the distance is too large by about c / N. Twice that of all less the mean of both halves' is without
    this share (Richardson). The error is a jackknife's: the same over and over, without one group of samples each time.
    The moments of the reference count as exact.

    Args:
        features: (N, D).
        labels: int64 (N,), the class of each; every group has as good a share of each. None for one class.
        groups: of the jackknife.
    Raises:
        ValueError: a half without a group has not more than D samples, whose bias goes another way.
    Source: Chong and Forsyth 2020 for the extrapolation, there by a line through more counts.
    """
    num, width = features.shape
    if not extrapolates(num, width, groups=groups):
        raise ValueError(
            f"{num} samples are too few to extrapolate the distance of {width} features from halves of them; take "
            f"{_needed(width, groups)} or more, or an extractor of fewer features"
        )
    features = features.double()
    order = torch.arange(num) if labels is None else _in_turns(labels)
    parts = [_Sums.of(features[index]) for index in order.tensor_split(2 * groups)]

    def from_halves(left: Sequence[_Sums]) -> float:
        return 2 * _distance(left, reference) - (_distance(left[::2], reference) + _distance(left[1::2], reference)) / 2

    return from_halves(parts), _jackknife(
        [from_halves([*parts[: 2 * group], *parts[2 * group + 2 :]]) for group in range(groups)]
    )


def extrapolates(num_samples: int, num_features: int, *, groups: int = 8) -> bool:
    """Whether `extrapolated_distance` takes so many samples of so many features."""
    return num_samples >= _needed(num_features, groups)


def _needed(num_features: int, groups: int) -> int:
    """Samples at which each half, a group left out, has more than one for each feature."""
    return -(-2 * (num_features + 2) * groups // (groups - 1))


def kernel_distance_error(
    real: Tensor, generated: Tensor, *, labels: Tensor | None = None, groups: int = 8, chunk_points: int = 1000
) -> float:
    """The standard error of `kernel_distance` from the generated points, by leaving out one group of them at a time.

    Args:
        real, generated, chunk_points: as for `kernel_distance`.
        labels, groups: as for `extrapolated_distance`.
    """
    check_pair(real, generated)
    if len(generated) < 2 * groups:
        raise ValueError(f"{groups} groups need at least {2 * groups} points, got {len(generated)}")
    real, generated = real.double(), generated.double()
    order = torch.arange(len(generated)) if labels is None else _in_turns(labels)
    parts = [generated[index] for index in order.tensor_split(groups)]
    kernel = partial(polynomial_kernel_sum, chunk_points=chunk_points)
    within = torch.stack([torch.stack([kernel(a, b) for b in parts]) for a in parts])
    own = torch.stack([(part.square().sum(1) / part.shape[1] + 1).pow(3).sum() for part in parts])
    across = torch.stack([kernel(real, part) for part in parts])
    values = []
    for group in range(groups):
        kept = [other for other in range(groups) if other != group]
        num = sum(len(parts[other]) for other in kept)
        pairs = within[kept][:, kept].sum() - own[kept].sum()
        values.append((pairs / (num * (num - 1)) - 2 * across[kept].sum() / (num * len(real))).item())
    return _jackknife(values)


def _in_turns(labels: Tensor) -> Tensor:
    """Places of the samples, the classes taking turns, so that consecutive parts have as good a share of each."""
    labels = labels.cpu()
    by_class = labels.argsort(stable=True)
    counts = labels.bincount()
    turn = torch.empty_like(by_class)
    turn[by_class] = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[by_class]]
    return (turn.double() / counts[labels]).argsort(stable=True)


class _Sums:
    """Count, sum and sum of squares of some features, which add up."""

    def __init__(self, count: int, first: Tensor, second: Tensor):
        self.count, self.first, self.second = count, first, second

    @classmethod
    def of(cls, features: Tensor) -> _Sums:
        return cls(len(features), features.sum(0), features.T @ features)


def _distance(parts: Sequence[_Sums], reference: Moments) -> float:
    count = sum(part.count for part in parts)
    mean = sum(part.first for part in parts) / count
    second = sum(part.second for part in parts)
    return frechet_distance(Moments(mean, (second - count * mean.outer(mean)) / (count - 1), count), reference)


def _jackknife(without: Sequence[float]) -> float:
    """The standard error of an estimate, from its values without one group each."""
    values = torch.tensor(without, dtype=torch.float64)
    return ((len(values) - 1) * values.var(correction=0)).sqrt().item()
