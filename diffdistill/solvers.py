"""Steps of the probability-flow ODE, from t to r < t, in the time of a process."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffdistill.prediction import Prediction
from diffdistill.process import Process, lift

Predict = Callable[..., Tensor]  # predict(x_t, t, to=Prediction) -> Tensor, with guidance and condition already inside


def euler(predict: Predict, process: Process, x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """x_t + (r - t) dx/dt: first order; exact on straight trajectories."""
    return x_t + lift(r - t, x_t) * predict(x_t, t, to=Prediction.VELOCITY)


def ddim(predict: Predict, process: Process, x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """The predicted x0 and eps put together again at r: first order (Song et al. 2021, eq. 12 without noise)."""
    kept = process.sigma(r) / process.sigma(t)
    x0 = predict(x_t, t, to=Prediction.X0)
    return lift(kept, x_t) * x_t + lift(process.alpha(r) - kept * process.alpha(t), x_t) * x0


def heun(predict: Predict, process: Process, x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """Euler, then the trapezoidal correction: second order (Karras et al. 2022, algorithm 1).

    Where r is the data, the velocity may be singular and the corrector is left out, as in the source.
    """
    velocity = predict(x_t, t, to=Prediction.VELOCITY)
    ahead = x_t + lift(r - t, x_t) * velocity
    arrived = r == 0
    after = predict(ahead, torch.where(arrived, t, r), to=Prediction.VELOCITY)
    corrected = x_t + lift((r - t) / 2, x_t) * (velocity + after)
    return torch.where(arrived.reshape(-1, *[1] * (x_t.ndim - 1)), ahead, corrected)


SOLVERS = {"euler": euler, "ddim": ddim, "heun": heun}


def solve(predict: Predict, process: Process, x: Tensor, times: Sequence[float | Tensor], *, solver: str) -> Tensor:
    """Follow the PF-ODE through `times`, descending; each is a number, or a tensor (N,) for its own per sample.

    A time of exactly 0 is the data, where nothing is evaluated; a sample whose t equals its r > 0 stays where it is.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; known are {', '.join(SOLVERS)}")
    for t, r in zip(times[:-1], times[1:], strict=True):
        to_data = not isinstance(r, Tensor) and r == 0
        step = euler if to_data and solver == "heun" else SOLVERS[solver]  # spares the evaluation heun would discard
        x = step(predict, process, x, at(t, x), at(r, x))
    return x


def at(t: float | Tensor, like: Tensor) -> Tensor:
    """A time as a tensor of shape (N,) for the batch `like`, in float64 where the device has it."""
    if isinstance(t, Tensor):
        return t
    dtype = torch.float32 if like.device.type == "mps" else torch.float64
    return torch.full((len(like),), t, device=like.device, dtype=dtype)
