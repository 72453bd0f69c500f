"""Rectified-flow networks: FlowMatchEulerDiscreteScheduler, and a flow solver for networks with classes."""

import torch

from diffdistill.exporting.stock import Refusal, Request, Stock, require, require_unit_prior, square_size
from diffdistill.prediction import Prediction


def require_flow(request: Request) -> None:
    """Refuse what is not a velocity network that starts at t = 1."""
    denoiser = request.denoiser
    require(
        denoiser.source is Prediction.VELOCITY and denoiser.clock == "thousand" and not denoiser.scale_input,
        "its scheduler knows prediction velocity, clock thousand, scale_input false; the generator has prediction "
        f"{denoiser.source.value}, clock {denoiser.clock}, scale_input {str(denoiser.scale_input).lower()}",
    )
    require_unit_prior(request)


def flow(request: Request) -> Stock:
    """Euler steps, or fresh noise between the steps, without classes: DDPMPipeline, whose loop is every scheduler's."""
    from diffusers import DDPMPipeline, FlowMatchEulerDiscreteScheduler

    require_flow(request)
    require(
        request.num_classes == 0,
        "DDPMPipeline gives its network no class labels; a network without classes, or a grid of one time, would do",
    )
    require(
        request.rule in ("one", "ddim", "renoise"),
        f"its scheduler takes Euler steps or renoises, and step_rule={request.generator.step_rule!r} is neither; use "
        "step_rule euler or renoise",
    )
    shift, terminal = stretched_shift(request.grid)
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=shift, shift_terminal=terminal, stochastic_sampling=request.rule == "renoise"
    )
    scheduler.set_timesteps(len(request.grid))
    require_times(scheduler.sigmas[:-1], request)
    return Stock(DDPMPipeline(unet=request.network, scheduler=scheduler), {"num_inference_steps": len(request.grid)})


def stretched_shift(grid: tuple[float, ...], spacing: float | None = None) -> tuple[float, float | None]:
    """`shift` and `shift_terminal` at which FlowMatchEulerDiscreteScheduler's times are those of `grid`, if any are.

    The scheduler spaces u evenly from 1 to its sigma_min, shifts, and stretches so that the last time is
    shift_terminal: at step k that is 1 - a k / (1 + b k), with b = -(shift - 1) h / shift and h the spacing of u. Two
    numbers, so that grids of up to three times, and shifted even grids of any length, are met.

    spacing: of u, where a pipeline gives it other ends than the scheduler does.
    """
    if len(grid) == 1:
        return 1.0, None
    if len(grid) == 2:
        return 1.0, grid[1]
    first, second = 1 - grid[1], 1 - grid[2]
    b = (2 * first - second) / (2 * (second - first))
    shift = 1.0
    for _ in range(100):  # sigma_min depends on the shift, weakly: it is a thousandth of it
        sigma_min = shift / (1000 + shift - 1)
        h = spacing or (1 - sigma_min) / (len(grid) - 1)
        require(b + h > 0, f"its scheduler spaces times evenly and shifts them; no shift gives generator.grid = {grid}")
        shift = h / (b + h)
    return shift, grid[-1]


def flow_with_classes(request: Request) -> Stock:
    """One step with class labels: ConsistencyModelPipeline hands them on, and a first-order flow solver ends at x0.

    DPMSolverMultistepScheduler's first flow time is 1 - 1 / n before the shift, and its timestep the floor of n times
    it: with n = 1001 and an enormous shift they are 1 - 1e-12, which is 1 in float32, and 1000.
    """
    from diffusers import ConsistencyModelPipeline, DPMSolverMultistepScheduler

    square_size(request)
    require_flow(request)
    require(
        request.rule == "one",
        f"no stock pipeline takes several steps of a flow with class labels for a UNet2DModel, and generator.grid has "
        f"{len(request.grid)} times; use a grid of one time, a network without classes, or a DiTTransformer2DModel",
    )
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=1001,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=1e9,
        solver_order=1,
        algorithm_type="dpmsolver++",
        final_sigmas_type="zero",
    )
    return Stock(
        ConsistencyModelPipeline(unet=request.network, scheduler=scheduler),
        {"num_inference_steps": 1},
        takes_labels=request.num_classes > 0,
    )


def flow_map_scheduler(request: Request):
    """Euler steps at shifted even times, for a pipeline that scales its scheduler's input."""
    from diffusers import FlowMapEulerDiscreteScheduler

    require_flow(request)
    require(
        request.rule in ("one", "ddim"),
        f"its scheduler takes Euler steps, and step_rule={request.generator.step_rule!r} with {len(request.grid)} "
        "steps is another rule; use step_rule euler, or a grid of one time",
    )
    shift = 1.0
    if len(request.grid) > 1:
        even, t = 1 - 1 / len(request.grid), request.grid[1]
        shift = t * (1 - even) / (even * (1 - t))
    scheduler = FlowMapEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(len(request.grid))
    require_times(scheduler.sigmas[:-1], request)
    return scheduler


def require_times(theirs: torch.Tensor, request: Request) -> None:
    """Refuse unless a scheduler's times are those of the grid, in float32."""
    ours = torch.tensor(request.grid, dtype=torch.float64)
    if not torch.allclose(theirs.double(), ours, rtol=0, atol=2e-7):
        raise Refusal(
            "its scheduler spaces times evenly and shifts them; the nearest are "
            f"{[round(t, 4) for t in theirs.tolist()]}, and generator.grid is {request.grid}; take a grid of "
            "Rectified(shift=...).grid(steps)"
        )
