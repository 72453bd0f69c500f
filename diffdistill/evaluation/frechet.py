"""Frechet distance between two sets of features, each taken as a Gaussian (Heusel et al. 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and covariance of a set of features.

    Attributes:
        mean: float64 (D,).
        covariance: float64 (D, D), with the divisor count - 1.
        count: number of samples behind them, at least 2.
    Raises:
        ValueError: a shape, a dtype or the count is not as above, or a value is not finite.
    """

    mean: Tensor
    covariance: Tensor
    count: int

    def __post_init__(self):
        if self.mean.dtype != torch.float64 or self.covariance.dtype != torch.float64:
            raise ValueError(
                f"moments must be float64, got mean {self.mean.dtype} and covariance {self.covariance.dtype}; "
                "use moments(features)"
            )
        if self.mean.ndim != 1 or self.covariance.shape != (len(self.mean), len(self.mean)):
            raise ValueError(
                f"moments must be (D,) and (D, D), got {tuple(self.mean.shape)} and {tuple(self.covariance.shape)}"
            )
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}; evaluate more images")
        if not (self.mean.isfinite().all() and self.covariance.isfinite().all()):
            raise ValueError("moments hold NaN or infinity; look at the images that were evaluated")


def moments(features: Tensor) -> Moments:
    """Mean and unbiased covariance of features, computed in float64.

    Args:
        features: (N, D), N >= 2.
    Raises:
        ValueError: another shape, fewer than two samples, or a value that is not finite.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features must be (N, D) with N >= 2, got {tuple(features.shape)}; evaluate more images")
    features = features.double()
    mean = features.mean(0)
    centred = features - mean
    return Moments(mean, centred.T @ centred / (len(features) - 1), len(features))


def symmetric_sqrt(matrix: Tensor) -> Tensor:
    """The positive semi-definite square root of one.

    Args:
        matrix: symmetric positive semi-definite, float64 (D, D).
    Raises:
        ValueError: an eigenvalue is negative beyond the round-off of the decomposition.
    """
    values, vectors = torch.linalg.eigh(matrix)
    round_off = len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    if values.min() < -round_off:
        raise ValueError(
            f"a covariance must be positive semi-definite, got an eigenvalue of {values.min():.3e}; "
            "use moments(features)"
        )
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # what lies below 0 here is round-off


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr A + tr B - 2 tr (sqrt(A) B sqrt(A))^(1/2), symmetric in a and b.

    The last trace is taken as the sum of the singular values of sqrt(A) sqrt(B): the same number, without squaring B's
    small eigenvalues, so that a rank-deficient covariance costs no digits.

    Raises:
        ValueError: the numbers of features differ, or a covariance is not positive semi-definite.
    Source: Dowson and Landau 1982 for the distance; Heusel et al. 2017 for its use.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"moments have {len(a.mean)} and {len(b.mean)} features; take both from the same feature extractor"
        )
    cross = torch.linalg.svdvals(symmetric_sqrt(a.covariance) @ symmetric_sqrt(b.covariance)).sum()
    mean_term = (a.mean - b.mean).square().sum()
    return (mean_term + a.covariance.trace() + b.covariance.trace() - 2 * cross).item()


def save_moments(path: Path, values: Moments, origin: Mapping[str, str]):
    """Writes moments as safetensors, with origin (for one, the extractor's checksum) as metadata."""
    tensors = {"mean": values.mean, "covariance": values.covariance, "count": torch.tensor(values.count)}
    save_file(tensors, str(path), metadata=dict(origin))


def load_moments(path: Path, *, checksum: str) -> Moments:
    """Moments saved by `save_moments`, of the extractor with this checksum.

    Raises:
        ValueError: the file is missing or damaged, or belongs to another extractor.
    """
    if not path.is_file():
        raise ValueError(f"there are no moments at {path}; write them with python -m {__package__}.train_features")
    try:
        with safe_open(str(path), "pt") as file:
            origin = file.metadata() or {}
            mean, covariance, count = (file.get_tensor(key) for key in ("mean", "covariance", "count"))
    except SafetensorError as error:
        raise ValueError(f"{path} could not be read: {error}; restore the file") from error
    if origin.get("extractor_checksum") != checksum:
        raise ValueError(
            f"{path} belongs to the extractor {origin.get('extractor_checksum')}, and {checksum} is in use; "
            "moments of two extractors cannot be compared, so recompute them"
        )
    return Moments(mean, covariance, int(count))
