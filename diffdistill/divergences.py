"""f-divergences D_f(real || fake) = E_fake f(r), r = real density / fake density, as score methods see them.

A divergence enters a gradient with respect to the generator only through h(r) = f''(r) r^2, and an exact one through
the slope d log h / d log r as well. Source: Xu et al. 2025 (f-distill) for h; the slopes follow.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Divergence:
    """f as h(r) = constant * shape(log r) and slope(log r) = d log h / d log r, of log ratios of any shape."""

    constant: float
    shape: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]

    def h(self, log_ratio: Tensor) -> Tensor:
        """f''(r) r^2."""
        return self.constant * self.shape(log_ratio)


def _power(constant: float, exponent: float) -> Divergence:
    return Divergence(constant, lambda x: (exponent * x).exp(), lambda x: torch.full_like(x, exponent))


DIVERGENCES: dict[str, Divergence] = {
    "reverse_kl": _power(1.0, 0.0),  # -log r; DMD's
    "forward_kl": _power(1.0, 1.0),  # r log r
    "jensen_shannon": Divergence(1.0, torch.sigmoid, lambda x: torch.sigmoid(-x)),
    "softened_reverse_kl": Divergence(1.0, lambda x: torch.sigmoid(-x), lambda x: -torch.sigmoid(x)),
    "jeffreys": Divergence(1.0, lambda x: 1 + x.exp(), torch.sigmoid),  # (r - 1) log r
    "squared_hellinger": _power(0.25, 0.5),  # 1 - sqrt r
    "neyman": _power(2.0, -1.0),  # (r - 1)^2 / r
    "pearson": _power(2.0, 2.0),  # (r - 1)^2
}


def check_divergence(name: str, ratio_range: tuple[float, float]) -> None:
    """Raises ValueError for a name that is not in DIVERGENCES, or a range of ratios that is none."""
    if name not in DIVERGENCES:
        raise ValueError(f"method.divergence must be one of {', '.join(DIVERGENCES)}, got {name!r}")
    low, high = ratio_range
    if not 0 < low < high:
        raise ValueError(f"method.ratio_range must be two ascending positive numbers, got {tuple(ratio_range)}")


def bounds_of_log(ratio_range: tuple[float, float]) -> tuple[float, float]:
    """The range of log ratios."""
    low, high = ratio_range
    return math.log(low), math.log(high)
