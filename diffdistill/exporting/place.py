"""Where an export is written: beside its folder, which it becomes when everything in it has been checked."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def require_free(folder: Path, replace: bool, *, marker: str) -> None:
    """Refuses an existing folder, unless it is to be replaced and has the file that marks such an export."""
    if not folder.exists():
        return
    if not replace:
        raise ValueError(f"{folder} exists; choose another folder, or replace=True for an earlier export")
    if not (folder / marker).is_file():
        raise ValueError(f"{folder} exists and is no pipeline folder, so it is not replaced; choose another folder")


@contextlib.contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """An empty folder next to `folder`: it takes that one's place when the block ends, and is removed if it raises."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield made
        for path in (made, *made.rglob("*")):  # temporary folders and safetensors files are private
            path.chmod(0o755 if path.is_dir() else 0o644)
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
