"""Degradation, the first stage of DisBack: what the teacher becomes on the way to the generator's law."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from diffdistill.generator import Generator
from diffdistill.losses import denoising
from diffdistill.method import Batch, Loss, Method, MethodConfig, Networks, PlayerSpec, Term, Update
from diffdistill.prediction import Prediction
from diffdistill.rng import Rng
from diffdistill.times import TimeSampler, Uniform


class Degrade(Method):
    """A copy of the teacher that learns to denoise what the generator makes before any training.

    Its checkpoints are the nodes of the way back: keep them by train.save_every and train.keep_every, and name them in
    `disback`. The player called generator is that copy, so that a node is sampled, evaluated and exported like any
    network; the generator whose samples it learns is fixed. Where that one has several steps, its samples stop at a
    random one.

    Source: Zhang et al. 2024 (DisBack), the degradation stage.
    """

    @dataclass(frozen=True)
    class Config(MethodConfig):
        times: TimeSampler = field(default_factory=Uniform)  # of the noised samples
        space: Prediction = Prediction.F  # the space whose squared error is minimised

    reference = "Zhang et al. 2024, arXiv:2408.15991, first stage"
    needs_teacher = True
    reads = "conditions"
    trains = "generator"

    def __init__(self, config: Config, networks: Networks):
        self.config, self.teacher = config, networks.teacher
        if self.teacher.guidance != 1:
            raise ValueError(
                f"teacher.guidance={self.teacher.guidance} has no meaning for degrade, whose nodes are guided when "
                "disback asks them; give it there"
            )
        self.untrained = networks.new_generator()
        self.untrained.denoiser.eval().requires_grad_(False)
        degraded = networks.new_critic().denoiser
        if not degraded.process.same_law(self.untrained.process):
            raise ValueError(
                f"the teacher speaks {degraded.process} and the generator {self.untrained.process}, with another alpha "
                "or sigma; wrap a denoiser by Denoiser.seen_in(process)"
            )
        self.generator = Generator(degraded, self.untrained.grid, step_rule=self.untrained.step_rule)

    def players(self) -> Mapping[str, PlayerSpec]:
        return {"generator": PlayerSpec.of(self.generator.denoiser)}

    def frozen(self) -> Mapping[str, torch.nn.Module]:
        return {"untrained": self.untrained.denoiser}

    def streams(self) -> frozenset[str]:
        return frozenset({"conditions"})

    def plan(self, step: int) -> Sequence[Update]:
        return (Update((Term("generator", "degrade", self._degrade),)),)

    def _degrade(self, batch: Batch, rng: Rng) -> Loss:
        cond, untrained = batch["conditions"].cond, self.untrained
        with torch.no_grad():
            stop = rng.shared.integer(len(untrained.grid))
            fake = untrained.rollout(untrained.prior(rng), cond, rng, stop=stop)
        t, eps = self.config.times(rng.uniform(), untrained.process), rng.normal(fake.shape[1:])
        return Loss(denoising(self.generator.denoiser, fake, eps, t, cond, space=self.config.space))
