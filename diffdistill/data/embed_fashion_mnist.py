"""Writes the embedded part of Fashion-MNIST, a class-balanced draw from the full set.

The shipped file was made by

    python -m diffdistill.data.embed_fashion_mnist --data fashion_mnist.npz --out fashion_mnist_10k.npz
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
from PIL import Image

from diffdistill.data.fashion_mnist import CLASS_NAMES, IMAGE_SIDE, load_fashion_mnist

SHEET_COLUMNS = 100


def choose(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Places of a class-balanced draw without repeats, sorted by class and then by place.

    Args:
        labels: (N,) integers.
    Returns:
        int64 (per_class * number of classes,).
    """
    rng = np.random.default_rng(seed)
    places = (np.flatnonzero(labels == label) for label in range(len(CLASS_NAMES)))
    return np.concatenate([np.sort(rng.choice(each, per_class, replace=False)) for each in places])


def png_sheet(images: np.ndarray) -> np.ndarray:
    """A grey PNG with the images row by row, SHEET_COLUMNS a row, as bytes (uint8, one-dimensional).

    Args:
        images: uint8 (N, 28, 28), N a multiple of SHEET_COLUMNS.
    """
    tiles = images.reshape(-1, SHEET_COLUMNS, IMAGE_SIDE, IMAGE_SIDE).transpose(0, 2, 1, 3)
    buffer = io.BytesIO()
    Image.fromarray(tiles.reshape(-1, SHEET_COLUMNS * IMAGE_SIDE)).save(buffer, "PNG", optimize=True)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the full set, .npz or folder")
    parser.add_argument("--out", type=Path, required=True, help="the .npz to write")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    arrays = {}
    for split, per_class in (("train", 800), ("test", 200)):
        full = load_fashion_mnist(options.data, split)
        index = choose(full.labels.numpy(), per_class, options.seed)
        arrays[f"{split}_sheet"] = png_sheet(full.images[index, 0].numpy())
        arrays[f"{split}_labels"] = full.labels.numpy()[index].astype(np.uint8)
        arrays[f"{split}_index"] = index.astype(np.int32)  # where each image stands in the full split
    np.savez_compressed(options.out, **arrays)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
