"""A user's own images: a folder of picture files, or one .npz."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from diffdistill.data.image_set import ImageSet
from diffdistill.data.npz import array_names, read_npz

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LOSSLESS_MODES = ("1", "L", "P", "RGB")  # what becomes RGB without a choice about transparency, depth or inks


def load_images(path: Path) -> ImageSet:
    """The images at a path: a folder through `load_image_folder`, a file through `load_image_npz`.

    Raises:
        ValueError: there is nothing at the path, or as for the two functions.
    """
    if path.is_dir():
        return load_image_folder(path)
    if path.is_file():
        return load_image_npz(path)
    raise ValueError(f"there are no images at {path}; give a folder of pictures, or an .npz with the array images")


def class_names(path: Path) -> list[str]:
    """Names of the sub-folders that hold the classes, in the order of their labels; empty for a flat folder."""
    return sorted(child.name for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))


def load_image_folder(path: Path) -> ImageSet:
    """The png, jpg and webp files of a folder, all of one size.

    One sub-folder per class, numbered in the order of `class_names`; or all files in the folder itself, unlabelled.
    Within a folder the files are sorted by name. Names that begin with a dot, and files of other kinds, are not read.

    Raises:
        ValueError: there is no such folder or no picture, pictures lie beside sub-folders, a class is empty, a file
            cannot be read or is not 8-bit grey, palette or RGB without transparency, or sizes differ.
    """
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}; give a folder of pictures, with one sub-folder per class or none")
    names, loose = class_names(path), _pictures(path)
    if names and loose:
        raise ValueError(
            f"{path} holds both sub-folders ({', '.join(names)}) and pictures ({loose[0].name}); move every picture "
            "into the folder of its class, or keep them all in one folder without sub-folders"
        )
    groups = [_pictures(path / name) for name in names] if names else [loose]
    for folder, group in zip(names or ["."], groups, strict=True):
        if not group:
            kinds = ", ".join(PICTURE_SUFFIXES)
            raise ValueError(f"{path / folder} holds no picture ({kinds}); add some, or remove the folder")
    files = [file for group in groups for file in group]
    first = _read_picture(files[0])
    images = torch.empty(len(files), *first.shape, dtype=torch.uint8)
    for place, file in enumerate(files):
        picture = _read_picture(file)
        if picture.shape != first.shape:
            raise ValueError(
                f"{file} has {picture.shape[1]} x {picture.shape[0]} pixels (width x height), and {files[0]} "
                f"{first.shape[1]} x {first.shape[0]}; resize all pictures to one size"
            )
        images[place] = picture
    labels = torch.tensor([label for label, group in enumerate(groups) for _ in group])
    return ImageSet(images.movedim(-1, 1).contiguous(), labels, num_classes=len(names))


def load_image_npz(path: Path) -> ImageSet:
    """The images of an .npz: images uint8 (N, H, W, 3), and labels (N,) integers from 0, or no labels.

    Raises:
        ValueError: the file is missing or damaged, or an array is not as above.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}; give an .npz with the array images, uint8 (N, H, W, 3)")
    labelled = "labels" in array_names(path)
    images, *labels = read_npz(path, ("images", "labels") if labelled else ("images",))
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"{path}: images must be uint8 (N, H, W, 3), got {images.dtype} {images.shape}; "
            "repeat a grey channel three times, scale floats to 0..255 and round them"
        )
    if labelled and not np.issubdtype(labels[0].dtype, np.integer):
        raise ValueError(f"{path}: labels must be integers, got {labels[0].dtype}; number the classes from 0")
    numbers = torch.from_numpy(labels[0].astype(np.int64)) if labelled else torch.zeros(len(images), dtype=torch.int64)
    num_classes = int(numbers.max()) + 1 if labelled and numbers.numel() else 0
    try:
        return ImageSet(torch.from_numpy(images).movedim(-1, 1).contiguous(), numbers, num_classes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _pictures(folder: Path) -> list[Path]:
    """Picture files directly inside a folder, sorted by name."""
    children = (child for child in folder.iterdir() if not child.name.startswith("."))
    return sorted(child for child in children if child.is_file() and child.suffix.lower() in PICTURE_SUFFIXES)


def _read_picture(file: Path) -> torch.Tensor:
    """uint8 (H, W, 3) of one picture file, turned upright as its EXIF tag says."""
    try:
        with Image.open(file) as picture:
            if picture.mode not in LOSSLESS_MODES or "transparency" in picture.info:
                raise ValueError(
                    f"{file} has the mode {picture.mode}{' with transparency' * ('transparency' in picture.info)}; "
                    "save it as 8-bit RGB or grey, on a background of your choice"
                )
            upright = ImageOps.exif_transpose(picture).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{file} could not be read: {error}; restore or remove it") from error
    return torch.from_numpy(np.array(upright))
