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
    chunks = a.split(chunk_points)
    return torch.stack([(chunk @ b.T / a.shape[1] + 1).pow(3).sum() for chunk in chunks]).sum()


def kernel_distance(real: Tensor, generated: Tensor, *, chunk_points: int = 1000) -> float:
    """Squared maximum mean discrepancy under the cubic kernel, estimated from all pairs of different points.

    Unbiased, so it is 0 on average, and can be negative, for two samples of one distribution. Published KID values
    average the same estimate over random subsets: equal in expectation, larger in variance.

    Args:
        real: (N, D), N >= 2.
        generated: (M, D), M >= 2.
        chunk_points: rows of the kernel matrix that are held at once.
    Raises:
        ValueError: D differs, a set has fewer than two points, or a value is not finite.
    Source: Binkowski et al. 2018 (KID); Gretton et al. 2012 for the unbiased estimate.
    """
    check_pair(real, generated)
    if min(len(real), len(generated)) < 2:
        raise ValueError(f"each set needs at least 2 points, got {len(real)} and {len(generated)}")
    real, generated = real.double(), generated.double()

    def mean_within(points: Tensor) -> Tensor:
        diagonal = (points.square().sum(1) / points.shape[1] + 1).pow(3).sum()
        pairs = len(points) * (len(points) - 1)
        return (polynomial_kernel_sum(points, points, chunk_points=chunk_points) - diagonal) / pairs

    across = polynomial_kernel_sum(real, generated, chunk_points=chunk_points) / (len(real) * len(generated))
    return (mean_within(real) + mean_within(generated) - 2 * across).item()
