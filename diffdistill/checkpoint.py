"""Checkpoints: everything a run needs to go on bit for bit, as safetensors and JSON in one folder per step.

A checkpoint is written beside its final place and renamed, so that a folder named step-N is always whole; each of its
files is listed with its SHA-256, so that one that was damaged later is noticed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from diffdistill.player import Player, whole

STATE = "state.json"


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another recipe."""


def save(folder: Path, players: Mapping[str, Player], state: Mapping, *, writes: bool) -> None:
    """Write `folder`, or leave nothing and what was there before.

    Args:
        folder: final name, e.g. RUN/checkpoints/step-00001000.
        state: what else the loop needs, as JSON.
        writes: whether this rank writes; all ranks take part, since sharded tensors are gathered.
    """
    beside = folder.with_name(f".{folder.name}.writing")
    if writes:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    try:
        sums = {}
        for name, player in players.items():
            for part, tensors in _parts(player).items():
                file = f"{name}.{part}.safetensors"
                kept = {key: whole(tensor.detach()).cpu().contiguous() for key, tensor in tensors.items()}
                if writes:
                    save_file(kept, beside / file)
                    sums[file] = _sha256(beside / file)
        if writes:
            (beside / STATE).write_text(json.dumps({**state, "files": sums}, indent=1))
            for path in beside.iterdir():
                _flush(path)
            if folder.exists():
                shutil.rmtree(folder)
            beside.rename(folder)
            _flush(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise CheckpointError(
            f"could not write checkpoint {folder}: {error}; free some space or change output, then run the same "
            "command again: earlier checkpoints are untouched"
        ) from error


def load(folder: Path, players: Mapping[str, Player]) -> dict:
    """Fill the players from `folder` and return its state.

    Raises:
        CheckpointError: something is missing, damaged or does not fit.
    """
    state = read_state(folder)
    for name, player in players.items():
        for part, tensors in _parts(player, make_missing=True).items():
            stored = read_tensors(folder, f"{name}.{part}.safetensors", state)
            fill(tensors, stored, source=folder / f"{name}.{part}.safetensors")
    return state


def read_state(folder: Path) -> dict:
    """The JSON part of a checkpoint."""
    try:
        return json.loads((folder / STATE).read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no checkpoint ({STATE} is missing); give a folder step-N of a run") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{folder / STATE} is damaged ({error}); use an earlier checkpoint") from error


def read_tensors(folder: Path, file: str, state: Mapping) -> dict[str, Tensor]:
    """One file of a checkpoint, after its checksum was compared."""
    path = folder / file
    if file not in state["files"] or not path.exists():
        raise CheckpointError(f"{path} is missing; use an earlier checkpoint, or check that the method is the same")
    if _sha256(path) != state["files"][file]:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one recorded; use an earlier checkpoint")
    return load_file(path)


@torch.no_grad()
def fill(tensors: Mapping[str, Tensor], stored: Mapping[str, Tensor], *, source: Path) -> None:
    """Copy `stored` into `tensors`, name by name, exactly.

    Raises:
        CheckpointError: names or shapes differ.
    """
    missing, unknown = sorted(tensors.keys() - stored.keys()), sorted(stored.keys() - tensors.keys())
    if missing or unknown:
        raise CheckpointError(
            f"{source} does not fit: {len(missing)} tensors are missing {missing[:3]} and {len(unknown)} are unknown "
            f"{unknown[:3]}; build the network it was saved from"
        )
    for name, tensor in tensors.items():
        if tensor.shape != stored[name].shape:
            raise CheckpointError(
                f"{source} does not fit: {name} is {tuple(stored[name].shape)} there and {tuple(tensor.shape)} here"
            )
        if isinstance(tensor, DTensor):
            value = stored[name].to(tensor.to_local().device, tensor.dtype)
            tensor.copy_(distribute_tensor(value, tensor.device_mesh, tensor.placements))
        else:
            tensor.copy_(stored[name])


def latest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run's folder, or None."""
    folders = sorted(path for path in (run / "checkpoints").glob("step-*") if (path / STATE).exists())
    return folders[-1] if folders else None


def keep(run: Path, *, last: int, every: int) -> None:
    """Delete all but the newest `last` checkpoints, those at multiples of `every` steps (0 for none), and links to them."""
    folders = sorted((run / "checkpoints").glob("step-*"))
    for path in folders[:-last]:
        if not every or int(path.name.removeprefix("step-")) % every:
            shutil.rmtree(path)


def _parts(player: Player, *, make_missing: bool = False) -> dict[str, dict[str, Tensor]]:
    """All tensors of a player: weights, averages, and the optimizer's, by file and name."""
    names = list(player.spec.parameters)
    parts = {"weights": dict(player.spec.parameters)}
    for average, copies in player.averages.items():
        parts[f"average-{average}"] = dict(zip(names, copies.copies, strict=True))
    states = player.optimizer.state
    if make_missing:
        player.make_optimizer_state()
    parts["optimizer"] = {
        f"{kind}/{name}": tensor
        for name, parameter in player.spec.parameters.items()
        for kind, tensor in states.get(parameter, {}).items()
    }
    return parts


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
