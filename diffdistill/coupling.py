"""Couplings: noises and where a sampler takes them, made once for DMD's regression and for reflow."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from diffdistill.checkpoint import to_disk
from diffdistill.data.pairs import RECIPE, PairRecipe, fingerprint, read_recipe, shard_path, write_recipe
from diffdistill.evaluation.sampling import Solved, denoisers, evaluating
from diffdistill.generator import Sampler
from diffdistill.rng import Rng


def recipe_of(source: Sampler | Solved, *, count: int, seed: int, shard: int) -> PairRecipe:
    """What the pairs of this source are.

    Raises:
        ValueError: count or shard is below 1, or the generators of the source begin at different times.
    """
    if count < 1 or shard < 1:
        raise ValueError(f"count and shard must be at least 1, got {count} and {shard}")
    networks = denoisers(source)
    if isinstance(source, Solved):
        start, how = source.times[0], (source.steps, source.solver, source.teacher.guidance)
    else:
        starts = {part.grid[0] for part in source.parts.values()}
        start, how = max(starts), (0, "", 1.0)
    return PairRecipe(
        source=fingerprint(*networks),
        start=start,
        noise_std=networks[0].process.prior_std(start),
        **dict(zip(("steps", "solver", "guidance"), how, strict=True)),
        seed=seed,
        count=count,
        shard=shard,
        shape=tuple(networks[0].sample_shape),
        num_classes=networks[0].backbone.num_classes,
    )


def refuse_another(folder: Path, recipe: PairRecipe) -> None:
    """Refuses a folder that holds pairs of another recipe, naming every key with both values, or something else."""
    if not (folder / RECIPE).exists():
        if folder.exists() and any(path.name != ".lock" for path in folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no pairs; choose another folder")
        return
    there, here = asdict(read_recipe(folder)), asdict(recipe)
    differing = [f"{key} was {there[key]!r} and is {here[key]!r}" for key in here if there[key] != here[key]]
    if differing:
        raise ValueError(
            f"{folder} holds pairs of another recipe: {'; '.join(differing)}. Restore these values to go on, or choose "
            "another folder"
        )


@torch.no_grad()
def make_pairs(
    source: Sampler | Solved, recipe: PairRecipe, folder: Path, *, batch: int, numbers: Iterable[int], bar: bool
) -> None:
    """Write those files among `numbers` that are not there yet, each beside its place first, so that it is whole.

    Args:
        batch: samples made at once; it does not change them beyond rounding.
        bar: show one, with the rate and the time left.
    """
    missing = [number for number in numbers if not shard_path(folder, number).exists()]
    networks = denoisers(source)
    total = sum(len(recipe.slots(number)) for number in missing)
    with evaluating(*networks), tqdm(total=total, unit="pair", disable=not bar, dynamic_ncols=True) as progress:
        for number in missing:
            slots, parts = recipe.slots(number), []
            for first in range(0, len(slots), batch):
                parts.append(_pairs(source, recipe, slots[first : first + batch]))
                progress.update(len(parts[-1]["x0"]))
            _write({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, shard_path(folder, number))


def _pairs(source: Sampler | Solved, recipe: PairRecipe, slots: range) -> dict[str, Tensor]:
    """These pairs, on the CPU, in float32."""
    parameter = next(denoisers(source)[0].parameters())
    rng = Rng((recipe.seed, "pairs"), slots, device=parameter.device, dtype=parameter.dtype)
    made, cond = {}, {}
    if recipe.num_classes:
        made["label"] = torch.tensor(slots) % recipe.num_classes
        cond = {"label": made["label"].to(parameter.device)}
    noise = source.prior(rng)
    made["noise"], made["x0"] = noise, source.sample(noise, cond, rng)
    if not made["x0"].isfinite().all():
        raise ValueError("the source's samples hold NaN or infinity; look at its weights, or take another solver")
    return {name: value.cpu() if name == "label" else value.cpu().float() for name, value in made.items()}


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    beside = path.with_name(f".{path.name}.writing")
    save_file(tensors, beside)
    to_disk(beside)
    beside.rename(path)
    to_disk(path.parent)


def begin(recipe: PairRecipe, folder: Path) -> None:
    """Write the recipe into the folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f".{RECIPE}.writing"
    write_recipe(recipe, beside)
    beside.rename(folder / RECIPE)
