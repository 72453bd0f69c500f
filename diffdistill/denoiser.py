"""Denoiser: a backbone, the process it was trained in, and what its output means, behind one call.

Teacher, generator and critic each hold one. Callers speak of clean, noisy and time in the denoiser's `process`; that
the network wants scaled inputs, its own clock, or was trained in another process, is settled here and nowhere else.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from diffdistill.prediction import Prediction, conversion, convert
from diffdistill.process import VE, Process, lift
from diffdistill.told import SCALE, SPAN, Told

Condition = Mapping[str, Tensor]


def either(mask: Tensor, first: Condition, second: Condition) -> Condition:
    """The entries of `first` for the samples at which mask (N,) is true, and of `second` for the others."""

    def pick(one: Tensor, other: Tensor) -> Tensor:
        return torch.where(mask.reshape(-1, *[1] * (one.ndim - 1)), one, other)

    return {name: pick(first[name], second[name]) for name in second}


def refuse_no_null(backbone: "Backbone", setting: str) -> None:
    """Refuses a network without the unconditional branch that `setting`, a key and its value, needs."""
    try:
        backbone.null({name: torch.zeros(1, dtype=torch.long) for name in backbone.condition_names})
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from error


class Backbone(nn.Module, ABC):
    """A network behind one signature; `diffdistill.backbones` adapts real ones to it."""

    sample_shape: tuple[int, ...]
    condition_names: tuple[str, ...]
    told: Told  # what the network is told besides its time and `condition_names`

    def __init__(self):
        super().__init__()
        self.told = Told()

    @abstractmethod
    def forward(self, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
        """The raw output, of the shape of x (N, *sample_shape), at the network's own time (N,).

        What the network is `told` it finds in `cond` by name, shape (N,): "span", how far a flow map leads in the time
        of a rectified flow, 0 where it is not there, and "scale", of guidance, there 1.
        """

    def tell(self, name: str) -> None:
        """From here on the network is told "span" or "scale"; at first that makes no difference to it.

        Raises:
            ValueError: the adapter has no way to tell it.
        """
        raise ValueError(f"a {type(self).__name__} cannot be told its {name}")

    def folded(self, **numbers: float) -> "Backbone":
        """A network of its own that is told nothing, and equals this one where it is told these numbers.

        Raises:
            ValueError: the adapter has no way to make one.
        """
        raise ValueError(f"a {type(self).__name__} that is told {', '.join(numbers)} cannot be made one that is not")

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


# What the network is told about t: the index of a DDPM table (between entries a fraction, below the first a negative
# one); EDM's 1/4 ln sigma, times 1000; a unit time, times 1000; or a bounded log-ratio.
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
        scale_input: feed x_t / sqrt(alpha^2 sigma_data^2 + sigma^2), EDM's c_in (Karras et al. 2022, table 1). With
            source=Prediction.F and clock="edm" that is EDM's whole preconditioning.
        process: the process that callers speak, by default `native`. Another one is matched by signal-to-noise ratio,
            which leaves the trajectories of the PF-ODE unchanged up to scale.
        boundary: the noise level on VE at which the predicted x0 is x_t itself, whatever the network gives (Song et al.
            2023); for source=Prediction.F. At 0 that is EDM's own x0.
    Raises:
        ValueError: a boundary above 0 with another native process or source, or not below t_max.
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
        boundary: float = 0.0,
    ):
        super().__init__()
        if boundary and not (isinstance(native, VE) and source is Prediction.F and 0 < boundary < native.t_max):
            raise ValueError(
                f"boundary={boundary} must be a noise level below sigma_max of a network with process ve, prediction "
                f"f, got one with {native} and {source.value}; leave boundary out"
            )
        self.backbone = backbone
        self.native, self.source, self.clock, self.scale_input = native, source, clock, scale_input
        self.process = native if process is None else process
        self.boundary = boundary

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return self.backbone.sample_shape

    def seen_in(self, process: Process) -> "Denoiser":
        """The same network, sharing its parameters, for callers who speak `process`."""
        return self._changed(process=process)

    def bounded(self, boundary: float) -> "Denoiser":
        """The same network, sharing its parameters, whose x0 is its input at the noise level `boundary`."""
        return self._changed(boundary=boundary)

    def told_no_more(self, t: float, toward: float, scale: float) -> "Denoiser":
        """A denoiser of a network of its own that is told its time alone, and equals this one for flow maps as long as
        from t to `toward`, and for guidance at that scale."""
        span = self._span(*(torch.tensor([time], dtype=torch.float64) for time in (t, toward))).item()
        numbers = {SPAN: span, SCALE: scale}
        return self._changed(backbone=self.backbone.folded(**{name: numbers[name] for name in self.backbone.told}))

    def _changed(self, *, backbone: Backbone | None = None, **changes) -> "Denoiser":
        kept = {"scale_input": self.scale_input, "process": self.process, "boundary": self.boundary}
        backbone = self.backbone if backbone is None else backbone
        return Denoiser(backbone, self.native, self.source, clock=self.clock, **{**kept, **changes})

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Condition | None = None,
        *,
        to: Prediction = Prediction.X0,
        toward: Tensor | None = None,
    ) -> Tensor:
        """The prediction `to` at x_t of shape (N, ...) and t of shape (N,), in the shape and dtype of x_t.

        toward: of a network that is told spans, the time r <= t of shape (N,) at which its flow map is to arrive; x_t
            moved there by DDIM's step from this prediction is the map. Without it, and at r = t, the prediction is
            that of an ordinary denoiser.

        t lies in (0, t_max]: at 0 the sample is the data, and clocks and scores are infinite. Where the caller's
        process is noisier than any native time (alpha = 0 against a table that ends above it), the network is asked
        at its noisiest time about the same noise; its x0 is passed on, and the rest follows in the caller's law.
        """
        native = self.native
        if toward is not None:
            if SPAN not in self.backbone.told:
                raise ValueError("the network is not told where a flow map leads; Backbone.tell changes that")
            cond = {**(cond or {}), SPAN: self._span(t, toward).to(x_t.dtype)}
        if native is self.process and not self.boundary:
            return convert(self._network(x_t, t, cond), x_t, t, native, source=self.source, to=to)
        time = native.time_of(self.process.ratio(t))
        norm = (native.alpha(time) ** 2 + native.sigma(time) ** 2).sqrt()
        norm = norm / (self.process.alpha(t) ** 2 + self.process.sigma(t) ** 2).sqrt()
        output = self._network(lift(norm, x_t) * x_t, time, cond)
        # x0 = p0 output + n0 norm x_t in the native process, then result = r0 x0 + s0 x_t in the caller's. The scalars
        # are composed first, in float64: near the data each alone is huge, and their float32 tensors would cancel.
        p0, n0 = self._clean(time)
        r0, s0 = conversion(t, self.process, source=Prediction.X0, to=to)
        return lift(r0 * p0, x_t) * output.to(x_t.dtype) + lift(r0 * n0 * norm + s0, x_t) * x_t

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

    def features(self, x_t: Tensor, t: Tensor, cond: Condition | None = None, *, taps: Sequence[str]) -> list[Tensor]:
        """The outputs of the backbone's submodules `taps` alone; what lies behind the last of them is not computed.

        Sharded backbones are run to the end, since FSDP2 puts its parameters away in a hook behind the whole forward.
        """
        whole = any(isinstance(part, FSDPModule) for part in self.backbone.modules())
        with tapped(self.backbone, taps, leave=not whole) as features:
            self(x_t, t, cond)
        return features

    def _span(self, t: Tensor, toward: Tensor) -> Tensor:
        """t - toward in the time of a rectified flow."""
        here, there = (self.process.sigma(s) / (self.process.alpha(s) + self.process.sigma(s)) for s in (t, toward))
        return here - there

    def _clean(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """The scalars of x0 = first * output + second * x in the native process, each (N,)."""
        p0, n0 = conversion(time, self.native, source=self.source, to=Prediction.X0)
        if not self.boundary:
            return p0, n0
        # Song et al. 2023, in the released code's form: what is under the root of c_out keeps its noise level
        above, std = time - self.boundary, self.native.sigma_data
        return p0 * (above / time), std**2 / (above**2 + std**2)

    def _network(self, x: Tensor, t: Tensor, cond: Condition | None) -> Tensor:
        """The backbone's raw output in the native process."""
        if self.scale_input:
            std = self.native.sigma_data
            x = x * lift((self.native.alpha(t) ** 2 * std**2 + self.native.sigma(t) ** 2).rsqrt(), x)
        time = CLOCKS[self.clock](t, self.native).to(x.dtype)
        return self.backbone(x, time, {} if cond is None else cond)


class _Seen(Exception):
    """Every tap has fired: leaves a forward pass whose remaining output nobody reads."""


@contextmanager
def tapped(module: nn.Module, taps: Sequence[str], *, leave: bool = False):
    """Within the block, a forward pass of `module` gives the output of each submodule in `taps` to the list yielded, in
    the order of `taps`. With `leave`, the pass and the block end as soon as the list is complete."""
    features: list[Tensor] = [None] * len(taps)
    missing = set(range(len(taps)))

    def keep(place, output):
        features[place] = output[0] if isinstance(output, tuple) else output
        missing.discard(place)
        if leave and not missing:
            raise _Seen

    handles = [
        module.get_submodule(tap).register_forward_hook(lambda part, inputs, output, place=place: keep(place, output))
        for place, tap in enumerate(taps)
    ]
    try:
        yield features
    except _Seen:
        pass
    finally:
        for handle in handles:
            handle.remove()
