"""Runs of one student each become one run of all: what multi-student training on several machines ends with."""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffdistill import checkpoint, run
from diffdistill.config import Config, ConfigError
from diffdistill.methods.multi_student import MultiStudent


def join(runs: Sequence[Path], output: Path) -> Path:
    """The run of all students, in `output`, made of one run for each (method.only); `output`.

    Its checkpoint has, bit for bit, the tensors that a run of all students would have written at that step, so that it
    can be sampled, measured, exported, and trained on. The log lines stay where they are.

    Raises:
        ConfigError, CheckpointError: the runs do not make a whole, or differ in more than the student; nothing was
            written.
    """
    configs = [run.read_config(folder) for folder in runs]
    whole = _whole(runs, configs, output)
    found = [checkpoint.latest(folder) for folder in runs]
    steps = ["no checkpoint" if path is None else path.name for path in found]
    for folder, step in zip(runs, steps, strict=True):
        if step != steps[0] or step == "no checkpoint":
            raise ConfigError(f"{folder} is at {step}, and {runs[0]} at {steps[0]}; bring all to one step")
    states = [checkpoint.read_state(path) for path in found]
    for folder, state in zip(runs, states, strict=True):
        alike = state["attempt"] == states[0]["attempt"] and len(state["readings"]) == len(states[0]["readings"])
        if not alike:
            raise ConfigError(f"{folder} was trained by another number of processes than {runs[0]}; use one number")
    require_free(output)
    run.enter(whole, writes=True)
    beside = output / "checkpoints" / f".{steps[0]}.writing"
    for path, state in zip(found, states, strict=True):
        for file in state["files"]:
            (beside / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path / file, beside / file)
    (beside / checkpoint.STATE).write_text(json.dumps(_joint(states), indent=1))
    for path in (*beside.rglob("*"), beside):
        checkpoint.to_disk(path)
    beside.rename(output / "checkpoints" / steps[0])
    return output


def require_free(output: Path) -> None:
    """Refuses a folder for the run of all students that holds anything but what a join began, and did not end."""
    begun = {run.RECIPE, run.LOCK, "checkpoints"}
    if checkpoint.latest(output) or (output.exists() and any(path.name not in begun for path in output.iterdir())):
        raise ConfigError(f"{output} exists; name another folder for the run of all students")


def _joint(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state of the run of all students: as if one process had trained them one after the other."""
    clocks = [state["training_seconds"] for state in states]
    watches = [state["watch"] for state in states]
    return {
        **states[0],
        "readings": [
            {name: sums for state in states for name, sums in state["readings"][rank].items()}
            for rank in range(len(states[0]["readings"]))
        ],
        "training_seconds": None if None in clocks else sum(clocks),
        "peak_bytes": max(state["peak_bytes"] for state in states),
        "references": _merged([state["references"] or {} for state in states]) or None,
        "watch": {
            key: _merged([watch[key] for watch in watches]) if isinstance(value, dict) else value
            for key, value in watches[0].items()
        },
        "log_bytes": 0,
        "files": _merged([state["files"] for state in states]),
    }


def _merged(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: value for part in parts for name, value in part.items()}


def _whole(runs: Sequence[Path], configs: Sequence[Config], output: Path) -> Config:
    """The recipe of the run of all students, when the runs are its students, each once."""
    for folder, config in zip(runs, configs, strict=True):
        if not isinstance(config.method, MultiStudent.Config) or config.method.only < 0:
            raise ConfigError(
                f"{folder} is not the run of one student: its method is no multi_student with method.only"
            )
    wholes = [
        dataclasses.replace(config, output=str(output), method=dataclasses.replace(config.method, only=-1))
        for config in configs
    ]
    for folder, config in zip(runs, wholes, strict=True):
        differing = run.differences(wholes[0], config)
        if differing:
            key, (there, here) = next(iter(differing.items()))
            raise ConfigError(f"{folder} is of another recipe than {runs[0]}: {key} is {here!r}, and {there!r} there")
    students = [config.method.only for config in configs]
    if sorted(students) != list(range(wholes[0].method.students)):
        raise ConfigError(
            f"these are the runs of students {students}; give one run for each of 0 to {wholes[0].method.students - 1}"
        )
    return wholes[0]
