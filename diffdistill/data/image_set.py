"""A set of images in memory, addressed by index: what every loader of this folder returns."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HASH_CHUNK_IMAGES = 4096


@dataclass(frozen=True)
class ImageSet:
    """Images and their labels.

    Attributes:
        images: uint8 (N, 3, H, W). May be an expanded view of (N, 1, H, W), so write to a copy, never to this tensor.
        labels: int64 (N,), in [0, num_classes); all zero when the set is unlabelled.
        num_classes: number of classes; 0 means that the set is unlabelled.
    Raises:
        ValueError: a dtype, a shape or a label is not as above, or the set is empty.
    """

    images: Tensor
    labels: Tensor
    num_classes: int

    def __post_init__(self):
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or self.images.shape[1] != 3:
            raise ValueError(
                f"images must be uint8 (N, 3, H, W), got {self.images.dtype} {tuple(self.images.shape)}; "
                "repeat a single channel with images.expand(-1, 3, -1, -1)"
            )
        if self.images.numel() == 0:
            raise ValueError(f"images hold no pixel, got shape {tuple(self.images.shape)}; give at least one image")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels must be int64 ({len(self.images)},), one for each image, got {self.labels.dtype} "
                f"{tuple(self.labels.shape)}; an unlabelled set has zeros here and num_classes=0"
            )
        lowest, highest = self.labels.min().item(), self.labels.max().item()
        if lowest < 0 or highest >= max(self.num_classes, 1):
            raise ValueError(
                f"labels must lie in [0, {max(self.num_classes, 1)}) for num_classes={self.num_classes}, "
                f"got {lowest} to {highest}; number the classes from 0"
            )

    def __len__(self) -> int:
        return len(self.images)

    def select(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels at the given places, images scaled to [-1, 1].

        Args:
            index: int64 (B,), each in [0, N); repeats are allowed.
        Returns:
            x0, float32 (B, 3, H, W), as images / 127.5 - 1; and labels, int64 (B,).
        Raises:
            ValueError: the index is not a one-dimensional int64 tensor.
            IndexError: a place lies outside the set.
        """
        if index.dtype != torch.int64 or index.ndim != 1:
            raise ValueError(f"index must be int64 (B,), got {index.dtype} {tuple(index.shape)}; use index.long()")
        return self.images[index].float() / 127.5 - 1, self.labels[index]

    def of_classes(self, classes: Sequence[int]) -> ImageSet:
        """The images of these classes alone, with the labels that they have here.

        Raises:
            ValueError: there is none.
        """
        kept = torch.isin(self.labels, torch.tensor(list(classes), device=self.labels.device))
        if not kept.any():
            raise ValueError(f"the data have no image of the classes {list(classes)}; give some, or other classes")
        grey = self.images.stride(1) == 0
        channels = self.images[:, :1] if grey else self.images
        return ImageSet(channels[kept].expand(-1, 3, -1, -1), self.labels[kept], self.num_classes)

    def content_hash(self) -> str:
        """SHA-256 over the shape and the pixels, as hex; labels and memory layout do not enter."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        for chunk in self.images.split(HASH_CHUNK_IMAGES):  # an expanded view is copied a piece at a time
            digest.update(chunk.contiguous().cpu().numpy())
        return digest.hexdigest()


def concatenate(sets: Sequence[ImageSet]) -> ImageSet:
    """One set that holds the images of all given sets, in order.

    Args:
        sets: at least one set; equal image shapes and numbers of classes.
    Raises:
        ValueError: no set is given, or shapes or numbers of classes differ.
    """
    if len({(one.images.shape[1:], one.num_classes) for one in sets}) != 1:
        given = [(tuple(one.images.shape), one.num_classes) for one in sets]
        raise ValueError(
            f"sets to join must agree in image shape and num_classes, got {given}; resize or relabel them first"
        )
    grey = all(one.images.stride(1) == 0 for one in sets)
    channels = [one.images[:, :1] if grey else one.images for one in sets]
    images = torch.cat(channels).expand(-1, 3, -1, -1)  # stays a view of one channel where every set is one
    return ImageSet(images, torch.cat([one.labels for one in sets]), sets[0].num_classes)
