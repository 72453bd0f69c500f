"""sCM by distillation (sCD): consistency along the teacher's own trajectories."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.denoiser import Condition
from diffdistill.method import Networks
from diffdistill.methods.continuous import ConsistencyConfig, ContinuousConsistency
from diffdistill.prediction import Prediction
from diffdistill.teacher import Teacher


class SCM(ContinuousConsistency):
    """Continuous-time consistency distillation, from a teacher of any family, guided or not.

    Source: Lu and Song 2024 (sCM, there sCD).
    """

    @dataclass(frozen=True)
    class Config(ConsistencyConfig):
        pass

    needs_teacher = True
    presets = ("cifar10", "imagenet64")

    def __init__(self, config: Config, networks: Networks):
        super().__init__(config, networks)
        self._guide = Teacher(self.teacher.denoiser.seen_in(self.process), guidance=self.teacher.guidance)

    @torch.no_grad()
    def velocity(self, x_t: Tensor, t: Tensor, x0: Tensor, z: Tensor, cond: Condition) -> Tensor:
        return self._guide(x_t, t, cond, to=Prediction.VELOCITY)
