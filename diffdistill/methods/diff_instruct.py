"""Diff-Instruct: the plain score difference as the generator's gradient."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffdistill.denoiser import Condition
from diffdistill.losses import full, inject
from diffdistill.method import Loss
from diffdistill.methods.score import ScoreConfig, ScoreMethod
from diffdistill.rng import Rng
from diffdistill.times import LogNormal, TimeSampler


class DiffInstruct(ScoreMethod):
    """The gradient of an integral of KL(fake || real) over noise levels, weighted as in the released code.

    That weight makes the direction mu_fake - mu_real, with nothing to normalise it. The code's augmentation of the
    critic's images is left out.

    Source: Luo et al. 2023 (Diff-Instruct).
    """

    @dataclass(frozen=True)
    class Config(ScoreConfig):
        ratio: int = 1
        match_times: TimeSampler = field(default_factory=LogNormal)
        critic_times: TimeSampler = field(default_factory=LogNormal)

    reference = "Luo et al. 2023, arXiv:2305.18455"
    presets = ("cifar10", "imagenet64")

    def match(self, fake: Tensor, cond: Condition, rng: Rng) -> Loss:
        with torch.no_grad():  # detached: both scores are constants
            x_t, t, _ = self.noised(fake, rng)
            x0_real, x0_fake = self.teacher(x_t, t, cond), self.critic(x_t, t, cond)
        direction = full(x0_fake) - full(x0_real)
        return Loss(inject(fake, direction), self.compared(fake, t, x0_real, x0_fake))
