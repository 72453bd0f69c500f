"""Shortcut models: a long step held to the two half as long that lead to the same place."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.denoiser import Condition
from diffdistill.losses import full
from diffdistill.method import AverageSpec, Batch, Loss, MethodConfig, Networks, Term, Update
from diffdistill.methods.flow_map import FlowMapMethod, chosen, masked, those
from diffdistill.prediction import Prediction
from diffdistill.process import lift
from diffdistill.rng import Rng, drawn_from, replace_dropout
from diffdistill.straightness import rectified

TARGET = "target"


class Shortcut(FlowMapMethod):
    """s(x_t, t, 2d) = (s(x_t, t, d) + s(x_(t-d), t - d, d)) / 2, from a step of 1/128 up to one from noise to data.

    A share of each batch learns that, at a step and a time drawn from the grid of that step; the others learn the
    velocity eps - x0 under the smallest step, at a time of the finest grid. Steps are of the time from the data to the
    first one of the generator's grid.

    Source: Frans et al. 2024 (Shortcut Models), without their guidance.
    """

    @dataclass(frozen=True)
    class Config(MethodConfig):
        levels: int = 7  # halvings from the whole way to the smallest step: 7 for 1/128
        bootstrap: float = 0.125  # share of samples that learn a step from two half as long
        target_decay: float = 0.999  # of the average that takes those; 0: the generator itself
        clip: float = 0.0  # bound on the state between the two; 4 in the paper, for latents; 0: none

        def __post_init__(self):
            if self.levels < 1:
                raise ValueError(f"method.levels must be at least 1, got {self.levels}")
            if not 0 < self.bootstrap < 1:
                raise ValueError(f"method.bootstrap must be in (0, 1), got {self.bootstrap}; 0.125 is the paper's")
            if not 0 <= self.target_decay < 1:
                raise ValueError(
                    f"method.target_decay must be in [0, 1), got {self.target_decay}; 0 is the generator itself"
                )
            if self.clip < 0:
                raise ValueError(f"method.clip must not be negative, got {self.clip}; 0 is none")

    reference = "Frans et al. 2024, arXiv:2410.12557"
    presets = ("cifar10",)
    needs_teacher = False

    def __init__(self, config: Config, networks: Networks):
        super().__init__(config, networks)
        process, native = self.flow.process, self.generator.process
        first = torch.tensor([self.generator.grid[0]], dtype=torch.float64)
        self.first = process.time_of(native.ratio(first)).item()
        self._target, self._target_dropouts = self.generator.denoiser, []
        if config.target_decay:
            self._target = copy.deepcopy(self.generator.denoiser).requires_grad_(False)
            self._target_dropouts = replace_dropout(self._target)
        self._target_flow = rectified(self._target)

    def averages(self) -> Mapping[str, AverageSpec]:
        decay = self.config.target_decay
        return {TARGET: AverageSpec("generator", self._target, lambda step: decay)} if decay else {}

    def plan(self, step: int) -> Sequence[Update]:
        return (Update((Term("generator", "match", self._match),)),)

    def times(self, rng: Rng) -> tuple[Tensor, Tensor, list[int]]:
        """t, the step from there, both (N,), and the places where a step is learnt from its halves."""
        levels, long = self.config.levels, chosen(rng.slots, self.config.bootstrap)
        level = torch.where(masked(rng.uniform(), long), rng.integers(levels), levels)
        count = 2.0 ** level.double()  # of such steps from the noise to the data
        place = 1 + (rng.uniform() * count).floor()
        return self.first * place / count, self.first / count, long

    def halves(self, x_t: Tensor, t: Tensor, step: Tensor, cond: Condition) -> Tensor:
        """The mean velocity of two steps of half that size, without graph."""
        half = step / 2
        with torch.no_grad():
            first = self._leap(x_t, t, t - half, cond)
            between = x_t - lift(half, x_t) * first
            if self.config.clip:
                between = between.clamp(-self.config.clip, self.config.clip)
            return (first + self._leap(between, t - half, t - step, cond)) / 2

    def _leap(self, x_t: Tensor, t: Tensor, r: Tensor, cond: Condition) -> Tensor:
        return self._target_flow(x_t, t, cond, to=Prediction.VELOCITY, toward=r)

    def _match(self, batch: Batch, rng: Rng) -> Loss:
        images = batch["images"]
        t, step, long = self.times(rng)
        eps = rng.normal(images.x0.shape[1:])
        x_t = self.flow.process.perturb(images.x0, eps, t)
        target = eps - images.x0
        asked = long or [0]  # every rank calls its sharded network as often, whatever its slots
        with drawn_from(self._target_dropouts or self.dropouts(), rng.rows(asked)):
            found = self.halves(x_t[asked], t[asked], step[asked], those(images.cond, asked))
        target[long] = found[: len(long)]
        made = self.mean_velocity(x_t, t, t - step, images.cond)
        square = (full(made) - full(target)).square().flatten(1).mean(1)
        return Loss(square, {"velocity": square.detach()})
