"""Prepared prompts on disk: `prompts.json` says what they are, and safetensors hold so many rows each."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffdistill.prompts import Call, Prompts

INDEX, SHARED_FILE, NULL_FILE = "prompts.json", "shared.safetensors", "null.safetensors"
ROWS, LATENTS = "rows-", "latents-"  # begin the names of files, each of so many prompts or pictures
VERSION = 1


def rows_file(number: int) -> str:
    return f"{ROWS}{number:05d}.safetensors"


def latents_file(number: int) -> str:
    return f"{LATENTS}{number:05d}.safetensors"


def write_index(folder: Path, said: Mapping[str, Any]) -> None:
    """The index is written last and whole: a folder without one is not finished."""
    beside = folder / f".{INDEX}"
    beside.write_text(json.dumps({"version": VERSION, **said}, indent=1) + "\n")
    beside.rename(folder / INDEX)


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the file that holds the tensors, written beside and renamed."""
    beside = file.with_name(f".{file.name}")
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, beside)
    beside.rename(file)
    return checksum(file)


def checksum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def call_in_words(call: Call) -> dict[str, Any]:
    return dataclasses.asdict(call)


@functools.lru_cache(maxsize=4)
def read_prompts(folder: Path) -> Prompts:
    """The prompts in a folder that `diffdistill prepare` wrote; the same object for the same folder.

    Raises:
        ValueError: the folder is not finished, or a file is missing or damaged.
    """
    said = read_index(folder)
    parts = [*_named(folder, said, ROWS), *_named(folder, said, NULL_FILE)]
    (shared,) = _named(folder, said, SHARED_FILE)
    rows = joined(parts)
    call = Call(**said["call"])
    return Prompts(tuple(said["texts"]), tuple(said["shape"]), call, said["network"], said["meaning"], rows, shared)


def read_latents(folder: Path) -> tuple[Tensor, Tensor]:
    """The pictures in a folder that `diffdistill prepare --images` wrote: x0, float32 (M, *shape), and labels (M,).

    Raises:
        ValueError: there are none, or as for `read_prompts`.
    """
    parts = _named(folder, read_index(folder), LATENTS)
    if not parts:
        raise ValueError(f"{folder} holds prompts, and no pictures; make some by diffdistill prepare ... --images")
    return torch.cat([part["x0"] for part in parts]), torch.cat([part["label"] for part in parts])


def _named(folder: Path, said: Mapping[str, Any], beginning: str) -> list[dict[str, Tensor]]:
    """The files of a finished folder whose names begin so, in order."""
    return [
        _tensors(folder / name, wanted) for name, wanted in sorted(said["files"].items()) if name.startswith(beginning)
    ]


def read_index(folder: Path) -> dict[str, Any]:
    """What `prompts.json` says.

    Raises:
        ValueError: it is missing or damaged.
    """
    file = folder / INDEX
    if not file.is_file():
        raise ValueError(
            f"there is no {INDEX} in {folder}; give a folder that diffdistill prepare finished, or run it again"
        )
    try:
        return json.loads(file.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is damaged ({error}); run diffdistill prepare again into an empty folder") from error


def _tensors(file: Path, wanted: str) -> dict[str, Tensor]:
    if not file.is_file() or checksum(file) != wanted:
        state = "missing" if not file.is_file() else "truncated or changed since"
        raise ValueError(f"{file} is {state}; delete it, and run the same diffdistill prepare again: it makes the rest")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} could not be read: {error}; delete it and run diffdistill prepare again") from error


def joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of several files as one, shorter ones padded with zeros behind."""
    return {name: _stacked([part[name] for part in parts]) for name in parts[0]}


def _stacked(tables: Sequence[Tensor]) -> Tensor:
    longest = max(table.shape[1] if table.ndim > 1 else 0 for table in tables)
    return torch.cat(
        [
            F.pad(table, [0, 0] * (table.ndim - 2) + [0, longest - table.shape[1]]) if table.ndim > 1 else table
            for table in tables
        ]
    )
