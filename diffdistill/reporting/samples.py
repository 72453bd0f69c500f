"""Pictures for a page that are made anew: samples of each class, and the training images nearest to them."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.data.image_set import ImageSet
from diffdistill.evaluation.features import Extractor
from diffdistill.evaluation.grid import image_grid
from diffdistill.evaluation.manifold import distances
from diffdistill.evaluation.metrics import Reference, quantise
from diffdistill.evaluation.sampling import Solved, classes_of, sample_images
from diffdistill.generator import Sampler

COLUMNS = 10
TILE_PIXELS = 56  # small images are drawn about this large
SEED = 0  # as of the pictures in training
WITHIN = 1000  # training images whose own nearest neighbours say what is near


@dataclass(frozen=True)
class Nearest:
    """Samples above the training images nearest to them.

    Attributes:
        png: rows in turns, samples and their nearest.
        share: the median distance of a sample from its nearest training image, over that of a training image from its
            nearest other one; far below 1 where samples are copies.
        extractor: in whose features.
    """

    png: bytes
    share: float
    extractor: str


def by_class(source: Sampler | Solved, rows: int) -> tuple[bytes, Sequence[int]]:
    """A PNG with `rows` samples of each of at most ten classes, a column each, and these classes; none without."""
    images, classes = drawn(source, rows)
    return png(images), classes


def drawn(source: Sampler | Solved, rows: int) -> tuple[Tensor, Sequence[int]]:
    """Rows of samples of shape (N, 3, H, W), a column for each of the classes, at most ten."""
    classes = list(classes_of(source))[:COLUMNS]
    columns = len(classes) or COLUMNS
    labels = classes * rows if classes else None
    images, _ = sample_images(source, rows * columns, seed=SEED, batch=64, labels=labels)
    return images.float(), classes


def nearest(source: Sampler | Solved, extractor: Extractor, reference: Reference, data: ImageSet) -> Nearest:
    """Two rows of samples, each above the training images that are nearest in the extractor's features."""
    images, _ = drawn(source, 2)
    away = distances(extractor(quantise(images))[0], reference.features)
    least, place = away.min(1)
    found = data.select(place)[0]
    columns = len(images) // 2
    rows = [images[:columns], found[:columns], images[columns:], found[columns:]]
    own = distances(reference.features[:WITHIN], reference.features).topk(2, largest=False).values[:, 1]
    return Nearest(png(torch.cat(rows), columns=columns), (least.median() / own.median()).item(), extractor.name)


def png(images: Tensor, *, columns: int = 0) -> bytes:
    """A grid of images (N, 3, H, W), enlarged to be seen."""
    drawn_to = io.BytesIO()
    wide = columns or min(COLUMNS, len(images))
    image_grid(images, columns=wide, scale=max(1, TILE_PIXELS // images.shape[-1])).save(drawn_to, "PNG", optimize=True)
    return drawn_to.getvalue()
