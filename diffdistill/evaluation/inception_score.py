"""Inception score: how sure a classifier is of each picture, and how evenly its classes are met over all of them."""

from __future__ import annotations

import torch
from torch import Tensor


def inception_score(logits: Tensor, *, splits: int = 10) -> tuple[float, float]:
    """exp E KL(p(y|x) | p(y)), in each of `splits` parts one after the other: their mean, and their deviation.

    Between 1 and the number of classes. It knows nothing of the real images, and names what is classified well good.

    Args:
        logits: (N, classes), N >= splits.
    Raises:
        ValueError: another shape, fewer samples than parts, or a value that is not finite.
    Source: Salimans et al. 2016.
    """
    if logits.ndim != 2 or splits < 1 or len(logits) < splits:
        raise ValueError(
            f"an inception score of {splits} parts needs logits (N, classes) with N >= {splits}, got "
            f"{tuple(logits.shape)}; evaluate more images"
        )
    if not logits.isfinite().all():
        raise ValueError("logits hold NaN or infinity; look at the images that were evaluated")
    parts = []
    for part in logits.double().tensor_split(splits):
        log_p = part.log_softmax(1)
        log_mean = log_p.logsumexp(0) - torch.tensor(len(part), dtype=torch.float64).log()
        parts.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp())
    scores = torch.stack(parts)
    return scores.mean().item(), scores.std(correction=0).item()
