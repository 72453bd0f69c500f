"""Seeded sampling: sample i is a function of (seed, i), whatever the batch size and the number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffdistill.generator import Sampler
from diffdistill.rng import Rng
from diffdistill.teacher import Teacher


@dataclass(frozen=True)
class Solved:
    """A teacher sampled by its PF-ODE.

    Attributes:
        teacher: with its own guidance.
        steps: times of the process's customary grid; the last step ends at the data.
        solver: heun, euler or ddim.
    """

    teacher: Teacher
    steps: int = 18
    solver: str = "heun"

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"the teacher needs at least 1 step, got {self.steps}")


def sample_images(
    source: Sampler | Solved,
    count: int,
    *,
    seed: int,
    batch: int,
    labels: Sequence[int] | None = None,
    rank: int = 0,
    ranks: int = 1,
    progress: str = "",
) -> tuple[Tensor, Tensor | None]:
    """Samples 0 to count - 1, or this rank's share of them, and their labels, on the CPU.

    Args:
        source: few-step generators, or a teacher with its steps.
        seed: of the noises. The same seed and index give the same noise for every source of one sample shape.
        batch: samples made at once; it does not change them beyond rounding.
        labels: the class of each sample, count of them, in [0, classes); None for i % classes.
        rank, ranks: this process's place. Shares are consecutive, and padded by the last sample to one length, since
            sharded networks need every rank at every forward; cut the joined shares to `count`.
        progress: what a bar says while sampling; empty for none.
    Returns:
        samples of shape (N, *sample_shape), in the network's dtype, and int64 labels (N,), or None without classes.
    Raises:
        ValueError: count or batch is below 1, or the labels do not fit the network.
    """
    if count < 1 or batch < 1:
        raise ValueError(f"count and batch must be at least 1, got {count} and {batch}")
    parts = source.parts.values() if isinstance(source, Sampler) else [source.teacher]
    denoisers = [part.denoiser for part in parts]
    denoiser = denoisers[0]
    wanted = _labels(labels, count, denoiser.backbone.num_classes)
    length = -(-count // ranks)
    own = [min(index, count - 1) for index in range(rank * length, (rank + 1) * length)]
    parameter = next(denoiser.parameters())
    made = []
    bar = tqdm(total=length, desc=progress, unit="image", leave=False, disable=not progress, dynamic_ncols=True)
    with torch.no_grad(), evaluating(*denoisers), bar:
        for first in range(0, length, batch):
            slots = own[first : first + batch]
            cond = {} if wanted is None else {"label": wanted[slots].to(parameter.device)}
            rng = Rng((seed, "sample"), slots, device=parameter.device, dtype=parameter.dtype)
            made.append(_draw(source, rng, cond).cpu())
            bar.update(len(slots))
    return torch.cat(made), None if wanted is None else wanted[own]


def _draw(source: Sampler | Solved, rng: Rng, cond: dict[str, Tensor]) -> Tensor:
    if isinstance(source, Sampler):
        return source.sample(source.prior(rng), cond, rng)
    teacher, process = source.teacher, source.teacher.process
    times = process.grid(source.steps)
    x = process.prior_std(times[0]) * rng.normal(teacher.denoiser.sample_shape)
    return teacher.solve(x, (*times, 0.0), cond, solver=source.solver)


def _labels(labels: Sequence[int] | None, count: int, classes: int) -> Tensor | None:
    if not classes:
        if labels is not None:
            raise ValueError("labels are given, but the network has no classes; leave them out")
        return None
    if labels is None:
        return torch.arange(count) % classes
    wanted = torch.as_tensor(labels, dtype=torch.int64).cpu()
    if wanted.shape != (count,) or wanted.min() < 0 or wanted.max() >= classes:
        raise ValueError(f"labels must be {count} numbers in [0, {classes}), got {wanted.tolist()[:10]}")
    return wanted


@contextmanager
def evaluating(*modules: nn.Module):
    """Within the block, the modules are in evaluation mode; behind it, each part is in the mode that it was in."""
    modes = {part: part.training for module in modules for part in module.modules()}
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
