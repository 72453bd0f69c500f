"""Looking into sampling: noises to keep or to mix, samples from them, and what is predicted on the way."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from diffdistill.denoiser import Condition
from diffdistill.evaluation.sampling import Solved, denoisers, evaluating
from diffdistill.generator import Generator
from diffdistill.rng import Rng
from diffdistill.solvers import at


def noises(source: Generator | Solved, count: int, *, seed: int = 0) -> Tensor:
    """The noises (count, *sample_shape) of samples 0 to count - 1, those that `api.sample` begins with."""
    return source.prior(_draws(source, count, seed))


def from_noise(
    source: Generator | Solved, noise: Tensor, labels: Sequence[int] | None = None, *, seed: int = 0
) -> Tensor:
    """Samples, of the shape of the noise (N, ...), which is that of the source's prior.

    Args:
        labels: N classes; None where the network has none.
        seed: of the noise that a generator of several steps adds; with that of `noises` and the same labels these are
            the samples of `api.sample`.
    """
    drawn = _drawn(source, noise, seed)
    with torch.no_grad(), evaluating(*denoisers(source)):
        return source.sample(noise, _condition(source, labels, len(noise)), drawn)


def predictions(
    source: Generator | Solved, noise: Tensor, labels: Sequence[int] | None = None, *, seed: int = 0
) -> tuple[tuple[float, ...], Tensor]:
    """The times of a source's evaluations, descending, and the x0 predicted at each: (steps, N, *sample_shape).

    For a generator the last prediction is the sample. For a teacher it is the denoiser's at the last time above 0; of
    a Heun step only the evaluation at its beginning is told.

    Args:
        noise, labels, seed: as for `from_noise`.
    """
    cond = _condition(source, labels, len(noise))
    with torch.no_grad(), evaluating(*denoisers(source)):
        if isinstance(source, Solved):
            return source.times, _of_teacher(source, noise, cond)
        stops = range(len(source.grid))  # each from the start, with the same draws
        made = [source.rollout(noise, cond, _drawn(source, noise, seed), stop=stop) for stop in stops]
        return source.grid, torch.stack(made)


def spherical(first: Tensor, second: Tensor, places: Sequence[float]) -> Tensor:
    """Points on the arc from one noise to another, (len(places), *shape), for two of one shape.

    Between Gaussian noises a straight line passes through shorter vectors, which no network has seen; the arc turns at
    a constant rate, and its length changes only from the one's to the other's.

    Args:
        places: 0 for `first`, 1 for `second`.
    Raises:
        ValueError: the shapes differ, or the two point in one direction or in opposite ones, or one is 0.
    Source: Shoemake 1985, for directions; lengths are interpolated beside them.
    """
    if first.shape != second.shape:
        raise ValueError(f"both noises must have one shape, got {tuple(first.shape)} and {tuple(second.shape)}")
    lengths = first.norm(), second.norm()
    cosine = ((first * second).sum() / (lengths[0] * lengths[1])).clamp(-1, 1)
    angle = torch.arccos(cosine)
    if not angle.sin() > 1e-6:
        raise ValueError("two noises in one direction, or in opposite ones, have no arc between them; draw another")
    s = torch.tensor(list(places), dtype=first.dtype, device=first.device).reshape(-1, *[1] * first.ndim)
    turned = torch.sin((1 - s) * angle) * first / lengths[0] + torch.sin(s * angle) * second / lengths[1]
    return turned / angle.sin() * ((1 - s) * lengths[0] + s * lengths[1])


def _of_teacher(source: Solved, x: Tensor, cond: Condition) -> Tensor:
    made = []
    for t, r in pairwise((*source.times, 0.0)):
        made.append(source.teacher(x, at(t, x), cond))
        x = source.teacher.solve(x, (t, r), cond, solver=source.solver)
    return torch.stack(made)


def _draws(source: Generator | Solved, count: int, seed: int) -> Rng:
    parameter = next(denoisers(source)[0].parameters())
    return Rng((seed, "sample"), range(count), device=parameter.device, dtype=parameter.dtype)


def _drawn(source: Generator | Solved, noise: Tensor, seed: int) -> Rng:
    """The draws that follow those of the noise."""
    rng = _draws(source, len(noise), seed)
    source.prior(rng)
    return rng


def _condition(source: Generator | Solved, labels: Sequence[int] | None, count: int) -> Condition:
    denoiser = denoisers(source)[0]
    classes = denoiser.backbone.num_classes
    if labels is None and not classes:
        return {}
    wanted = None if labels is None else torch.as_tensor(labels, dtype=torch.int64)
    if wanted is None or wanted.shape != (count,) or not ((wanted >= 0) & (wanted < classes)).all():
        known = f"{count} numbers in [0, {classes})" if classes else "left out, since the network has no classes"
        raise ValueError(f"labels must be {known}, got {labels if wanted is None else wanted.tolist()[:10]}")
    return {"label": wanted.to(next(denoiser.parameters()).device)}
