"""Teacher score matching: a network of another size learns to denoise as the teacher does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from diffdistill.generator import refuse_flow_map
from diffdistill.losses import full
from diffdistill.method import Batch, Loss, Method, MethodConfig, Networks, PlayerSpec, Term, Update
from diffdistill.prediction import Prediction
from diffdistill.rng import Rng
from diffdistill.times import LogNormal, TimeSampler


class ScoreMatching(Method):
    """The squared difference from the teacher's denoised sample, on noised real data.

    The target is a function of the noisy sample, so that a loss of 0 can be reached, and nothing of the noise stays in
    the gradient where it is. A student of the teacher's size starts as the teacher, and has nothing to learn here.

    Deviation from the paper: its weight over noise levels is not known here; in space F it is EDM's.

    Source: Song et al. 2024 (MSD), the first of its three stages.
    """

    @dataclass(frozen=True)
    class Config(MethodConfig):
        space: Prediction = Prediction.F  # the space whose squared difference is minimised; F has EDM's weight
        times: TimeSampler = field(default_factory=LogNormal)  # of the noised images

    reference = "Song et al. 2024, arXiv:2410.23274 (teacher score matching)"
    needs_teacher = True
    reads = "images"
    trains = "generator"

    def __init__(self, config: Config, networks: Networks):
        self.config, self.teacher = config, networks.teacher
        self.generator = networks.new_generator()
        refuse_flow_map(self.generator.step_rule, "a denoiser's loss")
        if not self.teacher.process.same_law(self.generator.process):
            raise ValueError(
                f"the teacher speaks {self.teacher.process} and the generator {self.generator.process}, with another "
                "alpha or sigma: one noisy sample needs one law; wrap a denoiser by Denoiser.seen_in(process)"
            )

    def players(self) -> Mapping[str, PlayerSpec]:
        return {"generator": PlayerSpec.of(self.generator.denoiser)}

    def streams(self) -> frozenset[str]:
        return frozenset({"images"})

    def plan(self, step: int) -> Sequence[Update]:
        return (Update((Term("generator", "match", self._match),)),)

    def _match(self, batch: Batch, rng: Rng) -> Loss:
        images, process = batch["images"], self.generator.process
        t = self.config.times(rng.uniform(), process)
        x_t = process.perturb(images.x0, rng.normal(images.x0.shape[1:]), t)
        target = self.teacher(x_t, t, images.cond, to=self.config.space)  # no graph: neither it nor x_t is trained
        ours = self.generator.denoiser(x_t, t, images.cond, to=self.config.space)
        return Loss((full(ours) - full(target)).square().flatten(1).mean(1))
