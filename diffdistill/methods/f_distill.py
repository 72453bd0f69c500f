"""f-distill: distribution matching in any f-divergence, by way of the discriminator's density ratio."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffdistill.denoiser import Condition
from diffdistill.divergences import DIVERGENCES, bounds_of_log, check_divergence
from diffdistill.losses import full, inject, matching_direction
from diffdistill.method import Loss
from diffdistill.methods.score import ScoreConfig, ScoreMethod
from diffdistill.process import lift
from diffdistill.rng import Rng
from diffdistill.times import TimeSampler, Uniform


class FDistill(ScoreMethod):
    """DMD2's direction, each sample weighted by h(r) of its density ratio r, real over fake.

    The ratio is exp of the discriminator's logit at the very noisy sample whose scores are compared. The reverse KL has
    h = 1, and is DMD2.

    Deviation from the paper: h is not divided by its mean over the batch, nor the ratio by a running mean over noise
    levels; a loss here sees one sample at a time, so that small accumulated batches equal one big one.

    Source: Xu et al. 2025 (f-distill).
    """

    @dataclass(frozen=True)
    class Config(ScoreConfig):
        gan_weight: float = 1e-3
        gan_critic_weight: float = 1e-2
        gan_times: TimeSampler = field(default_factory=Uniform)
        divergence: str = "forward_kl"  # best on CIFAR-10 in the paper; jensen_shannon on ImageNet-64
        ratio_range: tuple[float, float] = (0.1, 20.0)  # to which the density ratio is clamped
        normalised: bool = True  # by mean |x - mu_real| of each sample, as DMD
        normaliser_floor: float = 1e-5  # of that mean

        def __post_init__(self):
            ScoreConfig.__post_init__(self)
            check_divergence(self.divergence, self.ratio_range)
            if not self.gan_weight:
                raise ValueError("method.gan_weight=0 leaves f_distill no discriminator to tell the density ratio")
            if self.normaliser_floor <= 0:
                raise ValueError(f"method.normaliser_floor must be positive, got {self.normaliser_floor}")

    reference = "Xu et al. 2025, arXiv:2502.15681"
    reads = "conditions, images"
    presets = ("cifar10", "imagenet64")

    def match(self, fake: Tensor, cond: Condition, rng: Rng) -> Loss:
        config = self.config
        with torch.no_grad():  # detached: both scores and the ratio are constants
            x_t, t, _ = self.noised(fake, rng)
            x0_real = self.teacher(x_t, t, cond)
            x0_fake, log_ratio = self.critic(x_t, t, cond, with_logits=True)
            weight = DIVERGENCES[config.divergence].shape(full(log_ratio).clamp(*bounds_of_log(config.ratio_range)))
        if config.normalised:
            direction = matching_direction(fake, x0_real, x0_fake, floor=config.normaliser_floor)
        else:
            direction = full(x0_fake) - full(x0_real)
        direction = lift(weight, direction) * direction
        readings = {**self.compared(fake, t, x0_real, x0_fake), "direction": direction.abs().flatten(1).mean(1)}
        return Loss(inject(fake, direction), {**readings, "weight": weight})
