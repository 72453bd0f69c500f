"""Named streams of data, addressed by slot: what a sample is depends on its slot's draws and on nothing else."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.data.image_set import ImageSet
from diffdistill.method import Batch, Sample
from diffdistill.rng import Rng


class Stream(ABC):
    @abstractmethod
    def draw(self, rng: Rng) -> Sample:
        """One sample for each slot of `rng`."""


@dataclass(frozen=True)
class Images(Stream):
    """Images drawn uniformly with replacement, with their labels where the network is conditional.

    Args:
        images: kept on the training device as uint8.
        labelled: give the condition {"label": (N,)}.
        flip: mirror half of them left to right.
    """

    images: ImageSet
    labelled: bool
    flip: bool = False

    def draw(self, rng: Rng) -> Sample:
        x0, labels = self.images.select(rng.integers(len(self.images)))
        x0 = x0.to(rng.dtype)
        if self.flip:
            x0 = torch.where((rng.uniform() < 0.5).reshape(-1, 1, 1, 1), x0.flip(3), x0)
        return Sample(x0=x0, cond={"label": labels} if self.labelled else {})


@dataclass(frozen=True)
class Labels(Stream):
    """Class labels drawn uniformly; with no classes, the empty condition."""

    num_classes: int

    def draw(self, rng: Rng) -> Sample:
        return Sample(cond={"label": rng.integers(self.num_classes)} if self.num_classes else {})


@dataclass(frozen=True)
class SomeLabels(Stream):
    """Class labels drawn uniformly from `classes`, int64 (K,), on the training device."""

    classes: Tensor

    def draw(self, rng: Rng) -> Sample:
        return Sample(cond={"label": self.classes[rng.integers(len(self.classes))]})


@dataclass(frozen=True)
class Streams:
    """All streams of a run."""

    streams: Mapping[str, Stream]

    def draw(self, rng: Rng) -> Batch:
        return {name: stream.draw(rng.fork(name)) for name, stream in self.streams.items()}


def refuse_unfit(batch: Batch, sample_shape: tuple[int, ...], dtype: torch.dtype, *, pictures: bool = True) -> None:
    """Gate 3: refuses a first batch whose samples are not what the network expects.

    pictures: whether images are in [-1, 1]; latents know no bounds.
    Raises:
        ValueError: another shape or dtype, values that are not finite, or images outside [-1, 1] or nearly constant.
    """
    for name, sample in batch.items():
        x0 = sample.x0
        if x0 is None:
            continue
        if tuple(x0.shape[1:]) != sample_shape or x0.dtype != dtype:
            raise ValueError(
                f"stream {name} gives {x0.dtype} samples of shape {tuple(x0.shape[1:])}, but the network takes "
                f"{dtype} of shape {sample_shape}; choose data or network of one shape"
            )
        images = pictures and x0.ndim == 4 and sample.noise is None  # where an ODE ends knows no bounds
        low, high = x0.min().item(), x0.max().item()
        if not x0.isfinite().all():
            raise ValueError(f"stream {name} gives NaN or infinity; look at the data")
        if images and (low < -1 or high > 1):
            raise ValueError(f"stream {name} gives images from {low:g} to {high:g}; scale them to [-1, 1]")
        if images and high - low < 2 / 127.5:
            raise ValueError(
                f"stream {name} gives images from {low:g} to {high:g} in a whole batch, where [-1, 1] is the full "
                "range; files must hold levels 0 to 255, and not 0 to 1"
            )
