"""The JSON file at the root of an export of several networks: what it says, and that its files are those exported."""

import hashlib
import json
from pathlib import Path
from typing import Any


def checksums(folder: Path, *, root: Path) -> dict[str, str]:
    """The SHA-256 of every file in `folder`, by its path from `root`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): _sha256(path) for path in files}


def verify(root: Path, files: dict[str, str]) -> None:
    """Refuses files that are missing or not those of `checksums`."""
    for file, checksum in files.items():
        path = root / file
        if not path.is_file() or _sha256(path) != checksum:
            raise ValueError(f"{path} is missing or not the file that was exported; export again")


def read_manifest(path: Path, *, kind: str, version: int) -> dict[str, Any]:
    """The manifest at `path`.

    Args:
        kind, version: what its `format` and `version` must be.
    Raises:
        ValueError: it is missing, damaged, or of another kind or version.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}; give a folder that `diffdistill export` made")
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); export again") from error
    found = (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else (None, None)
    if found != (kind, version):
        raise ValueError(
            f"{path} is {found[0]!r} of version {found[1]}, and this reads {kind!r} of version {version}; export again"
        )
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
