"""How straight the trajectories of a flow are, whatever process and prediction its network was trained in."""

from itertools import pairwise

import torch
from torch import Tensor

from diffdistill.denoiser import Condition, Denoiser
from diffdistill.prediction import Prediction
from diffdistill.process import Rectified, lift
from diffdistill.solvers import at, solve


def rectified(denoiser: Denoiser) -> Denoiser:
    """The same network, sharing its parameters, whose velocity is that of a rectified flow.

    Its states are matched by signal-to-noise ratio, so that the flow has the denoiser's trajectories up to scale: a
    state x of VE at sigma is x / (1 + sigma) in the flow, at t = sigma / (1 + sigma). A network that ends at a finite
    sigma_max is asked at sigma_max for what lies beyond.
    """
    process = denoiser.process
    if isinstance(process, Rectified):
        return denoiser
    return denoiser.seen_in(Rectified(sigma_data=process.sigma_data))


@torch.no_grad()
def straightness(
    denoiser: Denoiser, noise: Tensor, cond: Condition | None = None, *, steps: int, solver: str = "heun"
) -> Tensor:
    """The integral over t of the mean square of (z_1 - z_0) - dz_t/dt along each trajectory, shape (N,).

    It is 0 where a single Euler step is exact. The velocity between two points of the solution is taken to be constant;
    with Heun's solver the error is of second order in the number of steps.

    Args:
        denoiser: of any process; the flow is its `rectified` one.
        noise: standard normal, shape (N, ...).
        steps: of the process's customary grid.

    Source: Liu et al. 2022, the straightness S(Z) of a rectified flow, here for each number of a sample.
    """
    flow = rectified(denoiser)

    def predict(x_t: Tensor, t: Tensor, *, to: Prediction) -> Tensor:
        return flow(x_t, t, cond, to=to)

    times, points = (*flow.process.grid(steps), 0.0), [noise]
    for t, r in pairwise(times):
        points.append(solve(predict, flow.process, points[-1], (t, r), solver=solver))
    whole, total = points[0] - points[-1], torch.zeros_like(at(0.0, noise))
    for (before, after), (t, r) in zip(pairwise(points), pairwise(times), strict=True):
        span = at(t - r, noise)
        bend = (before - after) / lift(span, noise) - whole
        total = total + span * bend.double().square().flatten(1).mean(1)
    return total
