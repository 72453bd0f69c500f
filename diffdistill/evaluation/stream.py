"""Features of many samples, made part by part: never all images at once, and no part twice, whoever was interrupted.

The parts lie in a folder as safetensors files, each of CHUNK samples. A part is a function of what is sampled, the
extractor, the seed and its number, so that a larger count goes on where a smaller one ended, and processes share them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from diffdistill.evaluation.features import Extractor
from diffdistill.evaluation.metrics import quantise
from diffdistill.evaluation.sampling import Solved, classes_of, denoisers, draw, evaluating, fingerprint
from diffdistill.generator import Sampler

CHUNK = 500  # samples of a part


@dataclass(frozen=True)
class Drawn:
    """Something that makes image i of a seed.

    Attributes:
        key: SHA-256 of what its images depend on beside their seed.
        classes: the labels, which samples take in turns; none without classes.
        images: (slots, labels or None, seed) to images (N, 3, H, W) in about [-1, 1], on the CPU.
    """

    key: str
    classes: Sequence[int]
    images: Callable[[Sequence[int], Tensor | None, int], Tensor]


def drawn(source: Sampler | Solved) -> Drawn:
    """A sampler's images; it must be in evaluation mode (`evaluating`)."""

    def images(slots: Sequence[int], labels: Tensor | None, seed: int) -> Tensor:
        return draw(source, slots, labels, seed=seed)

    return Drawn(fingerprint(source), classes_of(source), images)


@dataclass(frozen=True)
class Seen:
    """What an extractor saw of samples 0 to N - 1.

    Attributes:
        features: (N, D).
        logits: (N, classes), or None.
        labels: int64 (N,), or None.
    """

    features: Tensor
    logits: Tensor | None
    labels: Tensor | None


def look_at(
    source: Sampler | Solved | Drawn,
    extractor: Extractor,
    count: int,
    *,
    seed: int,
    batch: int,
    cache: Path,
    rank: int = 0,
    ranks: int = 1,
    wait: Callable[[], None] = lambda: None,
    progress: str = "",
) -> Seen:
    """What the extractor sees of samples 0 to count - 1; every process of several has all of it in the end.

    Args:
        batch: samples made at once; it does not change them beyond rounding.
        cache: the folder of the parts, made if need be.
        rank, ranks: this process's place; the parts that are missing are shared out.
        wait: returns once every process has called it.
        progress: what a bar says while sampling; empty for none.
    Raises:
        ValueError: count or batch is below 1, an image is not finite or of a wrong size, or a part is damaged.
    """
    if count < 1 or batch < 1:
        raise ValueError(f"count and batch must be at least 1, got {count} and {batch}")
    made = source if isinstance(source, Drawn) else drawn(source)
    folder = cache / f"samples-{_key(made, extractor, seed)[:16]}"
    parts = [range(first, min(first + CHUNK, count)) for first in range(0, count, CHUNK)]
    missing = [part for part in parts if not _has(folder, part)]
    wait()  # until all have looked, no process may write
    own = missing[rank::ranks]
    folder.mkdir(parents=True, exist_ok=True)
    bar = tqdm(
        total=sum(map(len, own)), desc=progress, unit="image", leave=False, disable=not progress, dynamic_ncols=True
    )
    with evaluating(*(denoisers(source) if not isinstance(source, Drawn) else ())), bar:
        for part in own:
            _write(folder, part, _see(made, extractor, part, seed=seed, batch=batch, bar=bar))
    wait()
    columns = [_read(folder, part) for part in parts]
    joined = {name: torch.cat([column[name] for column in columns]) for name in columns[0]}
    return Seen(joined["features"], joined.get("logits"), joined.get("label"))


def _key(made: Drawn, extractor: Extractor, seed: int) -> str:
    said = (made.key, extractor.checksum, extractor.input, seed, CHUNK)
    return hashlib.sha256(repr(said).encode()).hexdigest()


def _see(made: Drawn, extractor: Extractor, part: range, *, seed: int, batch: int, bar: tqdm) -> dict[str, Tensor]:
    columns: dict[str, list[Tensor]] = {}
    for first in range(part.start, part.stop, batch):
        slots = range(first, min(first + batch, part.stop))
        labels = torch.tensor([made.classes[slot % len(made.classes)] for slot in slots]) if made.classes else None
        features, logits = extractor(quantise(made.images(slots, labels, seed)))
        for name, value in (("features", features), ("logits", logits), ("label", labels)):
            if value is not None:
                columns.setdefault(name, []).append(value)
        bar.update(len(slots))
    return {name: torch.cat(values) for name, values in columns.items()}


def _path(folder: Path, part: range) -> Path:
    return folder / f"{part.start:07d}-{part.stop:07d}.safetensors"


def _has(folder: Path, part: range) -> bool:
    return _path(folder, part).is_file()


def _write(folder: Path, part: range, columns: dict[str, Tensor]) -> None:
    file = _path(folder, part)
    beside = file.with_suffix(f".{os.getpid()}.partial")
    save_file({name: value.contiguous() for name, value in columns.items()}, str(beside))
    beside.replace(file)  # whole, or not there


def _read(folder: Path, part: range) -> dict[str, Tensor]:
    file = _path(folder, part)
    try:
        columns = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} could not be read: {error}; delete it, and it will be computed again") from error
    if "features" not in columns or any(len(column) != len(part) for column in columns.values()):
        raise ValueError(f"{file} does not hold {len(part)} samples; delete it, and it will be computed again")
    return columns
