"""SiD: score identity distillation."""

from dataclasses import dataclass, field

from torch import Tensor

from diffdistill.denoiser import Condition
from diffdistill.losses import identity_distillation, normaliser
from diffdistill.method import Loss
from diffdistill.methods.score import ScoreConfig, ScoreMethod
from diffdistill.rng import Rng
from diffdistill.times import LogNormal, TimeSampler, Uniform


class SiD(ScoreMethod):
    """Score identity distillation: a Fisher divergence by way of two identities that hold at an ideal critic.

    alpha between 1/2 (the true Fisher divergence) and 1 always points towards the teacher on Gaussians; above 1 it is
    no divergence's gradient, and an over-dispersed generator may be pushed away. The paper's images had 1.2 and 1.

    `normalised` weights each sample by a number of its own, where the identities ask for a function of the time: the
    gradient is then no divergence's, which hundreds of pixels hardly tell and two numbers do (6 to 9 % of a covariance
    in tests/test_score.py's mixture, where it is off).

    Deviation from the released code: means over a sample where it sums.

    Source: Zhou et al. 2024 (SiD).
    """

    @dataclass(frozen=True)
    class Config(ScoreConfig):
        ratio: int = 1
        match_times: TimeSampler = field(default_factory=lambda: Uniform(0.0, 0.8))  # up to sigma 24.4 on EDM
        critic_times: TimeSampler = field(default_factory=LogNormal)
        alpha: float = 1.0  # 1/2 for the true Fisher divergence, 1 for SIM's; 1.2 in the paper
        normalised: bool = True  # by mean |x - mu_real| of each sample, as the code does
        normaliser_floor: float = 1e-5  # of that mean

        def __post_init__(self):
            ScoreConfig.__post_init__(self)
            if self.alpha < 0:
                raise ValueError(f"method.alpha must not be negative, got {self.alpha}; 0.5 to 1.2 make sense")
            if self.normaliser_floor <= 0:
                raise ValueError(f"method.normaliser_floor must be positive, got {self.normaliser_floor}")

    reference = "Zhou et al. 2024, arXiv:2404.04057"
    presets = ("cifar10", "imagenet64")

    def match(self, fake: Tensor, cond: Condition, rng: Rng) -> Loss:
        x_t, t, _ = self.noised(fake, rng)
        # attached: SiD differentiates through the inputs of teacher and critic
        x0_real, x0_fake = self.teacher(x_t, t, cond), self.critic(x_t, t, cond)
        value = identity_distillation(fake, x0_real, x0_fake, alpha=self.config.alpha)
        if self.config.normalised:
            value = value / normaliser(fake, x0_real, floor=self.config.normaliser_floor)
        return Loss(value, self.compared(fake, t, x0_real, x0_fake))
