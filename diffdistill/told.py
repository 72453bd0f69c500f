"""How a network is told, besides its time, how far a flow map leads: in the embedding of its time."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WAVES = 32


class SpanEmbedding(nn.Module):
    """A vector of `width` numbers for each span in [0, 1]; zeros at first, since the last layer is.

    Its sinusoids are of low frequency, for the derivative by the span is needed, and stays tame.
    """

    def __init__(self, width: int):
        super().__init__()
        frequencies = math.pi * torch.exp(torch.linspace(math.log(1 / 4), math.log(8), WAVES))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.enter = nn.Linear(2 * WAVES, width)
        self.leave = nn.Linear(width, width)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, span: Tensor) -> Tensor:
        """(N, width) of spans (N,)."""
        angles = span[:, None] * self.frequencies.to(span.dtype)
        return self.leave(F.silu(self.enter(torch.cat([angles.sin(), angles.cos()], dim=1))))


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


def with_span(label: nn.Embedding | None) -> nn.Module:
    """What takes the place of a network's embedding of labels, with its weights."""
    if label is None:
        return NoLabel()
    return Label(label.num_embeddings, label.embedding_dim, _weight=label.weight)
