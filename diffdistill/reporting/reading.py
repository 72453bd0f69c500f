"""What a run's folder holds, read for a page."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffdistill import checkpoint, run
from diffdistill.comparing.history import history, read_log
from diffdistill.config import Config
from diffdistill.recipe import flat, plain

POINTS = 300  # of a curve, at most
PICTURES = 6  # of the samples over time, at most


@dataclass(frozen=True)
class Told:
    """A run.

    Attributes:
        name: of its folder, unique on the page.
        recipe: the resolved YAML.
        lines: of its log.
        pictures: (step, PNG) of its samples on fixed noises, evenly from first to last.
        cost: see `comparing.history`; empty before the first checkpoint.
    """

    name: str
    folder: Path
    config: Config
    recipe: str
    lines: Sequence[Mapping[str, Any]]
    pictures: Sequence[tuple[int, bytes]]
    cost: Mapping[str, Any]

    def kind(self, kind: str) -> list[Mapping[str, Any]]:
        """The lines of one kind."""
        return [line for line in self.lines if line["kind"] == kind]

    def curves(self, kind: str) -> dict[str, list[tuple[float, float]]]:
        """Every number of the lines of one kind against the step, by name; of several weights, by those first."""
        found: dict[str, list[tuple[float, float]]] = {}
        for line in self.kind(kind):
            under = f"{line['weights']}/" if "weights" in line else ""
            for name, value in line.items():
                if isinstance(value, float) and name not in ("seconds",) and value == value:
                    found.setdefault(under + name, []).append((line["step"], value))
        return {name: thinned(points) for name, points in found.items()}

    @property
    def reference(self) -> Mapping[str, float]:
        """What readings should come to, by name."""
        lines = self.kind("reference")
        return {name: value for name, value in lines[-1].items() if isinstance(value, float)} if lines else {}


def read(folder: Path, name: str) -> Told:
    """A run's folder.

    Raises:
        ConfigError, CheckpointError, ValueError: it holds no run, or something of it is damaged.
    """
    config = run.read_config(folder)
    pictures = sorted((folder / "samples").glob("step-*.png"))
    chosen = [pictures[place] for place in spaced(len(pictures), PICTURES)]
    return Told(
        name=name,
        folder=folder,
        config=config,
        recipe=(folder / run.RECIPE).read_text(),
        lines=read_log(folder / checkpoint.LOG),
        pictures=[(int(re.sub(r"\D", "", path.stem)), path.read_bytes()) for path in chosen],
        cost=history(folder) if checkpoint.latest(folder) else {},
    )


def spaced(count: int, most: int) -> list[int]:
    """At most so many places among `count`, evenly from the first to the last."""
    if count <= most:
        return list(range(count))
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS of a curve, with its ends."""
    return [points[place] for place in spaced(len(points), POINTS)]


def differing(told: Sequence[Told]) -> dict[str, list[str]]:
    """The keys whose values are not the same in all recipes, with each one's value."""
    flats = [flat(plain(one.config)) for one in told]
    keys = dict.fromkeys(key for values in flats for key in values)
    return {
        key: [str(values.get(key, "–")) for values in flats]
        for key in keys
        if key != "output" and len({str(values.get(key)) for values in flats}) > 1
    }
