"""LADD: latent adversarial diffusion distillation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from diffdistill.denoiser import Condition
from diffdistill.generator import refuse_flow_map
from diffdistill.losses import (
    approximate_r1,
    gan_discriminator,
    gan_generator,
    hinge_discriminator,
    hinge_generator,
)
from diffdistill.method import Batch, Loss, Method, MethodConfig, Networks, PlayerSpec, Term, Update
from diffdistill.methods.score import teacher_samples
from diffdistill.process import lift
from diffdistill.readings import Reading, Sketch, of_logits, of_samples
from diffdistill.rng import Rng
from diffdistill.times import LogNormal, TimeSampler

LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "hinge": (hinge_generator, hinge_discriminator),
    "softplus": (gan_generator, gan_discriminator),
}


class LADD(Method):
    """A generator that must pass for real in the eyes of its frozen teacher.

    Samples, real and generated, are noised and shown to the teacher; small heads on its features, one for each tap,
    learn to tell them apart, and the generator follows them through the teacher. There is no fake score: the heads are
    all that is trained beside the generator. The discriminator moves first in a step, so that the generator never
    follows heads as they were made.

    The times are logit-normal on a rectified flow of data with standard deviation 1; log(sigma / alpha) is normal in
    every process. Where the data's standard deviation is s, add log s to the mean, to see the same share of noise.

    With several times in the grid the paper noises data to a time drawn by `step_probabilities`, others in the first
    `first_steps`, and the first time is pure noise here, as in sampling. `inputs: simulated` runs the generator's own
    steps instead, as DMD2 does, so that training sees what sampling will make.

    Deviations from the paper: the heads are not told noise level or caption beside what the teacher's features say of
    them; real data stand in for samples of the teacher; the penalty is the finite-difference R1 of APT, on the clean
    sample, its weight and sigma those of NVlabs/FastGen. That code, whose losses are `softplus`, compares a noised
    sample's logits with those of one that is not; here both are noised alike.

    Source: Sauer et al. 2024 (LADD); Lin et al. 2025 (APT) for the penalty.
    """

    @dataclass(frozen=True)
    class Config(MethodConfig):
        loss: Literal["hinge", "softplus"] = "hinge"  # the paper's, or as in DMD2
        discriminator_times: TimeSampler = field(default_factory=lambda: LogNormal(1.0, 1.0))  # of what the heads see
        same_noise: bool = False  # real and generated of one slot get one time and one noise
        discriminator_updates: int = 1  # in each step
        r1_weight: float = 0.1  # of the approximate R1 penalty; 0 for none
        r1_sigma: float = 0.1  # standard deviation of the step between the two samples that the penalty compares
        inputs: Literal["noised", "simulated"] = "noised"  # of the generator, where it has several steps
        step_probabilities: tuple[float, ...] = ()  # of each time of generator.grid; empty: all alike
        first_probabilities: tuple[float, ...] = ()  # the same in the first `first_steps` steps
        first_steps: int = 0  # how many those are

        def __post_init__(self):
            if self.discriminator_updates < 1:
                raise ValueError(f"method.discriminator_updates must be at least 1, got {self.discriminator_updates}")
            if self.r1_weight < 0 or self.r1_sigma <= 0:
                raise ValueError(
                    f"method.r1_weight={self.r1_weight} must not be negative, and r1_sigma={self.r1_sigma} positive; "
                    "r1_weight=0 turns the penalty off"
                )
            for name in ("step_probabilities", "first_probabilities"):
                given = getattr(self, name)
                if given and (min(given) < 0 or abs(sum(given) - 1) > 1e-6):
                    raise ValueError(f"method.{name} must not be negative and must sum to 1, got {list(given)}")
            if bool(self.first_probabilities) != (self.first_steps > 0):
                raise ValueError(
                    f"method.first_probabilities={list(self.first_probabilities)} and first_steps={self.first_steps} "
                    "belong together; give both or neither"
                )

    reference = "Sauer et al. 2024, arXiv:2403.12015"
    presets = ("cifar10", "imagenet64")
    example = {"critic": {"trunk": "teacher"}}
    needs_teacher = True
    reads = "images"
    trains = "generator, discriminator"

    def __init__(self, config: Config, networks: Networks):
        self.config, self.teacher = config, networks.teacher
        if self.teacher.guidance != 1:
            raise ValueError(
                f"teacher.guidance={self.teacher.guidance} has no meaning for ladd, which reads the teacher's features "
                "and not its predictions; leave guidance out"
            )
        self.generator = networks.new_generator()
        self.discriminator = networks.new_discriminator()
        if not self.discriminator.process.same_law(self.generator.process):
            raise ValueError(
                f"the teacher speaks {self.discriminator.process} and the generator {self.generator.process}, with "
                "another alpha or sigma; wrap a denoiser by Denoiser.seen_in(process)"
            )
        times = len(self.generator.grid)
        if times > 1 and config.inputs == "noised":
            refuse_flow_map(self.generator.step_rule, "method.inputs=noised")
        for name in ("step_probabilities", "first_probabilities"):
            given = getattr(config, name)
            if given and len(given) != times:
                raise ValueError(
                    f"method.{name} must have one number for each of the {times} times of generator.grid, got "
                    f"{list(given)}"
                )
        self._probabilities = config.step_probabilities or (1 / times,) * times
        self._score_fake, self._score_both = LOSSES[config.loss]
        self._sketch = Sketch(self.generator.denoiser.sample_shape)

    def players(self) -> Mapping[str, PlayerSpec]:
        return {
            "generator": PlayerSpec.of(self.generator.denoiser),
            "discriminator": PlayerSpec.of(self.discriminator),
        }

    def streams(self) -> frozenset[str]:
        return frozenset({"images"})

    @staticmethod
    def discriminates(config: Config) -> bool:
        return True

    def plan(self, step: int) -> Sequence[Update]:
        def fool(batch: Batch, rng: Rng) -> Loss:
            return self._fool(batch, rng, step)

        def judge(batch: Batch, rng: Rng) -> Loss:
            return self._judge(batch, rng, step)

        judging = Update((Term("discriminator", "judge", judge),))
        return (*[judging] * self.config.discriminator_updates, Update((Term("generator", "fool", fool),)))

    def references(self, batch: Batch, rng: Rng) -> Mapping[str, Reading]:
        """The readings of the teacher's own samples."""
        made = teacher_samples(self.teacher, self.generator.denoiser.sample_shape, batch["images"].cond, rng)
        return {f"generator/fool/{name}": reading for name, reading in of_samples(made, self._sketch).items()}

    def _fool(self, batch: Batch, rng: Rng, step: int) -> Loss:
        images, process = batch["images"], self.generator.process
        fake = self._fake(images.x0, images.cond, rng, step)
        t, eps = self._noise(fake, rng)
        # attached: through the frozen teacher to the samples
        logits = self.discriminator(process.perturb(fake, eps, t), t, images.cond)
        readings = {**of_samples(fake, self._sketch), "logit": logits.detach().mean(1)}
        return Loss(self._score_fake(logits).mean(1), readings)

    def _judge(self, batch: Batch, rng: Rng, step: int) -> Loss:
        images, process, config = batch["images"], self.generator.process, self.config
        with torch.no_grad():
            fake = self._fake(images.x0, images.cond, rng, step)
        t, eps = self._noise(fake, rng)
        t_real, eps_real = (t, eps) if config.same_noise else self._noise(fake, rng)
        shown = [process.perturb(fake, eps, t), process.perturb(images.x0, eps_real, t_real)]
        times = [t, t_real]
        join, cond = self.discriminator.trunk.backbone.join, images.cond
        both = join(cond, cond)
        if config.r1_weight:
            near = images.x0 + config.r1_sigma * rng.normal(images.x0.shape[1:])
            shown, times = [*shown, process.perturb(near, eps_real, t_real)], [*times, t_real]
            both = join(both, cond)
        logits = self.discriminator(torch.cat(shown), torch.cat(times), both).chunk(len(shown))
        value = self._score_both(logits[1], logits[0]).mean(1)
        fooled, real = logits[0].detach().mean(1), logits[1].detach().mean(1)  # all heads of a sample judge it together
        readings = {"logit_fake": fooled, "logit_real": real, **of_logits(real, fooled)}
        if config.r1_weight:
            penalty = approximate_r1(logits[1], logits[2]).mean(1)
            value = value + config.r1_weight * penalty
            readings["r1"] = penalty.detach()
        return Loss(value, readings)

    def _noise(self, x: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
        """Time and noise at which the teacher sees a sample."""
        return self.config.discriminator_times(rng.uniform(), self.generator.process), rng.normal(x.shape[1:])

    def _fake(self, x0: Tensor, cond: Condition, rng: Rng, step: int) -> Tensor:
        """Samples of the generator for the conditions of the data x0."""
        generator, noise = self.generator, self.generator.prior(rng)
        if len(generator.grid) == 1:
            return generator.rollout(noise, cond, rng, stop=0)
        early = step < self.config.first_steps
        edges = list(accumulate(self.config.first_probabilities if early else self._probabilities))[:-1]
        if self.config.inputs == "simulated":
            u = rng.shared.uniform()
            return generator.rollout(noise, cond, rng, stop=sum(u >= edge for edge in edges))
        u = rng.uniform()
        t = torch.full_like(u, generator.grid[0])
        for edge, time in zip(edges, generator.grid[1:], strict=True):
            t = torch.where(u < edge, t, time)
        noised = generator.process.perturb(x0, rng.normal(x0.shape[1:]), t)
        x = torch.where(lift(u < edges[0], x0).bool(), noise, noised)
        return generator.denoiser(x, t, cond)
