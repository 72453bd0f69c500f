"""Critic: a trainable denoiser that learns the score of the generator's samples, and may tell them from real data.
Discriminator: what tells them apart without learning a score."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffdistill.denoiser import Condition, Denoiser, tapped
from diffdistill.prediction import Prediction
from diffdistill.process import Process


class DiscriminatorHead(nn.Module):
    """A logit from one or more feature maps: strided convolutions down to one position, averaged over the maps.

    Shape of the head on the 8x8 features of a UNet as in DMD2 (Yin et al. 2024a, appendix): kernel 4 stride 2, then a
    kernel that covers what is left, each with GroupNorm and SiLU, then 1x1. Features of shape (N, channels) or
    (N, tokens, channels) get linear layers, and a mean over the tokens.

    Args:
        shapes: of each feature, without the batch.
    """

    def __init__(self, shapes: Sequence[Sequence[int]]):
        super().__init__()
        self.heads = nn.ModuleList(
            _convolutional(*shape) if len(shape) == 3 else _linear(shape[-1]) for shape in shapes
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits (N,): positive for real."""
        logits = [head(feature).flatten(1).mean(1) for head, feature in zip(self.heads, features, strict=True)]
        return torch.stack(logits).mean(0)


def _convolutional(channels: int, height: int, width: int) -> nn.Sequential:
    # The last norm sees one position, so that a group of one or two channels would carry a constant or a sign, and no
    # gradient: at least 16 channels a group. The paper's 768 and 1280 channels get its 32 groups.
    groups = next((g for g in (32, 16, 8, 4, 2) if channels % g == 0 and channels // g >= 16), 1)
    layers: list[nn.Module] = []
    while min(height, width) > 4:
        layers += [nn.Conv2d(channels, channels, 4, 2, 1), nn.GroupNorm(groups, channels), nn.SiLU()]
        height, width = height // 2, width // 2
    layers += [nn.Conv2d(channels, channels, (height, width)), nn.GroupNorm(groups, channels), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))


def _linear(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, channels), nn.LayerNorm(channels), nn.SiLU(), nn.Linear(channels, 1))


class Critic(nn.Module):
    """The fake score, with an optional discriminator head.

    Args:
        denoiser: trainable, initialised from the teacher.
        head: None for none.
        taps: names of the backbone's submodules whose outputs the head reads.
        trunk: the denoiser that the head reads: None for the critic's own, or the frozen teacher's, which adds no
            parameters.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        head: DiscriminatorHead | None = None,
        taps: Sequence[str] = (),
        trunk: Denoiser | None = None,
    ):
        super().__init__()
        self.denoiser, self.head, self.taps = denoiser, head, tuple(taps)
        self._foreign_trunk = () if trunk is None else (trunk,)  # in a tuple: not a submodule, not trained, not saved

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Condition | None = None,
        *,
        to: Prediction = Prediction.X0,
        with_logits: bool = False,
    ):
        """The prediction `to`; with_logits=True gives (prediction, logits (N,)), in one pass on its own trunk."""
        if not with_logits:
            return self.denoiser(x_t, t, cond, to=to)
        if self.head is None or self._foreign_trunk:
            return self.denoiser(x_t, t, cond, to=to), self.logits(x_t, t, cond)
        with tapped(self.denoiser.backbone, self.taps) as features:
            prediction = self.denoiser(x_t, t, cond, to=to)
        return prediction, self.head(features)

    @property
    def process(self) -> Process:
        return self.denoiser.process

    def logits(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """Logits (N,) of x_t being noised real data."""
        if self.head is None:
            raise ValueError("this critic has no discriminator head; give it one, or turn the GAN term off")
        trunk = self._foreign_trunk[0] if self._foreign_trunk else self.denoiser
        return self.head(trunk.features(x_t, t, cond, taps=self.taps))


class Discriminator(nn.Module):
    """Trainable heads on the features of a frozen denoiser, and nothing else.

    Args:
        heads: one for each tap, from a list of one feature to logits (N,).
        taps: names of the trunk's submodules whose outputs the heads read.
        trunk: the frozen denoiser, of which no copy is made.
    """

    def __init__(self, heads: Sequence[nn.Module], *, taps: Sequence[str], trunk: Denoiser):
        super().__init__()
        self.heads, self.taps = nn.ModuleList(heads), tuple(taps)
        self._trunk = (trunk,)  # in a tuple: not a submodule, not trained, not saved
        if len(self.heads) != len(self.taps):
            raise ValueError(f"each of the {len(self.taps)} taps needs a head of its own, got {len(self.heads)}")

    @property
    def trunk(self) -> Denoiser:
        return self._trunk[0]

    @property
    def process(self) -> Process:
        return self.trunk.process

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """Logits (N, heads) of x_t being noised real data; attached to x_t."""
        features = self.trunk.features(x_t, t, cond, taps=self.taps)
        return torch.stack([head([feature]) for head, feature in zip(self.heads, features, strict=True)], dim=1)
