"""Pairs of times (t, r), r < t, between which a consistency function is held constant, and how they close up.

How close the two are is a pure function of the step, so that a resumed run goes on where it was.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from diffdistill.process import Process


class TimePair(NamedTuple):
    """t > r, each (N,); ends (N,) is true where r is the end of the trajectory, at which nothing is evaluated."""

    t: Tensor
    r: Tensor
    ends: Tensor


class Levels(ABC):
    """How many noise levels a grid has; neighbours among them make the pairs."""

    @abstractmethod
    def __call__(self, step: int) -> int: ...


def _check_levels(first: int, last: int, steps: int) -> None:
    if not 1 <= first < last:
        raise ValueError(f"first must be at least 1 and below last, got first={first} and last={last}")
    if steps < 1:
        raise ValueError(f"steps must be positive, got {steps}; give the step at which last is reached")


@dataclass(frozen=True)
class FixedLevels(Levels):
    """One grid throughout, as in consistency distillation."""

    count: int = 18

    def __post_init__(self):
        if self.count < 2:
            raise ValueError(f"count must be at least 2, got {self.count}; one pair needs two levels")

    def __call__(self, step: int) -> int:
        return self.count


@dataclass(frozen=True)
class GrowingLevels(Levels):
    """ceil(sqrt(k/K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1 levels at step k, where s0 is `first`, s1 `last`, K `steps`.

    Source: Song et al. 2023, the schedule of consistency training.
    """

    first: int = 2
    last: int = 150
    steps: int = 800_000

    def __post_init__(self):
        _check_levels(self.first, self.last, self.steps)
        if self.first < 2:
            raise ValueError(f"first must be at least 2, got {self.first}; one pair needs two levels")

    def __call__(self, step: int) -> int:
        # in integers, since the root is one exactly at the end and a rounding error would add a level
        k, squares = min(step, self.steps), (self.last + 1) ** 2 - self.first**2
        return _ceil_root(k * squares + self.first**2 * self.steps, self.steps)


def _ceil_root(numerator: int, denominator: int) -> int:
    """ceil(sqrt(numerator / denominator)), exactly."""
    whole = -(-numerator // denominator)  # the least integer above the quotient has the same rounded root
    root = math.isqrt(whole)
    return root if root * root == whole else root + 1


@dataclass(frozen=True)
class DoublingLevels(Levels):
    """min(s0 2^floor(k/K'), s1) + 1 levels at step k, K' = floor(K / (log2 floor(s1/s0) + 1)).

    s0 is `first`, s1 `last` and K `steps`. Source: Song and Dhariwal 2023 (iCT).
    """

    first: int = 10
    last: int = 1280
    steps: int = 400_000

    def __post_init__(self):
        _check_levels(self.first, self.last, self.steps)
        if self.steps < self._stages:
            raise ValueError(f"steps={self.steps} must be at least {self._stages}, the doublings from first to last")

    @property
    def _stages(self) -> int:
        return (self.last // self.first).bit_length()  # floor(log2) + 1

    def __call__(self, step: int) -> int:
        return min(self.first * 2 ** min(step // (self.steps // self._stages), self._stages), self.last) + 1


LEVELS: dict[str, type[Levels]] = {"fixed": FixedLevels, "growing": GrowingLevels, "doubling": DoublingLevels}


class TimePairs(ABC):
    """Maps uniform numbers u in (0, 1), shape (N,), to one pair per sample."""

    @abstractmethod
    def __call__(self, u: Tensor, process: Process, step: int) -> TimePair: ...


class GridPairs(TimePairs):
    """Neighbours on the process's customary levels, warp(0), ..., warp(1): on VE those of Karras et al. 2022, from
    sigma_min to sigma_max; elsewhere from the data to t_max. The lowest level is the end of the trajectory."""

    levels: Levels

    @abstractmethod
    def cumulative(self, levels: Tensor, process: Process) -> Tensor:
        """For ascending levels (K,), the probability of the pairs below each, (K,), up to one affine map."""

    def __call__(self, u: Tensor, process: Process, step: int) -> TimePair:
        count = self.levels(step)
        levels = process.warp(torch.linspace(0, 1, count, dtype=u.dtype, device=u.device))
        below = self.cumulative(levels, process)
        wanted = below[0] + (below[-1] - below[0]) * u
        lower = (torch.searchsorted(below, wanted, right=True) - 1).clamp(0, count - 2)
        return TimePair(levels[lower + 1], levels[lower], lower == 0)


@dataclass(frozen=True)
class UniformPairs(GridPairs):
    """Every pair of neighbours as often. On a VP table of 1000 with 51 levels: LCM's grid, which skips 20 steps.

    Source: Song et al. 2023 (CD and CT); Luo et al. 2023 (LCM).
    """

    levels: Levels = field(default_factory=FixedLevels)

    def cumulative(self, levels: Tensor, process: Process) -> Tensor:
        return torch.linspace(0, 1, len(levels), dtype=levels.dtype, device=levels.device)


@dataclass(frozen=True)
class LogNormalPairs(GridPairs):
    """Each pair as often as log(sigma / alpha) ~ N(mean, std^2) falls between its levels (iCT: Song and Dhariwal 2023,
    from which the constants are)."""

    levels: Levels = field(default_factory=DoublingLevels)
    mean: float = -1.1
    std: float = 2.0

    def __post_init__(self):
        if self.std <= 0:
            raise ValueError(f"std must be positive, got {self.std}")

    def cumulative(self, levels: Tensor, process: Process) -> Tensor:
        return torch.special.ndtr((process.ratio(levels).log() - self.mean) / self.std)


@dataclass(frozen=True)
class ContinuousPairs(TimePairs):
    """log s ~ N(mean, std^2) for s = sigma / alpha at t, and s (1 - n(s) / q^(stage + 1)) at r, or the data if that
    is not positive; n(s) = 1 + 8 sigmoid(-s). The stage is step // stage_steps.

    Source: Geng et al. 2024 (ECT), in the form of the released code; there s = t.
    """

    stage_steps: int = 25_000
    q: float = 2.0
    cap: float = 1.0  # the largest ratio of both noise levels; 1: none
    mean: float = -1.1
    std: float = 2.0

    def __post_init__(self):
        if self.stage_steps < 1:
            raise ValueError(f"stage_steps must be positive, got {self.stage_steps}")
        if self.q <= 1:
            raise ValueError(f"q must be above 1, got {self.q}, or the times of a pair would never come closer")
        if not 0 < self.cap <= 1:
            raise ValueError(f"cap must be in (0, 1], got {self.cap}")
        if self.std <= 0:
            raise ValueError(f"std must be positive, got {self.std}")

    def __call__(self, u: Tensor, process: Process, step: int) -> TimePair:
        t = process.time_of((self.mean + self.std * torch.special.ndtri(u)).exp())
        noise = process.ratio(t)
        apart = (1 + 8 * torch.sigmoid(-noise)) / self.q ** (step // self.stage_steps + 1)
        kept = (1 - apart).clamp(0, self.cap)
        r = process.time_of(kept * noise)
        return TimePair(t, r, kept == 0)


TIME_PAIRS: dict[str, type[TimePairs]] = {
    "uniform": UniformPairs,
    "log_normal": LogNormalPairs,
    "continuous": ContinuousPairs,
}
