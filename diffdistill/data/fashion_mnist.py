"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017; MIT, see FASHION_MNIST_LICENSE): an embedded part, or the full set.

The embedded file holds 800 training and 200 test images of each class, sorted by class, as `embed_fashion_mnist` chose
them. Images are kept as one grey PNG sheet per split, row by row, because PNG's filters make it a tenth smaller than
the deflated array.
"""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from diffdistill.data.image_set import ImageSet
from diffdistill.data.npz import read_npz

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
IMAGE_SIDE = 28
EMBEDDED_FILE = Path(__file__).with_name("fashion_mnist_10k.npz")
ORIGINAL_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
NPZ_KEYS = {"train": ("train", "ytrain"), "test": ("test", "ytest")}

Split = Literal["train", "test"]


def load_fashion_mnist(path: Path | None, split: Split) -> ImageSet:
    """One split of Fashion-MNIST as images (N, 3, 28, 28), an expanded view of one grey channel.

    Args:
        path: None for the embedded part (8,000 train, 2,000 test, equal classes); else the full set, as an .npz with
            train, ytrain, test, ytest, images (N, 28, 28) uint8; or as a folder with the four original idx files,
            gzipped or not.
        split: "train" or "test".
    Raises:
        ValueError: the split is unknown, or a file is missing, damaged or of another shape.
    """
    if split not in NPZ_KEYS:
        raise ValueError(f'split must be "train" or "test", got {split!r}')
    if path is None:
        images, labels = _read_embedded(split)
    elif path.is_dir():
        images, labels = (_read_idx(path, name) for name in ORIGINAL_FILES[split])
    elif path.is_file():
        images, labels = read_npz(path, NPZ_KEYS[split])
    else:
        raise ValueError(
            f"there is no Fashion-MNIST at {path}; give an .npz with train, ytrain, test, ytest, a folder with the "
            "four original idx files, or None for the embedded images"
        )
    where = EMBEDDED_FILE if path is None else path
    if images.dtype != np.uint8 or images.shape[1:] != (IMAGE_SIDE, IMAGE_SIDE):
        raise ValueError(
            f"{where}: {split} images must be uint8 (N, 28, 28), got {images.dtype} {images.shape}; "
            "other images are loaded by diffdistill.data.folder"
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{where}: {split} labels must be integers ({len(images)},), got {labels.dtype} {labels.shape}; "
            "fetch the set again"
        )
    grey = torch.from_numpy(images)[:, None]
    try:
        return ImageSet(
            grey.expand(-1, 3, -1, -1), torch.from_numpy(labels.astype(np.int64)), num_classes=len(CLASS_NAMES)
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _read_embedded(split: Split) -> tuple[np.ndarray, np.ndarray]:
    sheet, labels = read_npz(EMBEDDED_FILE, (f"{split}_sheet", f"{split}_labels"))
    try:
        pixels = np.asarray(Image.open(io.BytesIO(sheet.tobytes())))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{EMBEDDED_FILE} is damaged ({error}); install the package again") from error
    rows, columns = pixels.shape[0] // IMAGE_SIDE, pixels.shape[1] // IMAGE_SIDE
    tiles = pixels.reshape(rows, IMAGE_SIDE, columns, IMAGE_SIDE).transpose(0, 2, 1, 3)
    return tiles.reshape(-1, IMAGE_SIDE, IMAGE_SIDE), labels


def _read_idx(folder: Path, name: str) -> np.ndarray:
    """The array of one idx file: two zero bytes, the type (8: unsigned byte), the rank, the sizes, the bytes."""
    plain, gzipped = folder / name, folder / f"{name}.gz"
    if not plain.is_file() and not gzipped.is_file():
        expected = ", ".join(file for files in ORIGINAL_FILES.values() for file in files)
        raise ValueError(f"{folder} has no {name} or {name}.gz; the four files of Fashion-MNIST are {expected}")
    source = plain if plain.is_file() else gzipped
    try:
        content = plain.read_bytes() if plain.is_file() else gzip.decompress(gzipped.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{source} could not be read: {error}; fetch the file again") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{source} is no idx file of bytes: it begins with {content[:4].hex()}; fetch the file again")
    rank = content[3]
    sizes = np.frombuffer(content[4 : 4 + 4 * rank], ">u4").astype(np.int64)
    body = np.frombuffer(content, np.uint8)[4 + 4 * rank :]
    if len(sizes) != rank or body.size != sizes.prod():
        raise ValueError(
            f"{source} announces {' x '.join(map(str, sizes))} bytes and holds {body.size}; fetch the file again"
        )
    return body.reshape(sizes).copy()  # a copy, since frombuffer is read-only
