"""What continuous-time consistency methods share: a network seen in TrigFlow, its tangent, and the loss towards it."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.denoiser import Condition
from diffdistill.generator import refuse_flow_map
from diffdistill.losses import consistency_tangent, full, normalised_tangent
from diffdistill.method import Batch, Loss, Method, MethodConfig, Networks, PlayerSpec, Term, Update
from diffdistill.prediction import Prediction
from diffdistill.process import Process, Trig
from diffdistill.readings import by_noise
from diffdistill.rng import Rng
from diffdistill.tangents import Exact, Rotational, Tangents
from diffdistill.times import LogNormal, TimeSampler


@dataclass(frozen=True)
class ConsistencyConfig(MethodConfig):
    """The settings of every continuous-time consistency method."""

    times: TimeSampler = field(default_factory=lambda: LogNormal(-1.0, 1.4))  # of the noised images
    tangents: Tangents = field(default_factory=Exact)  # how the derivative along the trajectory is taken
    warmup_steps: int = 1000  # from the teacher's own field to the whole tangent; the papers have 10000
    warmup: Literal["scm", "rcm"] = "scm"  # what the teacher's part falls as: cos^2 t, cos t sqrt(1 - r^2 sin^2 t)
    normalisation: Literal["l2", "rms", "clip", "none"] = "l2"  # of the tangent, sample by sample; l2 is the papers'
    constant: float = 0.1  # added to the norm; another number for rms than for l2
    adaptive: bool = False  # a learnt weight of the time, a player of its own
    discrete: bool = False  # two times `tangents.step` apart, for tangents rotational alone
    prior: bool = False  # once more the weight alpha / sigma, which the tangent has already

    def __post_init__(self):
        if self.warmup_steps < 0:
            raise ValueError(f"method.warmup_steps must not be negative, got {self.warmup_steps}; 0 is no warm-up")
        if self.constant <= 0:
            raise ValueError(f"method.constant must be positive, got {self.constant}; 0.1 is customary")
        if self.discrete and not isinstance(self.tangents, Rotational):
            raise ValueError(
                "method.discrete compares two times, whose distance is tangents.step; give tangents: "
                "{name: rotational, step: 0.1}, or discrete: false"
            )


class TimeWeight(nn.Module):
    """w(t), a trainable sum of cosines, 0 at first: minimising e^w E - w makes it -log E of the loss E at t.

    It stands for the paper's one-layer network, less the logarithm of a sample's size, so that 0 is about its end where
    tangents are normalised by l2.
    """

    def __init__(self, waves: int = 8):
        super().__init__()
        self.register_buffer("waves", 2.0 * torch.arange(1, waves + 1), persistent=False)
        self.sum = nn.Linear(waves, 1)
        nn.init.zeros_(self.sum.weight)
        nn.init.zeros_(self.sum.bias)

    def forward(self, t: Tensor) -> Tensor:
        """w of shape (N,) at t of shape (N,), in [0, pi / 2]."""
        return self.sum((t.to(self.waves.dtype)[:, None] * self.waves).cos())[:, 0]


class ContinuousConsistency(Method):
    """A network whose prediction of x0 learns to be the end of the trajectory through (x_t, t), whatever t.

    That prediction is f: it is x itself at t = 0 wherever the network predicts anything but x0, which is what makes the
    exact f the only one whose derivative along trajectories is 0. The generator stays in its own process, where it is
    sampled and exported; the loss sees it in TrigFlow of the same sigma_data, in which F is the velocity. Times beyond
    the process's noisiest are taken as that one, of which the network's clock must still tell the derivative.

    Of a network that predicts eps, F divides by cos t, and so do its gradients near pure noise; v and f do not.

    The loss is |F - sg(F) - g|^2 with F in units of sigma_data and g the normalised tangent, in the norm by which it is
    normalised: summed over a sample for l2, its mean for the others. Its value says nothing about progress (with l2 it
    is about 1 throughout); the readings `tangent` do, root mean squares of g before it is normalised.

    Source: Lu and Song 2024 (sCM).
    """

    Config = ConsistencyConfig
    reference = "Lu and Song 2024, arXiv:2410.11081"
    reads = "images"
    trains = "generator, weight where it is adaptive"

    def __init__(self, config: ConsistencyConfig, networks: Networks):
        self.config, self.teacher = config, networks.teacher
        self.generator = networks.new_generator()
        denoiser = self.generator.denoiser
        _refuse_unfit(self.generator.step_rule, len(self.generator.grid), denoiser.source)
        self.process = _trig_of(denoiser.process)
        self._student = denoiser.seen_in(self.process)
        noisiest = denoiser.process.ratio(torch.tensor([denoiser.process.t_max], dtype=torch.float64))
        # a little below, so that no rounding takes the native time to its end, where it stands still
        self._last = self.process.time_of(noisiest * (1 - config.tangents.ahead) * (1 - 1e-4)).item()
        self.weight = _beside(denoiser) if config.adaptive else None

    @abstractmethod
    def velocity(self, x_t: Tensor, t: Tensor, x0: Tensor, z: Tensor, cond: Condition) -> Tensor:
        """dx/dt of the trajectory through x_t = cos t x0 + sin t z, detached, shape (N, ...)."""

    def players(self) -> Mapping[str, PlayerSpec]:
        weight = {} if self.weight is None else {"weight": PlayerSpec.of(self.weight)}
        return {"generator": PlayerSpec.of(self.generator.denoiser)} | weight

    def streams(self) -> frozenset[str]:
        return frozenset({"images"})

    def plan(self, step: int) -> Sequence[Update]:
        seen: list[tuple[Tensor, Tensor]] = []  # the times of a micro-batch and the errors there, for the weight's term

        def match(batch: Batch, rng: Rng) -> Loss:
            images = batch["images"]
            t, error, readings = self._error(images.x0, images.cond, rng, step)
            seen[:] = [(t, error.detach())]
            scale = torch.ones_like(error)
            if self.weight is not None:
                scale = self.weight(t).exp().detach()  # detached: the weight learns in its own term
            if self.config.prior:
                scale = scale / self.process.ratio(t).to(scale.dtype)
            return Loss(scale * error, readings)

        def weigh(batch: Batch, rng: Rng) -> Loss:
            t, error = seen.pop()
            w = self.weight(t)
            return Loss(w.exp() * error - w, {"weight": w.detach()})

        terms = (Term("generator", "match", match),)
        return (Update(terms if self.weight is None else (*terms, Term("weight", "weigh", weigh))),)

    def warmup(self, step: int) -> float:
        """r, from 0 to 1."""
        return min(1.0, step / self.config.warmup_steps) if self.config.warmup_steps else 1.0

    def tangent(self, x_t: Tensor, t: Tensor, velocity: Tensor, student: Tensor, cond: Condition, step: int) -> Tensor:
        """g before it is normalised, detached; `student` is F at (x_t, t)."""

        def field(x: Tensor, time: Tensor) -> Tensor:
            return self._student(x, time, cond, to=Prediction.VELOCITY)

        tangents = self.config.tangents
        derivative = tangents(field, x_t, t, velocity)
        before = t - tangents.spacing(t) if self.config.discrete else None
        return consistency_tangent(
            x_t,
            velocity,
            student.detach(),
            derivative,
            t,
            warmup=self.warmup(step),
            form=self.config.warmup,
            before=before,
        )

    def _error(self, x0: Tensor, cond: Condition, rng: Rng, step: int) -> tuple[Tensor, Tensor, Mapping]:
        """Times, the error there with its gradient, both (N,), and readings."""
        config, std = self.config, self.process.sigma_data
        t = config.times(rng.uniform(), self.process).clamp(max=self._last)
        eps = rng.normal(x0.shape[1:])
        x_t = self.process.perturb(x0, eps, t)
        velocity = self.velocity(x_t, t, x0, std * eps, cond)
        student = full(self._student(x_t, t, cond, to=Prediction.VELOCITY))
        g = self.tangent(x_t, t, velocity, student, cond, step)
        goal = normalised_tangent(g, by=config.normalisation, constant=config.constant)
        # F - sg(F) is exactly 0, in every precision; the gradient is all that it is there for
        square = ((student - student.detach()) / std - goal).square().flatten(1)
        error = square.sum(1) if config.normalisation == "l2" else square.mean(1)
        return t, error, by_noise("tangent", g.square().flatten(1).mean(1).sqrt(), t, self.process)


def _trig_of(process: Process) -> Trig:
    """TrigFlow of the same sigma_data, or the process itself where it is one."""
    return process if isinstance(process, Trig) else Trig(sigma_data=process.sigma_data)


def _beside(denoiser: nn.Module) -> TimeWeight:
    """A weight on the device and in the precision of the denoiser."""
    parameter = next(denoiser.parameters())
    return TimeWeight().to(parameter.device, parameter.dtype)


def _refuse_unfit(step_rule: str, steps: int, source: Prediction) -> None:
    refuse_flow_map(step_rule, "a consistency function")
    if steps > 1 and step_rule != "renoise":
        raise ValueError(
            f"generator.step_rule={step_rule} follows an ODE, and a consistency function knows its end alone; give "
            "step_rule: renoise, or a grid of one time"
        )
    if source is Prediction.X0:
        raise ValueError(
            "the generator's network predicts x0, which at t = 0 is not x by itself, and without that a consistency "
            "function is not determined; start from a network with prediction f, v, velocity or eps"
        )
