"""Routed: several samplers that share the classes, and the table that says whose turn it is."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from diffdistill.denoiser import Condition
from diffdistill.generator import Generator, Sampler
from diffdistill.rng import Rng


class Routed(Sampler):
    """Each row of a batch is sampled by the student of its class, from the noise it would get anywhere else.

    Args:
        students: by number; all of one process, sample shape and start. A run of one student alone has only that one.
        table: the number of each class's student.
    Raises:
        ValueError: the students disagree, or one has no class.
    """

    def __init__(self, students: Mapping[int, Sampler], table: Sequence[int]):
        self.students, self.table = dict(students), tuple(table)
        first = next(iter(self.students.values()))
        for number, student in self.students.items():
            if number not in self.table:
                raise ValueError(f"no class is routed to student {number}; leave it out, or change the shares")
            alike = student.denoiser.sample_shape == first.denoiser.sample_shape
            if not alike or not student.process.same_law(first.process):
                raise ValueError(f"student {number} makes other samples than the first, or in another process; use one")
            if student.denoiser.backbone.num_classes != len(self.table):
                raise ValueError(
                    f"student {number} knows {student.denoiser.backbone.num_classes} classes, and the table "
                    f"{len(self.table)}; give one entry for each class"
                )

    @property
    def parts(self) -> Mapping[str, Generator]:
        return {
            f"{number}/{name}": part
            for number, student in self.students.items()
            for name, part in student.parts.items()
        }

    @property
    def classes(self) -> Sequence[int]:
        return [label for label, student in enumerate(self.table) if student in self.students]

    def prior(self, rng: Rng) -> Tensor:
        return next(iter(self.students.values())).prior(rng)

    @torch.no_grad()
    def sample(self, x: Tensor, cond: Condition | None, rng: Rng) -> Tensor:
        owners = self.route(cond)
        made = torch.empty_like(x)
        for number, student in self.students.items():
            rows = [row for row, owner in enumerate(owners) if owner == number]
            asked = rows or ([0] if _sharded(student) else [])  # sharded networks need every rank at every forward
            if asked:
                own = {name: entry[asked] for name, entry in cond.items()}
                made[rows] = student.sample(x[asked], own, rng.rows(asked))[: len(rows)].to(made.dtype)
        return made

    def route(self, cond: Condition | None) -> list[int]:
        """The student of each row.

        Raises:
            ValueError: rows without class, or of a class whose student is not here.
        """
        if cond is None or "label" not in cond:
            raise ValueError("students are chosen by class, and the condition has no label; give one for each sample")
        labels = cond["label"].tolist()
        for label in labels:
            if not 0 <= label < len(self.table) or self.table[label] not in self.students:
                raise ValueError(f"no student here makes class {label}; here are the classes {list(self.classes)}")
        return [self.table[label] for label in labels]


def _sharded(sampler: Sampler) -> bool:
    return any(isinstance(module, FSDPModule) for part in sampler.parts.values() for module in part.denoiser.modules())
