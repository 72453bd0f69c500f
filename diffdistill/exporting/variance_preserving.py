"""Networks of a DDPM table, with DDIMScheduler, LCMScheduler or DPMSolverMultistepScheduler."""

from typing import Any

import torch

from diffdistill.exporting.stock import Request, Stock, require, require_unit_prior, square_size
from diffdistill.prediction import Prediction
from diffdistill.process import VP

PREDICTION_TYPES = {Prediction.EPS: "epsilon", Prediction.V: "v_prediction", Prediction.X0: "sample"}

# LCM blends x_t into x0 with weights that approach (0, 1) as this grows. At 2^33 the first is below 1e-20 and the
# second is exactly 1 in float32, for every table index from 1 on.
LCM_SCALING = 2.0**33


def table(request: Request) -> dict[str, Any]:
    """The scheduler options that say which table and which prediction; checks that the network is of that kind."""
    process, denoiser = request.process, request.denoiser
    require(
        denoiser.source in PREDICTION_TYPES and denoiser.clock == "steps" and not denoiser.scale_input,
        "its scheduler knows prediction eps, v or x0, clock steps, scale_input false; the generator has prediction "
        f"{denoiser.source.value}, clock {denoiser.clock}, scale_input {str(denoiser.scale_input).lower()}",
    )
    require_unit_prior(request)
    return {
        "num_train_timesteps": int(process.t_max),
        "trained_betas": betas(process),
        "prediction_type": PREDICTION_TYPES[denoiser.source],
    }


def betas(process: VP) -> list[float]:
    """The betas whose products, as diffusers forms them, are the table of the process to float32.

    Rounding each beta by itself would let the errors of 1,000 factors add up (1e-6 at the end of the table, where an
    epsilon network amplifies it a hundred times); here each factor makes up for the rounding of those before it. What
    stays is a beta near 1, whose 1 - beta keeps few bits.
    """
    t = torch.arange(1, int(process.t_max) + 1, dtype=torch.float64)
    running, result = 1.0, []
    for product in (process.alpha(t) ** 2).tolist():
        factor = torch.tensor(product / running, dtype=torch.float32).item()
        beta = torch.tensor(1 - factor, dtype=torch.float32)
        result.append(beta.item())
        running *= (1 - beta).item()
        if running == 0:
            break
    return result


def indices(request: Request) -> list[int]:
    """The grid as indices of the table."""
    steps = [t - 1 for t in request.grid]
    require(
        all(step == int(step) and step >= 0 for step in steps),
        f"its timesteps are the integers t - 1 = 0 ... {request.process.t_max - 1:g}, and generator.grid is "
        f"{request.grid}; use whole times",
    )
    return [int(step) for step in steps]


def require_even(request: Request) -> None:
    """Refuse a grid other than t_max k / steps, k = steps ... 1, all that a number of steps can ask for."""
    t_max, steps = request.process.t_max, len(request.grid)
    even = tuple(t_max * (steps - k) / steps for k in range(steps))
    require(
        request.grid == even and t_max % steps == 0,
        f"it is told a number of steps only, and spaces {steps} of them evenly from t_max; generator.grid is "
        f"{request.grid}, and would have to be {even} in whole numbers",
    )


def ddim_scheduler(request: Request) -> Any:
    """DDIM over the whole table; its last step ends at x0 itself."""
    from diffusers import DDIMScheduler

    options = table(request)
    require(
        request.rule in ("one", "ddim"),
        f"its scheduler takes DDIM steps, and step_rule={request.generator.step_rule!r} with {len(request.grid)} steps "
        "is another rule; use step_rule ddim, or a grid of one time",
    )
    indices(request)
    require_even(request)
    return DDIMScheduler(**options, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing")


def lcm_scheduler(request: Request) -> Any:
    """x0, and fresh noise between the steps."""
    from diffusers import LCMScheduler

    options = table(request)
    require(
        request.rule in ("one", "renoise"),
        f"its scheduler adds fresh noise between its steps, and step_rule={request.generator.step_rule!r} with "
        f"{len(request.grid)} steps is another rule; use step_rule renoise, or a grid of one time",
    )
    require(
        indices(request)[-1] > 0,
        "LCMScheduler returns its input at timestep 0, that is t = 1; end the grid at a later time",
    )
    return LCMScheduler(
        **options, clip_sample=False, timestep_scaling=LCM_SCALING, original_inference_steps=int(request.process.t_max)
    )


def ddim(request: Request) -> Stock:
    """Unconditional, evenly spaced DDIM steps: DDIMPipeline."""
    from diffusers import DDIMPipeline

    require(
        request.num_classes == 0, "DDIMPipeline gives its network no class labels; a network without classes would do"
    )
    scheduler = ddim_scheduler(request)
    return Stock(
        DDIMPipeline(unet=request.network, scheduler=scheduler),
        {"num_inference_steps": len(request.grid), "eta": 0.0},
    )


def latent_consistency(request: Request) -> Stock:
    """Fresh noise between the steps, at any whole times, with or without classes.

    ConsistencyModelPipeline is the stock pipeline that hands labels, custom timesteps and its generator on; the rule
    is its scheduler's.
    """
    from diffusers import ConsistencyModelPipeline

    square_size(request)
    scheduler = lcm_scheduler(request)
    return Stock(
        ConsistencyModelPipeline(unet=request.network, scheduler=scheduler),
        {"num_inference_steps": None, "timesteps": indices(request)},
        takes_labels=request.num_classes > 0,
    )


def first_order_scheduler(request: Request) -> Any:
    """DDIM steps at any whole times: the first-order DPM-Solver++ is DDIM."""
    from diffusers import DPMSolverMultistepScheduler

    options = table(request)
    require(
        request.rule in ("one", "ddim"),
        f"its scheduler takes DDIM steps, and step_rule={request.generator.step_rule!r} with {len(request.grid)} steps "
        "is another rule; use step_rule ddim",
    )
    require(
        not request.process.ends_at_zero_snr,
        "DPMSolverMultistepScheduler divides by alpha, which is 0 at the end of this table",
    )
    return DPMSolverMultistepScheduler(
        **options, solver_order=1, algorithm_type="dpmsolver++", final_sigmas_type="zero"
    )


def any_ddim(request: Request) -> Stock:
    """DDIM steps at any whole times, with or without classes."""
    from diffusers import ConsistencyModelPipeline

    square_size(request)
    return Stock(
        ConsistencyModelPipeline(unet=request.network, scheduler=first_order_scheduler(request)),
        {"num_inference_steps": None, "timesteps": indices(request)},
        takes_labels=request.num_classes > 0,
    )
