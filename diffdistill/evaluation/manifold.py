"""Precision and recall, density and coverage: how two sets of features overlap, told by nearest neighbours.

A set's manifold is the union of closed balls around its points, each reaching to its k-th nearest neighbour in the set.

Sources: Kynkaanniemi et al. 2019 (improved precision and recall); Naeem et al. 2020 (density and coverage). For two
samples of one distribution the mean values of the latter are known: 1 for density, `expected_coverage` for coverage.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from diffdistill.evaluation.features import check_pair


@dataclass(frozen=True)
class Overlap:
    """How generated and real features overlap.

    Attributes:
        precision: share of generated points inside the real manifold.
        recall: share of real points inside the generated manifold.
        density: real balls that hold a generated point, divided by k, mean over generated points; not bounded by 1.
        coverage: share of real balls that hold at least one generated point.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances (N, M) between rows of a (N, D) and b (M, D), in float32.

    Differences are taken before squaring, so that equal rows are exactly 0 apart and chunks do not change a value.
    """
    return torch.cdist(a.float(), b.float(), compute_mode="donot_use_mm_for_euclid_dist")


def neighbour_distances(points: Tensor, k: int, *, chunk_points: int) -> Tensor:
    """Distances from each point to its 1st to k-th nearest neighbour in the same set, itself left out: (N, k).

    Args:
        points: (N, D), N > k.
        chunk_points: rows of the distance matrix that are held at once.
    Raises:
        ValueError: there are not more than k points.
    """
    if k < 1 or len(points) <= k:
        raise ValueError(f"k must be at least 1 and below the number of points, got k={k} for {len(points)} points")
    chunks = points.split(chunk_points)
    nearest = [points.new_full((len(chunk), k + 1), torch.inf, dtype=torch.float32) for chunk in chunks]

    def nearer(place: int, away: Tensor) -> None:
        least = torch.cat([nearest[place], away.topk(min(k + 1, away.shape[1]), largest=False).values], 1)
        nearest[place] = least.topk(k + 1, largest=False).values

    for place, chunk in enumerate(chunks):
        for other in range(place, len(chunks)):
            away = distances(chunk, chunks[other])
            nearer(place, away)
            if other > place:  # the same distances, seen from the other side
                nearer(other, away.T)
    return torch.cat(nearest)[:, 1:]  # the nearest of all is the point itself, 0 away


def overlap(
    real: Tensor,
    generated: Tensor,
    *,
    k: int = 3,
    density_k: int = 5,
    chunk_points: int = 1000,
    real_nearest: Tensor | None = None,
) -> Overlap:
    """Precision and recall, density and coverage of generated against real features.

    Args:
        real: (N, D).
        generated: (M, D).
        k: neighbours behind precision and recall; 3 in Kynkaanniemi et al.
        density_k: neighbours behind density and coverage; 5 in Naeem et al.
        chunk_points: rows of the distance matrix that are held at once; does not change the result.
        real_nearest: `neighbour_distances` of the real features, (N, >= max(k, density_k)), if they are known.
    Raises:
        ValueError: D differs, there are too few points, or a value is not finite.
    """
    check_pair(real, generated)
    if real_nearest is None:
        real_nearest = neighbour_distances(real, max(k, density_k), chunk_points=chunk_points)
    real_radii, ball_radii = real_nearest[:, k - 1], real_nearest[:, density_k - 1]
    generated_radii = neighbour_distances(generated, k, chunk_points=chunk_points)[:, -1]
    num_precise, num_in_balls = 0, 0
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    covered = recalled.clone()
    for points, radii in zip(generated.split(chunk_points), generated_radii.split(chunk_points), strict=True):
        away = distances(points, real)  # (chunk, N)
        in_balls = away <= ball_radii
        num_precise += (away <= real_radii).any(1).sum().item()
        num_in_balls += in_balls.sum().item()
        recalled |= (away <= radii[:, None]).any(0)
        covered |= in_balls.any(0)
    return Overlap(
        precision=num_precise / len(generated),
        recall=recalled.double().mean().item(),
        density=num_in_balls / (density_k * len(generated)),
        coverage=covered.double().mean().item(),
    )


def expected_coverage(num_real: int, num_generated: int, *, density_k: int = 5) -> float:
    """Mean coverage of two independent samples of one continuous distribution, whatever it is.

    A real ball stays empty when the density_k points nearest to its centre, of both sets together, are all real.

    Source: Naeem et al. 2020, the lemma on the expected value of coverage; the sentence above is the derivation.
    """
    others = num_real - 1
    return 1 - prod((others - step) / (others + num_generated - step) for step in range(density_k))
