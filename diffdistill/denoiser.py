"""Denoiser: a backbone, the process it was trained in, and what its output means, behind one call.

Teacher, generator and critic each hold one. Callers speak of clean, noisy and time in the denoiser's `process`; that the
network wants scaled inputs, its own clock, or was trained in another process, is settled here and nowhere else.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diffdistill.prediction import Prediction, convert
from diffdistill.process import Process, lift

Condition = Mapping[str, Tensor]


class Backbone(nn.Module, ABC):
    """A network behind one signature; `diffdistill.backbones` adapts real ones to it."""

    sample_shape: tuple[int, ...]
    condition_names: tuple[str, ...]

    @abstractmethod
    def forward(self, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
        """The raw output, of the shape of x (N, *sample_shape), at the network's own time (N,)."""

    @abstractmethod
    def null(self, cond: Condition) -> Condition:
        """The unconditional counterpart of `cond`, for guidance.

        Raises:
            ValueError: the network has no unconditional branch.
        """

    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """The modules to shard and to checkpoint, in order of execution."""

    def join(self, first: Condition, second: Condition) -> Condition:
        """Both conditions as one batch. Adapters whose conditions hold unbatched entries say how they join."""
        return {name: torch.cat([first[name], second[name]]) for name in first}


def _steps(t: Tensor, process: Process) -> Tensor:
    return t - 1


def _edm(t: Tensor, process: Process) -> Tensor:
    return process.ratio(t).log() * (1000 / 4)


def _thousand(t: Tensor, process: Process) -> Tensor:
    return t * 1000


def _log_ratio(t: Tensor, process: Process) -> Tensor:
    return process.ratio(t).clamp(1e-4, 1e4).log() / 4


# What the network is told about t: the index of a DDPM table; EDM's 1/4 ln sigma, times 1000; a unit time, times 1000;
# or a bounded log-ratio.
CLOCKS: dict[str, Callable[[Tensor, Process], Tensor]] = {
    "steps": _steps,
    "edm": _edm,
    "thousand": _thousand,
    "log_ratio": _log_ratio,
}


class Denoiser(nn.Module):
    """E[x0 | x_t], or any equivalent prediction, from a backbone.

    Args:
        backbone: the network.
        native: the process that the network's inputs and clock refer to.
        source: what the network's output means in `native`.
        clock: a key of CLOCKS.
        scale_input: feed x_t / sqrt(alpha^2 sigma_data^2 + sigma^2), EDM's c_in (Karras et al. 2022, eq. 7). With
            source=Prediction.F and clock="edm" that is EDM's whole preconditioning.
        process: the process that callers speak, by default `native`. Another one is matched by signal-to-noise ratio,
            which leaves the trajectories of the PF-ODE unchanged up to scale.
    """

    def __init__(
        self,
        backbone: Backbone,
        native: Process,
        source: Prediction,
        *,
        clock: str,
        scale_input: bool = False,
        process: Process | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        self.native, self.source, self.clock, self.scale_input = native, source, clock, scale_input
        self.process = native if process is None else process

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self.backbone.sample_shape

    def seen_in(self, process: Process) -> "Denoiser":
        """The same network, sharing its parameters, for callers who speak `process`."""
        return Denoiser(
            self.backbone,
            self.native,
            self.source,
            clock=self.clock,
            scale_input=self.scale_input,
            process=process,
        )

    def forward(
        self, x_t: Tensor, t: Tensor, cond: Condition | None = None, *, to: Prediction = Prediction.X0
    ) -> Tensor:
        """The prediction `to` at x_t of shape (N, ...) and t of shape (N,), in the shape and dtype of x_t."""
        native = self.native
        if native is self.process:
            return convert(self._network(x_t, t, cond), x_t, t, native, source=self.source, to=to)
        time = native.time_of(self.process.ratio(t))
        norm = (native.alpha(time) ** 2 + native.sigma(time) ** 2).sqrt()
        norm = norm / (self.process.alpha(t) ** 2 + self.process.sigma(t) ** 2).sqrt()
        x_native = lift(norm, x_t) * x_t
        x0 = convert(
            self._network(x_native, time, cond), x_native, time, native, source=self.source, to=Prediction.X0
        )
        return convert(x0, x_t, t, self.process, source=Prediction.X0, to=to)

    def with_features(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Condition | None = None,
        *,
        taps: Sequence[str],
        to: Prediction = Prediction.X0,
    ) -> tuple[Tensor, list[Tensor]]:
        """The prediction and the outputs of the backbone's submodules `taps`, all from one pass."""
        with tapped(self.backbone, taps) as features:
            prediction = self(x_t, t, cond, to=to)
        return prediction, features

    def _network(self, x: Tensor, t: Tensor, cond: Condition | None) -> Tensor:
        """The backbone's raw output in the native process."""
        if self.scale_input:
            std = self.native.sigma_data
            x = x * lift((self.native.alpha(t) ** 2 * std**2 + self.native.sigma(t) ** 2).rsqrt(), x)
        time = CLOCKS[self.clock](t, self.native).to(x.dtype)
        return self.backbone(x, time, {} if cond is None else cond)


@contextmanager
def tapped(module: nn.Module, taps: Sequence[str]):
    """Within the block, a forward pass of `module` appends the output of each submodule in `taps` to the list yielded."""
    features: list[Tensor] = []

    def keep(part, inputs, output):
        features.append(output[0] if isinstance(output, tuple) else output)

    handles = [module.get_submodule(tap).register_forward_hook(keep) for tap in taps]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()
