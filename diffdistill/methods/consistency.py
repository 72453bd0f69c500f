"""Consistency models: one function that takes every point of a trajectory to its end."""

import copy
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.denoiser import Condition, refuse_no_null
from diffdistill.distances import Distance, PseudoHuber
from diffdistill.generator import refuse_flow_map
from diffdistill.method import AverageSpec, Batch, Loss, Method, MethodConfig, Networks, PlayerSpec, Term, Update
from diffdistill.prediction import Prediction, conversion
from diffdistill.rng import Rng, drawn_from, replace_dropout
from diffdistill.solvers import SOLVERS
from diffdistill.time_pairs import ContinuousPairs, GridPairs, TimePair, TimePairs, UniformPairs
from diffdistill.told import SCALE

TARGET = "target"


@dataclass(frozen=True)
class ConsistencyConfig(MethodConfig):
    """The settings of both kinds; each adds its own, and gives others as defaults."""

    pairs: TimePairs = field(default_factory=UniformPairs)  # of times at which the function must agree
    distance: Distance = field(default_factory=PseudoHuber)  # between its values at both
    weight: Literal["uniform", "gap", "c_out"] = "uniform"  # 1, 1 / (t - r), or 1 / c_out(t)^2 of EDM
    target_decay: float = 0.0  # mu of the average that gives the value at r; 0: the generator itself
    target_annealed: bool = False  # mu at step k is target_decay^(N(0) / N(k)) for N(k) levels

    def __post_init__(self):
        if not 0 <= self.target_decay < 1:
            raise ValueError(
                f"method.target_decay must be in [0, 1), got {self.target_decay}; 0 is the generator itself"
            )
        if self.target_annealed and not (self.target_decay and isinstance(self.pairs, GridPairs)):
            raise ValueError(
                "method.target_annealed=true raises target_decay with the number of levels, and here is "
                f"target_decay={self.target_decay} on {type(self.pairs).__name__}; give a positive target_decay and "
                "pairs on levels, or leave it out"
            )

    def decay(self, step: int) -> float:
        """mu at a step, exp(s0 ln mu0 / N(k)) where it is annealed (Song et al. 2023); s0 is N(0) there."""
        if not self.target_annealed:
            return self.target_decay
        return self.target_decay ** (self.pairs.levels(0) / self.pairs.levels(step))


class ConsistencyMethod(Method):
    """A generator whose value at x_t is held to its value at x_r, r < t, on the same trajectory.

    The end of the trajectory is its own value: where r is there, the target is x_r itself and no network is asked. So
    the boundary condition, without which any constant would do, holds exactly for every network and process; on VE,
    `generator.boundary` builds it into the generator too, as in the published models.

    The value at r is detached, and sees the dropout masks of the value at t. What a kind adds is `earlier`, x_r.

    Source: Song et al. 2023 (Consistency Models); Song and Dhariwal 2023 (iCT) for targets without an average.
    """

    Config = ConsistencyConfig
    reads = "images"
    trains = "generator"

    def __init__(self, config: ConsistencyConfig, networks: Networks):
        self.config, self.teacher = config, networks.teacher
        self.generator = networks.new_generator()
        refuse_flow_map(self.generator.step_rule, "a consistency function")
        if len(self.generator.grid) > 1 and self.generator.step_rule != "renoise":
            raise ValueError(
                f"generator.step_rule={self.generator.step_rule} follows the ODE of a denoiser, and a consistency "
                "function leaps to its end; take step_rule renoise, or a grid of one time"
            )
        boundary = self.generator.denoiser.boundary
        end = self.generator.process.warp(torch.zeros(1, dtype=torch.float64)).item()
        if boundary and not (isinstance(config.pairs, GridPairs) and math.isclose(boundary, end, rel_tol=1e-9)):
            raise ValueError(
                f"generator.boundary={boundary} must be where the trajectories end: at the lowest level of a grid of "
                f"method.pairs, {end:g} here, and at 0 for continuous pairs; set it so, or leave it out"
            )
        self._distance = config.distance.measure(networks.perceptual)
        self._target, self._target_dropouts = self.generator.denoiser, []
        if config.target_decay:
            self._target = copy.deepcopy(self.generator.denoiser).requires_grad_(False)
            self._target_dropouts = replace_dropout(self._target)

    @abstractmethod
    def earlier(
        self, x_t: Tensor, x0: Tensor, eps: Tensor, pair: TimePair, cond: Condition, guidance: Tensor | None
    ) -> Tensor:
        """x_r of shape (N, ...) on the trajectory of x_t = alpha x0 + sigma eps, without graph."""

    def guidance(self, rng: Rng) -> Tensor | None:
        """A scale for each sample, shape (N,), where they are drawn."""
        return None

    def players(self) -> Mapping[str, PlayerSpec]:
        return {"generator": PlayerSpec.of(self.generator.denoiser)}

    def streams(self) -> frozenset[str]:
        return frozenset({"images"})

    def averages(self) -> Mapping[str, AverageSpec]:
        if not self.config.target_decay:
            return {}
        return {TARGET: AverageSpec("generator", self._target, self.config.decay)}

    def frozen(self) -> Mapping[str, nn.Module]:
        return {"lpips": self._distance} if isinstance(self._distance, nn.Module) else {}

    def plan(self, step: int) -> Sequence[Update]:
        def agree(batch: Batch, rng: Rng) -> Loss:
            images, process = batch["images"], self.generator.process
            pair, eps = self.config.pairs(rng.uniform(), process, step), rng.normal(images.x0.shape[1:])
            x_t, guidance = process.perturb(images.x0, eps, pair.t), self.guidance(rng)
            told = images.cond if self.generator.guidance is None else {**images.cond, SCALE: guidance.to(x_t.dtype)}
            with torch.no_grad():  # detached: the value at r is what the one at t learns from
                x_r = self.earlier(x_t, images.x0, eps, pair, images.cond, guidance)
                target = self._value_at_r(x_r, pair, told, rng)
            far = self._distance(self.generator.denoiser(x_t, pair.t, told), target)
            return Loss(self._weight(pair).to(far.dtype) * far, {"distance": far.detach()})

        return (Update((Term("generator", "agree", agree),)),)

    def _value_at_r(self, x_r: Tensor, pair: TimePair, cond: Condition, rng: Rng) -> Tensor:
        asked = torch.where(pair.ends, pair.t, pair.r)  # networks know no time 0
        with drawn_from(self._target_dropouts, rng):
            value = self._target(x_r, asked, cond)
        return torch.where(pair.ends.reshape(-1, *[1] * (x_r.ndim - 1)), x_r, value)

    def _weight(self, pair: TimePair) -> Tensor:
        match self.config.weight:
            case "uniform":
                return torch.ones_like(pair.t)
            case "gap":
                return 1 / (pair.t - pair.r)
            case "c_out":
                c_out, _ = conversion(pair.t, self.generator.process, source=Prediction.F, to=Prediction.X0)
                return 1 / c_out**2


class Consistency(ConsistencyMethod):
    """Consistency distillation: x_r is one step of the teacher's ODE from x_t.

    On a VP table with 51 uniform levels, solver ddim and a range of guidance it is latent consistency distillation
    (LCM). With `generator.guidance` the student's network is told the scale of each sample, and sampled at that one;
    without, as in LCM-LoRA, it learns the mean of the scales' targets. Deviations there: the boundary is at t = 0,
    where LCM's is at the table's first entry; and c_skip and c_out are those of the prediction, not LCM's.

    Deviation from the released code: masks of dropout, which is 0 in the paper, are those of the value at t.

    Source: Song et al. 2023, consistency distillation; Luo et al. 2023 (LCM).
    """

    @dataclass(frozen=True)
    class Config(ConsistencyConfig):
        solver: Literal[tuple(SOLVERS)] = "heun"  # of the teacher's step from t to r
        guidance_range: tuple[float, ...] = ()  # scales w of u + w (c - u), drawn uniformly; empty: teacher.guidance

        def __post_init__(self):
            ConsistencyConfig.__post_init__(self)
            scales = list(self.guidance_range)
            if scales and (len(scales) != 2 or scales[0] >= scales[1]):
                raise ValueError(
                    f"method.guidance_range must be two scales, the lower first, got {scales}; for a single one set "
                    "teacher.guidance"
                )

    reference = "Song et al. 2023, arXiv:2303.01469; Luo et al. 2023, arXiv:2310.04378"
    needs_teacher = True
    presets = ("cifar10", "imagenet64")

    def __init__(self, config: Config, networks: Networks):
        super().__init__(config, networks)
        if not self.teacher.process.same_law(self.generator.process):
            raise ValueError(
                f"the teacher speaks {self.teacher.process} and the generator {self.generator.process}, with another "
                "alpha or sigma: one trajectory needs one law; wrap a denoiser by Denoiser.seen_in(process)"
            )
        told, scales = self.generator.guidance, config.guidance_range
        if told is not None and not (scales and scales[0] <= told <= scales[1]):
            raise ValueError(
                f"generator.guidance={told} must be one of the scales that are learnt, and method.guidance_range is "
                f"{list(scales)}; change one of them, or leave generator.guidance out"
            )
        if scales:
            refuse_no_null(self.teacher.denoiser.backbone, f"method.guidance_range={list(scales)}")

    def guidance(self, rng: Rng) -> Tensor | None:
        if not self.config.guidance_range:
            return None
        low, high = self.config.guidance_range
        return low + (high - low) * rng.uniform()

    def earlier(
        self, x_t: Tensor, x0: Tensor, eps: Tensor, pair: TimePair, cond: Condition, guidance: Tensor | None
    ) -> Tensor:
        return self.teacher.solve(x_t, (pair.t, pair.r), cond, solver=self.config.solver, guidance=guidance)


class ConsistencyTraining(ConsistencyMethod):
    """Consistency training, without a teacher: x_r is the same image with the same noise, at r.

    With growing levels, uniform pairs and an annealed average for target it is CT; with doubling levels, log-normal
    pairs, weight gap and no average it is iCT; with continuous pairs and weight gap, from a diffusion model's weights,
    it is ECT, the default.

    A loss that is not a square changes the optimum where trajectories cross: the mean of the normalised difference is
    not the normalised mean.

    Source: Song et al. 2023 (CT); Song and Dhariwal 2023 (iCT); Geng et al. 2024 (ECT).
    """

    @dataclass(frozen=True)
    class Config(ConsistencyConfig):
        pairs: TimePairs = field(default_factory=ContinuousPairs)  # of times at which the function must agree
        weight: Literal["uniform", "gap", "c_out"] = "gap"  # 1, 1 / (t - r), or 1 / c_out(t)^2 of EDM

    reference = "Song et al. 2023, arXiv:2303.01469; 2024, arXiv:2310.14189; Geng 2024, arXiv:2406.14548"
    needs_teacher = False
    presets = ("cifar10", "imagenet64")

    def earlier(
        self, x_t: Tensor, x0: Tensor, eps: Tensor, pair: TimePair, cond: Condition, guidance: Tensor | None
    ) -> Tensor:
        return self.generator.process.perturb(x0, eps, pair.r)
