"""What the command line does, as functions: distill, load, sample, couple, evaluate, export, check.

from diffdistill import api

run = api.distill("configs/fashion/dmd2.yaml", ["train.steps=100"])
samples, labels = api.sample(run, 40)
api.export(run, "my-pipeline")
"""

import copy
import dataclasses
import shutil
import signal
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from diffdistill import build, checkpoint, coupling, joining, networks, run, spreading, trial
from diffdistill.backbones.folder import MEANING, META
from diffdistill.config import Config, ConfigError, DataConfig, DenoiserConfig, EvaluateConfig, TeacherConfig
from diffdistill.evaluation.extractors import open_extractor
from diffdistill.evaluation.features import MOMENTS_FILE, Extractor
from diffdistill.evaluation.frechet import load_moments
from diffdistill.evaluation.metrics import Reference, build_reference, evaluate_images
from diffdistill.evaluation.sampling import Solved, refuse_share, sample_images
from diffdistill.exporting import (
    TOLERANCE,
    RelayPipeline,
    RelayReport,
    Report,
    RoutedPipelines,
    RoutedReport,
    write_pipeline,
    write_relay,
    write_routed,
)
from diffdistill.generator import Generator, Sampler
from diffdistill.hooks import Evaluation, Pictures
from diffdistill.memory import OutOfMemory, memory_for
from diffdistill.methods import METHODS
from diffdistill.player import RAW
from diffdistill.recipe import flat, load_config, parse, plain, typed
from diffdistill.relay import Relay
from diffdistill.routed import Routed
from diffdistill.teacher import Teacher
from diffdistill.trainer import UNLIMITED, Budget, Every, Trainer

TEACHER_STEPS = 18  # of a teacher's folder, where nothing else is asked for
SAMPLE_BATCH = 64


class Stopped(RuntimeError):
    """A run that saved and left because a signal asked it to."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number = number


def distill(
    config: Config | Mapping | str | Path,
    overrides: Sequence[str] = (),
    *,
    budget: Budget = UNLIMITED,
    say: Callable[[str], None] = print,
    wandb_mode: str = "offline",
) -> Path:
    """Train to the end, going on by itself from what `output` holds of the same recipe; the run's folder.

    Args:
        config: a YAML file, plain data, or a Config.
        overrides: key=value each, for a YAML file.
        budget: ends the run before its recipe does; the schedules stay as they are, and a later start may go on.
        say: takes a line on what happens, from the first process alone.
        wandb_mode: of the wandb tracker, where `trackers` names it.
    Raises:
        ConfigError, CheckpointError: a mistake, before anything was written.
        Stopped: after a signal; everything is saved.
        NonFinite, OutOfMemory: the run cannot go on as it is.
    """
    config = as_config(config, overrides)
    output = Path(config.output)
    run.look(config)
    build.refuse_unused(config)
    accelerate = build.accelerator(config)
    trainer = build.trainer(
        config, accelerate, output=output, schedule=build.schedule(config), hooks=_hooks(config, accelerate.device)
    )
    tell = say if trainer.main else lambda line: None
    if short := trial.shortness(trainer.method, config.train.steps):
        tell(short)
    with run.held(output, writes=trainer.main):
        return _train(config, trainer, budget, tell, wandb_mode)


def _train(config: Config, trainer: Trainer, budget: Budget, tell: Callable[[str], None], wandb_mode: str) -> Path:
    """Go on from what the output holds, to the end; the output."""
    output, accelerate = trainer.output, trainer.accelerator
    found = run.enter(config, writes=trainer.main)
    accelerate.wait_for_everyone()
    if found is not None:
        trainer.resume(found)
        tell(f"going on from step {trainer.step} of {config.train.steps} in {found}")
    if config.trackers:
        scalars = {key: value for key, value in flat(plain(config)).items() if isinstance(value, str | int | float)}
        options = {"wandb": {"mode": wandb_mode, "dir": str(output), "name": output.name}}
        accelerate.init_trackers("diffdistill", config=scalars, init_kwargs=options)
    try:
        with memory_for("training"):
            stopped = trainer.run(budget)
    except OutOfMemory as error:
        held = trial.memory_line(trial.plan_memory(config))
        raise OutOfMemory(f"{error}. Weights, gradients and optimizers hold: {held}") from error
    accelerate.end_training()
    if stopped:
        raise Stopped(
            stopped,
            f"stopped by {signal.Signals(stopped).name} at step {trainer.step} of {config.train.steps}; everything is "
            f"saved in {checkpoint.latest(output)}. Run the same command again to go on",
        )
    ended = "complete" if trainer.step == config.train.steps else "at the end of its budget"
    tell(f"step {trainer.step} of {config.train.steps}: {output} is {ended}")
    return output


def distill_spread(
    config: Config | Mapping | str | Path,
    overrides: Sequence[str] = (),
    *,
    launcher: MutableMapping[str, str],
    budget: Budget = UNLIMITED,
    say: Callable[[str], None] = print,
    wandb_mode: str = "offline",
) -> Path:
    """As `distill`, for students that torchrun's processes share out among them; the folder of this process's run.

    Each student is a run of its own in OUTPUT-student-K, and the run of all, in `output`, is joined from them when the
    recipe is at its end; a budget joins nothing. Its weights are those that one process would have trained, where each
    student has one process.

    Args:
        launcher: the environment that torchrun made; its ranks become those of one student's processes.
    Raises:
        ConfigError: also where nothing can be spread; see `spreading.require_students`.
    """
    place = spreading.spread(as_config(config, overrides), launcher)
    run_of_student = distill(place.own, budget=budget, say=say, wandb_mode=wandb_mode)
    if budget is not UNLIMITED:
        return run_of_student
    joined = place.join()
    if joined is None:
        return run_of_student
    say(f"{joined} has all {place.config.method.students} students")
    return joined


def as_config(config: Config | Mapping | str | Path, overrides: Sequence[str] = ()) -> Config:
    """A checked Config from a YAML file with overrides, from plain data, or as it is."""
    if isinstance(config, str | Path):
        return load_config(Path(config), overrides)
    if overrides:
        raise ConfigError("overrides go with a YAML file; change the mapping or Config itself")
    return config if isinstance(config, Config) else parse(config)


def load(
    folder: str | Path,
    *,
    weights: str = "",
    grid: Sequence[float] = (),
    guidance: float | None = None,
    device: str = "cpu",
) -> Sampler | Teacher:
    """What a run samples with, or the teacher of any other folder that `teacher.path` may name, ready to sample.

    Args:
        folder: the output of `distill`, or a denoiser's or diffusers' folder.
        weights: of a run: "raw", or the name of an average; empty for its first average, or raw where it has none.
        grid: of a run: the times to sample at, in place of its own, as a consistency function and a flow map can.
        guidance: of a run whose network is told its scale: another than its own.
    Raises:
        ConfigError, CheckpointError: nothing to load there, or it does not fit.
    """
    folder = Path(folder)
    if run.is_run(folder):
        config = _sampled_at(folder, run.read_config(folder), grid, guidance)
        return _trained(folder, config, weights, device)[0]
    for name, value in (("weights", weights if weights != RAW else ""), ("grid", grid), ("guidance", guidance)):
        if value:
            raise ConfigError(f"{folder} is no run, so {name}={value!r} cannot be chosen; leave it out")
    return Teacher(networks.teacher_denoiser(TeacherConfig(str(folder)), device=device)[0])


def _sampled_at(folder: Path, config: Config, grid: Sequence[float], guidance: float | None) -> Config:
    """The config of a run, sampled at other times or another scale."""
    wanted = config.generator
    if guidance is not None and wanted.guidance is None:
        raise ConfigError(f"{folder} has a network that is told no scale; leave out guidance={guidance}")
    if guidance is not None:
        low, high = config.method.guidance_range
        if not low <= guidance <= high:
            raise ConfigError(f"guidance={guidance} is not among the scales that {folder} learnt, {low:g} to {high:g}")
    changes = {"grid": tuple(grid) or wanted.grid, "guidance": wanted.guidance if guidance is None else guidance}
    try:
        return dataclasses.replace(config, generator=dataclasses.replace(wanted, **changes))
    except ValueError as error:
        raise ConfigError(f"{folder} sampled at grid={list(grid)}: {error}") from error


def sample(
    source: str | Path | Sampler | Solved,
    count: int,
    *,
    seed: int = 0,
    labels: Sequence[int] | None = None,
    weights: str = "",
    grid: Sequence[float] = (),
    guidance: float | None = None,
    teacher_steps: int = 0,
    batch: int = SAMPLE_BATCH,
    device: str = "cpu",
) -> tuple[Tensor, Tensor | None]:
    """Samples (count, C, H, W) in about [-1, 1], each a function of the seed and its index alone, and their labels.

    Args:
        source: a run, a denoiser's folder, or something loaded.
        labels: one for each sample; None for i % classes.
        weights, grid, guidance: as for `load`.
        teacher_steps: of the PF-ODE: of a denoiser's folder, of a `denoise` run, or, for a run with a teacher, of that
            teacher instead of its student. 0 for the run's own grid, or 18 for a denoiser's folder.
    """
    if isinstance(source, str | Path):
        chosen = {"weights": weights, "grid": grid, "guidance": guidance}
        source = opened(Path(source), **chosen, teacher_steps=teacher_steps, device=device)
    return sample_images(source, count, seed=seed, batch=batch, labels=labels)


def opened(
    folder: Path,
    *,
    weights: str = "",
    grid: Sequence[float] = (),
    guidance: float | None = None,
    teacher_steps: int = 0,
    device: str = "cpu",
) -> Sampler | Solved:
    """What a folder holds, with its steps; the arguments are those of `sample`."""
    if teacher_steps < 0:
        raise ConfigError(f"teacher_steps must not be negative, got {teacher_steps}")
    if teacher_steps and (grid or guidance is not None):
        raise ConfigError(f"teacher_steps={teacher_steps} is a grid of its own; leave out grid and guidance, or it")
    if teacher_steps and run.is_run(folder):
        config = run.read_config(folder)
        if config.teacher is not None and METHODS[config.method_name].needs_teacher:
            return Solved(networks.teacher(config, torch.device(device)), teacher_steps)
    loaded = load(folder, weights=weights, grid=grid, guidance=guidance, device=device)
    if isinstance(loaded, Teacher) and not (teacher_steps or (folder / MEANING).is_file()):
        raise ConfigError(f"{folder} does not say in how many steps it is sampled; give them as the teacher's steps")
    if isinstance(loaded, Teacher):
        return Solved(loaded, teacher_steps or TEACHER_STEPS)
    return Solved(Teacher(_only(loaded, folder).denoiser), teacher_steps) if teacher_steps else loaded


def couple(
    source: str | Path,
    folder: str | Path,
    *,
    count: int,
    steps: int = 0,
    solver: str = "heun",
    guidance: float = 1.0,
    start: float = 0.0,
    seed: int = 0,
    batch: int = SAMPLE_BATCH,
    shard: int = 1024,
    weights: str = "",
    data: Mapping | None = None,
    device: str = "cpu",
) -> Path:
    """Write pairs of a noise and where the source takes it, for `data.pairs`; the folder.

    With `data` they are of real images, the first ones, and the noises to which the ODE takes them backwards.

    Killed, the same call goes on, and ends in the same files. Several processes of torchrun share the work.

    Args:
        source: a teacher's folder, whose ODE is solved; or a run, sampled on its own grid where steps is 0.
        count: pairs, of the classes i % classes.
        steps, solver: of the ODE; 0 is 18 for a teacher, and a run's own grid.
        guidance: of the ODE.
        start: the time of the noise, where the student's grid will begin; 0 for the teacher's last.
        shard: pairs of one file.
        weights: as for `load`.
        data: keys of DataConfig.
    Raises:
        ConfigError, ValueError: nothing to sample there, images that do not fit, or the folder holds other pairs.
    """
    source, folder = Path(source), Path(folder)
    state = build.processes(device)  # first: it gives each process a GPU of its own
    loaded = load(source, weights=weights, device=device)
    if isinstance(loaded, Teacher) or steps:
        denoiser = (loaded if isinstance(loaded, Teacher) else _only(loaded, source)).denoiser
        networks.refuse_unguidable(denoiser, guidance, source)
        found: coupling.Source = Solved(Teacher(denoiser, guidance=guidance), steps or TEACHER_STEPS, solver, start)
        if data:
            found = coupling.Inverted(found, build.images(typed(DataConfig, data, "data"), "train"))
    elif data:
        raise ConfigError(f"{source} is sampled on its own grid, which no image goes back; give steps, for its ODE")
    elif guidance != 1 or start:
        raise ConfigError(
            f"{source} is sampled on its own grid, where guidance and start have no meaning; give steps to solve its "
            "ODE, or leave them out"
        )
    else:
        found = loaded
    if batch < 1:
        raise ConfigError(f"batch must be at least 1, got {batch}")
    recipe = coupling.recipe_of(found, count=count, seed=seed, shard=shard)
    coupling.refuse_another(folder, recipe)
    state.wait_for_everyone()  # until all have looked, no process may write
    with run.held(folder, writes=state.is_main_process):
        if state.is_main_process:
            coupling.begin(recipe, folder)
        state.wait_for_everyone()
        numbers = coupling.missing(recipe, folder)
        state.wait_for_everyone()  # until all have seen the same files, no process may make another
        own = numbers[state.process_index :: state.num_processes]
        coupling.make_pairs(found, recipe, folder, batch=batch, numbers=own, bar=state.is_main_process)
        state.wait_for_everyone()
    return folder


def evaluate(
    source: str | Path,
    *,
    weights: str = "",
    grid: Sequence[float] = (),
    guidance: float | None = None,
    teacher_steps: int = 0,
    data: Mapping | None = None,
    settings: Mapping | None = None,
    device: str = "cpu",
) -> dict[str, float | int | str]:
    """The numbers of `evaluation.metrics.evaluate_images`, of samples against real images.

    Args:
        source: a run or a denoiser's folder.
        weights, grid, guidance, teacher_steps: as for `sample`.
        data: keys of DataConfig; None for the run's own.
        settings: keys of EvaluateConfig that differ from the run's own.
    Raises:
        ConfigError, ValueError: no extractor or no real images are named, or something does not fit.
    """
    folder = Path(source)
    own = run.read_config(folder) if run.is_run(folder) else None
    before = plain(EvaluateConfig() if own is None else own.evaluate)
    chosen = typed(EvaluateConfig, before | dict(settings or {}), "evaluate")
    if data is None and own is None:
        raise ConfigError(
            f"{folder} does not say which real images to compare with; name them, e.g. data.name=fashion_mnist"
        )
    real = own.data if data is None else typed(DataConfig, dict(data), "data")
    steps = {"grid": grid, "guidance": guidance, "teacher_steps": teacher_steps}
    loaded = opened(folder, weights=weights, **steps, device=device)
    refuse_share(loaded)
    extractor, reference = yardstick(chosen, real, cache=folder / "cache", device=device)
    samples, labels = sample_images(loaded, chosen.samples, seed=chosen.seed, batch=chosen.batch)
    return evaluate_images(samples.float(), labels, reference, extractor)


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


def export(
    source: str | Path,
    folder: str | Path,
    *,
    weights: str = "",
    grid: Sequence[float] = (),
    guidance: float | None = None,
    half: bool = False,
    vae: nn.Module | None = None,
    tolerance: float = TOLERANCE,
    replace: bool = False,
) -> Report | RoutedReport | RelayReport:
    """Write a run's generator as a stock diffusers pipeline, reopened and compared; what was written.

    Of a run of several students each becomes a pipeline, in a folder that `load_routed` opens; of a run of experts each
    becomes a network, in a folder that `load_relay` opens.

    Args:
        weights, grid, guidance: as for `load`.
        half: weights in float16.
        vae: an AutoencoderKL, for generators of latents.
        tolerance: the largest absolute difference allowed between the pipeline's samples and the generator's.
        replace: put it in the place of an earlier export.
    Raises:
        Refusal: no stock pipeline expresses this generator; the message has the reasons.
    """
    loaded = load(source, weights=weights, grid=grid, guidance=guidance)
    if isinstance(loaded, Teacher):
        raise ConfigError(f"{source} is a denoiser's folder, which has no grid to sample on; export a run")
    options = {"dtype": torch.float16 if half else torch.float32, "vae": vae, "tolerance": tolerance}
    if isinstance(loaded, Relay):
        return write_relay(loaded, Path(folder), replace=replace, **options)
    if isinstance(loaded, Routed):
        return write_routed(loaded, Path(folder), replace=replace, **options)
    return write_pipeline(_only(loaded, source), Path(folder), replace=replace, **options)


def load_routed(folder: str | Path, *, device: str = "cpu") -> RoutedPipelines:
    """The stock pipelines that `export` made of several students, behind their router: one call samples all classes.

    images = load_routed("my-pipelines")(labels=[0, 7], seed=0)

    Raises:
        ValueError: no such export is there, or a file of it is damaged.
    """
    return RoutedPipelines(Path(folder), device=device)


def load_relay(folder: str | Path, *, device: str = "cpu") -> RelayPipeline:
    """The stock networks that `export` made of experts, with their scheduler: one call samples through all of them.

    images = load_relay("my-experts")(4, seed=0)

    Raises:
        ValueError: no such export is there, or a file of it is damaged.
    """
    return RelayPipeline(Path(folder), device=device)


def join(runs: Sequence[str | Path], output: str | Path) -> Path:
    """One run of all students, made of the runs of each alone (method.only), to sample, measure, export or train on.

    Raises:
        ConfigError, CheckpointError: they do not make a whole.
    """
    return joining.join([Path(folder) for folder in runs], Path(output))


def export_denoiser(
    source: str | Path, folder: str | Path, *, weights: str = "", half: bool = False, replace: bool = False
) -> Path:
    """Write a run's network with its meaning, as a folder that `teacher.path` and `load` read; the folder.

    Args:
        weights, half, replace: as for `export`.
    """
    source, folder = Path(source), Path(folder)
    if folder.exists() and not (replace and (folder / MEANING).is_file()):
        raise ConfigError(f"{folder} exists; choose another folder, or replace an earlier export of this kind")
    config = run.read_config(source)
    loaded, meaning = _trained(source, config, weights)
    model = _only(loaded, source).denoiser
    beside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    networks.write_denoiser(model, meaning, beside, half=half)
    if folder.exists():
        shutil.rmtree(folder)
    beside.rename(folder)
    return folder


def check(config: Config | Mapping | str | Path, overrides: Sequence[str] = (), *, run_steps: bool = False) -> str:
    """A report on what a config will do: its networks and their memory; with `run_steps`, a trial of a few steps too.

    Nothing is written into the output folder.

    Raises:
        ConfigError: the mistake that the run would end with.
    """
    config = as_config(config, overrides)
    run.look(config)
    report = [f"method {config.method_name}, output {config.output}", trial.memory_table(trial.plan_memory(config))]
    chosen = build.method(config, META)
    build.refuse_absent(config, chosen)
    if short := trial.shortness(chosen, config.train.steps):
        report.append(short)
    if run_steps:
        with memory_for("the trial"):
            report.append(str(trial.trial(config)))
    return "\n".join(report)


def _trained(folder: Path, config: Config, weights: str, device: str = "cpu") -> tuple[Sampler, DenoiserConfig]:
    """What a run samples with, under the weights asked for, and the meaning of its networks."""
    chosen = weights or next(iter(config.averages), RAW)
    if chosen not in (RAW, *config.averages):
        raise ConfigError(f"{folder} has no weights {chosen!r}; known are {', '.join((RAW, *config.averages))}")
    if config.generator.network is not None or config.teacher is not None:  # all weights are replaced below
        config = dataclasses.replace(config, generator=dataclasses.replace(config.generator, init_from=""))
    start, meaning = networks.starting_denoiser(config)
    start = start.to(networks.DTYPES[config.train.precision])
    kind = METHODS[config.method_name]
    sampler = kind.new_sampler(config.method, lambda: networks.generator(config, copy.deepcopy(start)))
    for player, part in sampler.parts.items():
        checkpoint.initialise(dict(part.denoiser.named_parameters()), folder, player=player, weights=chosen)
        part.denoiser.to(device)
    return sampler, meaning


def _only(sampler: Sampler, source: str | Path) -> Generator:
    """The generator of a run that has one; a run of several has no single network to speak of."""
    if not isinstance(sampler, Generator):
        raise ConfigError(f"{source} has {len(sampler.parts)} generators, and this needs a run with one")
    return sampler


def _hooks(config: Config, device: torch.device) -> list[Every]:
    """Pictures and evaluation at the intervals of the config."""
    hooks = []
    if config.pictures.every:
        hooks.append(Every(config.pictures.every, Pictures(config.pictures, SAMPLE_BATCH)))
    if config.evaluate.every:
        wanted = config.evaluate
        extractor, reference = yardstick(wanted, config.data, cache=Path(config.output) / "cache", device=str(device))
        act = Evaluation(wanted.samples, wanted.seed, wanted.batch, reference, extractor)
        hooks.append(Every(wanted.every, act))
    return hooks
