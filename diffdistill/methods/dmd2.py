"""DMD2: distribution matching with two time scales, an optional GAN term, and backward simulation."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.denoiser import Condition
from diffdistill.losses import inject, matching_direction
from diffdistill.method import Loss
from diffdistill.methods.score import ScoreConfig, ScoreMethod
from diffdistill.rng import Rng


class DMD2(ScoreMethod):
    """Improved Distribution Matching Distillation.

    The generator follows the difference of the critic's and the teacher's denoised images of its noised samples; the
    critic keeps up with the generator by denoising those samples.

    Deviation from the released code: the normaliser has a floor where it maps infinities to large numbers.

    Source: Yin et al. 2024a (DMD2), section 4; Yin et al. 2024b (DMD) for the direction.
    """

    @dataclass(frozen=True)
    class Config(ScoreConfig):
        normaliser_floor: float = 1e-5  # of mean |x - mu_real| of each sample

        def __post_init__(self):
            ScoreConfig.__post_init__(self)
            if self.normaliser_floor <= 0:
                raise ValueError(f"method.normaliser_floor must be positive, got {self.normaliser_floor}")

    reference = "Yin et al. 2024, arXiv:2405.14867"
    presets = ("cifar10", "imagenet64")

    def match(self, fake: Tensor, cond: Condition, rng: Rng) -> Loss:
        with torch.no_grad():  # detached: DMD treats both scores as constants
            x_t, t, _ = self.noised(fake, rng)
            x0_real, x0_fake = self.teacher(x_t, t, cond), self.critic(x_t, t, cond)
        direction = matching_direction(fake, x0_real, x0_fake, floor=self.config.normaliser_floor)
        readings = {**self.compared(fake, t, x0_real, x0_fake), "direction": direction.abs().flatten(1).mean(1)}
        return Loss(inject(fake, direction), readings)
