"""How far samples of one class lie apart: what is lost when a generator draws the same few pictures again and again."""

from __future__ import annotations

from collections.abc import Callable

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


def perceptual_diversity(
    images: Tensor, labels: Tensor | None, distance: Callable[[Tensor, Tensor], Tensor], *, batch_pairs: int = 32
) -> float:
    """The mean perceptual distance of two samples of one class, over pairs of neighbours within each class.

    Args:
        images: (N, 3, H, W) in [-1, 1].
        labels: int64 (N,); None for one class. Each sample but the last of its class is paired with the next one.
        distance: of two batches of images, (M,): LPIPS, or a function of its kind.
        batch_pairs: compared in one pass.
    Raises:
        ValueError: no class has two samples.
    Source: Zhu et al. 2017 (BicycleGAN), section 5, which draws its pairs at random.
    """
    labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels.cpu()
    order = labels.argsort(stable=True)
    alike = labels[order[:-1]] == labels[order[1:]]
    first, second = order[:-1][alike], order[1:][alike]
    if not len(first):
        raise ValueError(f"{len(images)} samples of {len(labels.unique())} classes make no pair; take more samples")
    with torch.no_grad():
        pairs = zip(first.split(batch_pairs), second.split(batch_pairs), strict=True)
        return torch.cat([distance(images[a], images[b]).cpu() for a, b in pairs]).double().mean().item()
