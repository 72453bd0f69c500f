"""Named streams of data. Each is addressed by slot: what a sample is depends on its slot's draws and on nothing else."""

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
class Points(Stream):
    """Rows of a tensor (M, ...), drawn uniformly with replacement: two-dimensional data sets."""

    points: Tensor

    def draw(self, rng: Rng) -> Sample:
        return Sample(x0=self.points[rng.integers(len(self.points))].to(rng.dtype))


@dataclass(frozen=True)
class Streams:
    """All streams of a run."""

    streams: Mapping[str, Stream]

    def draw(self, rng: Rng) -> Batch:
        return {name: stream.draw(rng.fork(name)) for name, stream in self.streams.items()}
