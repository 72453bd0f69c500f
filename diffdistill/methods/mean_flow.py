"""MeanFlow: the mean velocity between two times, from its own derivative along the flow."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from diffdistill.denoiser import Condition, either, refuse_no_null
from diffdistill.losses import full
from diffdistill.method import Batch, Loss, MethodConfig, Networks, Term, Update
from diffdistill.methods.flow_map import FlowMapMethod, chosen, masked, those
from diffdistill.prediction import Prediction
from diffdistill.process import lift
from diffdistill.rng import Rng, drawn_from
from diffdistill.tangents import directional
from diffdistill.teacher import Teacher
from diffdistill.times import LogNormal, TimeSampler


@dataclass(frozen=True)
class MeanFlowConfig(MethodConfig):
    """The settings of both kinds."""

    times: TimeSampler = field(default_factory=lambda: LogNormal(-0.4, 1.0))  # t, of the rectified flow
    ends: TimeSampler | None = None  # r, where not both are of `times`; it is then the lesser of the two
    far: float = 0.25  # share of samples with r < t; the others learn the velocity itself
    step: float = 0.0  # in log(sigma / alpha), of a difference in the derivative's place; 0: the exact derivative
    power: float = 1.0  # p of the loss e / (e + constant)^p for the squared error e of a sample; 0: e itself
    constant: float = 0.01  # beside that squared error, which is a sum over the sample

    def __post_init__(self):
        if not 0 < self.far <= 1:
            raise ValueError(f"method.far must be in (0, 1], got {self.far}; with 0 no step longer than 0 is learnt")
        if self.step < 0:
            raise ValueError(f"method.step must not be negative, got {self.step}; 0 is the exact derivative")
        if self.power < 0:
            raise ValueError(f"method.power must not be negative, got {self.power}; 1 is customary")
        if self.constant <= 0:
            raise ValueError(f"method.constant must be positive, got {self.constant}; 0.01 is customary")


class MeanFlowMethod(FlowMapMethod):
    """u(x_t, t, r) = v - (t - r) du/dt, the derivative taken along the flow at fixed r, held to its own right side.

    Both sides agree for one function alone, the mean of the velocity v over the trajectory from t to r. The derivative
    is exact, by one pass in forward mode of the samples with r < t alone, and the right side is detached.

    With `step`, two times stand for the derivative: (t - r) u(x_t, t, r) = (t - s) v + (s - r) u(x_s, s, r), which is
    what remains of it when s goes to t, and where v is straight from t to s holds at every s. Short trainings need it:
    there are few such steps from noise to data.

    Source: Geng et al. 2025 (MeanFlow); Zhang et al. 2025 (AlphaFlow) for two times.
    """

    Config = MeanFlowConfig

    @abstractmethod
    def lesson(
        self, x_t: Tensor, t: Tensor, x0: Tensor, eps: Tensor, cond: Condition, rng: Rng
    ) -> tuple[Tensor, Condition]:
        """v at x_t = (1 - t) x0 + t eps, detached, shape (N, ...), and the condition under which it is learnt."""

    def between(self, x_t: Tensor, t: Tensor, s: Tensor, velocity: Tensor, cond: Condition) -> Tensor:
        """The mean of v from t to s, of which `velocity` is the one at t."""
        return velocity

    def plan(self, step: int) -> Sequence[Update]:
        return (Update((Term("generator", "match", self._match),)),)

    def times(self, rng: Rng) -> tuple[Tensor, Tensor, list[int]]:
        """t, r <= t, and the places at which r < t."""
        config, process = self.config, self.flow.process
        first, second = rng.uniform(), rng.uniform()
        samplers = (config.times, config.ends or config.times)
        t, other = (times(u, process).clamp(max=self.last) for times, u in zip(samplers, (first, second), strict=True))
        r = torch.minimum(t, other)
        if config.ends is None:
            t = torch.maximum(t, other)
        far = chosen(rng.slots, config.far)
        return t, torch.where(masked(t, far), r, t), far

    def target(
        self, x_t: Tensor, t: Tensor, r: Tensor, velocity: Tensor, cond: Condition, rng: Rng, far: Sequence[int]
    ) -> Tensor:
        """The right side, detached; v itself but at the places `far`."""
        asked = far or [0]  # every rank calls its sharded network as often, whatever its slots
        made, side = velocity.clone(), self._difference if self.config.step else self._derivative
        with drawn_from(self.dropouts(), rng.rows(asked)):
            found = side(x_t[asked], t[asked], r[asked], velocity[asked], those(cond, asked))
        made[far] = found[: len(far)]
        return made

    def _derivative(self, x_t: Tensor, t: Tensor, r: Tensor, velocity: Tensor, cond: Condition) -> Tensor:
        """v - (t - r) du/dt."""

        def field(x: Tensor, time: Tensor) -> Tensor:
            return self.mean_velocity(x, time, r, cond)

        _, derivative = directional(field, x_t, t, velocity, torch.ones_like(t))
        return velocity - lift(t - r, x_t) * derivative

    @torch.no_grad()
    def _difference(self, x_t: Tensor, t: Tensor, r: Tensor, velocity: Tensor, cond: Condition) -> Tensor:
        """The mean of v from t to s and of u from there to r, s being `step` nearer to the data, or r."""
        process = self.flow.process
        s = torch.maximum(r, process.time_of(process.ratio(t) * math.exp(-self.config.step)))
        velocity = self.between(x_t, t, s, velocity, cond)
        later = self.mean_velocity(x_t - lift(t - s, x_t) * velocity, s, r, cond)
        share = torch.where(t > r, (t - s) / (t - r), 1.0)
        return lift(share, x_t) * velocity + lift(1 - share, x_t) * later

    def _match(self, batch: Batch, rng: Rng) -> Loss:
        images = batch["images"]
        t, r, far = self.times(rng)
        eps = rng.normal(images.x0.shape[1:])
        x_t = self.flow.process.perturb(images.x0, eps, t)
        velocity, cond = self.lesson(x_t, t, images.x0, eps, images.cond, rng)
        target = self.target(x_t, t, r, velocity, cond, rng, far)
        error = full(self.mean_velocity(x_t, t, r, cond)) - full(target)
        square = error.square().flatten(1).sum(1)
        weight = (square.detach() + self.config.constant) ** -self.config.power
        return Loss(weight * square, {"velocity": square.detach() / error[0].numel()})


class MeanFlow(MeanFlowMethod):
    """MeanFlow by distillation: v is the teacher's, guided or not, whatever its process.

    Source: Geng et al. 2025 (MeanFlow), with a teacher's velocity in the place of a pair's.
    """

    @dataclass(frozen=True)
    class Config(MeanFlowConfig):
        solver: Literal["euler", "heun"] = "heun"  # of the teacher, through `step`

    reference = "Geng et al. 2025, arXiv:2505.13447"
    presets = ("cifar10",)
    needs_teacher = True

    def __init__(self, config: Config, networks: Networks):
        super().__init__(config, networks)
        self._guide = Teacher(self.teacher.denoiser.seen_in(self.flow.process), guidance=self.teacher.guidance)

    @torch.no_grad()
    def lesson(
        self, x_t: Tensor, t: Tensor, x0: Tensor, eps: Tensor, cond: Condition, rng: Rng
    ) -> tuple[Tensor, Condition]:
        return self._guide(x_t, t, cond, to=Prediction.VELOCITY), cond

    def between(self, x_t: Tensor, t: Tensor, s: Tensor, velocity: Tensor, cond: Condition) -> Tensor:
        if self.config.solver == "euler":
            return velocity
        ahead = x_t - lift(t - s, x_t) * velocity
        return (velocity + self._guide(ahead, s, cond, to=Prediction.VELOCITY)) / 2


class MeanFlowTraining(MeanFlowMethod):
    """MeanFlow by training: v is eps - x0, whose mean over the pairs behind x_t is the flow's.

    Guidance is by the network itself.

    With guidance, v is guidance (eps - x0) + mixing u(x_t, t, t | class) + (1 - guidance - mixing) u(x_t, t, t | none),
    which leads to a guided flow of scale guidance / (1 - mixing) that needs one evaluation.

    Source: Geng et al. 2025 (MeanFlow), section 4.2 and appendix for the mixing.
    """

    @dataclass(frozen=True)
    class Config(MeanFlowConfig):
        guidance: float = 1.0  # omega, the share of the pair's own velocity; 1 without mixing is none
        mixing: float = 0.0  # kappa, the share of the network's own guess under the class
        guided_from: float = 0.0  # the times t between which v is guided
        guided_to: float = 1.0  # the later of them
        condition_dropout: float = 0.0  # share of samples trained without condition, for guidance

        def __post_init__(self):
            MeanFlowConfig.__post_init__(self)
            if not 0 <= self.mixing < 1:
                raise ValueError(f"method.mixing must be in [0, 1), got {self.mixing}")
            if not 0 <= self.guided_from < self.guided_to <= 1:
                raise ValueError(
                    "method.guided_from and method.guided_to must be 0 <= from < to <= 1, got "
                    f"{self.guided_from} and {self.guided_to}"
                )
            if not 0 <= self.condition_dropout < 1:
                raise ValueError(f"method.condition_dropout must be in [0, 1), got {self.condition_dropout}")

        @property
        def guides(self) -> bool:
            return (self.guidance, self.mixing) != (1.0, 0.0)

    reference = "Geng et al. 2025, arXiv:2505.13447"
    presets = ("cifar10",)
    needs_teacher = False

    def __init__(self, config: Config, networks: Networks):
        super().__init__(config, networks)
        backbone = self.generator.denoiser.backbone
        if config.guides or config.condition_dropout:
            if not backbone.condition_names:
                raise ValueError("method.guidance and method.condition_dropout need a network with classes")
            refuse_no_null(backbone, "method.guidance, mixing or condition_dropout")

    @torch.no_grad()
    def lesson(
        self, x_t: Tensor, t: Tensor, x0: Tensor, eps: Tensor, cond: Condition, rng: Rng
    ) -> tuple[Tensor, Condition]:
        config, velocity = self.config, eps - x0
        if not (config.guides or config.condition_dropout):
            return velocity, cond
        backbone = self.generator.denoiser.backbone
        null, drop = backbone.null(cond), rng.uniform() < config.condition_dropout
        under = either(drop, null, cond)
        if config.guides:
            twice, both = torch.cat([t, t]), backbone.join(cond, null)
            kept, free = self.mean_velocity(torch.cat([x_t, x_t]), twice, twice, both).chunk(2)
            omega, kappa = config.guidance, config.mixing
            inside = (config.guided_from <= t) & (t <= config.guided_to) & ~drop
            guided = omega * velocity + kappa * kept + (1 - omega - kappa) * free
            velocity = torch.where(inside.reshape(-1, *[1] * (x0.ndim - 1)), guided, velocity)
        return velocity, under
