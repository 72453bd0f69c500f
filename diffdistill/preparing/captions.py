"""Pictures with captions: a folder with `metadata.jsonl`, or with a text file beside each picture."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
METADATA = "metadata.jsonl"  # a line {"file_name": ..., "text": ...} for each picture


def read_captions(folder: Path) -> list[tuple[Path, str]]:
    """The pictures of a folder, by name, and the caption of each.

    Raises:
        ValueError: there is no picture, or one has no caption or an empty one.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder of pictures {folder}; give one")
    if (folder / METADATA).is_file():
        lines = [json.loads(line) for line in (folder / METADATA).read_text().splitlines() if line.strip()]
        found = [(folder / line["file_name"], line["text"].strip()) for line in lines]
    else:
        pictures = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
        found = [(file, _beside(file)) for file in pictures]
    if not found:
        raise ValueError(f"{folder} holds no picture ({', '.join(SUFFIXES)}); give pictures with captions")
    for file, text in found:
        if not text:
            raise ValueError(
                f"{file} has an empty caption; give it one in {file.with_suffix('.txt').name} or {METADATA}"
            )
    return found


def _beside(file: Path) -> str:
    text = file.with_suffix(".txt")
    if not text.is_file():
        raise ValueError(f"{file} has no caption; write it into {text.name} beside it, or all into {METADATA}")
    return text.read_text().strip()


def read_pictures(files: Sequence[Path], size: tuple[int, int]) -> Tensor:
    """Pictures (N, 3, H, W) in [-1, 1].

    Args:
        size: (height, width) that all must have.
    Raises:
        ValueError: a file cannot be read, or has another size.
    """
    made = torch.empty(len(files), 3, *size)
    for place, file in enumerate(files):
        try:
            with Image.open(file) as opened:
                pixels = np.asarray(opened.convert("RGB"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} could not be read: {error}; replace it, or take its line out") from error
        if pixels.shape[:2] != size:
            raise ValueError(
                f"{file} has {pixels.shape[1]} x {pixels.shape[0]} pixels (width x height), and the pipeline takes "
                f"{size[1]} x {size[0]}; resize it, or prepare with its height and width"
            )
        made[place] = torch.from_numpy(pixels.copy()).movedim(-1, 0) / 127.5 - 1
    return made
