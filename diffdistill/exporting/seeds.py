"""The noise that stock pipelines draw for seeds, one for each sample, for our own samplers to draw the same."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Seeds:
    """The noise that stock pipelines draw for a list of generators, one for each sample, in the place of an `Rng`."""

    def __init__(self, generators: Sequence[torch.Generator]):
        self._generators = list(generators)

    @staticmethod
    def of(seeds: Sequence[int]) -> "Seeds":
        return Seeds([torch.Generator().manual_seed(seed) for seed in seeds])

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers of shape (N, *shape), each row of its own generator."""
        return torch.cat([torch.randn((1, *shape), generator=generator) for generator in self._generators])

    def rows(self, places: Sequence[int]) -> "Seeds":
        """The generators at these places, going on where they are."""
        return Seeds([self._generators[place] for place in places])
