"""A small MLP for low-dimensional data."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffdistill.denoiser import Backbone, Condition


class MLP(Backbone):
    """Residual layers on points of shape (N, dimension), with sinusoidal features of the time.

    Args:
        dimension: of the data.
        width, depth: of the hidden layers.
        num_classes: 0 for none. The null label, for guidance, is `num_classes`.
        dropout: within each hidden layer.
        told: what it is told besides, span or scale.
    """

    def __init__(
        self,
        *,
        dimension: int = 2,
        width: int = 128,
        depth: int = 3,
        num_classes: int = 0,
        dropout: float = 0.0,
        told: Sequence[str] = (),
    ):
        super().__init__()
        self.options = dict(dimension=dimension, width=width, depth=depth, num_classes=num_classes, dropout=dropout)
        self.sample_shape = (dimension,)
        self.condition_names = ("label",) if num_classes else ()
        self.num_classes = num_classes
        frequencies = torch.exp(torch.linspace(0, math.log(64), width // 2, dtype=torch.float64))
        self.register_buffer("frequencies", frequencies.float(), persistent=False)
        self.time = nn.Sequential(nn.Linear(width // 2 * 2, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.enter = nn.Linear(dimension, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Dropout(dropout), nn.Linear(width, width))
            for _ in range(depth)
        )
        self.leave = nn.Linear(width, dimension)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)
        for name in told:
            self.tell(name)

    def tell(self, name: str) -> None:
        self.told.add(name, self.enter.out_features, self.enter.weight)
        self.options["told"] = list(self.told)

    def forward(self, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
        angles = time[:, None] * self.frequencies.to(x.dtype)
        embedding = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        if self.label is not None:
            embedding = embedding + self.label(cond["label"])
        if self.told:
            embedding = embedding + self.told(cond, time)
        hidden = self.enter(x)
        for layer in self.layers:
            hidden = hidden + layer(hidden + embedding)
        return self.leave(hidden)

    def null(self, cond: Condition) -> Condition:
        if self.label is None:
            raise ValueError("this MLP has no classes, so it has no unconditional branch; leave guidance out")
        return {"label": torch.full_like(cond["label"], self.num_classes)}

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.layers)
