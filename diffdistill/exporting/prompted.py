"""A text-conditioned generator as the stock pipeline of its teacher, with a few-step scheduler and another network."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffdistill.backbones.pipeline import PipelineBackbone
from diffdistill.exporting.flow import require_flow, require_times, stretched_shift
from diffdistill.exporting.place import beside, require_free
from diffdistill.exporting.stock import Refusal, Request, require
from diffdistill.exporting.variance_preserving import ddim_scheduler, indices, lcm_scheduler, require_even
from diffdistill.exporting.write import INDEX, TOLERANCE, VERIFY, Report, quiet
from diffdistill.generator import Generator
from diffdistill.preparing.hearing import Listener
from diffdistill.preparing.opening import network_of
from diffdistill.process import VP, Rectified

COUNT = 2
CARD = """---
library_name: diffusers
---

# A {steps} generator, distilled with diffdistill

A `{pipeline}` with a `{scheduler}`, both as they come with diffusers {version}. Run this from inside the folder:

```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(".", dtype=torch.float32)
result = pipeline(
    {prompt!r},
{arguments}
    generator=torch.manual_seed(0),
)
```

The scheduler is set to the times that were trained, so that no others need be given; guidance is inside, and off in
the call. From the same noise, the pipeline's latents are the generator's to {difference:.1e} of their largest value, or
of 1, in float32.
"""


class Replay:
    """The noise that a pipeline draws between its steps, from the generator that drew its first noise."""

    def __init__(self, seed: int, like: Tensor):
        self._draws = torch.Generator().manual_seed(seed)
        self._count = len(like)
        torch.randn(like.shape, generator=self._draws)

    def normal(self, shape) -> Tensor:
        return torch.randn((self._count, *shape), generator=self._draws)


def write_prompted(
    generator: Generator,
    folder: Path,
    *,
    source: str | Path,
    options: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    tolerance: float = TOLERANCE,
    replace: bool = False,
) -> Report:
    """Write `generator` into a copy of the stock pipeline that its prompts were made by; reopened and compared.

    Args:
        source: that pipeline's folder, or its name on the hub.
        options: arguments of every call, those that the prompts were made with.
        dtype: of the network's weights on disk; what else is in the pipeline keeps its own.
        tolerance: the largest difference of latents allowed, relative to their largest value or 1.
        replace: put the new folder in the place of an existing export.
    Raises:
        Refusal: the pipeline cannot sample as the generator does; the message has the reason.
        ValueError: the folder exists, or the difference is too large.
    """
    import diffusers
    from diffusers import DiffusionPipeline

    require_free(Path(folder), replace, marker=INDEX)
    backbone = generator.denoiser.backbone
    assert isinstance(backbone, PipelineBackbone)
    require(
        generator.denoiser.process is generator.denoiser.native and not backbone.told,
        "the network is told more than its pipeline tells, or the generator speaks another process than it; export a "
        "generator in its teacher's process",
    )
    with quiet():
        pipeline = DiffusionPipeline.from_pretrained(source, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    network = network_of(pipeline)
    network.load_state_dict({name: tensor.to(dtype) for name, tensor in backbone.network.state_dict().items()})
    listener = Listener(pipeline, options)
    request = Request(generator, network, None)
    pipeline.scheduler, call = _scheduler(request, listener, backbone.prompts.texts[0])
    call = {**call, **options, **listener.off}
    with beside(Path(folder)) as made:
        network.to(dtype)
        pipeline.save_pretrained(made, safe_serialization=True)
        with quiet():
            reopened = DiffusionPipeline.from_pretrained(made, dtype=torch.float32)
        reopened.set_progress_bar_config(disable=True)
        rounded = {name: tensor.to(dtype).float() for name, tensor in backbone.network.state_dict().items()}
        backbone.network.load_state_dict(rounded)
        difference = compare(dataclasses.replace(listener, pipeline=reopened, options=call), generator)
        if not difference < tolerance:  # NaN fails too
            raise ValueError(
                f"{type(reopened).__name__} differs from the generator by {difference:.2e} of its largest value, and "
                f"{tolerance:.0e} is allowed; nothing was written. Prepare the prompts again from this pipeline, or "
                "export with a larger tolerance"
            )
        arguments = "\n".join(f"    {name}={value!r}," for name, value in call.items())
        steps = "one-step" if len(generator.grid) == 1 else f"{len(generator.grid)}-step"
        kinds = (type(pipeline).__name__, type(pipeline.scheduler).__name__)
        text = CARD.format(
            steps=steps,
            pipeline=kinds[0],
            scheduler=kinds[1],
            version=diffusers.__version__,
            prompt=backbone.prompts.texts[0],
            arguments=arguments,
            difference=difference,
        )
        (made / "README.md").write_text(text)
        said = {"call": call, "prompts": list(backbone.prompts.texts[:COUNT]), "difference": difference}
        (made / VERIFY).write_text(json.dumps({**said, "diffusers": diffusers.__version__}, indent=1) + "\n")
    return Report(Path(folder), *kinds, call, difference, (), False)


@torch.no_grad()
def compare(listener: Listener, generator: Generator, *, seed: int = 0) -> float:
    """The largest difference of the pipeline's latents from the generator's, relative to their largest value or 1.

    listener: of the pipeline on the CPU in float32, whose options are those of the call.
    """
    prompts = generator.denoiser.backbone.prompts
    labels = torch.arange(COUNT) % len(prompts.texts)
    with torch.random.fork_rng(devices=[]):
        # the global generator itself, because some pipelines draw the noise between their steps from there
        tape = listener.unguided(
            [prompts.texts[label] for label in labels], first_step_only=False, draws=torch.manual_seed(seed)
        )
    first, theirs = tape.steps[0].before, tape.steps[-1].after
    ours = generator.sample(first, {"label": labels}, Replay(seed, first))
    return ((theirs - ours).abs().max() / theirs.abs().max().clamp_min(1)).item()


def _scheduler(request: Request, listener: Listener, text: str) -> tuple[Any, dict[str, Any]]:
    """A scheduler that takes the generator's steps in a plain call, and the arguments that it needs in that call.

    Raises:
        Refusal: none does.
    """
    match request.process:
        case VP():
            return _of_a_table(request, listener)
        case Rectified():
            return _of_a_flow(request, listener, text)
    raise Refusal(f"no stock pipeline with prompts samples in {request.process}")


def _of_a_table(request: Request, listener: Listener) -> tuple[Any, dict[str, Any]]:
    from diffusers import LCMScheduler

    steps = len(request.grid)
    if request.rule in ("one", "ddim"):
        try:
            return ddim_scheduler(request), {"num_inference_steps": steps}
        except Refusal:
            if request.rule == "ddim":
                raise
    scheduler = lcm_scheduler(request)
    try:
        require_even(request)
        plain = LCMScheduler.from_config(scheduler.config, original_inference_steps=steps)
        plain.set_timesteps(steps)
        if plain.timesteps.tolist() == indices(request):
            return plain, {"num_inference_steps": steps}
    except Refusal:
        require(
            "timesteps" in listener.takes,
            f"{type(listener.pipeline).__name__} takes no times, and {steps} "
            f"even ones are not generator.grid = {request.grid}; train on even times",
        )
    return scheduler, {"num_inference_steps": None, "timesteps": indices(request)}


def _of_a_flow(request: Request, listener: Listener, text: str) -> tuple[Any, dict[str, Any]]:
    """FlowMatchEulerDiscreteScheduler, its shift and its last time set so that a plain number of steps is the grid.

    Both act on the even times that the pipeline or the scheduler begins with, which is why these are heard first.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    require_flow(request)
    grid, steps = request.grid, len(request.grid)
    require(
        request.rule in ("one", "ddim", "renoise"),
        f"its scheduler takes Euler steps or renoises, and step_rule={request.generator.step_rule!r} is another rule",
    )
    options = {"stochastic_sampling": request.rule == "renoise"}
    if steps == 1:
        return FlowMatchEulerDiscreteScheduler(**options), {"num_inference_steps": 1}
    listener.pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    even = listener.unguided([text], steps=steps).sigmas
    shift, terminal = stretched_shift(grid, None if even is None else float(even[0] - even[1]))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, shift_terminal=terminal, **options)
    scheduler.set_timesteps(steps) if even is None else scheduler.set_timesteps(sigmas=np.array(even))
    require_times(scheduler.sigmas[:-1], request)
    return scheduler, {"num_inference_steps": steps}
