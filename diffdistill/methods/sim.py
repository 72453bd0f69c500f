"""SIM: score implicit matching."""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from diffdistill.denoiser import Condition
from diffdistill.losses import score_implicit
from diffdistill.method import Loss
from diffdistill.methods.score import ScoreConfig, ScoreMethod
from diffdistill.rng import Rng
from diffdistill.times import LogNormal, TimeSampler, Uniform


class SIM(ScoreMethod):
    """Score implicit matching: any distance between the two scores, its gradient by the score-gradient theorem.

    The scores are compared as denoised samples, which drops the weight alpha^2 / sigma^4; times and weight are free in
    the paper, and the sampler is SiD's. The pseudo-Huber distance normalises each sample by itself.

    Source: Luo et al. 2024 (SIM).
    """

    @dataclass(frozen=True)
    class Config(ScoreConfig):
        ratio: int = 1
        match_times: TimeSampler = field(default_factory=lambda: Uniform(0.0, 0.8))
        critic_times: TimeSampler = field(default_factory=LogNormal)
        distance: Literal["pseudo_huber", "squared"] = "pseudo_huber"  # between the two scores
        huber: float = 5.4e-4  # the paper does not say; the constant of Song and Dhariwal 2023 (iCT), per root of size

        def __post_init__(self):
            ScoreConfig.__post_init__(self)
            if self.huber <= 0:
                raise ValueError(f"method.huber must be positive, got {self.huber}; distance=squared has none")

    reference = "Luo et al. 2024, arXiv:2410.16794"
    presets = ("cifar10", "imagenet64")

    def match(self, fake: Tensor, cond: Condition, rng: Rng) -> Loss:
        x_t, t, _ = self.noised(fake, rng)
        # attached: SIM differentiates through the inputs of teacher and critic
        x0_real, x0_fake = self.teacher(x_t, t, cond), self.critic(x_t, t, cond)
        huber = self.config.huber if self.config.distance == "pseudo_huber" else None
        value = score_implicit(fake, x0_real, x0_fake, huber=huber)
        return Loss(value, self.compared(fake, t, x0_real, x0_fake))
