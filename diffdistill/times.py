"""Samplers of noise times: each maps uniform numbers u in (0, 1), shape (N,), to times of a process, shape (N,)."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.process import Process


class TimeSampler(ABC):
    """An inverse distribution function, so that one uniform draw per sample gives its time."""

    @abstractmethod
    def __call__(self, u: Tensor, process: Process) -> Tensor: ...


@dataclass(frozen=True)
class Uniform(TimeSampler):
    """Uniform in the process's customary spacing, between `low` and `high`.

    On VE that is uniform over the rho = 7 levels of Karras et al. 2022; on VP uniform over steps; on a shifted
    rectified flow the shifted uniform law. DMD2 draws its generator times with low = 0.02 and high = 0.98.
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self):
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"a uniform time needs 0 <= low < high <= 1, got low={self.low} and high={self.high}")

    def __call__(self, u: Tensor, process: Process) -> Tensor:
        return process.warp(self.low + (self.high - self.low) * u)


@dataclass(frozen=True)
class LogNormal(TimeSampler):
    """log(sigma / alpha) ~ N(mean, std^2) (Karras et al. 2022, table 1). On a rectified flow this is the logit-normal
    law of Esser et al. 2024."""

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self):
        if self.std <= 0:
            raise ValueError(f"a log-normal time needs std > 0, got {self.std}")

    def __call__(self, u: Tensor, process: Process) -> Tensor:
        return process.time_of((self.mean + self.std * torch.special.ndtri(u)).exp())


@dataclass(frozen=True)
class UShaped(TimeSampler):
    """Density proportional to cosh(a (u - 1/2)) before the warp: mass at both ends (Lee et al. 2024, RF++)."""

    a: float = 4.0

    def __post_init__(self):
        if self.a <= 0:
            raise ValueError(f"a U-shaped time needs a > 0, got {self.a}")

    def __call__(self, u: Tensor, process: Process) -> Tensor:
        half = torch.as_tensor(self.a / 2, dtype=u.dtype, device=u.device).sinh()
        return process.warp(0.5 + ((2 * u - 1) * half).asinh() / self.a)


TIME_SAMPLERS: dict[str, type[TimeSampler]] = {"uniform": Uniform, "log_normal": LogNormal, "u_shaped": UShaped}
