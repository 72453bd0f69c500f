"""Gate 3: how good and how dear samples are, of one source or of many side by side."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffdistill import build, networks, run
from diffdistill.config import ConfigError, DataConfig, EvaluateConfig
from diffdistill.evaluation.cost import cost_of, evaluations_per_sample, num_parameters, timed
from diffdistill.evaluation.diversity import perceptual_diversity
from diffdistill.evaluation.extractors import open_extractor
from diffdistill.evaluation.features import MOMENTS_FILE, Extractor
from diffdistill.evaluation.frechet import load_moments, moments
from diffdistill.evaluation.front import on_front
from diffdistill.evaluation.metrics import Reference, build_reference, class_accuracies, evaluate_features, quantise
from diffdistill.evaluation.modes import class_overlaps, lost_classes, paired_distances, squared
from diffdistill.evaluation.pretrained import ClipScorer
from diffdistill.evaluation.sampling import Solved, classes_of, denoisers, evaluating, refuse_share
from diffdistill.evaluation.stream import Seen, drawn, look_at
from diffdistill.exporting import StockPipeline, is_pipeline
from diffdistill.generator import Sampler
from diffdistill.loading import load, opened
from diffdistill.methods import METHODS
from diffdistill.perceptual import read_lpips
from diffdistill.recipe import plain, typed

PICTURES = 256  # samples behind LPIPS and CLIP
PAIRS = 256  # samples of a student and its teacher that are compared one by one
BETWEEN_SETS = ("frechet_distance", "kid", "precision", "recall", "density", "coverage")
Source = Sampler | Solved | StockPipeline


def evaluate(
    source: str | Path,
    *,
    weights: str = "",
    grid: Sequence[float] = (),
    guidance: float | None = None,
    teacher_steps: int = 0,
    at: str = "",
    call: Mapping[str, Any] | None = None,
    data: Mapping | None = None,
    settings: Mapping | None = None,
    cost: bool = False,
    against_teacher: int = 0,
    device: str = "cpu",
) -> dict[str, Any]:
    """The numbers of `evaluation.metrics.evaluate_features`, of samples against real images.

    What was sampled is kept in the cache: an interrupted call goes on, and one for more samples adds them. Processes of
    torchrun share the work, and each returns all numbers.

    Args:
        source: a run, a denoiser's folder, or the folder of a stock pipeline.
        weights, grid, guidance, teacher_steps, at: as for `sample`.
        call: arguments of a stock pipeline's call, which an export's folder knows.
        data: keys of DataConfig; None for the run's own.
        settings: keys of EvaluateConfig that differ from the run's own.
        cost: also what a sample costs (`evaluation.cost.Cost`), which takes its time.
        against_teacher: also compare a run with its teacher in so many steps.
    Raises:
        ConfigError, ValueError: no extractor or no real images are named, or something does not fit.
    """
    folder = Path(source)
    steps = {"grid": grid, "guidance": guidance, "teacher_steps": teacher_steps, "at": at}
    wanted, real = _wanted([folder], data, settings)
    found = _open(folder, weights=weights, call=call, **steps, device=device)
    if against_teacher and (not isinstance(found, Sampler) or teacher_of(folder, device) is None):
        raise ConfigError(
            f"{folder} is no run with a teacher to compare with; leave out against_teacher={against_teacher}"
        )
    judge = Judge.of(wanted, real, cache=folder / "cache", device=device)
    row = judge.row(found, cache=folder / "cache", cost=cost)
    return row | (judge.against_teacher(folder, found, against_teacher) if against_teacher else {})


def evaluate_all(
    sources: Sequence[str | Path],
    *,
    weights: str = "",
    grids: Sequence[Sequence[float]] = (),
    guidance: float | None = None,
    teacher_steps: Sequence[int] = (),
    at: str = "",
    call: Mapping[str, Any] | None = None,
    data: Mapping | None = None,
    settings: Mapping | None = None,
    cost: bool = True,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """A row for each source and each of its grids, then for each number of the teachers' steps, all measured alike.

    Each row has its `name`, the numbers of `evaluate`, and whether it is on the `front` of quality against cost.

    Args:
        sources: runs, denoisers' folders, folders of stock pipelines.
        grids: for every run, one row each; none for its own.
        teacher_steps: for the runs' teachers and the denoisers' folders, one row each.
        cost: time them too; otherwise evaluations and parameters alone are counted.
        weights, guidance, at, call, data, settings, device: as for `evaluate`.
    """
    folders = [Path(source) for source in sources]
    wanted, real = _wanted(folders, data, settings)
    judge = Judge.of(wanted, real, cache=folders[0] / "cache", device=device)
    entries: list[tuple[str, Source, Path]] = []
    for folder in folders:
        chosen = {"weights": weights, "guidance": guidance, "at": at, "device": device}
        if run.is_run(folder):
            for grid in grids or [()]:
                name = folder.name + (f" at {','.join(f'{t:g}' for t in grid)}" if grid else "")
                entries.append((name, _open(folder, grid=grid, **chosen), folder))
        elif is_pipeline(folder):
            entries.append((folder.name, _open(folder, call=call, device=device), folder))
        elif not teacher_steps:
            entries.append((folder.name, opened(folder, device=device), folder))
    known: list[str] = []
    for folder in folders:
        found = None if is_pipeline(folder) else teacher_of(folder, device)
        for count in teacher_steps if found is not None else ():
            solved = Solved(found[1], count, solver="heun" if count > 1 else "euler")
            name = f"{found[0].name}, {count} step{'s' if count > 1 else ''}"
            if name not in known:
                known.append(name)
                entries.append((name, solved, folder))
    if not entries:
        raise ConfigError("there is nothing to measure; give runs, or a denoiser's folder with the teacher's steps")
    rows = [{"name": name} | judge.row(source, cache=folder / "cache", cost=cost) for name, source, folder in entries]
    return [row | {"front": best} for row, best in zip(rows, on_front(rows), strict=True)]


def _wanted(
    folders: Sequence[Path], data: Mapping | None, settings: Mapping | None
) -> tuple[EvaluateConfig, DataConfig]:
    """The settings and the data of the first run among the folders, unless others are given.

    Raises:
        ConfigError: no real images are named.
    """
    own = next((run.read_config(folder) for folder in folders if run.is_run(folder)), None)
    before = plain(EvaluateConfig() if own is None else own.evaluate)
    chosen = typed(EvaluateConfig, before | dict(settings or {}), "evaluate")
    if data is None and own is None:
        raise ConfigError(
            f"{folders[0]} does not say which real images to compare with; name them, e.g. data.name=fashion_mnist"
        )
    return chosen, own.data if data is None else typed(DataConfig, dict(data), "data")


def _open(folder: Path, *, call: Mapping[str, Any] | None = None, device: str = "cpu", **chosen: Any) -> Source:
    if not is_pipeline(folder):
        if call:
            raise ConfigError(f"{folder} is no stock pipeline, so it is not called; leave out {', '.join(call)}")
        found = opened(folder, **chosen, device=device)
        refuse_share(found)
        return found
    for name, value in chosen.items():
        if value:
            raise ConfigError(f"{folder} is a stock pipeline, where {name}={value!r} has no meaning; leave it out")
    return StockPipeline(folder, call=call, device=device)


def teacher_of(folder: Path, device: str = "cpu"):
    """The folder of a run's teacher, or the folder itself, and the teacher; None where a run has none."""
    if not run.is_run(folder):
        return folder, load(folder, device=device)
    config = run.read_config(folder)
    if config.teacher is None or not METHODS[config.method_name].needs_teacher:
        return None
    return Path(config.teacher.path), networks.teacher(config, torch.device(device))


@dataclass(frozen=True)
class Judge:
    """Extractor, real images and settings, the same for everything that is measured.

    Attributes:
        shared: whether several processes of torchrun measure together.
    """

    settings: EvaluateConfig
    extractor: Extractor
    reference: Reference
    device: str

    @staticmethod
    def of(settings: EvaluateConfig, real: DataConfig, *, cache: Path, device: str) -> "Judge":
        """The judge that a config names; features of the real images are kept in `cache`, unless it says where."""
        extractor, reference = yardstick(settings, real, cache=cache, device=device)
        return Judge(settings, extractor, reference, device)

    def row(self, source: Source, *, cache: Path, cost: bool) -> dict[str, Any]:
        """All numbers of one source."""
        seen = self.look_at(source, cache=cache)
        found = evaluate_features(seen.features, seen.logits, seen.labels, self.reference, self.extractor, errors=True)
        return found | self._pictures(source) | self._per_class(seen) | self._cost(source, cost)

    def look_at(self, source: Source, *, cache: Path) -> Seen:
        """What the extractor sees of the source's samples."""
        state, wanted = build.processes(self.device), self.settings
        return look_at(
            source.drawn() if isinstance(source, StockPipeline) else source,
            self.extractor,
            wanted.samples,
            seed=wanted.seed,
            batch=wanted.batch,
            cache=Path(wanted.cache) if wanted.cache else cache,
            rank=state.process_index,
            ranks=state.num_processes,
            wait=state.wait_for_everyone,
            progress="samples" if state.is_main_process else "",
        )

    def _pictures(self, source: Source) -> dict[str, float]:
        """What is told of the first samples as they are: LPIPS within classes, and the CLIP score of the prompts."""
        wanted = self.settings
        if not (wanted.lpips or wanted.clip):
            return {}
        made, count = source.drawn() if isinstance(source, StockPipeline) else drawn(source), wanted.samples
        slots = range(min(count, PICTURES))
        labels = torch.tensor([made.classes[slot % len(made.classes)] for slot in slots]) if made.classes else None
        with evaluating(*([] if isinstance(source, StockPipeline) else denoisers(source))):
            images = quantise(made.images(slots, labels, wanted.seed))
        report: dict[str, float] = {}
        if wanted.lpips:
            network = read_lpips(Path(wanted.lpips), size=wanted.lpips_size).to(self.device)
            report["lpips_diversity"] = perceptual_diversity(
                images, labels, lambda a, b: network(a.to(self.device), b.to(self.device))
            )
        if wanted.clip:
            if labels is None or len(made.classes) != len(wanted.prompts):
                raise ConfigError(
                    f"evaluate.prompts has {len(wanted.prompts)} prompts, and the samples {len(made.classes)} classes; "
                    "give one for each"
                )
            prompts = [wanted.prompts[made.classes.index(label)] for label in labels.tolist()]
            report["clip_score"] = ClipScorer(wanted.clip, device=self.device).scores(images, prompts).mean().item()
        return report | {"num_pictures": len(images)}

    def _per_class(self, seen: Seen) -> dict[str, Any]:
        if seen.labels is None or self.reference.labels is None:
            return {}
        found = class_overlaps(self.reference.features, self.reference.labels, seen.features, seen.labels)
        if seen.logits is not None and self.extractor.knows_classes:
            for label, accuracy in class_accuracies(seen.logits, seen.labels).items():
                found.setdefault(label, {})["accuracy"] = accuracy
        return {"classes": found} if found else {}

    def _cost(self, source: Source, timing: bool) -> dict[str, float]:
        if isinstance(source, StockPipeline):
            counted = {"evaluations": source.evaluations_per_sample(), "num_parameters": source.num_parameters}
            if not timing:
                return counted
            milliseconds, rate, batch = timed(source.make, torch.device(self.device))
            return counted | {"milliseconds": milliseconds, "images_per_second": rate, "best_batch": batch}
        if timing:
            return dataclasses.asdict(cost_of(source))
        networks_there = denoisers(source)
        return {"evaluations": evaluations_per_sample(source), "num_parameters": num_parameters(networks_there)}

    def against_teacher(self, folder: Path, student: Sampler, steps: int) -> dict[str, Any]:
        """A run beside its teacher: samples of the same noises, the sets of samples, and the classes that are lost."""
        teacher, wanted = Solved(teacher_of(folder, self.device)[1], steps), self.settings
        theirs, ours = (self.look_at(source, cache=folder / "cache") for source in (teacher, student))
        set_of = Reference(theirs.features, moments(theirs.features), "", self.extractor.checksum, theirs.labels)
        between = evaluate_features(ours.features, ours.logits, ours.labels, set_of, self.extractor)
        count = min(wanted.samples, PAIRS)
        paired = paired_distances(
            student, teacher, count, seed=wanted.seed, batch=wanted.batch, distances={"squared": squared}
        )
        report: dict[str, Any] = {
            "teacher_steps": steps,
            "same_noise": paired | {"num_samples": count},
            "teacher_set": {name: between[name] for name in BETWEEN_SETS},
        }
        if classes_of(student) and self.reference.labels is not None:
            overlaps = [self._per_class(seen).get("classes", {}) for seen in (ours, theirs)]
            report["lost_classes"] = lost_classes(*overlaps)
        return report


def yardstick(config: EvaluateConfig, data: DataConfig, *, cache: Path, device: str) -> tuple[Extractor, Reference]:
    """The extractor that a config names, and the real images seen through it.

    The training images of `data` are behind every metric but the Frechet distance, which takes the moments that lie in
    the extractor's folder, if there are any: those are of a full training set.
    """
    if not config.features:
        raise ConfigError(
            "evaluate.features is missing; name the extractor's folder, e.g. checkpoints/fashion-features"
        )
    extractor = open_extractor(config.features, input=config.input, device=device)
    reference = build_reference(
        build.images(data, "train"), extractor, cache=Path(config.cache) if config.cache else cache
    )
    known = Path(config.features) / MOMENTS_FILE
    if data.name == "fashion_mnist" and known.is_file():
        reference = reference.with_moments(load_moments(known, checksum=extractor.checksum))
    return extractor, reference
