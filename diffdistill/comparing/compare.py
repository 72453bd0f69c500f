"""The comparison from end to end; killed at any moment, the same command goes on where it was."""

import json
import math
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from diffdistill import __version__, api, networks, run
from diffdistill.comparing.entrants import Entrant, entrants, features_folder, real_data
from diffdistill.comparing.history import history
from diffdistill.comparing.measuring import Ruler
from diffdistill.comparing.page import page
from diffdistill.comparing.training import RECIPES, hold_budget, is_complete, train
from diffdistill.config import EvaluateConfig, TeacherConfig
from diffdistill.data.fashion_mnist import CLASS_NAMES
from diffdistill.evaluation.sampling import Solved
from diffdistill.player import RAW
from diffdistill.teacher import Teacher
from diffdistill.trainer import Budget

PAGE, RESULTS = "index.html", "results.json"
SCORES = "scores.json"  # of a teacher's folder, where its best number of steps was measured


class Failed(RuntimeError):
    """Some of the recipes could not be trained to the end of the budget."""


@dataclass(frozen=True)
class Measure:
    """How all are measured; the defaults are those of `evaluate`.

    Attributes:
        features: the extractor's folder; empty for the one that the recipes agree on.
        samples, seed, batch: of each row.
        teacher_steps: of the teacher's row; 0 for the best in its scores.json, or 18 where there is none.
    """

    features: str = ""
    samples: int = EvaluateConfig.samples
    seed: int = EvaluateConfig.seed
    batch: int = EvaluateConfig.batch
    teacher_steps: int = 0
    device: str = "cpu"


def compare(
    sources: Sequence[Path],
    overrides: Sequence[str] = (),
    *,
    output: Path,
    budget: Budget | None = None,
    measure: Measure,
    command: str = "",
    say: Callable[[str], None] = print,
) -> Path:
    """Train each recipe within the budget, measure all alike, and write OUTPUT/index.html; its path.

    Args:
        sources: YAML files, and folders of runs, which are measured as they are.
        overrides: key=value each, for every YAML file; of `data` and `evaluate`, for the measurement too.
        output: also holds results.json, the runs, and what was measured, so that nothing is done twice.
        budget: of each YAML file's training.
        command: what was typed, for the page.
    Raises:
        ConfigError, ValueError: a mistake, before anything is trained.
        Stopped: after a signal; the same call goes on.
        Failed: a recipe's training ended with an error; the page is written all the same.
    """
    found = entrants(sources, overrides, output=output, budget=budget, features=measure.features)
    data = real_data(found, overrides)
    teacher, steps = _teacher(found[0].config.teacher, measure)
    ruled = EvaluateConfig(
        samples=measure.samples,
        batch=measure.batch,
        seed=measure.seed,
        features=features_folder(found, measure.features),
        cache=str(output / "cache"),
    )
    say(f"comparing {', '.join(entrant.name for entrant in found)}")
    with run.held(output, writes=True):
        extractor, reference = api.yardstick(ruled, data, cache=output / "cache", device=measure.device)
        ruler = Ruler(extractor, reference, measure.samples, measure.seed, measure.batch)
        ruler.refuse_unfit(teacher.denoiser)
        if budget is not None:
            hold_budget(output, budget)
        failures = {e.name: _trained(e, ruled, budget, output=output, say=say) for e in found if e.trains}
        rows = []
        one = replace(steps, steps=1, solver="euler")
        for source in (steps, one) if steps.steps > 1 else (one,):
            name = f"teacher, {source.steps} step{'s' if source.steps > 1 else ''}"
            say(f"measuring {name}")
            measured = ruler.measure(name, source, output=output)
            rows.append({"name": name, "kind": "teacher", "solver": source.solver} | measured)
        for entrant in found:
            rows.append(_row(entrant, failures.get(entrant.name, ""), ruler, measure, output=output, say=say))
        results = {
            "made": _made(command, measure),
            "budget": None if budget is None else {k: v for k, v in asdict(budget).items() if math.isfinite(v)},
            "teacher": {"path": found[0].config.teacher.path, "guidance": found[0].config.teacher.guidance_weight},
            "ruler": {
                "extractor": extractor.name,
                "checksum": extractor.checksum,
                "samples": measure.samples,
                "seed": measure.seed,
                "data": data.name,
                "num_reference": len(reference.features),
                "num_moments": reference.moments.count,
                "classes": list(CLASS_NAMES) if data.name == "fashion_mnist" else [],
            },
            "rows": rows,
        }
        (output / RESULTS).write_text(json.dumps(results, indent=1) + "\n")
        pictures = {row["name"]: (output / row["picture"]).read_bytes() for row in rows if "picture" in row}
        (output / PAGE).write_text(page(results, pictures))
    say(f"{output / PAGE}")
    failed = [name for name, failure in failures.items() if failure]
    if failed:
        raise Failed(f"{', '.join(failed)} failed, as {output / PAGE} says; the others are compared there")
    return output / PAGE


def _teacher(config: TeacherConfig, measure: Measure) -> tuple[Teacher, Solved]:
    """The teacher, and how it is sampled for its row."""
    denoiser, _ = networks.teacher_denoiser(config, device=measure.device)
    teacher = Teacher(denoiser, guidance=config.guidance_weight)
    scores = Path(config.path) / SCORES
    if measure.teacher_steps:
        return teacher, Solved(teacher, measure.teacher_steps)
    if scores.is_file():
        return teacher, Solved(teacher, **json.loads(scores.read_text())["best"])
    return teacher, Solved(teacher, api.TEACHER_STEPS)


def _trained(
    entrant: Entrant, ruled: EvaluateConfig, budget: Budget, *, output: Path, say: Callable[[str], None]
) -> str:
    """Train what is not complete yet; why it failed, or ""."""
    if is_complete(entrant, budget):
        say(f"{entrant.name} is complete")
        return ""
    say(f"training {entrant.name}")
    config = replace(entrant.config, evaluate=replace(ruled, every=entrant.config.evaluate.every))
    failure = train(replace(entrant, config=config), budget, output=output)
    if failure:
        say(f"{entrant.name} failed: {failure}")
    return failure


def _row(
    entrant: Entrant, failure: str, ruler: Ruler, measure: Measure, *, output: Path, say: Callable[[str], None]
) -> dict:
    """A student's numbers, or why there are none."""
    config = entrant.config
    row = {
        "name": entrant.name,
        "kind": "student",
        "method": config.method_name,
        "source": str(entrant.source),
        "trained_here": entrant.trains,
        "steps": config.train.steps,
        "weights": next(iter(config.averages), RAW),
        "batch": config.train.batch,
        "seed": config.seed,
        "recipe": (
            entrant.folder / run.RECIPE if not failure else output / RECIPES / f"{entrant.name}.yaml"
        ).read_text(),
    }
    if failure:
        return row | {"failure": failure}
    say(f"measuring {entrant.name}")
    row |= history(entrant.folder)
    try:
        sampler = api.load(entrant.folder, device=measure.device)
        return row | ruler.measure(entrant.name, sampler, output=output)
    except ValueError as error:  # weights that were damaged, or samples that are not finite: the others go on
        return row | {"failure": str(error)}


def _made(command: str, measure: Measure) -> dict:
    """Where and by what the comparison was made."""
    return {
        "command": command,
        "diffdistill": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hardware": _hardware(measure.device),
        "threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    """The commit that this package runs from, with "-dirty" where files differ from it; None outside a checkout."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():
        return None
    asked = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _hardware(device: str) -> str:
    """The device's name, as far as the system tells it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    known = Path("/proc/cpuinfo")
    if known.is_file():
        names = [line.partition(":")[2].strip() for line in known.read_text().splitlines() if "model name" in line]
        if names:
            return f"{names[0]}, {len(names)} cores"
    return platform.processor() or platform.machine()
