"""What a network is told besides its time and class, in the embedding of its time: numbers, one per sample."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WAVES = 32
SPAN, SCALE = "span", "scale"
# What can be told: how far a flow map leads, in the time of a rectified flow, and the scale of guidance. The largest
# number that its sinusoids tell apart well, and the one that a network takes which is told none.
TELLABLE = {SPAN: (1.0, 0.0), SCALE: (16.0, 1.0)}


class ToldEmbedding(nn.Module):
    """A vector of `width` numbers for each number in [0, unit]; zeros at first, since the last layer is.

    Its sinusoids are of low frequency, for the derivative by the span is needed, and stays tame.
    """

    def __init__(self, width: int, unit: float):
        super().__init__()
        frequencies = math.pi / unit * torch.exp(torch.linspace(math.log(1 / 4), math.log(8), WAVES))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.enter = nn.Linear(2 * WAVES, width)
        self.leave = nn.Linear(width, width)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, number: Tensor) -> Tensor:
        """(N, width) of numbers (N,)."""
        angles = number[:, None] * self.frequencies.to(number.dtype)
        return self.leave(F.silu(self.enter(torch.cat([angles.sin(), angles.cos()], dim=1))))


class Told(nn.ModuleDict):
    """An embedding for each thing of TELLABLE that a network is told, by name."""

    def add(self, name: str, width: int, like: Tensor) -> None:
        """Tell `name` from here on, in the precision and on the device of `like`; at first it makes no difference."""
        if name not in TELLABLE:
            raise ValueError(f"a network can be told {', '.join(TELLABLE)}, not {name}")
        if name not in self:
            self[name] = ToldEmbedding(width, TELLABLE[name][0]).to(like)

    def forward(self, cond: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """The sum of the vectors, (N, width), of what `cond` says; `like` is any tensor (N,) of the right dtype."""
        return sum(
            embed(cond[name] if name in cond else torch.full_like(like, TELLABLE[name][1]))
            for name, embed in self.items()
        )


class Label(nn.Embedding):
    """Rows of [label, vector]: the label's embedding plus the vector.

    Networks of diffusers hand their labels on as they are, also to a recomputation of activations, so that what is told
    beside the label needs no state in the network; and its weights keep their names.
    """

    def forward(self, told: Tensor) -> Tensor:
        return super().forward(told[:, 0].long()) + told[:, 1:]


class NoLabel(nn.Module):
    """The same in a network without classes: the vector alone."""

    def forward(self, told: Tensor) -> Tensor:
        return told[:, 1:]


def beside(label: nn.Embedding | None) -> nn.Module:
    """What takes the place of a network's embedding of labels, with its weights, and adds what is told beside each."""
    if label is None:
        return NoLabel()
    return Label(label.num_embeddings, label.embedding_dim, _weight=label.weight)
