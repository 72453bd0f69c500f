"""Rectified flow: velocities matched along straight lines from noise to data, of a coupling or of independent ends."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.distances import Distance, Lpips, Squared
from diffdistill.generator import Generator, refuse_flow_map
from diffdistill.method import Batch, Loss, Method, MethodConfig, Networks, PlayerSpec, Sample, Source, Term, Update
from diffdistill.prediction import Prediction
from diffdistill.process import VE, Rectified, lift
from diffdistill.rng import Rng
from diffdistill.straightness import rectified, straightness
from diffdistill.times import TimeSampler, Uniform

MEASURED_STEPS = 8  # of Euler, for the straightness in the log


class Reflow(Method):
    """Rectified flow, reflow, 2-rectified flow++ and SlimFlow's annealing reflow, as settings of one loss.

    A line runs from the noise eps of deviation 1 to the data, x_t = (1 - t) x0 + t eps, and its velocity eps - x0 is
    learnt. With `coupling: independent` that is the first flow. Pairs of a teacher or of an earlier flow, made by
    `diffdistill couple`, give the next one: `couple TEACHER` for the second, `couple RUN --steps 100 --solver euler`
    for the third.

    The generator may be of any process and prediction: it is trained as the flow that it is when seen in the rectified
    process. So a start from an EDM or VP teacher is exact, and it samples in its own process, where an Euler step of
    the flow is a DDIM step (on VE and rectified, an Euler step). The noise of pairs that begin at sigma_max is divided
    by sigma_max. The state sigma_max eps, where the teacher's ODE began, is t eps in the flow, at t = sigma_max / (1 +
    sigma_max); the line of its pair passes there at t eps + (1 - t) x0, off by 1/81 of the data for EDM.

    Source: Liu et al. 2022 (rectified flow); Lee et al. 2024 (RF++): `times: {name: u_shaped}`, `distance: {name:
    pseudo_huber}`, `fading`, `sample_distance: {name: lpips}`, `sample_over_time`, and the start from EDM; Zhu et al.
    2024 (SlimFlow): `anneal_steps`.
    """

    @dataclass(frozen=True)
    class Config(MethodConfig):
        coupling: Literal["pairs", "independent"] = "pairs"  # independent: real images and fresh noise, the first flow
        times: TimeSampler = field(default_factory=lambda: Uniform(low=1e-3))  # of the flow: 0 the data, 1 the noise
        distance: Distance = field(default_factory=Squared)  # of the velocity from eps - x0
        weight: float = 1.0  # of that distance
        fading: bool = False  # multiplies it by 1 - t, as RF++ does
        sample_distance: Distance | None = None  # of the predicted x0 from the pair's, added; RF++: lpips
        sample_over_time: bool = False  # divides that by t, as RF++'s last configuration does
        anneal_steps: int = 0  # updates in which a pair's noise goes from a fresh one to its own; 0: none
        anneal: Literal["linear", "cosine"] = "linear"  # how the share of fresh noise falls
        flip: bool = False  # mirror half of the pairs left to right, noise and data together
        straightness_every: int = 100  # updates between measurements of the straightness; 0: none

        def __post_init__(self):
            for name in ("weight", "anneal_steps", "straightness_every"):
                if getattr(self, name) < 0:
                    raise ValueError(f"method.{name} must not be negative, got {getattr(self, name)}")
            if not self.weight and self.sample_distance is None:
                raise ValueError("method.weight=0 leaves no loss; give a weight, or a sample_distance")
            if isinstance(self.distance, Lpips):
                raise ValueError("method.distance=lpips compares pictures, not velocities; give it as sample_distance")
            if self.sample_over_time and self.sample_distance is None:
                raise ValueError("method.sample_over_time is about sample_distance, which is missing; give one")
            for name in ("anneal_steps", "flip"):
                if self.coupling == "independent" and getattr(self, name):
                    raise ValueError(
                        f"method.{name}={getattr(self, name)} is about pairs, and coupling=independent reads none; "
                        "leave it out (images are mirrored by data.flip)"
                    )

    reference = "Liu et al. 2022, arXiv:2209.03003; Lee 2024, arXiv:2405.20320; Zhu 2024, arXiv:2407.12718"
    presets = ("cifar10",)
    needs_teacher = False
    reads = "pairs, or images where the coupling is independent"
    trains = "generator"

    def __init__(self, config: Config, networks: Networks):
        self.config = config
        self.generator = networks.new_generator()
        refuse_no_flow(self.generator, flip=config.flip)
        self.flow = rectified(self.generator.denoiser)
        self._stream = "pairs" if config.coupling == "pairs" else "images"
        self._distance = config.distance.measure(networks.perceptual)
        wanted = config.sample_distance
        self._sample_distance = None if wanted is None else wanted.measure(networks.perceptual)

    def players(self) -> Mapping[str, PlayerSpec]:
        return {"generator": PlayerSpec.of(self.generator.denoiser)}

    def streams(self) -> frozenset[str]:
        return frozenset({self._stream})

    def source(self, stream: str) -> Source:
        return Source(stream, unit_noise=stream == "pairs")

    def frozen(self) -> Mapping[str, nn.Module]:
        return perceptual(self._distance, self._sample_distance)

    def plan(self, step: int) -> Sequence[Update]:
        every = self.config.straightness_every
        match = functools.partial(self._match, beta=self.fresh_share(step), measures=every and (step + 1) % every == 0)
        return (Update((Term("generator", "match", match),)),)

    def fresh_share(self, step: int) -> float:
        """beta at a step: the noise of a pair is sqrt(1 - beta^2) its own + beta fresh (Zhu et al. 2024)."""
        gone = min(1.0, step / self.config.anneal_steps) if self.config.anneal_steps else 1.0
        if gone == 1:
            return 0.0  # exactly, so that the pairs are the coupling's
        return 1 - gone if self.config.anneal == "linear" else math.cos(math.pi / 2 * gone)

    def _match(self, batch: Batch, rng: Rng, *, beta: float, measures: bool) -> Loss:
        config, sample = self.config, batch[self._stream]
        t = config.times(rng.uniform(), self.flow.process)
        x0, eps = self._ends(sample, rng, beta)
        x_t = self.flow.process.perturb(x0, eps, t)
        velocity = self.flow(x_t, t, sample.cond, to=Prediction.VELOCITY)
        far = self._distance(velocity, eps - x0)
        loss, readings = config.weight * far, {"velocity": far.detach()}
        if config.fading:
            loss = (1 - t).to(loss.dtype) * loss
        if self._sample_distance is not None:
            off = self._sample_distance(x_t - lift(t, x_t) * velocity, x0)
            readings["sample"] = off.detach()
            loss = loss + (off / t.to(off.dtype) if config.sample_over_time else off)
        if measures:
            noise = eps.detach()
            readings["straightness"] = straightness(
                self.generator.denoiser, noise, sample.cond, steps=MEASURED_STEPS, solver="euler"
            )
        return Loss(loss, readings)

    def _ends(self, sample: Sample, rng: Rng, beta: float) -> tuple[Tensor, Tensor]:
        """The data and the noise of each line."""
        if sample.noise is None:
            return sample.x0, rng.normal(sample.x0.shape[1:])
        x0, eps = mirrored(sample, rng) if self.config.flip else (sample.x0, sample.noise)
        if beta:
            eps = math.sqrt(1 - beta**2) * eps + beta * rng.normal(eps.shape[1:])
        return x0, eps


def refuse_no_flow(generator: Generator, *, flip: bool) -> None:
    """Refuses a generator whose steps are not those of a flow, and mirroring what is no picture.

    Raises:
        ValueError: naming the key.
    """
    rule, process = generator.step_rule, generator.process
    refuse_flow_map(rule, "a rectified flow")
    if len(generator.grid) > 1 and rule == "renoise":
        raise ValueError(
            f"generator.step_rule=renoise leaves the lines that a flow follows, and generator.grid has "
            f"{len(generator.grid)} times; take step_rule=ddim, or a grid of one time"
        )
    if len(generator.grid) > 1 and rule == "euler" and not isinstance(process, VE | Rectified):
        raise ValueError(f"generator.step_rule=euler on {process} is no Euler step of the flow; ddim is, take that")
    shape = tuple(generator.denoiser.sample_shape)
    if flip and len(shape) != 3:
        raise ValueError(f"method.flip mirrors pictures, and the samples have shape {shape}; leave it out")


def mirrored(pairs: Sample, rng: Rng) -> tuple[Tensor, Tensor]:
    """Data and noise, half of the pairs mirrored left to right, each with its own draw."""
    turned = (rng.uniform() < 0.5).reshape(-1, 1, 1, 1)
    return tuple(torch.where(turned, end.flip(3), end) for end in (pairs.x0, pairs.noise))


def perceptual(*measures) -> Mapping[str, nn.Module]:
    """The frozen network behind these distances, if one has any."""
    networks = [measure for measure in measures if isinstance(measure, nn.Module)]
    return {"lpips": networks[0]} if networks else {}
