"""Several students as stock pipelines in one folder, with a manifest that says which class goes to which.

router.json    the student of each class, and for each student its folder, its call, and the SHA-256 of its files
student-0/     a stock diffusers pipeline, as `write_pipeline` makes it; and so on
README.md      how to sample with and without diffdistill
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.exporting.compare import watched
from diffdistill.exporting.manifest import checksums, read_manifest, verify
from diffdistill.exporting.place import beside, require_free
from diffdistill.exporting.seeds import Seeds
from diffdistill.exporting.stock import Refusal, request, require
from diffdistill.exporting.write import TOLERANCE, Report, quiet, write_pipeline
from diffdistill.generator import Generator
from diffdistill.routed import Routed

MANIFEST, FORMAT, VERSION = "router.json", "diffdistill router", 1

CARD = """---
library_name: diffusers
---

# {count} generators behind one router, distilled with diffdistill

Each folder `student-k` is a stock diffusers pipeline for a share of the {classes} classes; `{manifest}` has the student
of each class and the arguments of its calls. With diffdistill, one call samples through the router:

```python
import diffdistill

images = diffdistill.load_routed(".")(labels=[0, {last}], seed=0)
```

Without it, choose the folder by hand:

```python
import json

import torch
from diffusers import DiffusionPipeline

label, seed = {last}, 1
manifest = json.load(open("{manifest}"))
student = manifest["students"][manifest["router"][label]]
pipeline = DiffusionPipeline.from_pretrained(student["folder"], dtype=torch.float32)
image = pipeline(class_labels=[label], generator=torch.Generator().manual_seed(seed), **student["call"]).images[0]
image.save("sample.png")
```

The same seed gives the same picture either way, and picture i of a call begins with seed + i. Started from the same
noise, the pipelines reproduce the generators that were trained: the largest absolute difference, before the pictures
are clamped, was {difference:.1e} in float32.
"""


@dataclass(frozen=True)
class RoutedReport:
    """What was written: the folder, the report of each student, and the difference of all through the router."""

    folder: Path
    students: tuple[Report, ...]
    difference: float

    def __str__(self) -> str:
        kinds = ", ".join(sorted({f"{report.pipeline} with {report.scheduler}" for report in self.students}))
        return (
            f"{self.folder}: {len(self.students)} students behind {MANIFEST}, each a {kinds}; maximum absolute "
            f"difference from the generators {self.difference:.1e}"
        )


class RoutedPipelines:
    """The stock pipelines of a folder that `write_routed` wrote, sampled by one call.

    Args:
        folder: with the manifest.
        device: where to sample.
    Raises:
        ValueError: the manifest or a file is missing or damaged.
    """

    def __init__(self, folder: Path, *, device: str = "cpu"):
        from diffusers import DiffusionPipeline

        self.folder, manifest = folder, read_manifest(folder / MANIFEST, kind=FORMAT, version=VERSION)
        self.router: tuple[int, ...] = tuple(manifest["router"])
        self._calls = [(student["call"], student["takes_batch_size"]) for student in manifest["students"]]
        self.pipelines: list[Any] = []
        for student in manifest["students"]:
            verify(folder, student["files"])
            with quiet():
                pipeline = DiffusionPipeline.from_pretrained(folder / student["folder"], dtype=torch.float32)
            pipeline.set_progress_bar_config(disable=True)
            self.pipelines.append(pipeline.to(device))

    def __call__(self, labels: Sequence[int], *, seed: int = 0, batch: int = 64) -> list:
        """A picture (PIL) for each label, in their order; picture i is a function of labels[i] and seed + i alone.

        Args:
            batch: pictures made at once, which does not change them beyond rounding.
        """
        pictures: list = [None] * len(labels)
        for pipeline, rows, arguments in self._shares(labels, seed, batch):
            for row, picture in zip(rows, pipeline(**arguments).images, strict=True):
                pictures[row] = picture
        return pictures

    def states(self, labels: Sequence[int], *, seed: int = 0) -> Tensor:
        """The samples (N, ...) before the pipelines clamp or decode them."""
        made: dict[int, Tensor] = {}
        for pipeline, rows, arguments in self._shares(labels, seed, len(labels)):
            with watched(pipeline) as states:
                pipeline(**arguments, output_type="pt")
            made |= dict(zip(rows, states[-1], strict=True))
        return torch.stack([made[row] for row in range(len(labels))])

    def _shares(self, labels: Sequence[int], seed: int, batch: int):
        """Each call: its pipeline, the rows that it makes, and its arguments."""
        unknown = [label for label in labels if not 0 <= label < len(self.router)]
        if unknown or not len(labels):
            raise ValueError(
                f"labels must lie in 0 ... {len(self.router) - 1}, and be at least one; got {list(labels)}"
            )
        for student, (pipeline, (call, takes_batch_size)) in enumerate(zip(self.pipelines, self._calls, strict=True)):
            own = [row for row, label in enumerate(labels) if self.router[label] == student]
            for first in range(0, len(own), batch):
                rows = own[first : first + batch]
                generators = [torch.Generator().manual_seed(seed + row) for row in rows]
                size = {"batch_size": len(rows)} if takes_batch_size else {}
                arguments = {**call, **size, "class_labels": [labels[row] for row in rows], "generator": generators}
                yield pipeline, rows, arguments


def write_routed(
    sampler: Routed,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    vae: nn.Module | None = None,
    tolerance: float = TOLERANCE,
    replace: bool = False,
) -> RoutedReport:
    """Write every student as a stock pipeline, and the manifest; the arguments are those of `write_pipeline`.

    All of it is written beside, reopened, sampled through the router, compared with `Routed.sample`, and then renamed.

    Raises:
        Refusal: no stock class expresses a student, or not all students are here.
        ValueError: the folder exists, or the difference is too large.
    """
    folder = Path(folder)
    require_free(folder, replace, marker=MANIFEST)
    students = _all_students(sampler)
    with beside(folder) as made:
        reports = [
            write_pipeline(student, made / f"student-{number}", dtype=dtype, vae=vae, tolerance=tolerance)
            for number, student in enumerate(students)
        ]
        entries = [_entry(made, report) for report in reports]
        manifest = {"format": FORMAT, "version": VERSION, "router": sampler.table, "students": entries}
        (made / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        rounded = Routed({n: request(one, vae, dtype).generator for n, one in enumerate(students)}, sampler.table)
        difference = compare_routed(RoutedPipelines(made), rounded)
        if not difference < tolerance:  # NaN fails too
            raise ValueError(
                f"the pipelines behind the router differ from the generators by {difference:.2e}, and {tolerance:.0e} "
                "is allowed; nothing was written"
            )
        last = len(sampler.table) - 1
        text = CARD.format(count=len(students), classes=last + 1, last=last, manifest=MANIFEST, difference=difference)
        (made / "README.md").write_text(text)
    return RoutedReport(folder, tuple(reports), difference)


def compare_routed(pipelines: RoutedPipelines, sampler: Routed, *, seed: int = 0) -> float:
    """The largest absolute difference of the pipelines' samples from the sampler's, one of each class and a last more.

    Args:
        sampler: on the CPU, in float32.
    """
    labels = [*reversed(range(len(sampler.table))), 0]
    draws = Seeds.of(range(seed, seed + len(labels)))
    ours = sampler.sample(sampler.prior(draws), {"label": torch.tensor(labels)}, draws)
    return (pipelines.states(labels, seed=seed) - ours).abs().max().item()


def _all_students(sampler: Routed) -> list[Generator]:
    """The students by number, when all are here and each is one generator."""
    wanted = range(max(sampler.table) + 1)
    missing = [number for number in wanted if number not in sampler.students]
    require(not missing, f"student {missing} is trained by another run; join the runs of all students, and export that")
    students = [sampler.students[number] for number in wanted]
    for number, student in enumerate(students):
        if not isinstance(student, Generator):
            raise Refusal(f"student {number} samples with several generators, and a stock pipeline holds one")
    return students


def _entry(folder: Path, report: Report) -> dict[str, Any]:
    """What the manifest says of one student."""
    return {
        "folder": report.folder.name,
        "pipeline": report.pipeline,
        "scheduler": report.scheduler,
        "call": report.call,
        "takes_batch_size": report.takes_batch_size,
        "files": checksums(report.folder, root=folder),
    }
