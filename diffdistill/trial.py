"""What a run will need, told before it starts: the plan of memory, and a trial of a few steps."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from diffdistill import build, networks
from diffdistill.backbones.folder import META
from diffdistill.config import Config
from diffdistill.memory import peak_bytes
from diffdistill.method import Method, Update
from diffdistill.methods import METHODS
from diffdistill.trainer import Every, Trainer

TRIAL_STEPS = 3  # the first warms up and is not timed


@dataclass(frozen=True)
class Role:
    """What one network or player keeps on the device throughout a run, in bytes."""

    name: str
    num_parameters: int
    weights: int
    gradients: int = 0
    optimizer: int = 0
    averages: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.averages


def plan_memory(config: Config) -> list[Role]:
    """Gate 1 and the meaning of all networks, without reading a weight: what each role keeps in memory.

    Activations are not among it; they depend on the batch and are measured by `trial`. Under FSDP2 each process keeps
    its share of every number but the teacher's.

    Raises:
        ConfigError: anything in the config that does not fit together.
    """
    roles = []
    chosen = build.method(config, META)
    build.player_settings(config, chosen.players())
    if METHODS[config.method_name].needs_teacher:
        roles.append(_role("teacher", list(networks.teacher(config, META).denoiser.parameters())))
    roles += [_role(name, list(module.parameters())) for name, module in chosen.frozen().items()]
    for name, spec in chosen.players().items():
        averages = len(config.averages) if name in chosen.generator.parts else 0
        averages += sum(average.player == name for average in chosen.averages().values())
        role = _role(name, list(spec.parameters.values()))
        size = role.weights
        roles.append(replace(role, gradients=size, optimizer=2 * size, averages=averages * size))
    return roles


def shortness(chosen: Method, steps: int) -> str:
    """A line on what a run of so many steps would leave as it is, or ""."""
    wanted = chosen.least_steps()
    if steps >= wanted:
        return ""
    return (
        f"train.steps={steps} ends before the last part of what is trained is begun, at step {wanted - 1}: it stays as "
        "it starts. Train longer, or shorten the parts before it"
    )


def _role(name: str, parameters: Sequence[nn.Parameter]) -> Role:
    weights = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    return Role(name, sum(parameter.numel() for parameter in parameters), weights)


def memory_table(roles: Sequence[Role]) -> str:
    """The plan as text."""
    columns = ("weights", "gradients", "optimizer", "averages", "total")
    lines = [f"{'role':<12}{'parameters':>14}" + "".join(f"{name:>12}" for name in columns)]
    for role in roles:
        sizes = "".join(f"{in_words(getattr(role, name)):>12}" for name in columns)
        lines.append(f"{role.name:<12}{role.num_parameters:>14,}{sizes}")
    together = in_words(sum(role.total for role in roles))
    lines.append(f"together {together} on each process when replicated; activations come on top")
    return "\n".join(lines)


def memory_line(roles: Sequence[Role]) -> str:
    """The plan in a few words, e.g. `teacher 1.50 GiB, generator 6.00 GiB`."""
    return ", ".join(f"{role.name} {in_words(role.total)}" for role in roles)


def in_words(num_bytes: float) -> str:
    """A size in the largest unit that it fills, e.g. 1.50 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"


@dataclass(frozen=True)
class Trial:
    """What `trial` measured.

    Attributes:
        updates: what one step does, in order: the players and terms of each update, or the name of an action.
        step_seconds: mean over the steps behind the first.
        peak_bytes: of the device where it counts them, else of this process.
    """

    updates: tuple[str, ...]
    step_seconds: float
    peak_bytes: int
    device: str

    def __str__(self) -> str:
        done = "\n".join(f"  {number}. {item}" for number, item in enumerate(self.updates, 1))
        peak = f"{in_words(self.peak_bytes)} peak memory"
        return f"one step on {self.device}:\n{done}\n{self.step_seconds:.3f} seconds per step, {peak}"


def trial(config: Config) -> Trial:
    """Gates 2 and 3 and a few steps of every update, as the run would take them, written only to a temporary folder."""
    accelerate = build.accelerator(replace(config, trackers=()))
    times: list[float] = []

    def note(trainer: Trainer, step: int) -> None:
        if accelerate.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    short = replace(build.schedule(config), steps=TRIAL_STEPS, log_every=0, save_every=0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build.trainer(config, accelerate, output=Path(folder), schedule=short, hooks=[Every(1, note)])
        trainer.run()
    items = trainer.method.plan(0)
    return Trial(
        updates=tuple(_described(item) if isinstance(item, Update) else item.name for item in items),
        step_seconds=(times[-1] - times[1]) / (len(times) - 2),
        peak_bytes=peak_bytes(accelerate.device),
        device=str(accelerate.device),
    )


def _described(update: Update) -> str:
    return " and ".join(f"{term.player} by {term.name}" for term in update.terms)
