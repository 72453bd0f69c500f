"""What the command line does, as functions: distill, load, sample, couple, evaluate, export, check.

from diffdistill import api

run = api.distill("configs/fashion/dmd2.yaml", ["train.steps=100"])
samples, labels = api.sample(run, 40)
api.export(run, "my-pipeline")
"""

import json
import shutil
import signal
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from diffdistill import build, checkpoint, coupling, joining, networks, prompting, run, spreading, trial
from diffdistill.backbones.folder import MEANING, META
from diffdistill.backbones.pipeline import PipelineBackbone
from diffdistill.config import Config, ConfigError, DataConfig
from diffdistill.evaluating import evaluate as evaluate
from diffdistill.evaluating import evaluate_all as evaluate_all
from diffdistill.evaluating import yardstick as yardstick
from diffdistill.evaluation.sampling import Solved, sample_images
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
from diffdistill.generator import Sampler
from diffdistill.hooks import Evaluation, Pictures
from diffdistill.loading import TEACHER_STEPS, load, only, opened, trained
from diffdistill.memory import OutOfMemory, memory_for
from diffdistill.prompting import check_teacher as check_teacher
from diffdistill.prompting import prepare as prepare
from diffdistill.recipe import flat, load_config, parse, plain, typed
from diffdistill.relay import Relay
from diffdistill.routed import Routed
from diffdistill.teacher import Teacher
from diffdistill.trainer import UNLIMITED, Budget, Every, Trainer

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
        said = {
            key: value if isinstance(value, str | int | float) else json.dumps(value)
            for key, value in flat(plain(config)).items()
        }
        options = {
            "wandb": {
                "mode": wandb_mode,
                "dir": str(output),
                "name": output.name,
                "id": run.tracker_id(output) if trainer.main else "",
            },
            "tensorboard": {"purge_step": trainer.step + 1 if trainer.step else 0},  # what a dead process wrote after
        }
        if wandb_mode == "online":
            options["wandb"]["resume"] = "allow"
        accelerate.init_trackers("diffdistill", config=said, init_kwargs=options)
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
    best = trainer.best and trainer.best.found(output)
    ended = "complete" if trainer.step == config.train.steps else "at the end of its budget"
    if trainer.gave_up:
        ended = f"at its end after {best.since} evaluations in which {config.evaluate.keep_best} did not get better"
    tell(f"step {trainer.step} of {config.train.steps}: {output} is {ended}")
    if best is not None:
        tell(f"best {config.evaluate.keep_best}: {best.value:.4g} at step {best.step}, which --at best opens")
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
    at: str = "",
    batch: int = SAMPLE_BATCH,
    device: str = "cpu",
) -> tuple[Tensor, Tensor | None]:
    """Samples (count, C, H, W) in about [-1, 1], each a function of the seed and its index alone, and their labels.

    Args:
        source: a run, a denoiser's folder, or something loaded.
        labels: one for each sample; None for i % classes.
        weights, grid, guidance, at: as for `load`.
        teacher_steps: of the PF-ODE: of a denoiser's folder, of a `denoise` run, or, for a run with a teacher, of that
            teacher instead of its student. 0 for the run's own grid, or 18 for a denoiser's folder.
    """
    if isinstance(source, str | Path):
        chosen = {"weights": weights, "grid": grid, "guidance": guidance, "at": at}
        source = opened(Path(source), **chosen, teacher_steps=teacher_steps, device=device)
    return sample_images(source, count, seed=seed, batch=batch, labels=labels)


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
        denoiser = (loaded if isinstance(loaded, Teacher) else only(loaded, source)).denoiser
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


def export(
    source: str | Path,
    folder: str | Path,
    *,
    weights: str = "",
    grid: Sequence[float] = (),
    guidance: float | None = None,
    at: str = "",
    half: bool = False,
    vae: nn.Module | None = None,
    tolerance: float = TOLERANCE,
    replace: bool = False,
) -> Report | RoutedReport | RelayReport:
    """Write a run's generator as a stock diffusers pipeline, reopened and compared; what was written.

    Of a run of several students each becomes a pipeline, in a folder that `load_routed` opens; of a run of experts each
    becomes a network, in a folder that `load_relay` opens.

    Args:
        weights, grid, guidance, at: as for `load`.
        half: weights in float16.
        vae: an AutoencoderKL, for generators of latents of classes; those of prompts have their teacher's pipeline.
        tolerance: the largest absolute difference allowed between the pipeline's samples and the generator's.
        replace: put it in the place of an earlier export.
    Raises:
        Refusal: no stock pipeline expresses this generator; the message has the reasons.
    """
    loaded = load(source, weights=weights, grid=grid, guidance=guidance, at=at)
    if isinstance(loaded, Teacher):
        raise ConfigError(f"{source} is a denoiser's folder, which has no grid to sample on; export a run")
    options = {"dtype": torch.float16 if half else torch.float32, "vae": vae, "tolerance": tolerance}
    if isinstance(loaded, Relay):
        return write_relay(loaded, Path(folder), replace=replace, **options)
    if isinstance(loaded, Routed):
        return write_routed(loaded, Path(folder), replace=replace, **options)
    generator = only(loaded, source)
    if isinstance(generator.denoiser.backbone, PipelineBackbone):
        return prompting.export(Path(source), generator, Path(folder), half=half, tolerance=tolerance, replace=replace)
    return write_pipeline(generator, Path(folder), replace=replace, **options)


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
    loaded, meaning = trained(source, config, weights)
    model = only(loaded, source).denoiser
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


def _hooks(config: Config, device: torch.device) -> list[Every]:
    """Pictures and evaluation at the intervals of the config."""
    hooks = []
    if config.pictures.every:
        hooks.append(Every(config.pictures.every, Pictures(config.pictures, SAMPLE_BATCH)))
    if config.evaluate.every:
        wanted = config.evaluate
        extractor, reference = yardstick(wanted, config.data, cache=Path(config.output) / "cache", device=str(device))
        act = Evaluation(wanted.samples, wanted.seed, wanted.batch, reference, extractor, wanted.weights)
        hooks.append(Every(wanted.every, act, judges=True))
    return hooks
