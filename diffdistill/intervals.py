"""Scores inside a noise interval: what a critic learns from samples that stopped at the interval's lower edge.

Phased distillation never has a clean sample of its high-noise phases, only x_s of some law at the edge s. Noised on to
t > s by x_t = a x_s + b eps, with (a, b) = process.transition(s, t), such a sample still tells the score at t, whatever
the law of x_s, since the score is E[-eps / b | x_t]. Every other prediction follows from the score at x_t:

    eps-hat = (sigma_t / b) eps,    x0-hat = x_s / alpha_s - alpha_t sigma_s^2 / (alpha_s^2 b) eps.

At s = 0 they are eps and x0 themselves.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffdistill.denoiser import Condition, Denoiser
from diffdistill.losses import full
from diffdistill.prediction import Prediction
from diffdistill.process import Process, lift
from diffdistill.times import TimeSampler

WIDE = 10.0  # of b^2, where a target is as good as any


class Interval:
    """The noise levels (edge, t_max] of a process, for samples at the edge.

    Args:
        edge: a time in [0, t_max), with alpha(edge) > 0; 0 is the data.
        margin: how far above an edge that is not the data times begin, as a share of the process's customary spacing.
    """

    def __init__(self, process: Process, edge: float, *, margin: float = 0.0):
        if not 0 <= edge < process.t_max:
            raise ValueError(f"an interval's edge must lie in [0, {process.t_max:g}) on {process}, got {edge}")
        if not 0 <= margin < 1:
            raise ValueError(f"an interval's margin must lie in [0, 1), got {margin}")
        self.process, self.edge = process, edge
        self.lowest = edge
        if edge and margin:
            place = _first_above(process.warp, edge) + margin
            if place >= 1:
                raise ValueError(f"a margin of {margin} above the edge {edge:g} leaves no times; make it smaller")
            self.lowest = process.warp(torch.tensor([place], dtype=torch.float64)).item()

    def restricted(self, times: TimeSampler) -> TimeSampler:
        """The law of `times`, given that they lie above the edge and its margin.

        Raises:
            ValueError: all of them lie below.
        """
        return Restricted(times, self.process, self.lowest)

    def transition(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """a and b of x_t = a x_edge + b eps, each (N,), for t of shape (N,)."""
        return self.process.transition(torch.full_like(t, self.edge), t)

    def perturb(self, x_s: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t of shape (N, ...) from x_s at the edge."""
        a, b = self.transition(t)
        return lift(a, x_s) * x_s + lift(b, x_s) * eps

    def target(self, x_s: Tensor, eps: Tensor, t: Tensor, space: Prediction) -> Tensor:
        """What a critic regresses `space` onto at x_t = perturb(x_s, eps, t), shape (N, ...); its variance is infinite
        at t = edge > 0.

        Given x_t, its mean is the prediction that belongs to the score of x_t, for any law of x_s.
        """
        b = self.transition(t)[1]
        on_x0, on_eps, carried = self._coefficients(t, space)
        on_eps = on_eps * (self.process.sigma(t) / b) - on_x0 * (carried / b)
        return lift(on_x0 / self._alpha(t), x_s) * x_s + lift(on_eps, eps) * eps

    def trust(self, t: Tensor) -> Tensor:
        """min(1, WIDE b^2), shape (N,), b as a share of alpha_t + sigma_t; 1 where the edge is the data.

        Times it, the square of a target's error is bounded close to the edge.
        """
        if self.edge == 0:
            return torch.ones_like(t)
        share = self.transition(t)[1] / (self.process.alpha(t) + self.process.sigma(t))
        return (WIDE * share**2).clamp(max=1)

    def denoising(
        self,
        denoiser: Denoiser,
        x_s: Tensor,
        eps: Tensor,
        t: Tensor,
        cond: Condition | None,
        *,
        space: Prediction,
        clamp: float | None,
    ) -> Tensor:
        """Denoising score matching from samples at the edge: mean squared errors of `space`, weighted, shape (N,).

        The optimum at every t is the score of x_t under any weight. With `clamp` the weight is min(1, clamp b^2), b as
        a share of alpha_t + sigma_t (b itself on a rectified flow), and nothing is divided by b; None is no weight.

        Source: Phased DMD's loss, clamp(1 / b^2, 0, 10) |b v - b target|^2, for any process and prediction.
        """
        predicted = full(denoiser(self.perturb(x_s, eps, t), t, cond, to=space))
        if clamp is None:
            return (predicted - full(self.target(x_s, eps, t, space))).square().flatten(1).mean(1)
        on_x0, on_eps, carried = self._coefficients(t, space)
        unit = 1 / (self.process.alpha(t) + self.process.sigma(t))
        b = unit * self.transition(t)[1]
        scaled = lift(b * on_x0 / self._alpha(t), x_s) * x_s
        scaled = scaled + lift(unit * (on_eps * self.process.sigma(t) - on_x0 * carried), eps) * eps
        error = (lift(b, predicted) * predicted - full(scaled)).square().flatten(1).mean(1)
        return (1 / b**2).clamp(max=clamp).to(error.dtype) * error

    def _alpha(self, t: Tensor) -> Tensor:
        """alpha at the edge, for as many samples as t has."""
        return self.process.alpha(torch.full_like(t, self.edge))

    def _coefficients(self, t: Tensor, space: Prediction) -> tuple[Tensor, Tensor, Tensor]:
        """Those of x0 and eps in `space`, and alpha_t sigma_s^2 / alpha_s^2, each (N,)."""
        on_x0, on_eps = space.coefficients(t, self.process)
        ratio = self.process.ratio(torch.full_like(t, self.edge))
        return on_x0, on_eps, self.process.alpha(t) * ratio**2


class Restricted(TimeSampler):
    """A sampler's law given that the time lies above `lowest`, by the share of it that lies below.

    Raises:
        ValueError: no time of the sampler lies above.
    """

    def __init__(self, times: TimeSampler, process: Process, lowest: float):
        self.times, self.lowest = times, lowest
        self.below = _first_above(lambda u: times(u, process), lowest) if lowest else 0.0
        if self.below >= 1:
            raise ValueError(f"{times} has no times above {lowest:g}; let it reach closer to t_max = {process.t_max:g}")

    def __call__(self, u: Tensor, process: Process) -> Tensor:
        return self.times(self.below + (1 - self.below) * u, process).clamp(min=self.lowest)


def _first_above(time_of: Callable[[Tensor], Tensor], floor: float) -> float:
    """The smallest u in [0, 1], to rounding, with time_of(u) > floor, of an increasing function; 1 if there is none."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        below = time_of(torch.tensor([middle], dtype=torch.float64)).item() <= floor
        low, high = (middle, high) if below else (low, middle)
    return high
