"""A stock pipeline opened for listening: its network's meaning, and a scheduler that takes plain first-order steps."""

import math
from pathlib import Path
from typing import Any

import torch

from diffdistill.backbones.folder import COMPONENTS
from diffdistill.backbones.scheduler import meaning

STEPWISE = ("CogVideoXDDIMScheduler", "FlowMatchEulerDiscreteScheduler")


def open_pipeline(path: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """A text-conditioned pipeline of diffusers, with a scheduler that `solve` can follow step by step.

    Args:
        path: its folder, or its name on the Hugging Face hub.
    Raises:
        ValueError: there is no pipeline, or its class is unknown, or it takes no prompts.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        pipeline = DiffusionPipeline.from_pretrained(path, dtype=dtype)
    except (OSError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} could not be opened as a diffusers pipeline: {_first(error)}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    if not any(name in pipeline.components for name in COMPONENTS) or "scheduler" not in pipeline.components:
        raise ValueError(
            f"{path} is a {type(pipeline).__name__} of {', '.join(pipeline.components)}, without a network called "
            f"{' or '.join(COMPONENTS)} and its scheduler; give a diffusion pipeline"
        )
    pipeline.scheduler = stepwise(pipeline.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def stepwise(scheduler: Any) -> Any:
    """The scheduler of the same network and table whose steps are DDIM's, or Euler's of a flow."""
    from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler

    config = dict(scheduler.config)
    said = meaning({"_class_name": type(scheduler).__name__, **config})
    if type(scheduler).__name__ in STEPWISE:
        return type(scheduler).from_config(config)
    if said["process"]["name"] == "rectified":
        return FlowMatchEulerDiscreteScheduler(shift=said["process"]["shift"])
    if said["process"]["name"] != "vp":
        raise ValueError(f"no pipeline with prompts is known for {type(scheduler).__name__}")
    plain = {"clip_sample": False, "thresholding": False, "set_alpha_to_one": True, "timestep_spacing": "trailing"}
    if type(scheduler).__name__.startswith("CogVideoX"):
        return CogVideoXDDIMScheduler.from_config({**config, **plain})
    return DDIMScheduler.from_config({**config, **plain, "steps_offset": 0, "skip_prk_steps": True})


def network_of(pipeline: Any) -> Any:
    """The network of a pipeline, the first where it has two."""
    return next(getattr(pipeline, name) for name in COMPONENTS if getattr(pipeline, name, None) is not None)


def meaning_of(pipeline: Any, *, mu: float | None = None) -> dict[str, Any]:
    """Process, prediction and clock, as the plain data of a `denoiser.json`.

    mu: where a flow's shift depends on the resolution, the logarithm of the shift that the pipeline came to.
    """
    said = meaning({"_class_name": type(pipeline.scheduler).__name__, **pipeline.scheduler.config})
    if mu is not None and pipeline.scheduler.config.get("use_dynamic_shifting"):
        said["process"]["shift"] = math.exp(mu)
    return said


def times_of(pipeline: Any, said: dict[str, Any]) -> list[float]:
    """The times of our process at which the pipeline's last call evaluated its network, descending."""
    scheduler = pipeline.scheduler
    if said["process"]["name"] == "rectified":
        return scheduler.sigmas[:-1].double().tolist()
    return [float(time) + 1 for time in scheduler.timesteps.tolist()]


def _first(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
