"""A run's folder: its recipe, and whether a run may go on in it.

config.yaml              the recipe, every default written out; a later start may change what is in FREE
log.jsonl                one JSON object a line: "reference", "train", "warning", "evaluate", "retry"
checkpoints/step-N/      everything needed to go on
samples/step-N.png       pictures
.tracker-id              by which a tracker knows the run again
.lock                    locked by the kernel while a process writes here; empty, and never in the way by itself
"""

import fcntl
import os
import secrets
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffdistill import __version__, checkpoint
from diffdistill.config import Config, ConfigError
from diffdistill.recipe import as_yaml, flat, load_config, plain

RECIPE = "config.yaml"
LOCK = ".lock"
TRACKER_ID = ".tracker-id"

# Keys that may differ when a run goes on, since they do not change what it computes.
FREE = (
    "output",
    "train.log_every",
    "train.save_every",
    "train.keep_last",
    "train.keep_every",
    "train.retries",
    "train.threads",
    "pictures",
    "evaluate",
    "trackers",
)


def look(config: Config) -> None:
    """Refuses, before anything is built, an output that cannot be written or holds a run of another recipe."""
    run = Path(config.output)
    existing = next(path for path in (run, *run.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        reason = "cannot be written to" if existing.is_dir() else "is no folder"
        raise ConfigError(f"output={run} cannot be made: {existing} {reason}; choose another by output=FOLDER")
    found = checkpoint.latest(run)
    if found is not None:
        refuse_other_recipe(config, run)
        step = int(found.name.removeprefix("step-"))
        if step > config.train.steps:
            raise ConfigError(f"{run} is at step {step} already, beyond train.steps={config.train.steps}; choose more")


def enter(config: Config, *, writes: bool) -> Path | None:
    """Make `config.output` and write the recipe there; the checkpoint to go on from, or None for a new run.

    Args:
        writes: whether this process does so; all others only look for the checkpoint.
    Raises:
        ConfigError: the folder cannot be written.
    """
    run = Path(config.output)
    found = checkpoint.latest(run)
    if not writes:
        return found
    try:
        run.mkdir(parents=True, exist_ok=True)
        if found is None:
            (run / checkpoint.LOG).unlink(missing_ok=True)  # of a start that never reached a checkpoint
        beside = run / f".{RECIPE}.writing"
        beside.write_text(as_yaml(config, f"The resolved recipe of this run, by diffdistill {__version__}."))
        beside.replace(run / RECIPE)
    except OSError as error:
        raise ConfigError(f"output={run} cannot be written: {error}; choose another by output=FOLDER") from error
    return found


def tracker_id(run: Path) -> str:
    """The name by which a tracker knows this run again, made at the first call and kept in its folder."""
    file = run / TRACKER_ID
    if not file.is_file():
        file.write_text(f"{secrets.token_hex(4)}\n")
    return file.read_text().strip()


@contextmanager
def held(run: Path, *, writes: bool):
    """Within the block, no other process that asks may write into the folder, which is made if need be.

    The kernel gives the lock back when this process ends, however it ends. Unix alone has such locks.

    Args:
        writes: whether this process does; all others need no lock.
    Raises:
        ConfigError: another process holds it, or the folder cannot be written.
    """
    if not writes:
        yield
        return
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = (run / LOCK).open("w")
    except OSError as error:
        raise ConfigError(f"output={run} cannot be written: {error}; choose another by output=FOLDER") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another process is writing into {run}; wait for its end, stop it, or choose another by output=FOLDER"
            ) from error
        except OSError as error:
            raise ConfigError(f"{run} cannot be locked: {error}; choose another by output=FOLDER") from error
        yield


def refuse_other_recipe(config: Config, run: Path) -> None:
    """Refuses to go on with a run whose recipe differs, naming every key with both values."""
    if not (run / RECIPE).is_file():
        raise ConfigError(f"{run} holds checkpoints but no {RECIPE}; put its recipe there, or choose another output")
    differing = differences(read_config(run), config)
    if differing:
        listed = "; ".join(f"{key} was {there!r} and is {here!r}" for key, (there, here) in differing.items())
        raise ConfigError(
            f"{run} holds a run of another recipe: {listed}. Restore these values to go on, or choose another output; "
            "to begin a new recipe from its weights, set generator.init_from to it as well"
        )


def differences(before: Config, after: Config) -> dict[str, tuple[Any, Any]]:
    """Keys that change what is computed and that differ, with both values; "(not set)" where one recipe lacks a key."""
    free = FREE
    if all(player.decay == "constant" for player in (*before.players.values(), *after.players.values())):
        free = (*FREE, "train.steps")  # nothing but the end of the run depends on it
    there, here = flat(plain(before)), flat(plain(after))
    return {
        key: (there.get(key, "(not set)"), here.get(key, "(not set)"))
        for key in dict.fromkeys((*there, *here))
        if there.get(key) != here.get(key) and not any(key == name or key.startswith(f"{name}.") for name in free)
    }


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's."""
    return (folder / RECIPE).is_file()


def read_config(run: Path) -> Config:
    """The recipe of a run.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    if not is_run(run):
        raise ConfigError(f"{run} holds no run ({RECIPE} is missing); give the output folder of `diffdistill train`")
    return load_config(run / RECIPE)
