"""Couplings: noises and where a sampler takes them, or real images and the noises that they come from, made once for
DMD's regression and for reflow."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from diffdistill.checkpoint import to_disk
from diffdistill.data.image_set import ImageSet
from diffdistill.data.pairs import (
    BEGUN,
    RECIPE,
    PairRecipe,
    beside,
    fingerprint,
    read_recipe,
    shard_path,
    write_recipe,
)
from diffdistill.denoiser import Condition, Denoiser
from diffdistill.evaluation.sampling import Solved, denoisers, evaluating
from diffdistill.generator import Sampler
from diffdistill.rng import Rng


@dataclass(frozen=True)
class Inverted:
    """Real images, and the noises to which the ODE takes them backwards.

    Source: Lee et al. 2024 (RF++), inversion.

    Attributes:
        solved: the ODE, from its last time, where the images stand for states, up to its first.
    """

    solved: Solved
    images: ImageSet

    def __post_init__(self):
        denoiser = self.solved.teacher.denoiser
        shape, wanted = tuple(self.images.images.shape[1:]), tuple(denoiser.sample_shape)
        if shape != wanted:
            raise ValueError(
                f"the images have shape {shape}, and the teacher's samples {wanted}; give images of the teacher's size"
            )
        known, found = denoiser.backbone.num_classes, self.images.num_classes
        if known not in (0, found):
            raise ValueError(f"the images have {found} classes, and the teacher {known}; give images of its classes")

    def noise_of(self, x0: Tensor, cond: Condition) -> Tensor:
        """The state at the first time of the ODE that ends in x0, shape (N, ...)."""
        return self.solved.teacher.solve(x0, self.solved.times[::-1], cond, solver=self.solved.solver)


Source = Sampler | Solved | Inverted


def networks_of(source: Source) -> list[Denoiser]:
    """All networks that take part."""
    return denoisers(source.solved if isinstance(source, Inverted) else source)


def recipe_of(source: Source, *, count: int, seed: int, shard: int) -> PairRecipe:
    """What the pairs of this source are.

    Raises:
        ValueError: count or shard is below 1, or there are fewer images.
    """
    if count < 1 or shard < 1:
        raise ValueError(f"count and shard must be at least 1, got {count} and {shard}")
    networks, images = networks_of(source), ""
    if isinstance(source, Inverted):
        if count > len(source.images):
            raise ValueError(f"count={count} is more than the {len(source.images)} images; each makes one pair")
        images, source = _digest(source.images), source.solved
    if isinstance(source, Solved):
        start, how = source.times[0], (source.steps, source.solver, source.teacher.guidance)
    else:
        start, how = max(part.grid[0] for part in source.parts.values()), (0, "", 1.0)
    return PairRecipe(
        source=fingerprint(*networks),
        meaning=meaning_of(networks[0]),
        device=next(networks[0].parameters()).device.type,
        start=start,
        noise_std=networks[0].process.prior_std(start),
        **dict(zip(("steps", "solver", "guidance"), how, strict=True)),
        seed=seed,
        count=count,
        shard=shard,
        shape=tuple(networks[0].sample_shape),
        num_classes=networks[0].backbone.num_classes,
        images=images,
    )


def _digest(images: ImageSet) -> str:
    """SHA-256 of the pixels and labels."""
    found = hashlib.sha256(images.labels.cpu().numpy().tobytes())
    found.update(images.images.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def meaning_of(network: Denoiser) -> str:
    """What a denoiser's weights mean: a few words and a digest, equal where its samples of equal noises are.

    The digest is of coefficients and spacing of both processes in six digits, so that every machine finds the same.
    """
    u = torch.linspace(0, 1, 17, dtype=torch.float64)
    laws = []
    for process in (network.native, network.process):
        t = process.warp(u)
        laws += [f"{value:.6g}" for value in torch.stack([t, process.alpha(t), process.sigma(t)]).flatten().tolist()]
        laws.append(f"{process.sigma_data:.6g}")
    boundary = [network.boundary] if network.boundary else []  # most have none, and pairs of before know of none
    said = json.dumps([*laws, network.source.name, network.clock, network.scale_input, *boundary])
    name = f"{network.source.name.lower()} of {network.native}, seen in {network.process}"
    return f"{name}, {hashlib.sha256(said.encode()).hexdigest()[:12]}"


def refuse_another(folder: Path, recipe: PairRecipe) -> None:
    """Refuses a folder that holds pairs of another recipe, naming every key with both values, or something else."""
    if not (folder / RECIPE).exists():
        if folder.exists() and any(path.name != ".lock" and not path.match(BEGUN) for path in folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no pairs; choose another folder")
        return
    there, here = asdict(read_recipe(folder)), asdict(recipe)
    differing = [f"{key} was {there[key]!r} and is {here[key]!r}" for key in here if there[key] != here[key]]
    if differing:
        raise ValueError(
            f"{folder} holds pairs of another recipe: {'; '.join(differing)}. Restore these values to go on, or choose "
            "another folder"
        )


def missing(recipe: PairRecipe, folder: Path) -> list[int]:
    """The numbers of the files that are not there yet."""
    return [number for number in range(recipe.num_shards) if not shard_path(folder, number).exists()]


@torch.no_grad()
def make_pairs(
    source: Source, recipe: PairRecipe, folder: Path, *, batch: int, numbers: Iterable[int], bar: bool
) -> None:
    """Write the files `numbers`, each beside its place first, so that it is whole.

    Args:
        batch: samples made at once; it does not change them beyond rounding.
        bar: show one, with the rate and the time left.
    Raises:
        ValueError: a sample is not finite, or the disk refused; what was written before is whole.
    """
    networks, numbers = networks_of(source), list(numbers)
    total = sum(len(recipe.slots(number)) for number in numbers)
    with evaluating(*networks), tqdm(total=total, unit="pair", disable=not bar, dynamic_ncols=True) as progress:
        for number in numbers:
            slots, parts = recipe.slots(number), []
            for first in range(0, len(slots), batch):
                parts.append(_pairs(source, recipe, slots[first : first + batch]))
                progress.update(len(parts[-1]["x0"]))
            columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            _put(shard_path(folder, number), lambda path, columns=columns: save_file(columns, path))


def _pairs(source: Source, recipe: PairRecipe, slots: range) -> dict[str, Tensor]:
    """These pairs, on the CPU, in float32."""
    parameter = next(networks_of(source)[0].parameters())
    rng = Rng((recipe.seed, "pairs"), slots, device=parameter.device, dtype=parameter.dtype)
    made, cond, labels = {}, {}, torch.tensor(slots) % max(recipe.num_classes, 1)
    if isinstance(source, Inverted):
        x0, labels = source.images.select(torch.tensor(slots))
        made["x0"] = x0.to(parameter)
    if recipe.num_classes:
        made["label"], cond = labels.cpu(), {"label": labels.to(parameter.device)}
    if isinstance(source, Inverted):
        made["noise"] = source.noise_of(made["x0"], cond)
    else:
        made["noise"] = source.prior(rng)
        made["x0"] = source.sample(made["noise"], cond, rng)
    if not all(end.isfinite().all() for end in (made["noise"], made["x0"])):
        raise ValueError("the source's samples hold NaN or infinity; look at its weights, or take another solver")
    return {name: value.cpu() if name == "label" else value.cpu().float() for name, value in made.items()}


def begin(recipe: PairRecipe, folder: Path) -> None:
    """Write the recipe into the folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    _put(folder / RECIPE, lambda path: write_recipe(recipe, path))


def _put(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file beside its place, and rename it once it is on the disk."""
    try:
        write(beside(path))
        to_disk(beside(path))
        beside(path).rename(path)
        to_disk(path.parent)
    except (OSError, SafetensorError) as error:
        beside(path).unlink(missing_ok=True)
        raise ValueError(
            f"could not write {path}: {error}; free some space, then run the same command again: it goes on"
        ) from error
