"""Reading .npz archives, with errors that say what to do."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

READ_ERRORS = (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error)  # what a damaged file raises


def array_names(path: Path) -> list[str]:
    """Names of the arrays in an .npz file.

    Raises:
        ValueError: the file is missing or no archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except READ_ERRORS as error:
        raise ValueError(f"{path} could not be read: {error}; it must be an .npz file") from error


def read_npz(path: Path, names: tuple[str, ...]) -> list[np.ndarray]:
    """The named arrays of an .npz file, in the order asked for; pickled content is refused.

    Raises:
        ValueError: the file cannot be read, or a name is absent.
    """
    present = array_names(path)
    missing = [name for name in names if name not in present]
    if missing:
        raise ValueError(f"{path} has no array {', '.join(missing)}, only {', '.join(present)}; add what is missing")
    try:
        with np.load(path, allow_pickle=False) as file:
            return [file[name] for name in names]
    except READ_ERRORS as error:
        raise ValueError(f"{path} could not be read: {error}; write the file again") from error
