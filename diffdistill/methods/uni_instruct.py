"""Uni-Instruct: any f-divergence between the clean laws, by its expansion along the diffusion."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from diffdistill.denoiser import Condition
from diffdistill.divergences import DIVERGENCES, bounds_of_log, check_divergence
from diffdistill.losses import full, identity_distillation, normaliser
from diffdistill.method import Loss, Networks
from diffdistill.methods.score import ScoreConfig, ScoreMethod
from diffdistill.process import lift
from diffdistill.rng import Rng
from diffdistill.running_means import RunningMeans, by_their_mean
from diffdistill.times import LogNormal, TimeSampler, Uniform


class UniInstruct(ScoreMethod):
    """The exact gradient of E_fake h(r) |S_fake - S_real|^2 at each noise level: SiD weighted by the density ratio.

    With h = f''(r) r^2 these add up over noise levels to D_f between the clean laws. Per sample the loss is SiD's with
    alpha = (1 + d log h / d log r) / 2, times h(r). The ratio's own gradient along the sample is known without the
    discriminator, grad log r = S_real - S_fake, and `ratio_grad=score_injected` puts it in; with `detached`, as in
    released code, the gradient is biased for every divergence but the reverse KL, and less noisy.

    Exact is the form without `normalised`, whose weight is a number of each sample's own, as SiD's. At small noise
    levels the score difference that is injected is large: in two dimensions the Jensen-Shannon divergence needs
    `detached`.

    Scores are compared as denoised samples, which drops the weight alpha^2 / sigma^4, as SiD does. `weight_normalised`
    divides h by its mean over earlier steps, and so changes the scale of the gradient alone.

    Source: Wang et al. 2025 (Uni-Instruct); the form by SiD's loss is derived here, and checked by quadrature.
    """

    @dataclass(frozen=True)
    class Config(ScoreConfig):
        ratio: int = 1
        match_times: TimeSampler = field(default_factory=lambda: Uniform(0.0, 0.8))
        critic_times: TimeSampler = field(default_factory=LogNormal)
        gan_weight: float = 1e-2
        gan_critic_weight: float = 1e-2
        divergence: str = "forward_kl"  # of the eight in divergences.py
        ratio_range: tuple[float, float] = (0.1, 20.0)  # to which the density ratio is clamped
        ratio_grad: Literal["score_injected", "detached"] = "score_injected"  # exact, or as in released code
        weight_normalised: bool = False  # h by its mean over earlier steps; with `detached`, the calmest there is
        mean_decay: float = 0.5  # of that mean; 0: of the last step alone
        normalised: bool = True  # by mean |x - mu_real| of each sample, as SiD
        normaliser_floor: float = 1e-5  # of that mean

        def __post_init__(self):
            ScoreConfig.__post_init__(self)
            check_divergence(self.divergence, self.ratio_range)
            if not self.gan_weight:
                raise ValueError("method.gan_weight=0 leaves uni_instruct no discriminator to tell the density ratio")
            if self.normaliser_floor <= 0:
                raise ValueError(f"method.normaliser_floor must be positive, got {self.normaliser_floor}")
            if not 0 <= self.mean_decay < 1:
                raise ValueError(f"method.mean_decay must be in [0, 1), got {self.mean_decay}; 0.9 is calm")

    reference = "Wang et al. 2025, arXiv:2505.20755"
    reads = "conditions, images"
    presets = ("cifar10", "imagenet64")

    def __init__(self, config: Config, networks: Networks):
        super().__init__(config, networks)
        if config.weight_normalised:
            device = next(self.generator.denoiser.parameters()).device
            right = DIVERGENCES[config.divergence].h(torch.zeros(())).item()  # h of a generator that is right
            self.means["weight"] = RunningMeans(right, decay=config.mean_decay, device=device)

    def match(self, fake: Tensor, cond: Condition, rng: Rng) -> Loss:
        config, process, divergence = self.config, self.generator.process, DIVERGENCES[self.config.divergence]
        x_t, t, _ = self.noised(fake, rng)
        # attached: as SiD, through the inputs of teacher and critic; the discriminator is a constant
        x0_real = self.teacher(x_t, t, cond)
        x0_fake, logits = self.critic(x_t, t, cond, with_logits=True)
        log_ratio = full(logits).detach()
        if config.ratio_grad == "score_injected":
            by_score = lift(process.alpha(t) / process.sigma(t) ** 2, x_t) * (full(x0_real) - full(x0_fake)).detach()
            moved = full(x_t) - full(x_t).detach()  # zero, with the gradient of x_t
            log_ratio = log_ratio + (by_score * moved).flatten(1).sum(1)
        log_ratio = log_ratio.clamp(*bounds_of_log(config.ratio_range))
        alpha = (1 + divergence.slope(log_ratio)) / 2
        weight = divergence.h(log_ratio)
        if config.weight_normalised:
            weight = by_their_mean(weight, self.means["weight"])
        value = weight * identity_distillation(fake, x0_real, x0_fake, alpha=alpha)
        if config.normalised:
            value = value / normaliser(fake, x0_real, floor=config.normaliser_floor)
        return Loss(value, {**self.compared(fake, t, x0_real, x0_fake), "weight": weight.detach()})
