"""Seeded sampling: sample i is a function of (seed, i), whatever the batch size and the number of processes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffdistill.denoiser import Condition, Denoiser
from diffdistill.generator import Sampler
from diffdistill.rng import Rng
from diffdistill.solvers import SOLVERS
from diffdistill.teacher import Teacher


@dataclass(frozen=True)
class Solved:
    """A teacher sampled by its PF-ODE.

    Attributes:
        teacher: with its own guidance.
        steps: times of the process's customary grid; the last step ends at the data.
        solver: heun, euler or ddim.
        start: the time that begins with pure noise; 0 for the process's last.
    """

    teacher: Teacher
    steps: int = 18
    solver: str = "heun"
    start: float = 0.0

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"the teacher needs at least 1 step, got {self.steps}")
        if self.solver not in SOLVERS:
            raise ValueError(f"the teacher's solver must be one of {', '.join(SOLVERS)}, got {self.solver!r}")
        last = self.teacher.process.t_max
        if not 0 <= self.start <= last:
            raise ValueError(f"the start must lie in (0, {last:g}], the times of the teacher, got {self.start}")

    @property
    def times(self) -> tuple[float, ...]:
        """The times of its evaluations, descending."""
        process = self.teacher.process
        if self.start in (0, process.t_max):
            return process.grid(self.steps)
        low, high = 0.0, 1.0
        for _ in range(60):  # where the customary spacing, which only rises, comes to `start`
            middle = (low + high) / 2
            later = process.warp(torch.tensor([middle], dtype=torch.float64)).item() > self.start
            low, high = (low, middle) if later else (middle, high)
        return (self.start, *process.grid(self.steps, first=low)[1:])

    def prior(self, rng: Rng) -> Tensor:
        """Pure noise at the first time, shape (N, *sample_shape)."""
        return self.teacher.process.prior_std(self.times[0]) * rng.normal(self.teacher.denoiser.sample_shape)

    def sample(self, x: Tensor, cond: Condition | None, rng: Rng) -> Tensor:
        """The end at the data of the ODE that begins in x, shape (N, ...)."""
        return self.teacher.solve(x, (*self.times, 0.0), cond, solver=self.solver)


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
        labels: the class of each sample, count of them, among the source's; None for all of these in turn.
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
    wanted = _labels(labels, count, classes_of(source))
    length = -(-count // ranks)
    own = [min(index, count - 1) for index in range(rank * length, (rank + 1) * length)]
    made = []
    bar = tqdm(total=length, desc=progress, unit="image", leave=False, disable=not progress, dynamic_ncols=True)
    with evaluating(*denoisers(source)), bar:
        for first in range(0, length, batch):
            slots = own[first : first + batch]
            made.append(draw(source, slots, None if wanted is None else wanted[slots], seed=seed))
            bar.update(len(slots))
    return torch.cat(made), None if wanted is None else wanted[own]


@torch.no_grad()
def draw(source: Sampler | Solved, slots: Sequence[int], labels: Tensor | None, *, seed: int) -> Tensor:
    """The samples `slots`, shape (N, *sample_shape), on the CPU, in the mode that the networks are in.

    Args:
        labels: int64 (N,), or None without classes.
    """
    parameter = next(denoisers(source)[0].parameters())
    cond = {} if labels is None else {"label": labels.to(parameter.device)}
    rng = Rng((seed, "sample"), slots, device=parameter.device, dtype=parameter.dtype)
    return source.sample(source.prior(rng), cond, rng).cpu()


def classes_of(source: Sampler | Solved) -> Sequence[int]:
    """The labels that a source can be asked for; none without classes."""
    return source.classes if isinstance(source, Sampler) else range(denoisers(source)[0].backbone.num_classes)


def fingerprint(source: Sampler | Solved) -> str:
    """SHA-256 of what its samples depend on beside their noise: the weights, the times, how it gets from one to the
    next."""
    digest = hashlib.sha256()
    for model in denoisers(source):
        for parameter in model.parameters():
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    digest.update(_in_words(source).encode())
    return digest.hexdigest()


def _in_words(source: Sampler | Solved) -> str:
    if isinstance(source, Solved):
        model, guidance = source.teacher.denoiser, source.teacher.guidance
        return f"{model.process} {source.steps} {source.solver} {source.start} {guidance}"
    return f"{type(source).__name__} " + " ".join(
        f"{name} {part.process} {part.grid} {part.step_rule} {part.guidance} {part.denoiser.boundary}"
        for name, part in source.parts.items()
    )


def denoisers(source: Sampler | Solved) -> list[Denoiser]:
    """All networks that take part in sampling."""
    if isinstance(source, Solved):
        return [source.teacher.denoiser]
    return [part.denoiser for part in source.parts.values()]


def refuse_share(source: Sampler | Solved) -> None:
    """Refuses to measure against all real images what makes only some of their classes.

    Raises:
        ValueError: naming these classes.
    """
    if isinstance(source, Sampler) and len(source.classes) < source.denoiser.backbone.num_classes:
        raise ValueError(
            f"this run makes only the classes {list(source.classes)}, and would be measured against all; join the runs "
            "of all students, and evaluate that one (in training: evaluate.every=0)"
        )


def _labels(labels: Sequence[int] | None, count: int, classes: Sequence[int]) -> Tensor | None:
    if not len(classes):
        if labels is not None:
            raise ValueError("labels are given, but the network has no classes; leave them out")
        return None
    if labels is None:
        return torch.tensor(list(classes))[torch.arange(count) % len(classes)]
    wanted = torch.as_tensor(labels, dtype=torch.int64).cpu()
    if wanted.shape != (count,) or not torch.isin(wanted, torch.tensor(list(classes))).all():
        last = classes[-1] + 1
        known = f"in [0, {last})" if len(classes) == last else f"among {list(classes)}"
        raise ValueError(f"labels must be {count} numbers {known}, got {wanted.tolist()[:10]}")
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
