"""Runs of one student each become one run of all: what multi-student training on several machines ends with."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

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
    for folder, path in zip(runs, found, strict=True):
        if path is None or path.name != found[0].name:
            reached = "no checkpoint" if path is None else path.name
            raise ConfigError(f"{folder} is at {reached}, and {runs[0]} at {found[0].name}; bring all to one step")
    states = [checkpoint.read_state(path) for path in found]
    for folder, state in zip(runs, states, strict=True):
        alike = state["attempt"] == states[0]["attempt"] and len(state["readings"]) == len(states[0]["readings"])
        if not alike:
            raise ConfigError(f"{folder} was trained by another number of processes than {runs[0]}; use one number")
    if output.exists():
        raise ConfigError(f"{output} exists; name another folder for the run of all students")
    joint = {
        **states[0],
        "readings": [
            {name: sums for state in states for name, sums in state["readings"][rank].items()}
            for rank in range(len(states[0]["readings"]))
        ],
        "log_bytes": 0,
        "files": {file: checksum for state in states for file, checksum in state["files"].items()},
    }
    run.enter(whole, writes=True)
    beside = output / "checkpoints" / f".{found[0].name}.writing"
    for path, state in zip(found, states, strict=True):
        for file in state["files"]:
            (beside / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path / file, beside / file)
    (beside / checkpoint.STATE).write_text(json.dumps(joint, indent=1))
    for path in (*beside.rglob("*"), beside):
        checkpoint.to_disk(path)
    beside.rename(output / "checkpoints" / found[0].name)
    return output


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
