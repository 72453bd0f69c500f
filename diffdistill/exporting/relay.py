"""Experts as stock networks in one folder, with one stock scheduler and a manifest that says who is asked when.

relay.json     the times, the boundaries between experts, and for each expert its folder and the SHA-256 of its files
expert-0/      a network of diffusers, for the noisiest times; and so on
scheduler/     a scheduler of diffusers that takes the steps of all of them
vae/           decodes latents, where the networks make latents
README.md      how to sample with and without diffdistill
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.backbones.diffusers import FAMILIES
from diffdistill.denoiser import CLOCKS
from diffdistill.exporting.flow import require_flow
from diffdistill.exporting.manifest import checksums, read_manifest, verify
from diffdistill.exporting.place import beside, require_free
from diffdistill.exporting.seeds import Seeds
from diffdistill.exporting.stock import Refusal, Request, request, require
from diffdistill.exporting.variance_preserving import first_order_scheduler, indices
from diffdistill.exporting.write import TOLERANCE, quiet
from diffdistill.generator import Generator
from diffdistill.prediction import Prediction
from diffdistill.process import VE, VP, Rectified
from diffdistill.relay import Relay

MANIFEST, FORMAT, VERSION = "relay.json", "diffdistill relay", 1
# The schedulers written here, and as what each wants a list of times.
_AS = {"EDMEulerScheduler": torch.tensor, "FlowMatchEulerDiscreteScheduler": list, "DPMSolverMultistepScheduler": list}

CARD = """---
library_name: diffusers
---

# {count} experts that hand a sample on, distilled with diffdistill

{steps} network evaluations a sample: each folder `expert-k` is a network of diffusers for a part of the noise levels,
and `scheduler` takes the steps. `{manifest}` says which expert is asked at which step. With diffdistill, one call:

```python
import diffdistill

images = diffdistill.load_relay(".")(4, seed=0)
```

Without it:

```python
import json

import diffusers
import torch

manifest = json.load(open("{manifest}"))
load = lambda part: getattr(diffusers, part["class"]).from_pretrained(part["folder"])
experts, scheduler = [load(expert) for expert in manifest["experts"]], load(manifest["scheduler"])
scheduler.set_timesteps(**{{name: torch.tensor(v) for name, v in manifest["scheduler"]["set_timesteps"].items()}})
x = manifest["noise_std"] * torch.randn(1, *manifest["sample_shape"], generator=torch.Generator().manual_seed(0))
label = torch.tensor([0]) if manifest["num_classes"] else None
with torch.no_grad():
    for t, turn, time in zip(scheduler.timesteps, manifest["turns"], manifest["clock"]):
        fed = scheduler.scale_model_input(x, t) if manifest["scheduler"]["scales_input"] else x
        output = experts[turn](fed, torch.tensor([time]), class_labels=label).sample[:, : x.shape[1]]
        x = scheduler.step(output, t, x).prev_sample
```

Sample i of a call begins with seed + i. Started from the same noise, this reproduces the generators that were trained:
the largest absolute difference was {difference:.1e} in float32.
"""


@dataclass(frozen=True)
class RelayReport:
    """What was written: the folder, its classes of diffusers, and the difference of its samples from the Relay's."""

    folder: Path
    networks: tuple[str, ...]
    scheduler: str
    difference: float

    def __str__(self) -> str:
        return (
            f"{self.folder}: {len(self.networks)} experts ({', '.join(sorted(set(self.networks)))}) behind {MANIFEST}, "
            f"with {self.scheduler}; maximum absolute difference from the generators {self.difference:.1e}"
        )


class RelayPipeline:
    """The stock networks and scheduler of a folder that `write_relay` wrote, sampled by one call.

    Args:
        folder: with the manifest.
        device: where to sample.
    Raises:
        ValueError: the manifest or a file is missing or damaged.
    """

    def __init__(self, folder: Path, *, device: str = "cpu"):
        self.manifest = read_manifest(folder / MANIFEST, kind=FORMAT, version=VERSION)
        self.device = torch.device(device)
        verify(folder, self.manifest["files"])
        self.experts = [_load(folder, part, tuple(FAMILIES), self.device) for part in self.manifest["experts"]]
        self.scheduler = _load(folder, self.manifest["scheduler"], tuple(_AS))
        vae = self.manifest.get("vae")
        self.vae = None if vae is None else _load(folder, vae, ("AutoencoderKL",), self.device)

    def __call__(self, count: int, *, labels: Sequence[int] | None = None, seed: int = 0, batch: int = 64) -> list:
        """Pictures (PIL); picture i is a function of its label and seed + i alone.

        Args:
            labels: one for each, or None for all classes in turn.
            batch: pictures made at once, which does not change them beyond rounding.
        """
        from diffusers.image_processor import VaeImageProcessor

        pictures: list = []
        wanted = self._labels(labels, count)
        for first in range(0, count, batch):
            own = slice(first, min(first + batch, count))
            x = self.states(own.stop - first, labels=None if wanted is None else wanted[own], seed=seed + first)
            if self.vae is not None:
                with torch.no_grad():
                    x = self.vae.decode(x / self.vae.config.scaling_factor, return_dict=False)[0]
            pictures += VaeImageProcessor().postprocess(x, output_type="pil")
        return pictures

    @torch.no_grad()
    def states(self, count: int, *, labels: Sequence[int] | None = None, seed: int = 0) -> Tensor:
        """The samples (N, ...) before they are decoded and clamped."""
        steps, scheduler = self.manifest["scheduler"], self.scheduler
        wanted = self._labels(labels, count)
        label = None if wanted is None else torch.tensor(wanted, device=self.device)
        x = Seeds.of(range(seed, seed + count)).normal(self.manifest["sample_shape"]).to(self.device)
        x = self.manifest["noise_std"] * x
        scheduler.set_timesteps(**{name: _AS[steps["class"]](value) for name, value in steps["set_timesteps"].items()})
        for t, turn, time in zip(scheduler.timesteps, self.manifest["turns"], self.manifest["clock"], strict=True):
            fed = scheduler.scale_model_input(x, t) if steps["scales_input"] else x
            told = torch.full((count,), time, device=self.device)
            output = self.experts[turn](fed, told, class_labels=label, return_dict=False)[0][:, : x.shape[1]]
            x = scheduler.step(output, t, x, return_dict=False)[0]
        return x

    def _labels(self, labels: Sequence[int] | None, count: int) -> list[int] | None:
        classes = self.manifest["num_classes"]
        if not classes or labels is None:
            if labels is not None:
                raise ValueError("labels are given, but the networks have no classes; leave them out")
            return [index % classes for index in range(count)] if classes else None
        if len(labels) != count or not all(0 <= label < classes for label in labels):
            raise ValueError(f"labels must be {count} numbers in [0, {classes}), got {list(labels)[:10]}")
        return list(labels)


def write_relay(
    sampler: Relay,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    vae: nn.Module | None = None,
    tolerance: float = TOLERANCE,
    replace: bool = False,
) -> RelayReport:
    """Write every expert as a stock network, the scheduler and the manifest; the arguments are those of
    `write_pipeline`.

    All of it is written beside, reopened, sampled, compared with `Relay.sample`, and then renamed.

    Raises:
        Refusal: no stock scheduler takes these steps, or an expert is no network of diffusers.
        ValueError: the folder exists, or the difference is too large.
    """
    folder = Path(folder)
    require_free(folder, replace, marker=MANIFEST)
    asked = [request(expert, vae, dtype) for expert in sampler.experts]
    rounded = Relay([one.generator for one in asked])
    scheduler, steps = _scheduler(rounded, asked[0])
    with beside(folder) as made:
        experts = []
        for number, (one, expert) in enumerate(zip(asked, sampler.experts, strict=True)):
            nn.Module.to(one.network, dtype)
            part = {"class": one.family, "folder": f"expert-{number}", "times": expert.grid}
            one.network.save_pretrained(made / part["folder"], safe_serialization=True)
            experts.append(part)
        scheduler.save_pretrained(made / "scheduler")
        manifest = _manifest(rounded, experts) | {
            "scheduler": {"class": type(scheduler).__name__, "folder": "scheduler", **steps}
        }
        if vae is not None:
            vae.save_pretrained(made / "vae", safe_serialization=True)
            manifest["vae"] = {"class": type(vae).__name__, "folder": "vae"}
        manifest["files"] = checksums(made, root=made)
        (made / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        difference = compare_relay(RelayPipeline(made), rounded)
        if not difference < tolerance:  # NaN fails too
            raise ValueError(
                f"{type(scheduler).__name__} with these experts differs from the generators by {difference:.2e}, and "
                f"{tolerance:.0e} is allowed; nothing was written"
            )
        text = CARD.format(count=len(asked), steps=len(sampler.grid), manifest=MANIFEST, difference=difference)
        (made / "README.md").write_text(text)
    return RelayReport(folder, tuple(one.family for one in asked), type(scheduler).__name__, difference)


def compare_relay(pipeline: RelayPipeline, sampler: Relay, *, seed: int = 0, count: int = 4) -> float:
    """The largest absolute difference of the pipeline's samples from the sampler's, NaN if one is not finite.

    Args:
        sampler: on the CPU, in float32.
    """
    classes = sampler.denoiser.backbone.num_classes
    labels = [index % classes for index in range(count)] if classes else None
    draws = Seeds.of(range(seed, seed + count))
    ours = sampler.sample(sampler.prior(draws), {} if labels is None else {"label": torch.tensor(labels)}, draws)
    return (pipeline.states(count, labels=labels, seed=seed) - ours).abs().max().item()


def _manifest(relay: Relay, experts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What it says of the experts: `boundaries` are the times at which one hands on to the next, `turns` the expert of
    each time of the grid, and `clock` what that one is told instead of it."""
    times = torch.tensor(relay.grid, dtype=torch.float64)
    return {
        "format": FORMAT,
        "version": VERSION,
        "process": str(relay.process),
        "grid": relay.grid,
        "boundaries": [expert.grid[0] for expert in relay.experts[1:]],
        "turns": [number for number, expert in enumerate(relay.experts) for _ in expert.grid],
        "clock": CLOCKS[relay.denoiser.clock](times, relay.process).tolist(),
        "noise_std": relay.process.prior_std(relay.grid[0]),
        "sample_shape": relay.denoiser.sample_shape,
        "num_classes": relay.denoiser.backbone.num_classes,
        "experts": list(experts),
    }


def _scheduler(relay: Relay, first: Request) -> tuple[Any, dict[str, Any]]:
    """A stock scheduler that takes the relay's steps, and how it is used."""
    whole = Request(Generator(first.denoiser, relay.grid, step_rule=relay.step_rule), first.network, first.vae)
    match relay.process:
        case VE():
            scheduler, ramp = _edm(whole)
            return scheduler, {"set_timesteps": {"sigmas": ramp}, "scales_input": True}
        case Rectified():
            from diffusers import FlowMatchEulerDiscreteScheduler

            require_flow(whole)
            return FlowMatchEulerDiscreteScheduler(), {"set_timesteps": {"sigmas": relay.grid}, "scales_input": False}
        case VP():
            times = {"timesteps": indices(whole)}
            return first_order_scheduler(whole), {"set_timesteps": times, "scales_input": False}
    raise Refusal(f"no stock scheduler of diffusers takes ODE steps in {relay.process}; use VE, Rectified or VP")


def _edm(whole: Request) -> tuple[Any, list[float]]:
    """EDMEulerScheduler, and its ramp: with rho = 1 a time is sigma_max + ramp (sigma_min - sigma_max)."""
    from diffusers import EDMEulerScheduler

    denoiser, high = whole.denoiser, whole.grid[0]
    require(
        denoiser.source is Prediction.F and denoiser.scale_input and denoiser.clock == "edm",
        "its scheduler is EDM's preconditioning: prediction f, scale_input true, clock edm; the experts have "
        f"prediction {denoiser.source.value}, scale_input {str(denoiser.scale_input).lower()}, clock {denoiser.clock}",
    )
    low = whole.grid[-1] / 2
    scheduler = EDMEulerScheduler(
        sigma_min=low, sigma_max=high, sigma_data=whole.process.sigma_data, rho=1.0, prediction_type="epsilon"
    )
    return scheduler, [(high - t) / (high - low) for t in whole.grid]


def _load(folder: Path, part: dict[str, Any], known: Sequence[str], device: torch.device | None = None) -> Any:
    """A part of diffusers, of a class that this file writes."""
    import diffusers

    if part["class"] not in known:
        raise ValueError(f"{MANIFEST} names the class {part['class']}; known are {', '.join(known)}; export again")
    kind = getattr(diffusers, part["class"])
    with quiet():
        if device is None:
            return kind.from_pretrained(folder / part["folder"])
        return kind.from_pretrained(folder / part["folder"], torch_dtype=torch.float32).to(device).eval()
