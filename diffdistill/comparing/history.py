"""What a run's folder tells of its training: how long it took, what it cost, and its curves."""

import json
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from diffdistill import checkpoint

POINTS = 200  # of a curve, at most


def history(folder: Path) -> dict:
    """Cost and curves of a run, from its newest checkpoint and its log.

    Returns:
        updates: generator updates behind the newest checkpoint.
        clocked: whether the run kept the time of training. Earlier versions logged the time since the process started,
            evaluation included; then the time of an update is the median over the intervals of the log.
        training_seconds, seconds_per_update: None where nothing tells.
        peak_bytes: None where it was not kept.
        losses: {"player/term": [[seconds, value], ...]}.
        distances: [[seconds, Frechet distance, samples], ...] of the evaluations in training.
    """
    newest = checkpoint.latest(folder)
    state = checkpoint.read_state(newest)
    updates, seconds = state["step"], state.get("training_seconds")
    lines = [line for line in read_log(folder / checkpoint.LOG) if line["step"] <= updates]
    clocked = seconds is not None
    rate = seconds / updates if clocked else _median_rate([line for line in lines if line["kind"] == "train"])
    times = {id(line): line["seconds"] if clocked else rate and rate * line["step"] for line in lines}
    placed = [(times[id(line)], line) for line in lines if times[id(line)] is not None]
    return {
        "updates": updates,
        "clocked": clocked,
        "training_seconds": seconds if clocked else rate and rate * updates,
        "seconds_per_update": rate,
        "peak_bytes": state.get("peak_bytes"),
        "losses": _losses([(at, line) for at, line in placed if line["kind"] == "train"], _players(state["files"])),
        "distances": [
            [at, line["frechet_distance"], line["num_samples"]]
            for at, line in placed
            if line["kind"] == "evaluate" and "frechet_distance" in line
        ],
    }


def read_log(log: Path) -> list[dict]:
    """The whole lines of a log; what a process writes at this moment is left out, and no log has none.

    Raises:
        ValueError: a line before the last one is damaged.
    """
    texts = log.read_text().splitlines() if log.is_file() else []
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            if number < len(texts):
                raise ValueError(f"{log}, line {number}: {error}; restore the file") from error
    return lines


def _median_rate(lines: Sequence[Mapping]) -> float | None:
    """Seconds of one update, robust against pauses for evaluation and new starts, where the clock falls back."""
    steps = [
        (after["seconds"] - before["seconds"]) / (after["step"] - before["step"])
        for before, after in pairwise(lines)
        if after["seconds"] > before["seconds"] and after["step"] > before["step"]
    ]
    return statistics.median(steps) if steps else None


def _players(files: Sequence[str]) -> set[str]:
    """Who is trained, by the files of a checkpoint."""
    weights = ".weights.safetensors"
    return {file.removesuffix(weights) for file in files if file.endswith(weights)}


def _losses(placed: Sequence[tuple[float, Mapping]], players: set[str]) -> dict[str, list[list[float]]]:
    """Each player's terms against time, thinned to every n-th point where a run is long."""
    found: dict[str, list[list[float]]] = {}
    for at, line in placed:
        for name, value in line.items():
            player, _, term = name.rpartition("/")
            if player in players and term != "gradient_norm":
                found.setdefault(name, []).append([at, value])
    return {name: points[:: -(-len(points) // POINTS)] for name, points in found.items()}
