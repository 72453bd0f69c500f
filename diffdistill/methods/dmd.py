"""DMD: distribution matching with a regression on pairs that the teacher made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from diffdistill.distances import Distance, PseudoHuber
from diffdistill.method import Batch, Loss, Networks, Term, Update
from diffdistill.methods.dmd2 import DMD2
from diffdistill.rng import Rng


class DMD(DMD2):
    """Distribution Matching Distillation: DMD2's direction, and a regression that keeps every mode.

    The pairs are noises and the ends of the teacher's ODE from them; the generator has one step, from the time of that
    noise.

    The paper's distance is LPIPS on images enlarged to 224 pixels, at weight 0.25: `distance: {name: lpips, weights:
    FILE}`. The default needs no other network, and the weight is on another scale there.

    Source: Yin et al. 2024b (DMD).
    """

    @dataclass(frozen=True)
    class Config(DMD2.Config):
        ratio: int = 1
        regression_weight: float = 0.25  # 0 turns the regression off, and reads no pairs
        distance: Distance = field(default_factory=PseudoHuber)  # of a sample from the end of its pair

        def __post_init__(self):
            DMD2.Config.__post_init__(self)
            if self.regression_weight < 0:
                raise ValueError(f"method.regression_weight must not be negative, got {self.regression_weight}")

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
        self._distance = config.distance.measure(networks.perceptual) if config.regression_weight else None

    def streams(self) -> frozenset[str]:
        return super().streams() | ({"pairs"} if self.config.regression_weight else set())

    def frozen(self) -> Mapping[str, nn.Module]:
        return {"lpips": self._distance} if isinstance(self._distance, nn.Module) else {}

    def plan(self, step: int) -> Sequence[Update]:
        first, *others = super().plan(step)
        if not self.config.regression_weight:
            return (first, *others)
        match, *fit = first.terms
        return (Update((match, Term("generator", "regress", self._regress), *fit)), *others)

    def _regress(self, batch: Batch, rng: Rng) -> Loss:
        pairs = batch["pairs"]
        made = self.generator.rollout(pairs.noise, pairs.cond, rng, stop=0)
        far = self._distance(made, pairs.x0)
        return Loss(self.config.regression_weight * far, {"distance": far.detach()})
