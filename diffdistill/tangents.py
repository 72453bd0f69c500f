"""Tangents: how fast a network's output changes along a trajectory of TrigFlow, exactly or by differences.

All speak of a field u(x, t), such as a network with its condition inside, at t of shape (N,) in (0, pi / 2), and of
its total derivative du/dt along dx/dt = velocity. They give sin t cos t du/dt: that is the derivative along
log tan t, so that the tangent of every customary clock (log sigma, the time of a rectified flow) stays bounded at both
ends, where du/dt does not. Nothing keeps a graph.

Along a frozen pair (x0, z) a trajectory is a rotation, x_(t+h) = cos h x + sin h dx/dt. The differences take that step,
and divide by sin h in place of h, which makes them exact where the data are a single point, for every h
(Zheng et al. 2025, rCM, whose code has the backward one). Their step is h = `step` sin t cos t, which is `step` in
log tan t: it reaches neither end of [0, pi / 2].
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffdistill.dual_layers import DualLayers
from diffdistill.process import lift

Field = Callable[[Tensor, Tensor], Tensor]  # field(x_t, t): (N, ...) and (N,) to (N, ...)


def directional(field: Field, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """field(x, t) and its derivative along (dx, dt), exact, in the shape of x, by one pass in forward mode.

    Attention takes no matrix of length times length for it. With FSDP2 around the network it needs torch 2.13, where
    hooks of sharded modules let tangents through.

    Args:
        x, dx: (N, ...), of one dtype.
        t, dt: (N,), of one dtype.
    """
    from flash_jvp import dual_attention

    with torch.no_grad(), dual_attention(), DualLayers():
        return torch.func.jvp(field, (x, t), (dx, dt))


class Tangents(ABC):
    """A way to the derivative along the trajectory.

    ahead: it asks for noise levels up to 1 / (1 - ahead) times that at t.
    """

    ahead: ClassVar[float] = 0.0

    @abstractmethod
    def __call__(self, field: Field, x: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
        """sin t cos t du/dt, detached, for x and velocity of shape (N, ...) and t of shape (N,)."""


@dataclass(frozen=True)
class Exact(Tangents):
    """Forward-mode differentiation: no error but rounding, at the cost of two to three forward passes."""

    def __call__(self, field: Field, x: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
        pace = _pace(t)
        return directional(field, x, t, lift(pace, x) * velocity, pace)[1]


@dataclass(frozen=True)
class Difference(Tangents):
    """What the differences share.

    The error falls with `step`, and what rounding does to the field comes 1 / step times as large: in bfloat16 take
    0.1 or more.
    """

    step: float = 0.01  # in log tan t

    def __post_init__(self):
        if not 0 < self.step <= 0.5:
            raise ValueError(
                f"step must be in (0, 0.5], got {self.step}; 0.01 is customary in float32, 0.1 in bfloat16"
            )

    def spacing(self, t: Tensor) -> Tensor:
        """h of shape (N,)."""
        return self.step * _pace(t)


@dataclass(frozen=True)
class Rotational(Difference):
    """(cos h u(x_t, t) - u(x_(t-h), t - h)) / sin h: first order, two forward passes."""

    @torch.no_grad()
    def __call__(self, field: Field, x: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
        h = self.spacing(t)
        before = field(lift(h.cos(), x) * x - lift(h.sin(), x) * velocity, t - h)
        return lift(_pace(t) / h.sin(), x) * (lift(h.cos(), x) * field(x, t) - before)


@dataclass(frozen=True)
class Central(Difference):
    """(u(x_(t+h), t + h) - u(x_(t-h), t - h)) / (2 sin h): second order, two forward passes."""

    @property
    def ahead(self) -> float:
        return self.step  # near pi / 2, where tan is 1 / (pi / 2 - t), exactly so; elsewhere it is less

    @torch.no_grad()
    def __call__(self, field: Field, x: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
        h = self.spacing(t)
        kept, turned = lift(h.cos(), x) * x, lift(h.sin(), x) * velocity
        return lift(_pace(t) / (2 * h.sin()), x) * (field(kept + turned, t + h) - field(kept - turned, t - h))


@dataclass(frozen=True)
class Semi(Difference):
    """Exact in x, and (cos h u(x, t) - u(x, t - h)) / sin h in t: for networks whose clock loses digits in its tangent.

    First order in h, and not exact on a single point either, since x stays where it is.
    """

    def __call__(self, field: Field, x: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
        pace, h = _pace(t), self.spacing(t)
        here, in_x = directional(field, x, t, lift(pace, x) * velocity, torch.zeros_like(t))
        with torch.no_grad():
            before = field(x, t - h)
        return in_x + lift(pace / h.sin(), x) * (lift(h.cos(), x) * here - before)


def _pace(t: Tensor) -> Tensor:
    """dt / d log tan t, shape (N,)."""
    return t.sin() * t.cos()


TANGENTS: dict[str, type[Tangents]] = {"exact": Exact, "semi": Semi, "rotational": Rotational, "central": Central}
