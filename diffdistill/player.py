"""Player: a set of parameters with its optimizer, learning rate and averages, and the one way it takes a step."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from diffdistill.method import PlayerSpec
from diffdistill.rng import replace_dropout


@dataclass(frozen=True)
class LearningRate:
    """A pure function of the step: linear warm-up to `peak`, then constant, or down to `final` x peak at `steps`."""

    peak: float
    warmup_steps: int = 0
    decay: str = "constant"
    steps: int = 0
    final: float = 0.0

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.decay == "constant":
            return self.peak
        done = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        left = 1 - done if self.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.peak * (self.final + (1 - self.final) * left)


class Decay(ABC):
    """How much of an average survives a step; a pure function of the step, counted in generator updates from 0."""

    @abstractmethod
    def __call__(self, step: int) -> float: ...


@dataclass(frozen=True)
class ConstantDecay(Decay):
    """average <- beta average + (1 - beta) parameters."""

    beta: float

    def __call__(self, step: int) -> float:
        return self.beta


@dataclass(frozen=True)
class HalfLifeDecay(Decay):
    """Half of the weight lies on the last `images` images; early on, on the last `ramp_up` of all images so far (0 for
    no ramp-up). Source: the training code of Karras et al. 2022."""

    images: float
    batch: int
    ramp_up: float = 0.0

    def __call__(self, step: int) -> float:
        images = min(self.images, (step + 1) * self.batch * self.ramp_up) if self.ramp_up else self.images
        return 0.5 ** (self.batch / images)


@dataclass(frozen=True)
class PowerDecay(Decay):
    """beta = (1 - 1/i)^(gamma + 1) at the i-th step, for an average of relative width
    sigma_rel = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)) (Karras et al. 2024, section 3.1)."""

    sigma_rel: float

    def __call__(self, step: int) -> float:
        return (1 - 1 / (step + 1)) ** (self.gamma + 1)

    @property
    def gamma(self) -> float:
        """The positive root: solved by bisection, since sigma_rel falls monotonically with gamma."""
        low, high = 0.0, 1e6
        for _ in range(200):
            middle = (low + high) / 2
            width = math.sqrt(middle + 1) / ((middle + 2) * math.sqrt(middle + 3))
            low, high = (middle, high) if width > self.sigma_rel else (low, middle)
        return low


class Average:
    """Tensors that follow a player's parameters."""

    def __init__(self, parameters: Sequence[Tensor], copies: Sequence[Tensor], decay: Callable[[int], float]):
        self.parameters, self.copies, self.decay = list(parameters), list(copies), decay

    @torch.no_grad()
    def follow(self, step: int, finite: Tensor) -> None:
        """One step towards the parameters; none where `finite` (a 0-dimensional 0 or 1) is 0."""
        change = torch._foreach_sub(self.parameters, self.copies)
        torch._foreach_mul_(change, finite * (1 - self.decay(step)))
        torch._foreach_add_(self.copies, change)

    @contextmanager
    def swapped_in(self):
        """Within the block the player's modules compute with the averaged values."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, copy in zip(self.parameters, self.copies, strict=True):
            kept = parameter.clone()
            parameter.copy_(copy)
            copy.copy_(kept)


class Player:
    """What a method trains under one name.

    Args:
        spec: modules and parameters.
        optimizer: made of the parameters; a fused torch.optim.AdamW, which can skip a step by a flag on the device.
        learning_rate: a pure function of the step.
        max_norm: clip the gradient's global norm to it; infinity for not.
        reduce: sums a flat tensor over the ranks in place; None where the gradients are reduced already (FSDP2).
    """

    def __init__(
        self,
        spec: PlayerSpec,
        optimizer: torch.optim.Optimizer,
        learning_rate: Callable[[int], float],
        *,
        max_norm: float,
        reduce: Callable[[Tensor], None] | None,
    ):
        self.spec, self.optimizer, self.learning_rate = spec, optimizer, learning_rate
        self.max_norm, self._reduce = max_norm, reduce
        self.parameters = list(spec.parameters.values())
        self.averages: dict[str, Average] = {}
        self.dropouts = [dropout for module in spec.modules for dropout in replace_dropout(module)]

    def average(self, name: str, decay: Callable[[int], float]) -> None:
        """Keep a running average of the parameters under this name, starting from their present values."""
        self.averages[name] = Average(self.parameters, [p.detach().clone() for p in self.parameters], decay)

    def make_optimizer_state(self) -> None:
        """Give the optimizer the tensors it makes on its first step, so that a checkpoint can be loaded into them."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.found_inf = torch.ones((), device=local(self.parameters[0]).device)  # nothing else changes
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def trainable(self, flag: bool) -> None:
        """Whether backward passes reach the parameters, and dropout is on."""
        for parameter in self.parameters:
            parameter.requires_grad_(flag)
        for dropout in self.dropouts:
            dropout.training = flag

    def reduce_on_backward(self, flag: bool) -> None:
        """Whether the next backward pass of sharded modules also reduces: only the last one of an update should."""
        for module in self.spec.modules:
            for part in module.modules():
                if isinstance(part, FSDPModule):
                    part.set_requires_gradient_sync(flag, recurse=False)

    def apply(self, step: int) -> dict[str, Tensor]:
        """Reduce, find out whether all is finite, clip, step, average; then drop the gradients.

        Returns:
            0-dimensional tensors on the device: `finite` (1 or 0) and `gradient_norm`, before clipping.
        """
        self._reduce_gradients()
        gradients = [parameter.grad for parameter in self.parameters]
        norm = whole(nn.utils.get_total_norm(gradients, foreach=True))
        finite = norm.isfinite().to(norm.dtype)
        if math.isfinite(self.max_norm):
            shrink = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([local(gradient) for gradient in gradients], shrink)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.optimizer.found_inf = (1 - finite).float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for average in self.averages.values():
            average.follow(step, finite)
        return {"finite": finite, "gradient_norm": norm}

    @torch.no_grad()
    def _reduce_gradients(self) -> None:
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self._reduce is None:
            return
        flat = torch.cat([parameter.grad.flatten() for parameter in self.parameters])
        self._reduce(flat)
        parts = flat.split([parameter.numel() for parameter in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad.copy_(part.view_as(parameter))


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all ranks; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def only(name: str, players: Mapping[str, Player]):
    """Within the block, one player's parameters train and all others are frozen, yet differentiable in their inputs."""
    for other, player in players.items():
        player.trainable(other == name)
    yield
