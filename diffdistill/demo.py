"""The main job from end to end, on a laptop: distill, measure, export, reopen with stock diffusers, compare, show.

`make demo` runs it from the root of the repository. Killed at any moment, it goes on where it was.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from diffdistill import api
from diffdistill.cli import status_of
from diffdistill.config import ConfigError
from diffdistill.data.fashion_mnist import CLASS_NAMES, load_fashion_mnist
from diffdistill.evaluation.features import MOMENTS_FILE, Extractor, default_extractor
from diffdistill.evaluation.frechet import load_moments
from diffdistill.evaluation.grid import comparison_sheet
from diffdistill.evaluation.metrics import Reference, build_reference, evaluate_images
from diffdistill.evaluation.sampling import Solved, sample_images
from diffdistill.generator import Generator
from diffdistill.recipe import load_config

CONFIG = Path("configs/fashion/demo.yaml")
FEATURES = Path("checkpoints/fashion-features")
SAMPLE_SEED = 20_000  # of the samples that are measured and shown; training draws with another key
BATCH = 100


@dataclass(frozen=True)
class Row:
    """One line of the table: a name, its metrics, and the milliseconds that one of its images took."""

    name: str
    metrics: dict[str, float | int | str]
    milliseconds: float | None


@dataclass(frozen=True)
class Judge:
    """The evaluation, fixed before the first student was trained: extractor and real images."""

    extractor: Extractor
    reference: Reference

    @staticmethod
    def shipped(cache: Path) -> "Judge":
        """Moments of all 60,000 training images; neighbours among the 8,000 that ship."""
        extractor = default_extractor(FEATURES)
        moments = load_moments(FEATURES / MOMENTS_FILE, checksum=extractor.checksum)
        reference = build_reference(load_fashion_mnist(None, "train"), extractor, cache=cache)
        return Judge(extractor, reference.with_moments(moments))

    def measure(self, name: str, source: Generator | Solved, count: int) -> Row:
        """Metrics of `count` samples of a source, sample i made from the same noise and class for every source."""
        started = time.perf_counter()
        images, labels = sample_images(source, count, seed=SAMPLE_SEED, batch=BATCH, progress=f"     {name}")
        seconds = time.perf_counter() - started
        return Row(name, evaluate_images(images, labels, self.reference, self.extractor), 1000 * seconds / count)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m diffdistill.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIG, help="the distillation to run (%(default)s)")
    parser.add_argument("--samples", type=int, default=2000, help="measured per row (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="on top of the config, e.g. seed=1")
    options = parser.parse_args(arguments)
    return status_of(lambda: demo(options.config, options.overrides, count=options.samples))


def demo(path: Path, overrides: list[str], *, count: int) -> None:
    """Everything the demo does; its results lie in the config's output folder."""
    if not FEATURES.is_dir():
        raise ConfigError(f"there is no {FEATURES}; run the demo from the root of the repository")
    if count < 100:
        raise ConfigError(f"--samples={count} is too few to measure; take at least 100")
    started = time.perf_counter()
    config = load_config(path, overrides)
    if config.teacher is None:
        raise ConfigError(f"{path} names no teacher to hold the student against; set teacher.path")
    output = Path(config.output)

    print(f"1/4  Distilling {config.teacher.path} into {len(config.generator.grid)} step(s)")
    api.distill(config)
    student = api.load(output)
    teacher = api.load(config.teacher.path)

    print("2/4  Exporting to a stock diffusers pipeline, and comparing it with the generator")
    report = api.export(output, output / "pipeline", replace=True)
    print(f"     {report}")

    print(f"3/4  Measuring {count} samples of each")
    scores = json.loads((Path(config.teacher.path) / "scores.json").read_text())
    best = Solved(teacher, steps=scores["best"]["steps"], solver=scores["best"]["solver"])
    judge = Judge.shipped(output / "cache")
    real = load_fashion_mnist(None, "test")
    images, labels = real.select(torch.arange(len(real)))
    rows = [
        judge.measure(f"teacher, {best.steps} steps of {best.solver}", best, count),
        judge.measure("teacher, 1 step", Solved(teacher, steps=1, solver="euler"), count),
        judge.measure(f"student, {len(student.grid)} step", student, count),
        Row("real, held out", evaluate_images(images, labels, judge.reference, judge.extractor), None),
    ]

    print("4/4  Drawing")
    picture = output / "samples.png"
    draw(picture, best, student)
    seconds = time.perf_counter() - started
    (output / "results.json").write_text(json.dumps(results(rows, config.seed, seconds), indent=1) + "\n")
    print(f"\n{table(rows)}\n")
    print(f"Pipeline: {output / 'pipeline'} (its README.md shows how to load it).  Picture: {picture}")
    print(f"Took {seconds:.0f} s on {torch.get_num_threads()} threads.")


def draw(path: Path, best: Solved, student: Generator) -> None:
    """The picture: each column is one noise and one class, for teacher and student alike."""
    rows = [
        (f"teacher\n{best.steps} steps", best),
        ("teacher\n1 step", Solved(best.teacher, steps=1, solver="euler")),
        (f"student\n{len(student.grid)} step", student),
    ]
    drawn = [(name, sample_images(source, 20, seed=SAMPLE_SEED, batch=20)[0]) for name, source in rows]
    comparison_sheet(drawn, CLASS_NAMES, scale=3).save(path)


def table(rows: list[Row]) -> str:
    """The results as text, one line a row."""
    first = rows[0].metrics
    lines = [
        f"Frechet distance (FD) on {first['extractor']}, against the moments of {first['num_moments']} real images;",
        f"recall against {first['num_reference']} of them.",
        "",
        f"{'':<28}{'samples':>8}{'FD':>10}{'/ teacher':>11}{'precision':>11}"
        f"{'recall':>9}{'accuracy':>10}{'ms/image':>10}",
    ]
    for row in rows:
        m = row.metrics
        ratio = m["frechet_distance"] / first["frechet_distance"]
        speed = "" if row.milliseconds is None else f"{row.milliseconds:.2f}"
        lines.append(
            f"{row.name:<28}{m['num_samples']:>8}{m['frechet_distance']:>10.3f}{ratio:>11.2f}{m['precision']:>11.3f}"
            f"{m['recall']:>9.3f}{m['class_accuracy']:>10.3f}{speed:>10}"
        )
    return "\n".join(lines)


def results(rows: list[Row], seed: int, seconds: float) -> dict:
    """The table as data."""
    return {
        "seed": seed,
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rows": [{"name": row.name, "milliseconds_per_image": row.milliseconds, **row.metrics} for row in rows],
    }


if __name__ == "__main__":
    sys.exit(main())
