"""Sampler: what turns noise into samples. Generator: a trainable denoiser with the few times of its evaluations."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from diffdistill.denoiser import Condition, Denoiser
from diffdistill.prediction import Prediction
from diffdistill.process import Process, lift
from diffdistill.rng import Rng
from diffdistill.solvers import SOLVERS, Predict, at, solve
from diffdistill.told import SCALE, SPAN

SAME_NOISE, FLOW_MAP = "same_noise", "flow_map"
STEP_RULES = ("renoise", SAME_NOISE, FLOW_MAP, *SOLVERS)
GENERATOR = "generator"  # the player that trains the generator, where there is one


def check_descending(grid: Sequence[float]) -> None:
    """Refuses times that are empty or do not fall strictly."""
    if not grid or any(after >= before for before, after in pairwise(grid)):
        raise ValueError(
            f"generator.grid must be strictly decreasing, got {list(grid)}; list the largest noise time first"
        )


def refuse_flow_map(step_rule: str, what: str) -> None:
    """Refuses flow_map where `what` trains a network without telling it where steps lead, which sampling would tell."""
    if step_rule == FLOW_MAP:
        raise ValueError(
            f"generator.step_rule={FLOW_MAP} tells the network where each step leads, and {what} never teaches it "
            "that; take another step_rule, or mean_flow or shortcut for method.name"
        )


class Sampler(ABC):
    """What a run trains for sampling: one generator, or several that share the conditions or the noise levels."""

    @property
    @abstractmethod
    def parts(self) -> Mapping[str, "Generator"]:
        """Its generators, by the name of the player that trains each."""

    @abstractmethod
    def prior(self, rng: Rng) -> Tensor:
        """The pure noise that sampling begins with, shape (N, *sample_shape)."""

    @abstractmethod
    def sample(self, x: Tensor, cond: Condition | None, rng: Rng) -> Tensor:
        """Clean samples from the noise x of shape (N, ...), without gradient: what evaluation scores."""

    @property
    def classes(self) -> Sequence[int]:
        """The labels that it can be asked for: all that its networks know, unless it is made for a part of them."""
        return range(self.denoiser.backbone.num_classes)

    @property
    def denoiser(self) -> Denoiser:
        """Of the first part: its sample shape, classes and precision are those of all."""
        return next(iter(self.parts.values())).denoiser

    @property
    def process(self) -> Process:
        return self.denoiser.process


class Generator(Sampler):
    """What distillation trains and what is exported.

    Args:
        denoiser: trainable.
        grid: the times of its evaluations, strictly descending, in (0, t_max].
        step_rule: how it gets from one time to the next. "renoise": predict x0, add fresh noise (consistency and
            DMD sampling). "same_noise": predict x0, add the noise that sampling began with, as straight flows allow
            (RF++, Lee et al. 2024). "euler", "ddim", "heun": follow the PF-ODE. The last evaluation gives the predicted
            x0, which on VE and Rectified is Euler's step to the data. "flow_map": the network is told where each step
            leads, and leaps there.
        guidance: the scale, w of u + w (c - u), that a network is told which learnt to be guided.
    """

    def __init__(
        self, denoiser: Denoiser, grid: Sequence[float], *, step_rule: str = "renoise", guidance: float | None = None
    ):
        grid = tuple(float(t) for t in grid)
        process = denoiser.process
        check_descending(grid)
        if grid[0] > process.t_max or grid[-1] <= 0:
            raise ValueError(f"generator.grid must lie in (0, {process.t_max:g}], the times of {process}, got {grid}")
        if step_rule not in STEP_RULES:
            raise ValueError(f"generator.step_rule must be one of {', '.join(STEP_RULES)}, got {step_rule!r}")
        told = denoiser.backbone.told
        if step_rule == FLOW_MAP and SPAN not in told:
            raise ValueError(
                f"generator.step_rule={FLOW_MAP} needs a network that is told where a step leads; Backbone.tell makes "
                "it one"
            )
        if (guidance is None) == (SCALE in told):
            raise ValueError(
                f"generator.guidance={guidance} is the scale that the network is told, and this one is told "
                f"{'one' if SCALE in told else 'none'}; {'give it' if SCALE in told else 'leave it out'}"
            )
        self._denoiser, self.grid, self.step_rule, self.guidance = denoiser, grid, step_rule, guidance
        self._prior_std = process.prior_std(grid[0])  # once: reading a number of a tensor waits for it
        # where predictions of x0 lie: at the data, or at a consistency function's boundary, whose noise they keep
        self._end = process.time_of(torch.tensor([denoiser.boundary], dtype=torch.float64)).item()
        if grid[-1] <= self._end:
            raise ValueError(
                f"generator.grid must lie above generator.boundary={denoiser.boundary}, at which x0 is the input "
                f"itself, got {grid}"
            )
        if step_rule == SAME_NOISE and self._end:
            raise ValueError(
                f"generator.step_rule={SAME_NOISE} adds noise to clean predictions, and those of "
                f"generator.boundary={denoiser.boundary} keep some; take step_rule=renoise"
            )

    @property
    def denoiser(self) -> Denoiser:
        return self._denoiser

    @property
    def parts(self) -> Mapping[str, "Generator"]:
        return {GENERATOR: self}

    def prior(self, rng: Rng) -> Tensor:
        """Pure noise at the first time of the grid, shape (N, *sample_shape)."""
        return self._prior_std * rng.normal(self.denoiser.sample_shape)

    @torch.no_grad()
    def sample(self, x: Tensor, cond: Condition | None, rng: Rng) -> Tensor:
        """Clean samples from the noise x of shape (N, ...): what training simulates, evaluation scores and export
        reproduces."""
        return self.rollout(x, cond, rng, stop=len(self.grid) - 1)

    def rollout(self, x: Tensor, cond: Condition | None, rng: Rng, *, stop: int) -> Tensor:
        """The prediction of x0 at grid[stop], reached from the noise x by the generator's own steps.

        The steps before `stop` are simulated without gradient; the last evaluation carries it. This is DMD2's backward
        simulation (Yin et al. 2024a): training sees the inputs that sampling will produce.
        """
        first = x
        with torch.no_grad():
            for t, r in zip(self.grid[:stop], self.grid[1 : stop + 1], strict=True):
                x = self._step(x, t, r, cond, rng, first)
        return self._predictor(cond, 0.0)(x, at(self.grid[stop], x))

    def _step(self, x: Tensor, t: float, r: float, cond: Condition | None, rng: Rng, first: Tensor) -> Tensor:
        """The state at r from the state at t; `first` is the noise that sampling began with."""
        if self.step_rule == SAME_NOISE:
            x0 = self._predictor(cond, r)(x, at(t, x))
            return self.process.perturb(x0, first / self._prior_std, at(r, x))
        if self.step_rule == "renoise":
            x0 = self._predictor(cond, r)(x, at(t, x))
            _, added = self.process.transition(at(self._end, x), at(r, x))
            return lift(self.process.alpha(at(r, x)), x) * x0 + lift(added, x) * rng.normal(x.shape[1:])

        solver = "ddim" if self.step_rule == FLOW_MAP else self.step_rule
        return solve(self._predictor(cond, r), self.process, x, (t, r), solver=solver)

    def _predictor(self, cond: Condition | None, r: float) -> Predict:
        """The denoiser under its condition, told that the step leads to r, and the scale, where it is told these."""
        scale = self.guidance

        def predict(x_t: Tensor, t: Tensor, *, to: Prediction = Prediction.X0) -> Tensor:
            toward = at(r, x_t) if self.step_rule == FLOW_MAP else None
            under = cond if scale is None else {**(cond or {}), SCALE: x_t.new_full((len(x_t),), scale)}
            return self.denoiser(x_t, t, under, to=to, toward=toward)

        return predict
