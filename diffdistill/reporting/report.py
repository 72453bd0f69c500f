"""`report`: reads the runs, samples what the page shows anew, and writes it."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diffdistill import __version__, api, build
from diffdistill.checkpoint import latest
from diffdistill.config import ConfigError, DataConfig, EvaluateConfig
from diffdistill.data.fashion_mnist import CLASS_NAMES
from diffdistill.evaluation.cost import evaluations_per_sample, num_parameters
from diffdistill.evaluation.sampling import denoisers
from diffdistill.recipe import plain, typed
from diffdistill.reporting.page import Made, page
from diffdistill.reporting.reading import Told, read
from diffdistill.reporting.samples import by_class, nearest

ROWS = 4  # of samples by class
FASHION = "fashion_mnist"


def report(
    runs: Sequence[str | Path],
    out: str | Path,
    *,
    table: str | Path = "",
    data: Mapping | None = None,
    features: str = "",
    command: str = "",
    device: str = "cpu",
) -> Path:
    """Write one self-contained HTML page about the runs; its path.

    Args:
        runs: folders of runs, finished or training.
        out: the file.
        table: JSON that `diffdistill evaluate --out` wrote of several rows, for quality against cost.
        data: keys of DataConfig: the real images; None for each run's own.
        features: the extractor for the nearest training images; empty for each run's own.
        command: what was typed, for the page.
    Raises:
        ConfigError, ValueError: a folder holds no run, or the table is none.
    """
    if not runs:
        raise ConfigError("there is nothing to report; give folders of runs")
    folders = [Path(folder) for folder in runs]
    rows = _rows(Path(table)) if table else []
    told = [read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    made = [_made(one, data, features, device) for one in told]
    facts_of = {
        "command": command or "diffdistill.reporting.report",
        "versions": f"diffdistill {__version__}, PyTorch {torch.__version__}",
        "runs": ", ".join(f"{one.name} (seed {one.config.seed})" for one in told),
    }
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.writing")
    beside.write_text(page(told, made, rows=rows, facts_of=facts_of))
    beside.replace(out)
    return out


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with their parents' where two are alike."""
    count = Counter(folder.name for folder in folders)
    return [folder.name if count[folder.name] == 1 else "/".join(folder.parts[-2:]) for folder in folders]


def _rows(path: Path) -> list[dict[str, Any]]:
    wanted = "write one by diffdistill evaluate RUN... --teacher-steps 1,4 --out table.json"
    if not path.is_file():
        raise ConfigError(f"there is no table at {path}; {wanted}")
    try:
        rows = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} could not be read: {error}; {wanted}") from error
    needed = {"name", "evaluations", "frechet_distance"}
    if not isinstance(rows, list) or not all(isinstance(row, dict) and needed <= row.keys() for row in rows):
        raise ConfigError(f"{path} holds no table of rows with {', '.join(sorted(needed))}; {wanted}")
    return rows


def _made(one: Told, data: Mapping | None, features: str, device: str) -> Made:
    """What is sampled anew of a run."""
    if latest(one.folder) is None:
        return Made(missing=["there is no checkpoint yet, so nothing could be sampled; train.save_every says when"])
    sampler = api.load(one.folder, device=device)
    made = Made(num_parameters=num_parameters(denoisers(sampler)), evaluations=evaluations_per_sample(sampler))
    shape = tuple(sampler.denoiser.sample_shape)
    if len(shape) != 3 or shape[0] != 3:
        made.missing.append(f"samples have shape {shape} and are no pictures")
        return made
    grid, classes = by_class(sampler, ROWS)
    made.classes = (grid, [CLASS_NAMES[label] for label in classes] if one.config.data.name == FASHION else classes)
    before = plain(one.config.evaluate)
    settings = typed(EvaluateConfig, before | ({"features": features} if features else {}), "evaluate")
    real = one.config.data if data is None else typed(DataConfig, dict(data), "data")
    if not settings.features or real.name == "none":
        made.missing.append(
            "nearest training images need an extractor and the images: --features FOLDER data.name=fashion_mnist"
        )
        return made
    extractor, reference = api.yardstick(settings, real, cache=one.folder / "cache", device=device)
    made.nearest = nearest(sampler, extractor, reference, build.images(real, "train"))
    return made
