"""Distances between samples, as a recipe names them: what a loss on pairs of a sample and its target is made of."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from diffdistill.losses import full, pair_distance

Measure = Callable[[Tensor, Tensor], Tensor]  # of samples and their targets, each (N, ...): one value each, shape (N,)


class Distance(ABC):
    """What a recipe says of a distance."""

    @abstractmethod
    def measure(self, perceptual: Callable[["Lpips"], Measure] | None) -> Measure:
        """The distance itself; `perceptual` gives the network of one that has a network."""


@dataclass(frozen=True)
class Squared(Distance):
    """The mean square of the difference."""

    def measure(self, perceptual: Callable[["Lpips"], Measure] | None) -> Measure:
        return lambda made, target: pair_distance(made, target, huber=None)


@dataclass(frozen=True)
class PseudoHuber(Distance):
    """sqrt(mean square + huber^2) - huber (Song and Dhariwal 2023, iCT, whose constant is the default here)."""

    huber: float = 5.4e-4  # per root of the sample's size

    def __post_init__(self):
        if self.huber <= 0:
            raise ValueError(f"huber must be positive, got {self.huber}; name: squared has none")

    def measure(self, perceptual: Callable[["Lpips"], Measure] | None) -> Measure:
        return lambda made, target: pair_distance(made, target, huber=self.huber)


@dataclass(frozen=True)
class Absolute(Distance):
    """The mean absolute difference."""

    def measure(self, perceptual: Callable[["Lpips"], Measure] | None) -> Measure:
        return lambda made, target: (full(made) - full(target)).abs().flatten(1).mean(1)


SMALLEST = 16  # pixels a side: VGG16 halves a picture four times


@dataclass(frozen=True)
class Lpips(Distance):
    """LPIPS on VGG16 (Zhang et al. 2018), of pictures in [-1, 1]."""

    weights: str  # torchvision's vgg16-397923af.pth, or a .safetensors of its tensors features.*
    size: int = 224  # pixels a side that pictures are enlarged to, bilinearly; 0: as they are

    def __post_init__(self):
        if not self.weights:
            raise ValueError("weights is empty; name the file of torchvision's VGG16, e.g. vgg16-397923af.pth")
        if self.size and self.size < SMALLEST:
            raise ValueError(f"size must be at least {SMALLEST}, got {self.size}; 0 leaves pictures as they are")

    def measure(self, perceptual: Callable[["Lpips"], Measure] | None) -> Measure:
        return perceptual(self)

    def refuse_unseen(self, shape: tuple[int, ...]) -> None:
        """Refuses samples of a shape that LPIPS cannot see, or would shrink.

        Raises:
            ValueError: they are no grey or coloured pictures, smaller than the network takes, or larger than `size`.
        """
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise ValueError(
                f"distance.name=lpips compares pictures in pixels, of shape (3, height, width) or (1, height, width), "
                f"and the samples are {tuple(shape)}: points or latents; take name: pseudo_huber or squared"
            )
        if not self.size and min(shape[1:]) < SMALLEST:
            raise ValueError(
                f"distance.size=0 leaves samples of {shape[1]} x {shape[2]} pixels as they are, and VGG16 needs "
                f"{SMALLEST} or more a side; give a size, e.g. 224"
            )
        if self.size and max(shape[1:]) > self.size:
            raise ValueError(
                f"distance.size={self.size} would shrink samples of {shape[1]} x {shape[2]} pixels; give 0, which "
                "leaves them as they are"
            )


DISTANCES: dict[str, type[Distance]] = {
    "pseudo_huber": PseudoHuber,
    "squared": Squared,
    "absolute": Absolute,
    "lpips": Lpips,
}
