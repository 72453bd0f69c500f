"""What a stock pipeline tells its network and its scheduler while it samples."""

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

NETWORKS = ("unet", "transformer", "transformer_2")  # names that pipelines give to their networks
TIMES = ("timestep", "t")  # names that networks give to their time


@dataclass(frozen=True)
class Heard:
    """One call of a network.

    Args:
        sample, time: names of the arguments that take x and the time.
        x, told: these two.
        arguments: all others, by name.
        output: a tensor, or a list of one per sample.
    """

    sample: str
    time: str
    x: Tensor | list[Tensor]
    told: Tensor
    arguments: Mapping[str, Any]
    output: Any


@dataclass(frozen=True)
class Step:
    """One step of a scheduler: the model's output as it takes it, its own time, and x before and after."""

    output: Tensor
    time: Tensor
    before: Tensor
    after: Tensor


@dataclass
class Tape:
    calls: list[Heard] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    mu: float | None = None  # of a flow's spacing that depends on the resolution
    sigmas: list[float] | None = None  # the times that the pipeline asks its scheduler to shift, where it does


class FirstStep(Exception):
    """The scheduler is about to step, and nobody wants to hear more."""


@contextmanager
def listening(pipeline: Any, *, first_step_only: bool = False) -> Iterator[Tape]:
    """Within the block, what the pipeline tells its networks and its scheduler goes on the tape that is yielded.

    first_step_only: leave the block before the first step, with networks that answer zeros in no time.
    """
    tape, scheduler = Tape(), pipeline.scheduler
    networks = [part for name in NETWORKS if (part := getattr(pipeline, name, None)) is not None]
    step, set_timesteps = scheduler.step, scheduler.set_timesteps

    @functools.wraps(step)
    def stepping(model_output, timestep, sample, *args, **kwargs):
        if first_step_only:
            raise FirstStep
        result = step(model_output, timestep, sample, *args, **kwargs)
        tape.steps.append(Step(model_output.clone(), torch.as_tensor(timestep).clone(), sample.clone(), result[0]))
        return result

    @functools.wraps(set_timesteps)
    def setting(*args, **kwargs):
        tape.mu, tape.sigmas = kwargs.get("mu"), kwargs.get("sigmas")
        return set_timesteps(*args, **kwargs)

    for network in networks:
        network.forward = _heard(network, tape, silent=first_step_only)
    scheduler.step, scheduler.set_timesteps = stepping, setting
    try:
        yield tape
    except FirstStep:
        pass
    finally:
        del scheduler.step, scheduler.set_timesteps
        for network in networks:
            del network.forward


def _heard(network: nn.Module, tape: Tape, *, silent: bool):
    """The network's forward, on tape; silent: zeros in its place, as many as samples came in."""
    forward, signature = network.forward, inspect.signature(network.forward)
    sample, time = next(iter(signature.parameters)), next(name for name in TIMES if name in signature.parameters)

    @functools.wraps(forward)
    def listened(*args, **kwargs):
        told = dict(signature.bind(*args, **kwargs).arguments)
        told |= told.pop("kwargs", {})
        x = told.pop(sample)
        output = [torch.zeros_like(x) if isinstance(x, Tensor) else x] if silent else forward(*args, **kwargs)
        time_told = torch.as_tensor(told.pop(time)).clone()
        tape.calls.append(Heard(sample, time, _kept(x), time_told, told, _kept(output[0])))
        return output

    return listened


def _kept(x: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
    return x.clone() if isinstance(x, Tensor) else [part.clone() for part in x]
