"""What an exporter is asked, what it answers, and the questions that several of them put to a generator."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from diffdistill.backbones.diffusers import DiffusersBackbone
from diffdistill.denoiser import Denoiser
from diffdistill.generator import FLOW_MAP, Generator
from diffdistill.process import VE, Process, Rectified


class Refusal(ValueError):
    """A generator, or a part of it, that no stock class expresses; the message says why and what to do instead."""


@dataclass(frozen=True)
class Request:
    """What is to be exported.

    Args:
        generator: on the CPU, in float32, in eval mode.
        network: a fresh instance of the diffusers class with the generator's weights.
        vae: decodes latents, for pipelines that work on them; or None.
    """

    generator: Generator
    network: nn.Module
    vae: nn.Module | None

    @property
    def family(self) -> str:
        return type(self.network).__name__

    @property
    def denoiser(self) -> Denoiser:
        return self.generator.denoiser

    @property
    def process(self) -> Process:
        return self.generator.process

    @property
    def grid(self) -> tuple[float, ...]:
        return self.generator.grid

    @property
    def num_classes(self) -> int:
        return self.denoiser.backbone.num_classes

    @property
    def rule(self) -> str:
        """How the samples come about, with equal rules under one name: one, renoise, ddim, euler or heun.

        The last evaluation of every rule gives the predicted x0, so that with a single time all rules are one. Where
        sigma / alpha is straight in time (VE, Rectified), an Euler step is a DDIM step.
        """
        if len(self.grid) == 1:
            return "one"
        straight = isinstance(self.process, VE | Rectified)
        return "ddim" if self.generator.step_rule == "euler" and straight else self.generator.step_rule


@dataclass(frozen=True)
class Stock:
    """A stock pipeline that samples as the generator does.

    Args:
        pipeline: an instance of a class of diffusers.
        call: arguments of every call.
        takes_batch_size: False where the number of labels says how many images to make.
        takes_labels: whether `class_labels` must be given.
        notes: what a user of the folder should know.
    """

    pipeline: Any
    call: Mapping[str, Any]
    takes_batch_size: bool = True
    takes_labels: bool = False
    notes: tuple[str, ...] = field(default=())

    def arguments(self, labels: list[int] | None, count: int) -> dict[str, Any]:
        """Keyword arguments of a call that makes `count` images; labels has `count` entries, or is None."""
        arguments = dict(self.call)
        if self.takes_batch_size:
            arguments["batch_size"] = count
        if self.takes_labels:
            arguments["class_labels"] = labels
        return arguments


def require(condition: bool, reason: str) -> None:
    """Refuse for `reason` unless `condition` holds."""
    if not condition:
        raise Refusal(reason)


def require_unit_prior(request: Request) -> None:
    """Refuse a generator that starts from noise of another deviation than 1, which is what most pipelines draw."""
    std = request.process.prior_std(request.grid[0])
    require(
        abs(std - 1) < 1e-7,
        f"it starts from noise of deviation {std:.6g}, at t = {request.grid[0]:g}, and the pipeline from deviation 1; "
        f"let generator.grid begin at t_max = {request.process.t_max:g}",
    )


def square_size(request: Request) -> int:
    """Side of the pictures, for pipelines that know square ones only."""
    size = request.network.config.sample_size
    if isinstance(size, list | tuple):
        raise Refusal(f"the pipeline makes square pictures from an integer sample_size, and the network has {size}")
    return size


def request(generator: Generator, vae: nn.Module | None, dtype: torch.dtype) -> Request:
    """A Request with its own copy of everything: on the CPU, weights rounded to `dtype` and kept in float32.

    Raises:
        Refusal: no pipeline can hold this network.
    """
    backbone = generator.denoiser.backbone
    require(
        isinstance(backbone, DiffusersBackbone),
        f"the network is a {type(backbone).__name__}, which is not a class of diffusers; "
        "train a generator on a network of diffusers, e.g. UNet2DModel, to export it",
    )
    denoiser = generator.denoiser
    require(
        denoiser.process is denoiser.native,
        f"the generator speaks {denoiser.process} and its network {denoiser.native}, and stock pipelines know one; "
        "make a Generator of the denoiser in its native process, on a grid mapped by native.time_of(process.ratio(t))",
    )
    denoiser, step_rule = copy.deepcopy(denoiser).to("cpu", torch.float32).eval(), generator.step_rule
    if backbone.told:
        require(
            step_rule != FLOW_MAP or len(generator.grid) == 1,
            f"the network is told where each of its {len(generator.grid)} steps leads, and stock pipelines tell it the "
            "time alone; export it with a grid of one time, where that is always the same",
        )
        first = generator.grid[0]
        leads = 0.0 if step_rule == FLOW_MAP else first
        denoiser = denoiser.told_no_more(first, leads, 1.0 if generator.guidance is None else generator.guidance).eval()
        step_rule = "renoise" if step_rule == FLOW_MAP else step_rule  # of one step all rules are one
    network = denoiser.backbone.network
    weights = {
        name: tensor.to(dtype).to(torch.float32) if tensor.is_floating_point() else tensor
        for name, tensor in network.state_dict().items()
    }
    for name, tensor in weights.items():
        require(
            bool(tensor.isfinite().all()),
            f"the weight {name} is not finite in {dtype}; export in torch.float32 instead",
        )
    network.load_state_dict(weights)
    with torch.random.fork_rng(devices=[]):
        fresh = type(network).from_config(network.config)  # whatever training put inside, e.g. its dropout, stays out
    fresh.load_state_dict(weights)
    ours = Generator(denoiser, generator.grid, step_rule=step_rule)
    return Request(ours, fresh.eval(), vae)
