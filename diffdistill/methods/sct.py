"""sCM by training (sCT): consistency along the straight guess that each image and its noise give, without a teacher."""

from dataclasses import dataclass

from torch import Tensor

from diffdistill.denoiser import Condition
from diffdistill.methods.continuous import ConsistencyConfig, ContinuousConsistency
from diffdistill.process import lift


class SCT(ContinuousConsistency):
    """Continuous-time consistency training.

    The velocity of a pair (x0, z) has the trajectory's as its mean over the pairs behind x_t, so that the tangent is
    right in the mean; once normalised it need not be, and for skewed data it is not. Where there is a teacher, take
    scm.

    Source: Lu and Song 2024 (sCM, there sCT).
    """

    @dataclass(frozen=True)
    class Config(ConsistencyConfig):
        pass

    presets = ("cifar10",)
    needs_teacher = False

    def velocity(self, x_t: Tensor, t: Tensor, x0: Tensor, z: Tensor, cond: Condition) -> Tensor:
        return lift(t.cos(), x0) * z - lift(t.sin(), x0) * x0
