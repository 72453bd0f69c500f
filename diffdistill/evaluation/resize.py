"""How images come to the size that a feature network takes; scores are comparable only where this is the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def tf1_bilinear(images: Tensor, height: int, width: int) -> Tensor:
    """Images (N, C, height, width), as TensorFlow 1's `resize_bilinear` enlarged them for the first FID.

    Place i of n reads place i * old / n of the old pixels, whose last one goes on beyond the edge: without the half
    pixel by which `interpolate` centres the picture, and without smoothing where pictures get smaller.
    """
    return _rows(_rows(images, height, 2), width, 3)


def _rows(images: Tensor, size: int, dim: int) -> Tensor:
    old = images.shape[dim]
    place = torch.arange(size, device=images.device, dtype=torch.float64) * old / size
    below = place.floor().long()
    above = (below + 1).clamp(max=old - 1)
    share = (place - below).to(images.dtype).reshape([-1 if axis == dim else 1 for axis in range(4)])
    return torch.lerp(images.index_select(dim, below), images.index_select(dim, above), share)


def bicubic(images: Tensor, height: int, width: int) -> Tensor:
    """Images (N, C, height, width) in [-1, 1], cubic and smoothed before they get smaller, as Pillow makes them."""
    resized = F.interpolate(images, (height, width), mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(-1, 1)


def shorter_bicubic(images: Tensor, height: int, width: int) -> Tensor:
    """The middle (N, C, height, width) of images that `bicubic` brought just so near that they cover it."""
    share = max(height / images.shape[2], width / images.shape[3])
    tall, wide = (
        max(least, round(old * share)) for least, old in ((height, images.shape[2]), (width, images.shape[3]))
    )
    resized = bicubic(images, tall, wide)
    top, left = (tall - height) // 2, (wide - width) // 2
    return resized[:, :, top : top + height, left : left + width]


RESIZES: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "tf1_bilinear": tf1_bilinear,
    "bicubic": bicubic,
    "shorter_bicubic": shorter_bicubic,
}
