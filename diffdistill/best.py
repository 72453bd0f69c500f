"""Which of a run's evaluations was the best, told by its log alone, so that a resumed run knows it as well."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diffdistill.checkpoint import LOG

BETTER = {  # of each metric, whether more (1) or less (-1) is
    "frechet_distance": -1,
    "fid": -1,
    "kid": -1,
    "precision": 1,
    "recall": 1,
    "density": 1,
    "coverage": 1,
    "diversity": 1,
    "class_accuracy": 1,
    "inception_score": 1,
}


@dataclass(frozen=True)
class Found:
    """The best evaluation so far.

    Attributes:
        step: when it was.
        value: of the metric.
        since: evaluations after it.
    """

    step: int
    value: float
    since: int


@dataclass(frozen=True)
class Best:
    """What the best is.

    Attributes:
        metric: a key of BETTER.
        weights: whose evaluations count; empty where a run evaluates one kind, which its log does not name.
    """

    metric: str
    weights: str = ""

    def found(self, run: Path) -> Found | None:
        """By the log of a run; None before its first evaluation."""
        best, since = None, 0
        for line in _evaluations(run / LOG):
            if self.metric not in line or line.get("weights", "") != self.weights:
                continue
            value = BETTER[self.metric] * line[self.metric]
            if best is None or value > best[0]:
                best, since = (value, line["step"]), 0
            else:
                since += 1
        return None if best is None else Found(best[1], BETTER[self.metric] * best[0], since)


def _evaluations(log: Path) -> Iterator[dict]:
    if not log.is_file():
        return
    with log.open() as lines:
        for text in lines:
            if '"evaluate"' in text:
                line = json.loads(text)
                if line["kind"] == "evaluate":
                    yield line
