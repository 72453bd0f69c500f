"""What the score methods share: a generator, a critic of its samples, and the cadence of the two."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from diffdistill.denoiser import Condition
from diffdistill.generator import refuse_flow_map
from diffdistill.losses import denoising, full, gan_discriminator, gan_generator
from diffdistill.method import Batch, Loss, Method, MethodConfig, Networks, PlayerSpec, Term, Update
from diffdistill.prediction import Prediction
from diffdistill.readings import Reading, Sketch, of_difference, of_logits, of_pulls, of_samples
from diffdistill.rng import Rng
from diffdistill.running_means import RunningMeans
from diffdistill.teacher import Teacher
from diffdistill.times import TimeSampler, Uniform

REFERENCE_STEPS = 10  # of the teacher's solver, for the readings that a run is compared with


def teacher_samples(teacher: Teacher, shape: Sequence[int], cond: Condition, rng: Rng) -> Tensor:
    """The teacher's own samples (N, *shape), in REFERENCE_STEPS steps."""
    times = (*teacher.process.grid(REFERENCE_STEPS), 0.0)
    return teacher.solve(teacher.process.prior_std(times[0]) * rng.normal(shape), times, cond)


@dataclass(frozen=True)
class ScoreConfig(MethodConfig):
    """The settings of every score method; a method adds its own and may give others as defaults."""

    time_scale: Literal["interleaved", "alternating"] = "interleaved"  # alternating: no fit in the first iteration
    ratio: int = 5  # iterations per generator update
    match_times: TimeSampler = field(default_factory=lambda: Uniform(0.02, 0.98))  # at which scores are compared
    critic_times: TimeSampler = field(default_factory=Uniform)  # at which the critic learns
    critic_space: Prediction = Prediction.F  # the space whose squared error the critic minimises
    stops: Literal["rotating", "random"] = "random"  # where simulation stops; random is the papers'
    inputs: Literal["simulated", "noised"] = "simulated"  # of later steps: the generator's own, or real images noised
    reduction: Literal["mean", "sum"] = "mean"  # of match and fit over the numbers of a sample; sum in SiD's code
    gan_weight: float = 0.0  # of the generator's GAN term; 3e-3 for ImageNet-64 in DMD2's code
    gan_critic_weight: float = 0.0  # of the discriminator's loss; 1e-2 in DMD2's code
    gan_times: TimeSampler = field(default_factory=Uniform)  # of the noised samples that are told apart
    match_weight: float = 1.0  # 0 leaves the GAN term alone

    def __post_init__(self):
        if self.ratio < 1:
            raise ValueError(f"method.ratio must be at least 1, got {self.ratio}")
        if self.time_scale == "alternating" and self.ratio < 2:
            raise ValueError("method.ratio must be at least 2 for alternating updates, or the critic never learns")
        weights = (self.match_weight, self.gan_weight, self.gan_critic_weight)
        if min(weights) < 0:
            raise ValueError(f"method weights must not be negative, got {weights} for match, gan and gan_critic")
        if (self.gan_weight > 0) != (self.gan_critic_weight > 0):
            raise ValueError(
                f"method.gan_weight={self.gan_weight} and method.gan_critic_weight={self.gan_critic_weight} must "
                "be both positive (GAN on) or both 0 (off): one without the other trains nothing"
            )
        if self.match_weight == 0 and self.gan_weight == 0:
            raise ValueError("method.match_weight and method.gan_weight are both 0: the generator has no loss")


class ScoreMethod(Method):
    """A generator that a critic of its own samples compares with the teacher, score against score.

    One step is one generator update. With `interleaved` (DMD2's code) the critic takes `ratio` updates a step, the
    first of them on the very samples of the generator's update; with `alternating` it takes ratio - 1. Data-free unless
    the GAN term is on. What a method adds is `match`, the generator's loss.

    For generators of several steps `stops="rotating"` is ours, and better where it was measured (tests/test_dmd2.py).
    One critic serves all steps of the grid, so that with random stops it learns the mixture of what the generator makes
    at each, and the directions vanish as soon as that mixture is the teacher's law: the single steps, the last one too,
    may share out the modes among themselves. With rotating stops the generator's step s stops at s modulo the length of
    the grid, and the critic's fresh samples already stop where the generator's next update will. It then leans towards
    the law it is asked about, and the only rest is at every step having the teacher's law.

    `inputs="noised"` starts the later steps from noised real images instead, which sampling never sees: it needs no
    simulation, and is what DMD2 was made to replace. `reduction="sum"` multiplies both losses by the number of values
    of a sample, which Adam hardly sees, while the clipping of gradients and the GAN's weights do.

    Deviation from the released codes: times are continuous where they draw from 1000 levels.

    Source: Yin et al. 2024a (DMD2), section 4, for the cadence, the GAN term and the simulation of several steps.
    """

    Config = ScoreConfig
    needs_teacher = True
    reads = "conditions, and images where the GAN term is on or inputs are noised"
    trains = "generator, critic"

    def __init__(self, config: ScoreConfig, networks: Networks):
        self.config = config
        self.teacher = networks.teacher
        self.generator = networks.new_generator()
        self.critic = networks.new_critic()
        self.means: dict[str, RunningMeans] = {}  # that `match` divides by, where it does
        self._sketch = Sketch(self.generator.denoiser.sample_shape)
        self._scale = math.prod(self.generator.denoiser.sample_shape) if config.reduction == "sum" else 1
        if config.inputs == "noised" and len(self.generator.grid) == 1:
            raise ValueError(
                "method.inputs=noised is of the steps behind the first, and generator.grid has one time; leave it out"
            )
        if config.inputs == "noised":
            refuse_flow_map(self.generator.step_rule, "method.inputs=noised")
        fresh = config.ratio - 1  # critic updates on fresh samples
        if len(self.generator.grid) > 1 and config.stops == "rotating" and fresh == 0:
            raise ValueError(
                "method.ratio=1 leaves the critic no update for the generator's next stop; with several steps in "
                "generator.grid give a ratio of at least 2, or stops=random"
            )
        for role, process in (("teacher", self.teacher.process), ("critic", self.critic.process)):
            if not process.same_law(self.generator.process):
                raise ValueError(
                    f"the {role} speaks {process} and the generator {self.generator.process}, with another alpha or "
                    "sigma: scores of one noisy sample need one law; wrap a denoiser by Denoiser.seen_in(process)"
                )

    @abstractmethod
    def match(self, fake: Tensor, cond: Condition, rng: Rng) -> Loss:
        """How far the generator's samples (N, ...) are from the teacher's law, through their gradient."""

    def players(self) -> Mapping[str, PlayerSpec]:
        generator = replace(PlayerSpec.of(self.generator.denoiser), means=self.means)
        return {"generator": generator, "critic": PlayerSpec.of(self.critic)}

    def streams(self) -> frozenset[str]:
        wants_images = self.discriminates(self.config) or self.config.inputs == "noised"
        return frozenset({"conditions", "images"} if wants_images else {"conditions"})

    @staticmethod
    def discriminates(config: ScoreConfig) -> bool:
        return config.gan_weight > 0

    def plan(self, step: int) -> Sequence[Update]:
        made: list[tuple[Tensor, Condition]] = []  # the generator's samples, for the critic's term of the same update

        def match(batch: Batch, rng: Rng) -> Loss:
            fake, cond = self._fake(batch, rng, step)
            made[:] = [(fake.detach(), cond)]
            return self._generator_loss(fake, cond, rng)

        def fit_made(batch: Batch, rng: Rng) -> Loss:
            return self._critic_loss(*made.pop(), batch, rng)

        def fit(batch: Batch, rng: Rng) -> Loss:
            with torch.no_grad():
                fake, cond = self._fake(batch, rng, step + 1)
            return self._critic_loss(fake, cond, batch, rng)

        generate, fit_new = Term("generator", "match", match), Update((Term("critic", "fit", fit),))
        if self.config.time_scale == "alternating":
            return (Update((generate,)), *[fit_new] * (self.config.ratio - 1))
        return (Update((generate, Term("critic", "fit", fit_made))), *[fit_new] * (self.config.ratio - 1))

    def references(self, batch: Batch, rng: Rng) -> Mapping[str, Reading]:
        made = teacher_samples(self.teacher, self.generator.denoiser.sample_shape, batch["conditions"].cond, rng)
        return {f"generator/match/{name}": reading for name, reading in of_samples(made, self._sketch).items()}

    def noised(self, fake: Tensor, rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
        """x_t, t and eps: the samples noised at times drawn for the comparison. x_t keeps the graph of the samples."""
        t = self.config.match_times(rng.uniform(), self.generator.process)
        eps = rng.normal(fake.shape[1:])
        return self.generator.process.perturb(fake, eps, t), t, eps

    def compared(self, fake: Tensor, t: Tensor, x0_real: Tensor, x0_fake: Tensor) -> dict[str, Reading]:
        """The readings of teacher's and critic's denoised samples at t, each (N, ...)."""
        return of_difference(fake, t, x0_real, x0_fake, self.generator.process)

    def _fake(self, batch: Batch, rng: Rng, step: int) -> tuple[Tensor, Condition]:
        """Samples for the generator's update at `step`, from the time of the grid that all ranks agree on."""
        generator, grid = self.generator, self.generator.grid
        stop = step % len(grid) if self.config.stops == "rotating" else rng.shared.integer(len(grid))
        if stop == 0 or self.config.inputs == "simulated":
            cond = batch["conditions"].cond
            return generator.rollout(generator.prior(rng), cond, rng, stop=stop), cond
        images = batch["images"]
        t = torch.full_like(rng.uniform(), grid[stop])
        x_t = generator.process.perturb(images.x0, rng.normal(images.x0.shape[1:]), t)
        return generator.denoiser(x_t, t, images.cond), images.cond

    def _generator_loss(self, fake: Tensor, cond: Condition, rng: Rng) -> Loss:
        config, process = self.config, self.generator.process
        readings = of_samples(fake, self._sketch)
        if not self.discriminates(config):
            matched = self.match(fake, cond, rng)
            return Loss(self._scale * config.match_weight * matched.value, readings | matched.readings)
        # each term's gradient is taken at the samples, where the two can be compared, and there handed to the generator
        value, pulls = full(fake).new_zeros(len(fake)), []
        if config.match_weight:
            made = fake.detach().requires_grad_(True)
            matched = self.match(made, cond, rng)
            weighted = self._scale * config.match_weight * matched.value
            pulls.append(_pull(weighted, made))
            value = value + weighted.detach()
            readings |= matched.readings
        made = fake.detach().requires_grad_(True)
        t, eps = config.gan_times(rng.uniform(), process), rng.normal(fake.shape[1:])
        adversarial = gan_generator(self.critic.logits(process.perturb(made, eps, t), t, cond))
        pulls.append(_pull(config.gan_weight * adversarial, made))  # attached: through the frozen trunk to the samples
        readings["gan"] = adversarial.detach()
        value = value + config.gan_weight * adversarial.detach()
        if config.match_weight:
            readings["gan_share"] = of_pulls(pulls[1], pulls[0])
        handed = (full(fake) * sum(pulls)).flatten(1).sum(1)
        return Loss(value + handed - handed.detach(), readings)

    def _critic_loss(self, fake: Tensor, cond: Condition, batch: Batch, rng: Rng) -> Loss:
        config, process = self.config, self.generator.process
        t, eps = config.critic_times(rng.uniform(), process), rng.normal(fake.shape[1:])
        value = denoising(self.critic, fake, eps, t, cond, space=config.critic_space)
        readings, value = {"score": value.detach()}, self._scale * value
        if self.discriminates(config):
            real = batch["images"]
            logits_real, logits_fake = self._logits(real.x0, real.cond, fake, cond, rng)
            discrimination = gan_discriminator(logits_real, logits_fake)
            value = value + config.gan_critic_weight * discrimination
            readings |= {
                "gan": discrimination.detach(),
                "logit_real": logits_real.detach(),
                "logit_fake": logits_fake.detach(),
                **of_logits(logits_real, logits_fake),
            }
        return Loss(value, readings)

    def _logits(
        self, real: Tensor, real_cond: Condition, fake: Tensor, fake_cond: Condition, rng: Rng
    ) -> tuple[Tensor, Tensor]:
        """Logits of real and of fake samples, each (N,), noised at independent times, in one batched call."""
        process, times = self.generator.process, self.config.gan_times
        t = torch.cat([times(rng.uniform(), process), times(rng.uniform(), process)])
        eps = torch.cat([rng.normal(real.shape[1:]), rng.normal(fake.shape[1:])])
        x_t = process.perturb(torch.cat([real, fake]), eps, t)
        cond = self.generator.denoiser.backbone.join(real_cond, fake_cond)
        return self.critic.logits(x_t, t, cond).chunk(2)


def _pull(value: Tensor, made: Tensor) -> Tensor:
    """The gradient of each sample's value, shape (N,), with respect to the sample, shape (N, ...)."""
    (gradient,) = torch.autograd.grad(value.sum(), made)
    return full(gradient)
