"""How far samples of one class lie apart: what is lost when a generator draws the same few pictures again and again."""

from __future__ import annotations

import torch
from torch import Tensor


def spread(features: Tensor, labels: Tensor | None) -> float:
    """The root mean square distance between two samples of one class, in feature space.

    Without loops over pairs: the mean of |a - b|^2 over independent a and b of one law is twice the trace of its
    covariance, estimated here without bias, pooled over the classes.

    Args:
        features: float (N, D).
        labels: int64 (N,), not negative, with fewer distinct values than N; None for one class.
    Raises:
        ValueError: there are not more samples than classes.
    """
    features = features.double()
    labels = torch.zeros(len(features), dtype=torch.int64) if labels is None else labels
    _, place, counts = labels.unique(return_inverse=True, return_counts=True)
    freedom = len(features) - len(counts)
    if freedom < 1:
        raise ValueError(
            f"{len(features)} samples of {len(counts)} classes do not tell how far apart a class is; take more samples"
        )
    means = features.new_zeros(len(counts), features.shape[1]).index_add(0, place, features) / counts[:, None]
    return (2 * (features - means[place]).square().sum() / freedom).sqrt().item()
