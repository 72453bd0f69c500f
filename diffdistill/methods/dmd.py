"""DMD: distribution matching with a regression on pairs that the teacher made."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from diffdistill.losses import pair_distance
from diffdistill.method import Batch, Loss, Networks, Term, Update
from diffdistill.methods.dmd2 import DMD2
from diffdistill.rng import Rng


class DMD(DMD2):
    """Distribution Matching Distillation: DMD2's direction, and a regression that keeps every mode.

    The pairs are noises and the ends of the teacher's ODE from them; the generator has one step, from the time of that
    noise.

    Deviation from the paper: the regression's distance is LPIPS there, on images enlarged to 224 pixels; here it is one
    that needs no other network, and its weight, 0.25 in the paper, is on another scale.

    Source: Yin et al. 2024b (DMD).
    """

    @dataclass(frozen=True)
    class Config(DMD2.Config):
        ratio: int = 1
        regression_weight: float = 0.25  # 0 turns the regression off, and reads no pairs
        distance: Literal["pseudo_huber", "squared"] = "pseudo_huber"  # of a sample from the end of its pair
        huber: float = 5.4e-4  # of the pseudo-Huber distance, per root of the sample's size, as in iCT

        def __post_init__(self):
            DMD2.Config.__post_init__(self)
            if self.regression_weight < 0:
                raise ValueError(f"method.regression_weight must not be negative, got {self.regression_weight}")
            if self.huber <= 0:
                raise ValueError(f"method.huber must be positive, got {self.huber}; distance=squared has none")

    reference = "Yin et al. 2023, arXiv:2311.18828"
    presets = ("cifar10", "imagenet64")
    reads = "conditions, pairs where the regression is on, and images where the GAN term is on"

    def __init__(self, config: Config, networks: Networks):
        super().__init__(config, networks)
        if len(self.generator.grid) > 1:
            raise ValueError(
                f"dmd has one step, since its pairs lead from pure noise to the data, and generator.grid has "
                f"{len(self.generator.grid)} times; give one, or take method dmd2"
            )

    def streams(self) -> frozenset[str]:
        return super().streams() | ({"pairs"} if self.config.regression_weight else set())

    def plan(self, step: int) -> Sequence[Update]:
        first, *others = super().plan(step)
        if not self.config.regression_weight:
            return (first, *others)
        match, *fit = first.terms
        return (Update((match, Term("generator", "regress", self._regress), *fit)), *others)

    def _regress(self, batch: Batch, rng: Rng) -> Loss:
        config, pairs = self.config, batch["pairs"]
        made = self.generator.rollout(pairs.noise, pairs.cond, rng, stop=0)
        far = pair_distance(made, pairs.x0, huber=config.huber if config.distance == "pseudo_huber" else None)
        return Loss(config.regression_weight * far, {"distance": far.detach()})
