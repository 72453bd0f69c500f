"""Checkpoints: everything a run needs to go on bit for bit, as safetensors and JSON in one folder per step.

A checkpoint is written beside its final place and renamed, so that a folder named step-N is always whole; each of its
files is listed with its SHA-256, so that one that was damaged later is noticed.

Two things are kept apart: `load` fills everything, to go on with the same recipe; `initialise` takes weights alone, to
begin another one.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from diffdistill.player import RAW, Player, local, whole

STATE = "state.json"
LOG = "log.jsonl"  # of a run, whose length a checkpoint records


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, of another recipe, or cannot be written."""


def save(folder: Path, players: Mapping[str, Player], state: Mapping, *, writes: bool) -> None:
    """Write `folder`, or leave everything as it was.

    Args:
        folder: final name, e.g. RUN/checkpoints/step-00001000.
        state: what else the loop needs, as JSON.
        writes: whether this rank writes; all ranks take part, since sharded tensors are gathered.
    Raises:
        CheckpointError: the disk refused; earlier checkpoints are untouched.
    """
    beside, replaced = (folder.with_name(f".{folder.name}.{what}") for what in ("writing", "replaced"))
    try:
        if writes:
            clear(folder.parent)
            beside.mkdir(parents=True)
        sums = {}
        for name, player in players.items():
            for part, tensors in parts(player).items():
                file = f"{name}.{part}.safetensors"
                kept = {}
                for key, tensor in tensors.items():
                    full = whole(tensor.detach())
                    if writes:
                        kept[key] = full.cpu().contiguous()
                if writes:
                    (beside / file).parent.mkdir(exist_ok=True)  # a player may be named student/generator
                    save_file(kept, beside / file)
                    sums[file] = _sha256(beside / file)
        if writes:
            (beside / STATE).write_text(json.dumps({**state, "files": sums}, indent=1))
            for path in (*beside.rglob("*"), beside):
                to_disk(path)
            if folder.exists():
                folder.rename(replaced)
            beside.rename(folder)
            to_disk(folder.parent)
            clear(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        raise CheckpointError(
            f"could not write checkpoint {folder}: {error}; free some space or change output, then run the same "
            "command again: earlier checkpoints are untouched"
        ) from error


def load(folder: Path, players: Mapping[str, Player]) -> dict:
    """Fill the players from `folder`, and return its state; nothing is changed unless all of it fits.

    Raises:
        CheckpointError: something is missing, damaged or does not fit.
    """
    state = read_state(folder)
    targets = {
        f"{name}.{part}.safetensors": tensors
        for name, player in players.items()
        for part, tensors in parts(player).items()
    }
    unknown = sorted(state["files"].keys() - targets.keys())
    if unknown:
        raise CheckpointError(f"{folder} does not fit: this run has no use for {unknown}; use the recipe that wrote it")
    stored = {file: read_tensors(folder, file, state) for file in targets}
    for file, tensors in targets.items():
        _check(tensors, stored[file], source=folder / file)
    for file, tensors in targets.items():
        fill(tensors, stored[file], source=folder / file)
    for player in players.values():
        player.reshard()
    return state


def initialise(parameters: Mapping[str, Tensor], source: Path, *, player: str, weights: str = RAW) -> None:
    """Fill `parameters` with a player's weights in another run, and nothing else: a new recipe begins.

    Do it before players are made of the parameters, so that optimizers and averages start from them.

    Args:
        source: a run, of which the latest checkpoint is taken, or a checkpoint.
        weights: "raw", or the name of one of the player's averages.
    Raises:
        CheckpointError: the checkpoint is damaged, has no such weights, or they do not fit.
    """
    folder = latest(source) or source
    state = read_state(folder)
    file = f"{player}.{'weights' if weights == RAW else f'average-{weights}'}.safetensors"
    if file not in state["files"]:
        known = sorted(name.removesuffix(".safetensors") for name in state["files"])
        known = [name for name in known if not name.endswith((".optimizer", ".means"))]
        raise CheckpointError(f"{folder} has no {file.removesuffix('.safetensors')}; it has {', '.join(known)}")
    stored = read_tensors(folder, file, state)
    # a new recipe may compute in another precision than the old one
    cast = {name: value.to(parameters[name].dtype) if name in parameters else value for name, value in stored.items()}
    fill(parameters, cast, source=folder / file)


def read_state(folder: Path) -> dict:
    """The JSON part of a checkpoint."""
    path = folder / STATE
    try:
        state = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{folder} holds no checkpoint ({STATE} is missing); give a folder step-N of a run"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except ValueError as error:  # not JSON, or not text at all
        raise CheckpointError(f"{path} is damaged ({error}); use an earlier checkpoint") from error
    if not isinstance(state, dict) or not isinstance(state.get("files"), dict):
        raise CheckpointError(f"{path} is damaged (it does not list its files); use an earlier checkpoint")
    return state


def read_tensors(folder: Path, file: str, state: Mapping) -> dict[str, Tensor]:
    """One file of a checkpoint, after its checksum was compared."""
    path = folder / file
    if file not in state["files"]:
        raise CheckpointError(f"{folder} does not fit: it has no {file}; use the recipe that wrote it")
    try:
        if _sha256(path) != state["files"][file]:
            raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one recorded; use an earlier checkpoint")
        return load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; use an earlier checkpoint") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; use an earlier checkpoint") from error


@torch.no_grad()
def fill(tensors: Mapping[str, Tensor], stored: Mapping[str, Tensor], *, source: Path) -> None:
    """Copy `stored` into `tensors`, name by name, exactly.

    Raises:
        CheckpointError: names, shapes or dtypes differ; nothing was changed.
    """
    _check(tensors, stored, source=source)
    for name, tensor in tensors.items():
        value = stored[name]
        if isinstance(tensor, DTensor):
            value = distribute_tensor(value.to(local(tensor).device), tensor.device_mesh, tensor.placements)
            local(tensor).copy_(local(value))
        else:
            tensor.copy_(value)


def _check(tensors: Mapping[str, Tensor], stored: Mapping[str, Tensor], *, source: Path) -> None:
    missing, unknown = sorted(tensors.keys() - stored.keys()), sorted(stored.keys() - tensors.keys())
    if missing or unknown:
        raise CheckpointError(
            f"{source} does not fit: {len(missing)} tensors are missing {missing[:3]} and {len(unknown)} are unknown "
            f"{unknown[:3]}; build the network it was saved from"
        )
    for name, tensor in tensors.items():
        here, there = (tuple(tensor.shape), tensor.dtype), (tuple(stored[name].shape), stored[name].dtype)
        if here != there:
            raise CheckpointError(
                f"{source} does not fit: {name} is {there[0]} of {there[1]} there and {here[0]} of {here[1]} here; "
                "build the network it was saved from, in the same precision"
            )


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run's folder, oldest first."""
    found = [path for path in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted((path for path in found if (path / STATE).exists()), key=_step)


def latest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run's folder, or None."""
    return next(reversed(checkpoints(run)), None)


def at(run: Path, step: int) -> Path:
    """The checkpoint of a step.

    Raises:
        CheckpointError: it is not there.
    """
    found = {_step(path): path for path in checkpoints(run)}
    if step not in found:
        raise CheckpointError(f"{run} has no checkpoint of step {step}; it has those of {', '.join(map(str, found))}")
    return found[step]


def keep(run: Path, *, last: int, every: int, also: Collection[int] = ()) -> None:
    """Delete all checkpoints but the newest `last` (at least 1), those at multiples of `every` steps (0: none), and
    those of the steps `also`."""
    if last < 1:
        raise ValueError(f"keep_last must be at least 1, got {last}; a run needs a checkpoint to go on from")
    for path in checkpoints(run)[:-last]:
        if (not every or _step(path) % every) and _step(path) not in also:
            path.rename(
                path.with_name(f".{path.name}.deleted")
            )  # whole or hidden, also if the next line is interrupted
    clear(run / "checkpoints")


def to_disk(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def clear(folder: Path) -> None:
    """Delete what an interrupted `save` or `keep` left behind; a replaced checkpoint only if its successor is there."""
    for path in folder.glob(".step-*"):
        whole_name = path.name.removeprefix(".").rpartition(".")[0]
        if path.suffix == ".replaced" and not (folder / whole_name).exists():
            path.rename(folder / whole_name)
        else:
            shutil.rmtree(path)


def parts(player: Player) -> dict[str, dict[str, Tensor]]:
    """All tensors of a player: weights, averages, running means, and the optimizer's, by file and name."""
    player.make_optimizer_state()
    parameters = player.spec.parameters
    made = {"weights": dict(parameters)}
    for average, copies in player.averages.items():
        made[f"average-{average}"] = dict(zip(parameters, copies.copies, strict=True))
    if player.spec.means:
        made["means"] = {name: means.values for name, means in player.spec.means.items()}
    made["optimizer"] = {
        f"{kind}/{name}": tensor
        for name, parameter in parameters.items()
        for kind, tensor in player.optimizer.state[parameter].items()
    }
    return made


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
