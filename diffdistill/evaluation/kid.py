"""Kernel distance between two sets of features, without bias at any sample count (Binkowski et al. 2018)."""

from __future__ import annotations

import torch
from torch import Tensor

from diffdistill.evaluation.features import check_pair


def polynomial_kernel_sum(a: Tensor, b: Tensor, *, chunk_points: int) -> Tensor:
    """Sum over all pairs of (x . y / D + 1)^3, a float64 scalar.

    Args:
        a: (N, D).
        b: (M, D).
        chunk_points: rows of the kernel matrix that are held at once.
    """
    sums = []
    for chunk in a.split(chunk_points):
        base = (chunk @ b.T).div_(a.shape[1]).add_(1).flatten()
        sums.append(base.square() @ base)
    return torch.stack(sums).sum()


def mean_kernel(points: Tensor, *, chunk_points: int = 1000) -> float:
    """The mean of (x . y / D + 1)^3 over pairs of different points (N, D), N >= 2."""
    points = points.double()
    diagonal = (points.square().sum(1) / points.shape[1] + 1).pow(3).sum()
    pairs = len(points) * (len(points) - 1)
    return ((polynomial_kernel_sum(points, points, chunk_points=chunk_points) - diagonal) / pairs).item()


def kernel_distance(
    real: Tensor, generated: Tensor, *, chunk_points: int = 1000, real_mean: float | None = None
) -> float:
    """Squared maximum mean discrepancy under the cubic kernel, estimated from all pairs of different points.

    Unbiased, so it is 0 on average, and can be negative, for two samples of one distribution. Published KID values
    average the same estimate over random subsets: equal in expectation, larger in variance.

    Args:
        real: (N, D), N >= 2.
        generated: (M, D), M >= 2.
        chunk_points: rows of the kernel matrix that are held at once.
        real_mean: `mean_kernel` of the real features, if it is known.
    Raises:
        ValueError: D differs, a set has fewer than two points, or a value is not finite.
    Source: Binkowski et al. 2018 (KID); Gretton et al. 2012 for the unbiased estimate.
    """
    check_pair(real, generated)
    if min(len(real), len(generated)) < 2:
        raise ValueError(f"each set needs at least 2 points, got {len(real)} and {len(generated)}")
    within = mean_kernel(generated, chunk_points=chunk_points)
    within += mean_kernel(real, chunk_points=chunk_points) if real_mean is None else real_mean
    across = polynomial_kernel_sum(real.double(), generated.double(), chunk_points=chunk_points)
    return within - 2 * across.item() / (len(real) * len(generated))
