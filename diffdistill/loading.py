"""What a folder holds, ready to sample: a run under the weights and steps asked for, or a teacher."""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from diffdistill import build, checkpoint, networks, run
from diffdistill.backbones.folder import MEANING
from diffdistill.config import Config, ConfigError, DenoiserConfig, TeacherConfig
from diffdistill.evaluation.sampling import Solved
from diffdistill.generator import Generator, Sampler
from diffdistill.methods import METHODS
from diffdistill.player import RAW
from diffdistill.teacher import Teacher

TEACHER_STEPS = 18  # of a teacher's folder, where nothing else is asked for


def load(
    folder: str | Path,
    *,
    weights: str = "",
    grid: Sequence[float] = (),
    guidance: float | None = None,
    at: str = "",
    device: str = "cpu",
) -> Sampler | Teacher:
    """What a run samples with, or the teacher of any other folder that `teacher.path` may name, ready to sample.

    Args:
        folder: the output of `distill`, or a denoiser's or diffusers' folder.
        weights: of a run: "raw", or the name of an average; empty for its first average, or raw where it has none.
        grid: of a run: the times to sample at, in place of its own, as a consistency function and a flow map can.
        guidance: of a run whose network is told its scale: another than its own.
        at: of a run: "best" for the checkpoint that evaluate.keep_best kept, a step, or "" for the newest.
    Raises:
        ConfigError, CheckpointError: nothing to load there, or it does not fit.
    """
    folder = Path(folder)
    if run.is_run(folder):
        config = _sampled_at(folder, run.read_config(folder), grid, guidance)
        return trained(folder, config, weights, device, at=at)[0]
    for name, value in (
        ("weights", weights if weights != RAW else ""),
        ("grid", grid),
        ("guidance", guidance),
        ("at", at),
    ):
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


def opened(
    folder: Path,
    *,
    weights: str = "",
    grid: Sequence[float] = (),
    guidance: float | None = None,
    teacher_steps: int = 0,
    at: str = "",
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
    loaded = load(folder, weights=weights, grid=grid, guidance=guidance, at=at, device=device)
    if isinstance(loaded, Teacher) and not (teacher_steps or (folder / MEANING).is_file()):
        raise ConfigError(f"{folder} does not say in how many steps it is sampled; give them as the teacher's steps")
    if isinstance(loaded, Teacher):
        return Solved(loaded, teacher_steps or TEACHER_STEPS)
    return Solved(Teacher(only(loaded, folder).denoiser), teacher_steps) if teacher_steps else loaded


def trained(
    folder: Path, config: Config, weights: str, device: str = "cpu", *, at: str = ""
) -> tuple[Sampler, DenoiserConfig]:
    """What a run samples with, under the weights asked for, and the meaning of its networks."""
    source = checkpoint_at(folder, config, at)
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
        checkpoint.initialise(dict(part.denoiser.named_parameters()), source, player=player, weights=chosen)
        part.denoiser.to(device)
    return sampler, meaning


def checkpoint_at(folder: Path, config: Config, at: str) -> Path:
    """The checkpoint that `at` names, or the run itself, whose newest one is meant.

    Raises:
        ConfigError: it is neither "best" nor a step, or no best one was kept.
        CheckpointError: there is none of that step.
    """
    if not at:
        return folder
    if at != "best" and not at.isdecimal():
        raise ConfigError(f"at={at!r} must be best, or a step of {folder}")
    if at != "best":
        return checkpoint.at(folder, int(at))
    kept = build.best(config)
    found = kept and kept.found(folder)
    if found is None:
        raise ConfigError(f"{folder} kept no best checkpoint; train with evaluate.keep_best=frechet_distance")
    return checkpoint.at(folder, found.step)


def only(sampler: Sampler, source: str | Path) -> Generator:
    """The generator of a run that has one; a run of several has no single network to speak of."""
    if not isinstance(sampler, Generator):
        raise ConfigError(f"{source} has {len(sampler.parts)} generators, and this needs a run with one")
    return sampler
