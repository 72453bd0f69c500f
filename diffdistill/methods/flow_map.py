"""What methods of flow maps share: a network that is told two times, and which samples take part in what."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffdistill.denoiser import Condition
from diffdistill.generator import FLOW_MAP
from diffdistill.method import Method, MethodConfig, Networks, PlayerSpec
from diffdistill.prediction import Prediction
from diffdistill.rng import SlotDropout, slot_dropouts
from diffdistill.straightness import rectified


class FlowMapMethod(Method):
    """A generator that leaps from any time t to any r < t along the trajectories of a flow.

    The network is told t - r besides t. What it then gives is u(x_t, t, r), the mean velocity from t to r, as velocity
    of the rectified flow: x_r = x_t - (t - r) u. At r = t that is the velocity itself, and the network an ordinary
    denoiser. The generator may be of any process and prediction: it is trained as the rectified flow that it is when
    matched by signal-to-noise ratio, and samples in its own process, where the same leap is a step of DDIM. Times
    beyond that process's noisiest are taken as that one.

    Source: Geng et al. 2025 (MeanFlow) for u.
    """

    reads = "images"
    trains = "generator"
    example = {"generator": {"step_rule": FLOW_MAP}}

    def __init__(self, config: MethodConfig, networks: Networks):
        self.config, self.teacher = config, networks.teacher
        self.generator = networks.new_generator()
        if self.generator.step_rule != FLOW_MAP:
            raise ValueError(
                f"generator.step_rule={self.generator.step_rule} tells the network one time, and a flow map needs to "
                f"know where it leads; give step_rule: {FLOW_MAP}"
            )
        self.flow = rectified(self.generator.denoiser)
        native = self.generator.process
        # a little below, so that no rounding takes the native time to its end, where it stands still
        noisiest = native.ratio(torch.tensor([native.t_max], dtype=torch.float64)) * (1 - 1e-4)
        self.last = self.flow.process.time_of(noisiest).item()

    def players(self) -> Mapping[str, PlayerSpec]:
        return {"generator": PlayerSpec.of(self.generator.denoiser)}

    def streams(self) -> frozenset[str]:
        return frozenset({"images"})

    def mean_velocity(self, x_t: Tensor, t: Tensor, r: Tensor, cond: Condition) -> Tensor:
        """u of shape (N, ...) at x_t and times (N,) of the rectified flow."""
        return self.flow(x_t, t, cond, to=Prediction.VELOCITY, toward=r)

    def dropouts(self) -> list[SlotDropout]:
        """The generator's, for `drawn_from`: a part of a batch goes through it under its own masks."""
        return slot_dropouts(self.flow)


def chosen(slots: Sequence[int], share: float) -> list[int]:
    """The places among `slots` that belong to a share of them: one in so many, whatever the batch is split into."""
    return [place for place, slot in enumerate(slots) if int((slot + 1) * share) > int(slot * share)]


def those(cond: Condition, places: Sequence[int]) -> Condition:
    """The conditions of the samples at `places`."""
    return {name: value[places] for name, value in cond.items()}


def masked(like: Tensor, places: Sequence[int]) -> Tensor:
    """True at `places`, shape (N,)."""
    mask = torch.zeros(len(like), dtype=torch.bool)
    mask[places] = True
    return mask.to(like.device)
