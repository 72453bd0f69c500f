"""What a network's output means, and the one formula that turns one meaning into another."""

from enum import Enum

import torch
from torch import Tensor

from diffdistill.process import Process, lift


class Prediction(Enum):
    """A network output is a pair (a, b): output = a x0 + b eps, with a and b functions of time.

    V is alpha eps - sigma x0 (Salimans and Ho 2022). VELOCITY is d x_t / dt of the process at hand. F is the
    unit-variance target of EDM's preconditioning (Karras et al. 2022, table 1), for any process.
    """

    X0 = "x0"
    EPS = "eps"
    V = "v"
    VELOCITY = "velocity"
    SCORE = "score"
    F = "f"

    def coefficients(self, t: Tensor, process: Process) -> tuple[Tensor, Tensor]:
        """a and b at t of shape (N,), each (N,): output = a x0 + b eps."""
        alpha, sigma = process.alpha(t), process.sigma(t)
        zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
        match self:
            case Prediction.X0:
                return one, zero
            case Prediction.EPS:
                return zero, one
            case Prediction.V:
                return -sigma, alpha
            case Prediction.VELOCITY:
                return process.d_alpha(t), process.d_sigma(t)
            case Prediction.SCORE:
                return zero, -1 / sigma
            case Prediction.F:
                std = process.sigma_data
                norm = (alpha**2 * std**2 + sigma**2).sqrt()
                return sigma / (std * norm), -alpha * std / norm


def convert(p: Tensor, x_t: Tensor, t: Tensor, process: Process, *, source: Prediction, to: Prediction) -> Tensor:
    """The prediction `to` that is equivalent to the prediction `p` of kind `source`.

    Solving p = a x0 + b eps and x_t = alpha x0 + sigma eps for (x0, eps) and inserting into c x0 + d eps gives an
    affine map of (p, x_t), whose two scalars are computed in the dtype of t before they meet a tensor.

    Args:
        p, x_t: of one shape (N, ...). The result has the dtype of x_t.
        t: times of shape (N,).
    Source: linear algebra; the EDM and velocity cases are checked against their papers' formulas in the tests.
    """
    if source is to:
        return p.to(x_t.dtype)
    on_p, on_x = conversion(t, process, source=source, to=to)
    return lift(on_p, x_t) * p.to(x_t.dtype) + lift(on_x, x_t) * x_t


def conversion(t: Tensor, process: Process, *, source: Prediction, to: Prediction) -> tuple[Tensor, Tensor]:
    """The scalars of `convert`, each (N,): result = first * p + second * x_t.

    They are infinite where the source says nothing about the target: SCORE at t = 0, EPS from X0 at t = 0, and X0 from
    EPS or SCORE where alpha is 0.
    """
    alpha, sigma = process.alpha(t), process.sigma(t)
    if source is to:
        return torch.ones_like(alpha), torch.zeros_like(alpha)
    a, b = source.coefficients(t, process)
    c, d = to.coefficients(t, process)
    determinant = alpha * b - sigma * a
    return (alpha * d - sigma * c) / determinant, (c * b - d * a) / determinant
