"""Latent transformers with classes: DiTPipeline."""

from typing import Any

from diffdistill.exporting.flow import flow_map_scheduler
from diffdistill.exporting.stock import Request, Stock, require, square_size
from diffdistill.exporting.variance_preserving import ddim_scheduler, lcm_scheduler, require_even


def dit_ddim(request: Request) -> Stock:
    """A DDPM table, DDIM steps."""
    require_dit(request)
    return _pipeline(request, ddim_scheduler(request))


def dit_renoise(request: Request) -> Stock:
    """A DDPM table, fresh noise between the steps."""
    require_dit(request)
    scheduler = lcm_scheduler(request)
    require_even(request)
    return _pipeline(request, scheduler, _GLOBAL_NOISE)


def dit_flow(request: Request) -> Stock:
    """A rectified flow, Euler steps."""
    require_dit(request)
    return _pipeline(request, flow_map_scheduler(request))


_GLOBAL_NOISE = (
    "DiTPipeline draws the noise between steps from torch's global generator: to make it repeatable, pass "
    "`generator=torch.manual_seed(seed)`, which is that generator."
)


def require_dit(request: Request) -> None:
    """Refuse what the pipeline cannot hold."""
    square_size(request)
    require(
        request.vae is not None,
        "DiTPipeline decodes latents and needs an AutoencoderKL; give one as export(..., vae=...)",
    )


def _pipeline(request: Request, scheduler: Any, *notes: str) -> Stock:
    from diffusers import DiTPipeline

    return Stock(
        DiTPipeline(transformer=request.network, vae=request.vae, scheduler=scheduler),
        {"num_inference_steps": len(request.grid), "guidance_scale": 1.0},
        takes_batch_size=False,
        takes_labels=True,
        notes=("Keep guidance_scale at 1: guidance is distilled into the network.", *notes),
    )
