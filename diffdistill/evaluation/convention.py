"""What images a feature network takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class InputConvention:
    """What images a network takes: (N, 3, height, width), black at low and white at high.

    Images of another size are refused where resize is "none", and else brought to this one by a function of `resize`.
    """

    height: int
    width: int
    low: float = -1.0
    high: float = 1.0
    resize: Literal["none", "tf1_bilinear", "bicubic", "shorter_bicubic"] = "none"

    def __post_init__(self):
        if min(self.height, self.width) < 1:
            raise ValueError(f"height and width must be at least 1, got {self.height} and {self.width}")
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")
