"""Students on processes of their own: what a launch of several processes does, when it is asked to spread them.

The processes fall into one group for each student, which trains as a run of that student alone does (method.only), in a
folder of its own; no message passes between groups. When all have come to the end, the first process joins their runs.
"""

import dataclasses
import time
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed import PrefixStore, Store

from diffdistill import checkpoint
from diffdistill.config import Config, ConfigError
from diffdistill.joining import join, require_free
from diffdistill.methods.multi_student import MultiStudent

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Place:
    """Where this process stands among those that students are spread over."""

    config: Config  # of all students
    student: int
    first: bool  # of all processes
    _store: Store
    _processes: int

    @property
    def own(self) -> Config:
        """What the group of this process trains."""
        method = dataclasses.replace(self.config.method, only=self.student)
        evaluate = dataclasses.replace(self.config.evaluate, every=0)  # a share of the classes is not measured
        output = str(folders(self.config)[self.student])
        return dataclasses.replace(self.config, method=method, evaluate=evaluate, output=output)

    def join(self) -> Path | None:
        """The run of all students, made by the first process when all have come here, or None in the others.

        A run that an earlier launch joined at this step stays as it is.
        """
        self._store.add("come", 1)
        if not self.first:
            return None
        while self._store.add("come", 0) < self._processes:
            time.sleep(POLL_SECONDS)
        output = Path(self.config.output)
        return output if checkpoint.latest(output) else join(folders(self.config), output)


def folders(config: Config) -> list[Path]:
    """The run of each student, beside the output of the run of all."""
    output = Path(config.output)
    return [output.with_name(f"{output.name}-student-{number}") for number in range(config.method.students)]


def require_students(config: Config, processes: int) -> None:
    """Refuses, before any process waits for another, what cannot be spread or joined.

    Raises:
        ConfigError: the method has no students or trains one alone, the processes do not share out, or the output
            holds a run that is not the joined one at its last step.
    """
    if not isinstance(config.method, MultiStudent.Config) or config.method.only >= 0:
        raise ConfigError("only a run of all students of method.name=multi_student is spread; start it without")
    students = config.method.students
    if processes % students:
        raise ConfigError(
            f"{processes} processes do not share out among method.students={students}; start it by: torchrun "
            f"--nproc-per-node {students} -m diffdistill train ..., or a multiple of {students}"
        )
    output = Path(config.output)
    found = checkpoint.latest(output)
    if found is None or int(found.name.removeprefix("step-")) != config.train.steps:
        require_free(output)  # the students' runs are to be joined there


def spread(config: Config, launcher: MutableMapping[str, str]) -> Place:
    """Start the group of this process, in the place of the group of all that torchrun means to start.

    From here on `torch.distributed`, and what reads torchrun's variables, sees the processes of one student alone.

    Args:
        launcher: the environment that torchrun made, which is changed.
    Raises:
        ConfigError: see `require_students`.
    """
    require_students(config, int(launcher.get("WORLD_SIZE", 1)))
    store, rank, processes = next(torch.distributed.rendezvous("env://"))
    size = processes // config.method.students
    student = rank // size
    launcher.update(RANK=str(rank % size), WORLD_SIZE=str(size))
    on_gpu = config.train.device in ("auto", "cuda") and torch.cuda.is_available()
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=PrefixStore(f"student-{student}", store),
        rank=rank % size,
        world_size=size,
    )
    return Place(config, student, rank == 0, PrefixStore("all", store), processes)
