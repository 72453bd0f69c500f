"""Running means: numbers of earlier steps that a loss divides by, the same for every sample of a step."""

import torch
from torch import Tensor


class RunningMeans:
    """Means of a number over the samples of earlier steps, one for each of several bins.

    A loss reads `values`, which stay as they are throughout a step, and adds the numbers of its own samples; the player
    that it trains folds these in as it steps. So a step is the same function of its samples however they are parted
    into micro-batches and ranks, which a mean over the present batch would not be. Nothing waits for the device.

    Args:
        start: of all means, until a bin sees its first sample.
        bins: how many means.
        decay: the part of a mean that survives a step in which its bin saw samples; 0 for the last such step's alone.
        device: of the numbers.
    """

    def __init__(self, start: float, *, bins: int = 1, decay: float, device: torch.device):
        if not 0 <= decay < 1:
            raise ValueError(f"a running mean's decay must be in [0, 1), got {decay}; 1 would never leave the start")
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.values = torch.full((bins,), start, dtype=dtype, device=device)
        self.decay = decay
        self._bins = torch.arange(bins, device=device)
        self._sums = torch.zeros(2, bins, dtype=dtype, device=device)  # of the numbers, and of how many there are

    @torch.no_grad()
    def add(self, numbers: Tensor, places: Tensor) -> None:
        """Count numbers of shape (N,), each in the bin at its place, shape (N,), towards the means of later steps."""
        # a mask, since scattered sums have no fixed order on a GPU, and a resumed run must go on bit for bit
        inside = (places[:, None] == self._bins).to(self._sums.dtype)
        self._sums += torch.stack([(inside * numbers[:, None]).sum(0), inside.sum(0)])

    @torch.no_grad()
    def fold(self, finite: Tensor) -> None:
        """Move the means towards what was added since the last fold, on all ranks; not where `finite`, 0-dimensional,
        is 0, nor in a bin without samples."""
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._sums)
        total, count = self._sums
        moved = self.decay * self.values + (1 - self.decay) * total / count.clamp(min=1)
        self.values.copy_(torch.where((count > 0) & (finite > 0), moved, self.values))
        self._sums.zero_()


def by_their_mean(numbers: Tensor, means: RunningMeans) -> Tensor:
    """Numbers of shape (N,) over their one running mean, towards which they count in later steps; it is a constant."""
    means.add(numbers, torch.zeros_like(numbers, dtype=torch.int64))
    return numbers / means.values.to(numbers.dtype)
