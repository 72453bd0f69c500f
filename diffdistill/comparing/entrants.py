"""Who takes part: recipes to train and runs that were trained before, refused where they cannot be compared."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffdistill import build, run, trial
from diffdistill.backbones.folder import META
from diffdistill.checkpoint import latest
from diffdistill.config import Config, ConfigError, DataConfig, TeacherConfig
from diffdistill.methods.multi_student import MultiStudent
from diffdistill.recipe import load_config, sections, typed
from diffdistill.trainer import Budget

RUNS = "runs"  # of the output: a run's folder for each recipe
RULED = {f"evaluate.{name}" for name in ("samples", "seed", "batch", "features", "cache")}  # by the comparison, for all


@dataclass(frozen=True)
class Entrant:
    """One line of the comparison.

    Attributes:
        name: of the recipe's file or the run's folder, unique.
        config: its recipe; `output` is where it is, or will be, trained.
        source: what was given.
        trains: whether it is trained here; otherwise it was trained before.
    """

    name: str
    config: Config
    source: Path
    trains: bool

    @property
    def folder(self) -> Path:
        return Path(self.config.output)


def entrants(
    sources: Sequence[Path], overrides: Sequence[str], *, output: Path, budget: Budget | None, features: str = ""
) -> list[Entrant]:
    """What was given, read and checked against each other; nothing is written.

    Args:
        sources: YAML files and folders of runs.
        overrides: key=value each, for every YAML file.
        output: the comparison's folder.
        budget: of each recipe; None where there is none to train.
        features: the extractor's folder, in the place of each recipe's own; empty to leave it.
    Raises:
        ConfigError: a mistake in one of them, or two that cannot be compared.
    """
    if not sources:
        raise ConfigError("there is nothing to compare; give YAML files, or folders of runs")
    for override in overrides:
        if override.partition("=")[0] in RULED:
            raise ConfigError(
                f"{override} is the comparison's to say, alike for all: give --features, --samples or --seed"
            )
    _refuse_twins(sources)
    own = [*overrides, *([f"evaluate.features={features}"] if features else [])]
    found = [_entrant(source, own, output) for source in sources]
    _refuse_shares(found)
    _refuse_useless(found, overrides, budget)
    _refuse_other_teachers(found)
    for entrant in found:
        if entrant.trains:
            _refuse_unfit(entrant, budget)
    return found


def _entrant(source: Path, overrides: Sequence[str], output: Path) -> Entrant:
    if not source.is_dir():
        config = load_config(source, overrides)
        config = dataclasses.replace(config, output=str(output / RUNS / source.stem))
        return Entrant(source.stem, config, source, trains=True)
    if not run.is_run(source):
        raise ConfigError(f"{source} holds no run ({run.RECIPE} is missing); give YAML files, or folders of runs")
    if latest(source) is None:
        raise ConfigError(f"{source} has no checkpoint yet, so there is nothing to measure; wait for one")
    config = dataclasses.replace(run.read_config(source), output=str(source))
    return Entrant(source.name or source.resolve().name, config, source, trains=False)


def _refuse_twins(sources: Sequence[Path]) -> None:
    seen: dict[str, Path] = {}
    for source in sources:
        name = (source.resolve() if source.is_dir() else source).name
        name = name if source.is_dir() else Path(name).stem
        if name in seen:
            raise ConfigError(
                f"{seen[name]} and {source} would both be called {name}, and have one output; rename one of them"
            )
        seen[name] = source


def _refuse_shares(found: Sequence[Entrant]) -> None:
    for entrant in found:
        method = entrant.config.method
        if isinstance(method, MultiStudent.Config) and method.only >= 0:
            raise ConfigError(
                f"{entrant.source} is student {method.only} alone, and would be measured against the classes of all; "
                "join the runs of all students, and compare that one"
            )


def _refuse_useless(found: Sequence[Entrant], overrides: Sequence[str], budget: Budget | None) -> None:
    """Refuses a budget, or keys of recipes, where nothing is trained, and the lack of a budget where something is."""
    training = [entrant.name for entrant in found if entrant.trains]
    if training and budget is None:
        raise ConfigError(
            f"how long are {', '.join(training)} to be trained? give --budget, e.g. --budget 10m, or --steps"
        )
    if training:
        return
    if budget is not None:
        raise ConfigError("only runs are given, which are measured as they are; leave out --budget and --steps")
    for override in overrides:
        if not override.startswith("data."):
            raise ConfigError(f"only runs are given, which are measured as they are; leave out {override}")


def _refuse_other_teachers(found: Sequence[Entrant]) -> None:
    first = found[0]
    for entrant in found:
        if entrant.config.teacher is None:
            raise ConfigError(
                f"{entrant.source} has no teacher (method {entrant.config.method_name}), and students of one "
                "teacher are compared; leave it out"
            )
        for f in dataclasses.fields(TeacherConfig):
            ours, theirs = getattr(first.config.teacher, f.name), getattr(entrant.config.teacher, f.name)
            if ours != theirs and not (f.name == "path" and Path(ours).resolve() == Path(theirs).resolve()):
                raise ConfigError(
                    f"{first.source} and {entrant.source} have different teachers: teacher.{f.name} is {ours!r} in "
                    f"the one and {theirs!r} in the other; compare students of one teacher"
                )


def _refuse_unfit(entrant: Entrant, budget: Budget) -> None:
    """Refuses what `diffdistill check` refuses, and a budget that does not fit."""
    try:
        run.look(entrant.config)
        trial.plan_memory(entrant.config)
        build.refuse_absent(entrant.config, build.method(entrant.config, META))
    except ValueError as error:
        raise ConfigError(f"{entrant.source}: {error}") from error
    train = entrant.config.train
    if not train.save_every:
        raise ConfigError(f"{entrant.source}: train.save_every=0 would leave no weights to measure; set it")
    if math.isfinite(budget.steps) and budget.steps > train.steps:
        raise ConfigError(
            f"{entrant.source}: --steps {budget.steps:.0f} is beyond train.steps={train.steps}, where its learning "
            "rates end; give fewer, or set train.steps for all by train.steps=N"
        )


def real_data(found: Sequence[Entrant], overrides: Sequence[str]) -> DataConfig:
    """The real images that all are measured against: those that any of them names, or `data.` in the overrides.

    Raises:
        ConfigError: two are named, or none.
    """
    ruled = sections([override for override in overrides if override.startswith("data.")], ["data"])["data"]
    named = {str(entrant.source): entrant.config.data for entrant in found}
    if ruled:
        named["the command line"] = typed(DataConfig, ruled, "data")
    named = {source: data for source, data in named.items() if data.name != "none"}
    if not named:
        raise ConfigError("no real images are named to compare with; name them, e.g. data.name=fashion_mnist")
    (first, chosen), *others = named.items()
    for source, data in others:
        if (data.name, data.path) != (chosen.name, chosen.path):
            raise ConfigError(
                f"{first} and {source} have different data: {chosen.name} {chosen.path!r} and {data.name} "
                f"{data.path!r}; compare students of one data set"
            )
    return chosen


def features_folder(found: Sequence[Entrant], given: str) -> str:
    """The extractor's folder: `given`, or the one that the recipes agree on."""
    named = [given] if given else sorted({e.config.evaluate.features for e in found} - {""})
    if len(named) != 1:
        problem = f"the recipes name {' and '.join(named)}" if named else "no feature extractor is named"
        raise ConfigError(f"{problem}; name one by --features, e.g. --features checkpoints/fashion-features")
    return named[0]
