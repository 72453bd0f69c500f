"""Readings: what a step reports, as sums that add up exactly over samples, micro-batches, ranks and steps."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from diffdistill.losses import full
from diffdistill.prediction import Prediction
from diffdistill.process import Process

NOISE_EDGES = (0.5, 2.0, 8.0)  # of sigma / (alpha sigma_data)
NOISE_LEVELS = ("below_0.5", "0.5_to_2", "2_to_8", "above_8")
PEAK = 0.99
SKETCH = 16  # numbers that stand for a sample's values in its spread


@dataclass(frozen=True)
class Ratio:
    """Told as the sum of `numerator` over that of `denominator`, which is 0 or 1 for a mean over some samples."""

    numerator: Tensor
    denominator: Tensor


@dataclass(frozen=True)
class Spread:
    """Told as the root of the summed variances, over all samples, of the columns of `values`, shape (N, K)."""

    values: Tensor


Reading = Tensor | Ratio | Spread  # a Tensor is told as the mean of its numbers


def _mean(sums: Sequence[float], count: float) -> float:
    return sums[0] / count


def _ratio(sums: Sequence[float], count: float) -> float | None:
    return sums[0] / sums[1] if sums[1] else None


def _spread(sums: Sequence[float], count: float) -> float:
    half = len(sums) // 2
    variances = [square / count - (total / count) ** 2 for total, square in zip(sums[:half], sums[half:], strict=True)]
    return math.sqrt(max(0.0, sum(variances)))


TOLD: dict[str, Callable[[Sequence[float], float], float | None]] = {"mean": _mean, "ratio": _ratio, "spread": _spread}


class Readings:
    """Running sums of what a step reports, kept on the device until the log interval."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
        self._kinds: dict[str, str] = {}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, float] = {}

    def add(self, name: str, reading: Reading, *, share: float = 1.0) -> None:
        """Count a reading; as a part of one where several ranks hold the same numbers."""
        match reading:
            case Ratio(numerator, denominator):
                kind, count, parts = "ratio", 1, (numerator.sum(dtype=self._dtype), denominator.sum(dtype=self._dtype))
                sums = torch.stack(parts)
            case Spread(values):
                rows = values.to(self._dtype)
                kind, count, sums = "spread", len(rows), torch.cat([rows.sum(0), rows.square().sum(0)])
            case Tensor():
                kind, count, sums = "mean", reading.numel(), reading.to(self._dtype).sum().reshape(1)
        sums = sums.detach() * share
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums
        self._counts[name] = self._counts.get(name, 0.0) + count * share
        self._kinds[name] = kind

    def flush(self) -> dict[str, float]:
        """What each reading comes to over all ranks since the last flush; none of a ratio whose denominator is 0."""
        names = list(self._sums)
        if not names:
            return {}
        counts = torch.tensor([self._counts[name] for name in names], dtype=self._dtype)
        flat = torch.cat([*self._sums.values(), counts.to(self._accelerator.device)])
        totals = iter(self._accelerator.reduce(flat).tolist())
        sums = {name: [next(totals) for _ in self._sums[name]] for name in names}
        told = {name: TOLD[self._kinds[name]](sums[name], next(totals)) for name in names}
        self._sums.clear()
        self._counts.clear()
        return {name: value for name, value in told.items() if value is not None}

    def state(self) -> list[dict[str, list]]:
        """The kind, sums and counts of each rank, for a checkpoint."""
        own = {name: [self._kinds[name], sums.tolist(), self._counts[name]] for name, sums in self._sums.items()}
        return gather_object([own])

    def load(self, state: Sequence[Mapping[str, list]]) -> None:
        """Go on from `state`; with another number of ranks than it was saved by, the first takes over all sums."""
        rank, device = self._accelerator.process_index, self._accelerator.device
        if len(state) == self._accelerator.num_processes:
            own = state[rank]
        else:
            own = {
                name: [
                    kind,
                    [sum(column) * (rank == 0) for column in zip(*(s[name][1] for s in state), strict=True)],
                    sum(s[name][2] for s in state) * (rank == 0),
                ]
                for name, (kind, _, _) in state[0].items()
            }
        self._kinds = {name: kind for name, (kind, _, _) in own.items()}
        self._sums = {name: torch.tensor(sums, dtype=self._dtype, device=device) for name, (_, sums, _) in own.items()}
        self._counts = {name: count for name, (_, _, count) in own.items()}


class Sketch:
    """A few numbers of each sample whose summed variance is, in expectation over random signs, that of one value.

    The values get fixed random signs and are added up in `SKETCH` runs of neighbours: a count sketch, which keeps sums
    of squares (Charikar et al. 2002), and spares a whole mean sample on every rank and in every checkpoint.
    """

    def __init__(self, shape: Sequence[int]):
        size = math.prod(shape)
        generator = torch.Generator().manual_seed(0)
        self._signs = (torch.randint(0, 2, (size,), generator=generator) * 2 - 1) / math.sqrt(size)
        self._runs = min(SKETCH, size)

    def __call__(self, x: Tensor) -> Tensor:
        """x of shape (N, ...) as (N, K)."""
        if self._signs.device != x.device:  # the first time
            self._signs = self._signs.to(x.device)
        signed = full(x).flatten(1) * self._signs
        return torch.stack([run.sum(1) for run in signed.tensor_split(self._runs, dim=1)], dim=1)


@torch.no_grad()
def of_samples(x: Tensor, sketch: Sketch) -> dict[str, Reading]:
    """What tells samples (N, ...) that are too loud or too alike, to be compared with the teacher's.

    rms: root mean square of a sample's values. peak: what 1 % of a sample's values exceed in size. spread: standard
    deviation of a value over the samples, classes included.
    """
    values = full(x).flatten(1)
    size = values.shape[1]
    return {
        "rms": values.square().mean(1).sqrt(),
        "peak": values.abs().kthvalue(math.ceil(PEAK * size), dim=1).values,
        "spread": Spread(sketch(x)),
    }


@torch.no_grad()
def of_difference(
    x: Tensor, t: Tensor, x0_real: Tensor, x0_fake: Tensor, process: Process, *, trust: Tensor | float = 1.0
) -> dict[str, Reading]:
    """What tells of the denoised samples of teacher and critic, x0_real and x0_fake, of noised x, at t of shape (N,).

    direction: mean absolute d = x0_real - x0_fake. difference/LEVEL: root mean square of d over the samples whose noise
    sigma / (alpha sigma_data) is of that level. agreement: how far the samples themselves bear the critic out. Their
    best denoiser mu has E[x | x_t] = mu, so that the mean of d (x0_real - x) is that of d^2 for a perfect critic: the
    ratio is 1. It is above 1 for a critic that has gone only a part of the way from the teacher, below 1 for one that
    sees a difference which the samples do not have, or no longer. All that it asks of x is E[x | x_t] = mu, so that
    the critic's target may stand for a clean sample that does not exist. `trust` is a further weight of the agreement,
    shape (N,), a function of t alone.
    """
    x, x0_real, x0_fake = full(x), full(x0_real), full(x0_fake)
    d = x0_real - x0_fake
    square = d.square().flatten(1).mean(1)
    rms = square.sqrt()
    readings: dict[str, Reading] = {"direction": d.abs().flatten(1).mean(1), **by_noise("difference", rms, t, process)}
    a, _ = Prediction.F.coefficients(t, process)
    weight = trust / a.square()  # brings all noise levels to one scale; of t alone, so that the law holds with it
    readings["agreement"] = Ratio(weight * (d * (x0_real - x)).flatten(1).mean(1), weight * square)
    return readings


@torch.no_grad()
def by_noise(name: str, values: Tensor, t: Tensor, process: Process) -> dict[str, Reading]:
    """name/LEVEL: the mean of `values` over the samples whose noise sigma / (alpha sigma_data) is of that level."""
    noise, readings = process.ratio(t) / process.sigma_data, {}
    for level, (low, high) in zip(NOISE_LEVELS, pairwise((0.0, *NOISE_EDGES, math.inf)), strict=True):
        inside = ((noise >= low) & (noise < high)).to(values.dtype)
        readings[f"{name}/{level}"] = Ratio(values * inside, inside)
    return readings


@torch.no_grad()
def of_logits(real: Tensor, fake: Tensor) -> dict[str, Reading]:
    """How well a discriminator tells real from fake by its logits, each (N,): their gap, and its accuracy."""
    right = torch.cat([real > 0, fake < 0]).to(torch.float32)
    return {"logit_gap": full(real) - full(fake), "accuracy": right}


@torch.no_grad()
def of_pulls(pull: Tensor, other: Tensor) -> Ratio:
    """The share that one term's gradients at the samples, (N, ...), have of its own and another's, by their norms."""
    ours, theirs = (full(gradient).flatten(1).norm(dim=1) for gradient in (pull, other))
    return Ratio(ours, ours + theirs)
