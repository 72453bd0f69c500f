"""Pictures that an autoencoder has seen already, each with the prompt that is its caption."""

from dataclasses import dataclass

from torch import Tensor

from diffdistill.data import Stream
from diffdistill.method import Sample
from diffdistill.rng import Rng


@dataclass(frozen=True)
class Latents(Stream):
    """Latents drawn uniformly with replacement, with the labels of their prompts.

    Args:
        x0: float32 (M, *shape), on the training device.
        labels: int64 (M,).
    """

    x0: Tensor
    labels: Tensor

    def draw(self, rng: Rng) -> Sample:
        index = rng.integers(len(self.x0))
        return Sample(x0=self.x0[index].to(rng.dtype), cond={"label": self.labels[index]})
