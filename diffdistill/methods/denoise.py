"""Plain diffusion or flow-matching training, from scratch or fine-tuning: what makes a teacher."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from diffdistill.denoiser import Condition, either
from diffdistill.generator import refuse_flow_map
from diffdistill.losses import denoising
from diffdistill.method import Batch, Loss, Method, MethodConfig, Networks, PlayerSpec, Term, Update
from diffdistill.prediction import Prediction
from diffdistill.rng import Rng
from diffdistill.times import LogNormal, TimeSampler


class Denoise(Method):
    """Denoising score matching on real data.

    Source: Karras et al. 2022, table 1 (space F, log-normal times); Lipman et al. 2022 (space VELOCITY).
    """

    @dataclass(frozen=True)
    class Config(MethodConfig):
        space: Prediction = Prediction.F  # the space whose squared error is minimised
        times: TimeSampler = field(default_factory=LogNormal)  # of the noised images
        condition_dropout: float = 0.0  # share of samples trained without condition, for guidance

        def __post_init__(self):
            if not 0 <= self.condition_dropout < 1:
                raise ValueError(f"method.condition_dropout must be in [0, 1), got {self.condition_dropout}")

    reference = "Karras et al. 2022, arXiv:2206.00364; Lipman et al. 2022, arXiv:2210.02747"
    needs_teacher = False
    reads = "images"
    trains = "generator"

    def __init__(self, config: Config, networks: Networks):
        self.config = config
        self.generator = networks.new_generator()
        refuse_flow_map(self.generator.step_rule, "a denoiser's loss")

    def players(self) -> Mapping[str, PlayerSpec]:
        return {"generator": PlayerSpec.of(self.generator.denoiser)}

    def streams(self) -> frozenset[str]:
        return frozenset({"images"})

    def plan(self, step: int) -> Sequence[Update]:
        return (Update((Term("generator", "denoise", self._denoise),)),)

    def _denoise(self, batch: Batch, rng: Rng) -> Loss:
        denoiser, images = self.generator.denoiser, batch["images"]
        t = self.config.times(rng.uniform(), denoiser.process)
        eps = rng.normal(images.x0.shape[1:])
        cond = self._dropped(images.cond, rng) if self.config.condition_dropout else images.cond
        return Loss(denoising(denoiser, images.x0, eps, t, cond, space=self.config.space))

    def _dropped(self, cond: Condition, rng: Rng) -> Condition:
        """`cond` with some samples' entries replaced by the null condition."""
        drop = rng.uniform() < self.config.condition_dropout
        return either(drop, self.generator.denoiser.backbone.null(cond), cond)
