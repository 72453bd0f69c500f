"""Teacher: a frozen denoiser, its guidance, and its probability-flow ODE."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffdistill.denoiser import Condition, Denoiser
from diffdistill.prediction import Prediction
from diffdistill.process import Process, lift
from diffdistill.solvers import solve


class Teacher:
    """The model to distill. Its weights never train; gradients with respect to x_t do flow (SIM and SiD need them).

    Args:
        denoiser: put in eval mode, its parameters frozen.
        guidance: the default scale w of u + w (c - u) (Ho and Salimans 2022, with w = 1 for none).
    """

    def __init__(self, denoiser: Denoiser, *, guidance: float = 1.0):
        self.denoiser = denoiser.eval().requires_grad_(False)
        self.guidance = guidance

    @property
    def process(self) -> Process:
        return self.denoiser.process

    def __call__(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Condition | None = None,
        *,
        to: Prediction = Prediction.X0,
        guidance: float | Tensor | None = None,
    ) -> Tensor:
        """The guided prediction at x_t of shape (N, ...) and t of shape (N,); both branches in one call of 2 N.

        guidance: another scale than the default, or one per sample, shape (N,).
        """
        w = self.guidance if guidance is None else guidance
        if isinstance(w, Tensor):
            w = lift(w, x_t)
        elif w == 1:
            return self.denoiser(x_t, t, cond, to=to)
        backbone = self.denoiser.backbone
        cond = {} if cond is None else cond
        both = backbone.join(cond, backbone.null(cond))
        conditional, unconditional = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both, to=to).chunk(2)
        return unconditional + w * (conditional - unconditional)

    @torch.no_grad()
    def solve(
        self,
        x: Tensor,
        times: Sequence[float | Tensor],
        cond: Condition | None = None,
        *,
        solver: str = "heun",
        guidance: float | Tensor | None = None,
    ) -> Tensor:
        """The PF-ODE from times[0] through to times[-1], descending, without gradient.

        Args:
            x: the state at times[0], shape (N, ...).
            times: numbers, or tensors of shape (N,) for times of their own per sample; a final 0 is the data.
            solver: euler, ddim or heun.
        """

        def predict(x_t: Tensor, t: Tensor, *, to: Prediction) -> Tensor:
            return self(x_t, t, cond, to=to, guidance=guidance)

        return solve(predict, self.process, x, times, solver=solver)
