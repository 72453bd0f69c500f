"""Pairs of a noise and where a sampler takes it: the folders that `diffdistill couple` writes, and their stream."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from diffdistill.data import Stream
from diffdistill.method import Sample
from diffdistill.rng import Rng

RECIPE = "pairs.json"
BEGUN = ".pairs*.writing"  # files that an interrupted process left


@dataclass(frozen=True)
class PairRecipe:
    """What the pairs of a folder are. Pair i is a function of all this and of i alone."""

    source: str  # fingerprint of the networks that were sampled
    meaning: str  # of their outputs, and of the process that the noise and its time belong to
    device: str  # its kind: a CPU and a GPU draw different noises
    start: float  # time of the noise, in the source's process
    noise_std: float  # of the noise at that time
    steps: int  # of the solver; 0 for a generator's own
    solver: str  # empty for a generator's own
    guidance: float
    seed: int
    count: int
    shard: int  # pairs of one file
    shape: tuple[int, ...]  # of one sample
    num_classes: int  # 0: no labels
    images: str = ""  # digest of the real images that were inverted; empty: noises were sampled

    @property
    def num_shards(self) -> int:
        return -(-self.count // self.shard)

    def slots(self, number: int) -> range:
        """The pairs in file `number`."""
        return range(number * self.shard, min((number + 1) * self.shard, self.count))


@dataclass(frozen=True)
class Pairs(Stream):
    """Pairs drawn uniformly with replacement: the end point as x0, and its noise as it is fed to a generator.

    Args:
        noise, x0: float32 (M, *shape), on the training device.
        labels: int64 (M,), or None without classes.
    """

    noise: Tensor
    x0: Tensor
    labels: Tensor | None

    def draw(self, rng: Rng) -> Sample:
        index = rng.integers(len(self.x0))
        cond = {} if self.labels is None else {"label": self.labels[index]}
        return Sample(x0=self.x0[index].to(rng.dtype), cond=cond, noise=self.noise[index].to(rng.dtype))


def shard_path(folder: Path, number: int) -> Path:
    """Where the pairs of file `number` lie: noise, x0 and, with classes, label."""
    return folder / f"pairs-{number:05d}.safetensors"


def beside(path: Path) -> Path:
    """Where a file is written before it takes its place."""
    return path.with_name(f".{path.name}.writing")


def write_recipe(recipe: PairRecipe, path: Path) -> None:
    path.write_text(json.dumps(asdict(recipe), indent=1) + "\n")


def read_recipe(folder: Path) -> PairRecipe:
    """The recipe of a folder of pairs.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = folder / RECIPE
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no pairs ({RECIPE} is missing); make some by: diffdistill couple TEACHER "
            f"--out {folder} --count N"
        )
    try:
        values = json.loads(path.read_text())
        return PairRecipe(**{**values, "shape": tuple(values["shape"])})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}; make the pairs again") from error


def read_pairs(folder: Path, device: torch.device) -> tuple[PairRecipe, Pairs]:
    """All pairs of a folder, on the device.

    Raises:
        ValueError: some are missing or damaged.
    """
    recipe = read_recipe(folder)
    columns = {name: torch.empty(recipe.count, *recipe.shape, device=device) for name in ("noise", "x0")}
    if recipe.num_classes:
        columns["label"] = torch.empty(recipe.count, dtype=torch.int64, device=device)
    for number in range(recipe.num_shards):
        path = shard_path(folder, number)
        try:
            shard = load_file(path)
        except FileNotFoundError as error:
            raise ValueError(
                f"{path} is missing: {folder} has {number} of {recipe.num_shards} files; run the same `diffdistill "
                "couple` again, it makes what is missing"
            ) from error
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{path} cannot be read: {error}; delete it and run the same `diffdistill couple`"
            ) from error
        slots = recipe.slots(number)
        for name, column in columns.items():
            found = shard.get(name, torch.empty(0))
            wanted = (len(slots), *column.shape[1:])
            if tuple(found.shape) != wanted or found.dtype != column.dtype:
                raise ValueError(
                    f"{path} is not of {RECIPE}: {name} is {found.dtype} of shape {tuple(found.shape)}, and should be "
                    f"{column.dtype} of shape {wanted}; delete it and run the same `diffdistill couple`"
                )
            column[slots.start : slots.stop] = found
    return recipe, Pairs(columns["noise"], columns["x0"], columns.get("label"))


def joined_pairs(parts: Sequence[Pairs]) -> Pairs:
    """All pairs of several folders, each drawn as often as any other."""
    if len(parts) == 1:
        return parts[0]
    labels = None if parts[0].labels is None else torch.cat([part.labels for part in parts])
    return Pairs(torch.cat([part.noise for part in parts]), torch.cat([part.x0 for part in parts]), labels)


def fingerprint(*networks: nn.Module) -> str:
    """SHA-256 of all weights, as float32: the same for one network stored in float16 and read back in any precision."""
    found = hashlib.sha256()
    for network in networks:
        for name, value in sorted(network.state_dict().items()):
            found.update(name.encode())
            found.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return found.hexdigest()
