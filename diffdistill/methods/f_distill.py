"""f-distill: distribution matching in any f-divergence, by way of the discriminator's density ratio."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffdistill.denoiser import Condition
from diffdistill.divergences import DIVERGENCES, bounds_of_log, check_divergence
from diffdistill.losses import full, inject, matching_direction
from diffdistill.method import Loss, Networks
from diffdistill.methods.score import ScoreConfig, ScoreMethod
from diffdistill.process import lift
from diffdistill.rng import Rng
from diffdistill.running_means import RunningMeans, by_their_mean
from diffdistill.times import TimeSampler, Uniform

BINS = 10  # of noise levels


class FDistill(ScoreMethod):
    """DMD2's direction, each sample weighted by h(r) of its density ratio r, real over fake.

    The ratio is exp of the discriminator's logit at the very noisy sample whose scores are compared. The reverse KL has
    h = 1, and is DMD2.

    A discriminator that leans to one side at some noise level makes all samples there count too much, or too little. So
    the clamped ratio is divided by its mean in each of BINS bins of noise levels, which is 1 for the true ratio, and h
    by its mean, so that a learning rate means the same for every divergence.

    Deviations: both means are those of earlier steps, where the released code has the present batch among them, so that
    small accumulated batches equal one big one; they start at 1 and h(1), those of a generator that is right. Bins are
    equally likely ones of `match_times`, where the code parts the range of t evenly, which on VE puts nearly all levels
    into the first. One decay serves both means; the code's mean of h is the batch's alone.

    Source: Xu et al. 2025 (f-distill); NVlabs/FastGen for both means.
    """

    @dataclass(frozen=True)
    class Config(ScoreConfig):
        gan_weight: float = 1e-3
        gan_critic_weight: float = 1e-2
        gan_times: TimeSampler = field(default_factory=Uniform)
        divergence: str = "forward_kl"  # best on CIFAR-10 in the paper; jensen_shannon on ImageNet-64
        ratio_range: tuple[float, float] = (0.1, 20.0)  # to which the density ratio is clamped
        ratio_normalised: bool = True  # by its running mean in each bin of noise levels
        weight_normalised: bool = True  # h by its running mean
        mean_decay: float = 0.5  # of both means, as for ImageNet-64; 0, as for CIFAR-10: of the last step alone
        normalised: bool = True  # by mean |x - mu_real| of each sample, as DMD
        normaliser_floor: float = 1e-5  # of that mean

        def __post_init__(self):
            ScoreConfig.__post_init__(self)
            check_divergence(self.divergence, self.ratio_range)
            if not self.gan_weight:
                raise ValueError("method.gan_weight=0 leaves f_distill no discriminator to tell the density ratio")
            if self.normaliser_floor <= 0:
                raise ValueError(f"method.normaliser_floor must be positive, got {self.normaliser_floor}")
            if not 0 <= self.mean_decay < 1:
                raise ValueError(f"method.mean_decay must be in [0, 1), got {self.mean_decay}; 0.9 is calm")

    reference = "Xu et al. 2025, arXiv:2502.15681"
    reads = "conditions, images"
    presets = ("cifar10", "imagenet64")

    def __init__(self, config: Config, networks: Networks):
        super().__init__(config, networks)
        self._divergence = DIVERGENCES[config.divergence]
        device = next(self.generator.denoiser.parameters()).device
        shares = torch.arange(1, BINS, dtype=torch.float64) / BINS
        edges = config.match_times(shares, self.generator.process)
        self._edges = edges.to(device, torch.float32 if device.type == "mps" else torch.float64)
        if config.ratio_normalised:
            self.means["ratio"] = RunningMeans(1.0, bins=BINS, decay=config.mean_decay, device=device)
        if config.weight_normalised:
            right = self._divergence.shape(torch.zeros(())).item()  # h of a generator that is right
            self.means["weight"] = RunningMeans(right, decay=config.mean_decay, device=device)

    def match(self, fake: Tensor, cond: Condition, rng: Rng) -> Loss:
        config = self.config
        with torch.no_grad():  # detached: both scores and the ratio are constants
            x_t, t, _ = self.noised(fake, rng)
            x0_real = self.teacher(x_t, t, cond)
            x0_fake, log_ratio = self.critic(x_t, t, cond, with_logits=True)
            weight = self._weight(full(log_ratio).clamp(*bounds_of_log(config.ratio_range)), t)
        if config.normalised:
            direction = matching_direction(fake, x0_real, x0_fake, floor=config.normaliser_floor)
        else:
            direction = full(x0_fake) - full(x0_real)
        direction = lift(weight, direction) * direction
        readings = {**self.compared(fake, t, x0_real, x0_fake), "direction": direction.abs().flatten(1).mean(1)}
        return Loss(inject(fake, direction), {**readings, "weight": weight})

    def _weight(self, log_ratio: Tensor, t: Tensor) -> Tensor:
        """h of the log ratios at t, both (N,), each divided by its mean; the means are positive, as the range is."""
        if "ratio" in self.means:
            means, places = self.means["ratio"], torch.bucketize(t, self._edges)
            means.add(log_ratio.exp(), places)
            log_ratio = log_ratio - means.values[places].log().to(log_ratio.dtype)
        weight = self._divergence.shape(log_ratio)
        return by_their_mean(weight, self.means["weight"]) if "weight" in self.means else weight
