"""Relay: generators that hand a sample on, each serving the noise levels it was trained for."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from diffdistill.denoiser import Condition
from diffdistill.generator import GENERATOR, Generator, Sampler, check_descending
from diffdistill.prediction import Prediction, convert
from diffdistill.rng import Rng
from diffdistill.solvers import at, solve

STEP_RULES = ("euler", "ddim")  # one evaluation a step, so that no expert is asked about the times of the next


class Relay(Sampler):
    """Experts along one grid: each carries the state over its own times, and on to the first time of the next.

    Args:
        experts: of one law, from noise to data; their grids follow each other, and all steps are of one rule. The
            player that trains expert k is named k/generator.
    """

    def __init__(self, experts: Sequence[Generator]):
        first = experts[0]
        for expert in experts:
            if expert.step_rule not in STEP_RULES:
                raise ValueError(
                    "experts move along the ODE in steps of one evaluation, so that generator.step_rule must be one of "
                    f"{', '.join(STEP_RULES)}; got {expert.step_rule}"
                )
            if not expert.process.same_law(first.process) or expert.step_rule != first.step_rule:
                raise ValueError(
                    f"experts must share one process and one step rule; one has {expert.process} and "
                    f"{expert.step_rule}, the first {first.process} and {first.step_rule}"
                )
        self.experts, self.step_rule = tuple(experts), first.step_rule
        self.grid = tuple(t for expert in experts for t in expert.grid)
        check_descending(self.grid)
        self._on_duty = tuple(expert for expert in experts for _ in expert.grid)  # by place in the grid

    @property
    def parts(self) -> Mapping[str, Generator]:
        return {f"{number}/{GENERATOR}": expert for number, expert in enumerate(self.experts)}

    def prior(self, rng: Rng) -> Tensor:
        """Pure noise at the first time of the grid, shape (N, *sample_shape)."""
        return self.experts[0].prior(rng)

    @torch.no_grad()
    def sample(self, x: Tensor, cond: Condition | None, rng: Rng) -> Tensor:
        """Clean samples from the noise x of shape (N, ...); the last evaluation gives the predicted x0."""
        last = len(self.grid) - 1
        return self.predict(self.simulate(x, cond, stop=last), cond, stop=last)

    @torch.no_grad()
    def simulate(self, x: Tensor, cond: Condition | None, *, stop: int) -> Tensor:
        """The state at grid[stop] from the noise x, by the experts' own steps, without gradient."""
        for place, (t, r) in enumerate(pairwise(self.grid[: stop + 1])):
            x = self.move(x, self.predict(x, cond, stop=place), t, r)
        return x

    def predict(self, x: Tensor, cond: Condition | None, *, stop: int) -> Tensor:
        """The x0 that the expert on duty at grid[stop] predicts from the state x there."""
        return self._on_duty[stop].denoiser(x, at(self.grid[stop], x), cond)

    def move(self, x: Tensor, x0: Tensor, t: float, r: float) -> Tensor:
        """The state at r < t, one step of the ODE from the state x at t along the predicted x0; at the data, x0."""
        if r == 0:
            return x0
        process = self.process

        def predicted(x_t: Tensor, time: Tensor, *, to: Prediction) -> Tensor:
            return convert(x0, x_t, time, process, source=Prediction.X0, to=to)

        return solve(predicted, process, x, (t, r), solver=self.step_rule)
