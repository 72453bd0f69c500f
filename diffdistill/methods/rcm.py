"""rCM: continuous-time consistency distillation, with score distillation of the generator's own samples beside it."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from diffdistill.denoiser import Condition
from diffdistill.generator import refuse_flow_map
from diffdistill.losses import full
from diffdistill.method import Batch, Loss, Networks, PlayerSpec, Term, Update
from diffdistill.methods.dmd2 import DMD2
from diffdistill.methods.scm import SCM
from diffdistill.rng import Rng
from diffdistill.solvers import at
from diffdistill.tangents import Exact, Tangents
from diffdistill.times import LogNormal, TimeSampler


class RCM(DMD2):
    """Score-regularised continuous-time consistency model.

    The consistency part, SCM's, makes every point of a teacher's trajectory lead to its end, and covers all modes; the
    score part, DMD2's, keeps what is generated near the teacher's law, and sharpens. Their gradients meet in one step
    of the generator, from one backward pass each. While the tangent warms up the consistency part is alone.

    Without score_weight this is SCM, and without consistency_weight DMD2.

    The score part's samples come of 1, 2, ..., drawn_steps leaps with fresh noise between them, as many as the number
    of the update says, at times drawn from match_times that fall; with drawn_steps = 0 they come of the generator's own
    grid. Its gradient goes through the last leap.

    Deviations from the released code: its warm-up leaves the network's derivative whole, and then the tangent does not
    vanish on a single point; samples whose tangent is not finite stop the run, where there they count as 0; the
    critic's rollouts are as long as the generator's next, where there they have a count of their own.

    Source: Zheng et al. 2025 (rCM).
    """

    @dataclass(frozen=True)
    class Config(DMD2.Config):
        consistency_weight: float = 100.0  # of SCM's loss, summed over a sample
        score_weight: float = 2.0  # of DMD2's losses of the generator; 2 is the paper's 1, whose square has no half
        reduction: Literal["mean", "sum"] = "sum"  # of DMD2's losses over the numbers of a sample
        consistency_times: TimeSampler = field(default_factory=lambda: LogNormal(-0.8, 1.6))  # of the noised images
        match_times: TimeSampler = field(default_factory=lambda: LogNormal(0.0, 1.6))  # at which scores are compared
        critic_times: TimeSampler = field(default_factory=lambda: LogNormal(0.0, 1.6))  # at which the critic learns
        drawn_steps: int = 4  # the longest rollouts, at drawn times; 0: rollouts of the generator's grid
        tangents: Tangents = field(default_factory=Exact)  # how the derivative along the trajectory is taken
        warmup_steps: int = 1000  # from the teacher's own field to the whole tangent, without the score part
        constant: float = 0.1  # added to the tangent's norm, by which it is divided
        discrete: bool = False  # two times `tangents.step` apart, for tangents rotational alone

        def __post_init__(self):
            DMD2.Config.__post_init__(self)
            for name in ("consistency_weight", "score_weight", "drawn_steps"):
                if getattr(self, name) < 0:
                    raise ValueError(f"method.{name} must not be negative, got {getattr(self, name)}")
            if not (self.consistency_weight or self.score_weight):
                raise ValueError(
                    "method.consistency_weight and method.score_weight are both 0, which leaves no loss; give one"
                )
            self.consistency()  # checks its own

        def consistency(self) -> SCM.Config:
            """The settings of SCM's part."""
            return SCM.Config(
                times=self.consistency_times,
                tangents=self.tangents,
                warmup_steps=self.warmup_steps,
                warmup="rcm",
                constant=self.constant,
                discrete=self.discrete,
            )

    reference = "Zheng et al. 2025, arXiv:2510.08431"
    reads = "conditions, and real images but where consistency_weight is 0"
    trains = "generator, critic but where score_weight is 0"
    presets = ("cifar10",)

    def __init__(self, config: Config, networks: Networks):
        super().__init__(config, networks)
        if config.drawn_steps:
            refuse_flow_map(self.generator.step_rule, "a rollout of method.drawn_steps")
        shared = dataclasses.replace(networks, new_generator=lambda: self.generator)
        self._consistency = SCM(config.consistency(), shared) if config.consistency_weight else None

    def players(self) -> Mapping[str, PlayerSpec]:
        players = super().players()
        return players if self.config.score_weight else {"generator": players["generator"]}

    def streams(self) -> frozenset[str]:
        score = super().streams() if self.config.score_weight else frozenset()
        return score | (self._consistency.streams() if self._consistency else frozenset())

    def least_steps(self) -> int:
        both = self._consistency and self.config.score_weight
        return 1 + self.config.warmup_steps if both else 1

    def plan(self, step: int) -> Sequence[Update]:
        consistent = ()
        if self._consistency:
            ((agree,),) = (update.terms for update in self._consistency.plan(step))
            consistent = (_weighted(agree, self.config.consistency_weight, name="agree"),)
            if not self.config.score_weight or step < self.config.warmup_steps:
                return (Update(consistent),)
        first, *fits = super().plan(step)
        match, *others = first.terms
        return (Update((*consistent, _weighted(match, self.config.score_weight), *others)), *fits)

    def references(self, batch, rng):
        return super().references(batch, rng) if self.config.score_weight else {}

    def _fake(self, batch: Batch, rng: Rng, step: int) -> tuple[Tensor, Condition]:
        if not self.config.drawn_steps:
            return super()._fake(batch, rng, step)
        generator, cond = self.generator, batch["conditions"].cond
        again = step % self.config.drawn_steps if self.config.stops == "rotating" else None
        again = rng.shared.integer(self.config.drawn_steps) if again is None else again
        x = generator.prior(rng)
        t = at(generator.grid[0], x)
        for _ in range(again):
            with torch.no_grad():  # detached: the gradient is the last leap's
                x0 = generator.denoiser(x, t, cond)
            t = torch.minimum(t, self.config.match_times(rng.uniform(), generator.process))
            x = generator.process.perturb(x0, rng.normal(x.shape[1:]), t)
        return generator.denoiser(x, t, cond), cond


def _weighted(term: Term, weight: float, *, name: str = "") -> Term:
    """The term, its losses times a weight."""

    def loss(batch: Batch, rng: Rng) -> Loss:
        made = term.loss(batch, rng)
        return Loss(weight * full(made.value), made.readings)

    return dataclasses.replace(term, name=name or term.name, loss=loss)
