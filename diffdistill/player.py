"""Player: a set of parameters with its optimizer, learning rate and averages, and the one way it takes a step."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from diffdistill.method import PlayerSpec
from diffdistill.rng import replace_dropout

RAW = "raw"  # the name of a player's weights as they are, among its averages


@dataclass(frozen=True)
class LearningRate:
    """A pure function of the step: linear warm-up to `peak`, then constant, or down to `final` x peak at `steps`."""

    peak: float
    warmup_steps: int = 0
    decay: Literal["constant", "linear", "cosine"] = "constant"
    steps: int = 0
    final: float = 0.0

    def __post_init__(self):
        if self.decay not in ("constant", "linear", "cosine"):
            raise ValueError(f"decay must be constant, linear or cosine, got {self.decay!r}")

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

    def __post_init__(self):
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta must be in [0, 1), got {self.beta}; 1 would never leave the starting weights")

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

    def __post_init__(self):
        widest = 1 / math.sqrt(12)  # at gamma = 0, the average over the whole run with equal weights
        if not 0 < self.sigma_rel <= widest:
            raise ValueError(f"sigma_rel must be in (0, {widest:.4f}], got {self.sigma_rel}; 0.05 to 0.15 is customary")

    def __call__(self, step: int) -> float:
        return (1 - 1 / (step + 1)) ** (self.gamma + 1)

    @cached_property
    def gamma(self) -> float:
        """The positive root: solved by bisection, since sigma_rel falls monotonically with gamma."""
        low, high = 0.0, 1e6
        for _ in range(200):
            middle = (low + high) / 2
            width = math.sqrt(middle + 1) / ((middle + 2) * math.sqrt(middle + 3))
            low, high = (middle, high) if width > self.sigma_rel else (low, middle)
        return low


class Average:
    """Tensors that follow a player's parameters.

    Args:
        parameters, copies: of the same shapes, in the same order.
        decay: a pure function of the step.
        changed: called after `swapped_in` has changed the parameters in place.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        copies: Sequence[Tensor],
        decay: Callable[[int], float],
        *,
        changed: Callable[[], None],
    ):
        self.parameters, self.copies, self.decay = list(parameters), list(copies), decay
        self._changed = changed

    @torch.no_grad()
    def follow(self, step: int, finite: Tensor) -> None:
        """One step towards the parameters; none where `finite` (a 0-dimensional 0 or 1) is 0."""
        part = 1 - self.decay(step)
        for parameter, copy in zip(self.parameters, self.copies, strict=True):
            local(copy).lerp_(local(parameter), finite.to(copy.dtype) * part)

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew, with the parameters as they are."""
        for parameter, copy in zip(self.parameters, self.copies, strict=True):
            local(copy).copy_(local(parameter))

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
            kept = local(parameter).clone()
            local(parameter).copy_(local(copy))
            local(copy).copy_(kept)
        self._changed()


class Player:
    """What a method trains under one name.

    Args:
        spec: modules and parameters.
        optimizer: made of the parameters; a fused torch.optim.AdamW, which can skip a step by a flag on the device.
        learning_rate: a pure function of the step.
        max_norm: clip the gradient's global norm to it; infinity for not.
        reduce: sums a flat tensor over the ranks in place; None where there is nothing to sum: one process, or
            gradients that the backward pass has reduced already (FSDP2).
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
        if not optimizer.defaults["fused"]:
            raise ValueError("a Player needs AdamW(fused=True): other kernels ignore the flag that skips a step")
        self.spec, self.optimizer, self.learning_rate = spec, optimizer, learning_rate
        self.max_norm, self._reduce = max_norm, reduce
        self.parameters = list(spec.parameters.values())
        self.averages: dict[str, Average] = {}
        self.dropouts = [dropout for module in spec.modules for dropout in replace_dropout(module)]
        self._sharded = [part for module in spec.modules for part in module.modules() if isinstance(part, FSDPModule)]

    def average(self, name: str, decay: Callable[[int], float]) -> None:
        """Keep a running average of the parameters under this name, starting from their present values."""
        copies = [parameter.detach().clone() for parameter in self.parameters]
        self.averages[name] = Average(self.parameters, copies, decay, changed=self.reshard)

    def follow_with(self, name: str, module: nn.Module, decay: Callable[[int], float]) -> None:
        """Keep a running average of the parameters in those of a module, such as a network that a loss reads.

        Raises:
            ValueError: the parameters are sharded, and the module's are not; or there is an average of this name.
        """
        copies = list(module.parameters())
        pairs = zip(self.parameters, copies, strict=True)
        if any(isinstance(parameter, DTensor) and not isinstance(copy, DTensor) for parameter, copy in pairs):
            raise ValueError(
                f"{name} is a network that follows a player whose parameters are sharded, and its own are whole on "
                "every rank; shard it in the same way (build.shard), or use train.sharding=replicated"
            )
        if name in self.averages:
            raise ValueError(f"averages.{name} is what the method calls a network of its own; choose another name")
        self._sharded += [part for part in module.modules() if isinstance(part, FSDPModule)]
        self.averages[name] = Average(self.parameters, copies, decay, changed=self.reshard)

    @torch.no_grad()
    def gaps(self) -> dict[str, Tensor]:
        """For each average, the norm of its difference from the parameters over theirs, 0-dimensional."""
        size = self._norm(lambda parameter, copy: parameter, self.parameters)
        return {
            name: self._norm(lambda parameter, copy: copy - parameter, average.copies) / size
            for name, average in self.averages.items()
        }

    def _norm(self, difference: Callable[[Tensor, Tensor], Tensor], copies: Sequence[Tensor]) -> Tensor:
        """The norm over all parameters of a function of each and its copy, one bucket of them in memory at a time."""
        pairs = list(zip(self.parameters, copies, strict=True))
        sizes = [len(bucket) for bucket in buckets(self.parameters)]
        norms = []
        for size in sizes:
            part, pairs = pairs[:size], pairs[size:]
            norms.append(whole(nn.utils.get_total_norm([difference(*pair) for pair in part])))
        return torch.stack(norms).norm()

    def make_optimizer_state(self) -> None:
        """Give the optimizer the tensors it makes on its first step, so that a checkpoint can be loaded into them.

        Nothing else changes: the flag makes the step a skipped one. It does nothing where the tensors are there.
        """
        if len(self.optimizer.state) == len(self.parameters):
            return
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.found_inf = torch.ones((), device=self.device)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def device(self) -> torch.device:
        return local(self.parameters[0]).device

    def trainable(self, flag: bool) -> None:
        """Whether backward passes reach the parameters."""
        for parameter in self.parameters:
            parameter.requires_grad_(flag)
        self.reshard()  # what FSDP2 has gathered keeps the flag it was gathered with

    def reduce_on_backward(self, flag: bool) -> None:
        """Whether the next backward pass of sharded modules also reduces: only the last one of an update should."""
        for part in self._sharded:
            part.set_requires_gradient_sync(flag, recurse=False)

    def reshard(self) -> None:
        """Drop what sharded modules have gathered, so that they gather again after the parameters changed in place."""
        for part in self._sharded:
            part.reshard()

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """The norm, 0-dimensional, of the gradient summed over the ranks; to be called once, before `apply`.

        A parameter that no backward pass reached gets a gradient of zeros, so that all ranks agree on what there is.
        """
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self.parameters]
        if self._reduce is not None:
            for bucket in buckets(gradients):
                flat = torch.cat([gradient.flatten() for gradient in bucket])
                self._reduce(flat)
                parts = flat.split([gradient.numel() for gradient in bucket])
                for gradient, part in zip(bucket, parts, strict=True):
                    gradient.copy_(part.view_as(gradient))
        return whole(nn.utils.get_total_norm(gradients))

    @torch.no_grad()
    def apply(self, step: int, norm: Tensor, finite: Tensor) -> None:
        """Clip, step, average, fold the running means; then drop the gradients.

        Args:
            step: of the learning rate and the decays.
            norm: what `gradient_norm` returned.
            finite: 1, or 0 to change nothing: neither parameters, nor moments and step count, nor averages or means.
        """
        if math.isfinite(self.max_norm):
            shrink = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([local(parameter.grad) for parameter in self.parameters], shrink)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.optimizer.found_inf = (1 - finite).float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for average in self.averages.values():
            average.follow(step, finite)
        self.reshard()
        for means in self.spec.means.values():
            means.fold(finite)


def buckets(tensors: Sequence[Tensor], *, numbers: int = 2**25) -> list[list[Tensor]]:
    """`tensors`, in order, in lists of at most that many numbers, or of one larger tensor."""
    made: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        if not made or tensor.numel() > room:
            made.append([])
            room = numbers
        made[-1].append(tensor)
        room -= tensor.numel()
    return made


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all ranks; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def only(name: str, players: Mapping[str, Player]):
    """Within the block, one player's parameters train and all others are frozen, yet differentiable in their inputs.

    It leaves the flags as they are, since the next block sets all of them.
    """
    for other, player in players.items():
        player.trainable(other == name)
    yield
