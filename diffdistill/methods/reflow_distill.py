"""Distillation of a rectified flow: from noise to the end of its pair in one step, or along its line in a few."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.distances import Distance, PseudoHuber
from diffdistill.method import Batch, Loss, Method, MethodConfig, Networks, PlayerSpec, Source, Term, Update
from diffdistill.methods.reflow import mirrored, perceptual, refuse_no_flow
from diffdistill.process import Rectified
from diffdistill.rng import Rng
from diffdistill.solvers import at
from diffdistill.times import TimeSampler, Uniform


class ReflowDistill(Method):
    """The distance of the generator's prediction from the data of its pair, at the times of its own evaluations.

    At the first time the generator sees the pair's noise, as in sampling; at later ones the point of the pair's line
    there. One time is the one-step distillation of rectified flow and InstaFlow; a generator that starts as the
    reflowed network (`generator.init_from`) is near its target, since straight lines end where their first velocity
    says.

    SlimFlow's guidance adds a target that costs no pairs. From fresh noise the generator jumps to x0, goes back on that
    line to a random time, and the teacher says where the line should have ended. This is right where the teacher's own
    lines are straight: give a reflowed one.

    The teacher is the one whose pairs are read; without guidance it is only held to be compared with them.

    Source: Liu et al. 2022; Liu et al. 2023 (InstaFlow); Zhu et al. 2024 (SlimFlow), whose code lets the student make
    the first part of the line, and whose paper the teacher.
    """

    @dataclass(frozen=True)
    class Config(MethodConfig):
        distance: Distance = field(default_factory=PseudoHuber)  # of a prediction from the data of its pair
        guided_weight: float = 0.0  # of the distance from where the teacher leads fresh noise; 0 turns it off
        guided_times: TimeSampler = field(default_factory=lambda: Uniform(0.2, 0.8))  # of the flow, where it takes over
        guided_from: Literal["student", "teacher"] = "student"  # who leads there
        flip: bool = False  # mirror half of the pairs left to right, noise and data together

        def __post_init__(self):
            if self.guided_weight < 0:
                raise ValueError(f"method.guided_weight must not be negative, got {self.guided_weight}")

    reference = "Liu et al. 2022, arXiv:2209.03003; 2023, arXiv:2309.06380; Zhu 2024, arXiv:2407.12718"
    presets = ("cifar10",)
    needs_teacher = True
    reads = "pairs"
    trains = "generator"

    def __init__(self, config: Config, networks: Networks):
        self.config, self.teacher = config, networks.teacher
        self.generator = networks.new_generator()
        refuse_no_flow(self.generator, flip=config.flip)
        process = self.generator.process
        if not self.teacher.process.same_law(process):
            raise ValueError(
                f"the teacher speaks {self.teacher.process} and the generator {process}, with another alpha or sigma: "
                "one line needs one law; wrap a denoiser by Denoiser.seen_in(process)"
            )
        self._prior_std = process.prior_std(self.generator.grid[0])
        self._distance = config.distance.measure(networks.perceptual)

    def players(self) -> Mapping[str, PlayerSpec]:
        return {"generator": PlayerSpec.of(self.generator.denoiser)}

    def streams(self) -> frozenset[str]:
        return frozenset({"pairs"})

    def source(self, stream: str) -> Source:
        return Source(stream, unit_noise=True)

    def frozen(self) -> Mapping[str, nn.Module]:
        return perceptual(self._distance)

    def plan(self, step: int) -> Sequence[Update]:
        regress = Term("generator", "regress", self._regress)
        guided = (Term("generator", "guide", self._guide),) if self.config.guided_weight else ()
        return (Update((regress, *guided)),)

    def _regress(self, batch: Batch, rng: Rng) -> Loss:
        pairs = batch["pairs"]
        x0, eps = mirrored(pairs, rng) if self.config.flip else (pairs.x0, pairs.noise)
        t, x_t = self._on_the_line(x0, eps, rng)
        return Loss(self._distance(self.generator.denoiser(x_t, t, pairs.cond), x0))

    def _on_the_line(self, x0: Tensor, eps: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
        """One of the generator's times for each pair, with the state that its sampling has there on a straight line."""
        first, *later = self.generator.grid
        t, x_t = at(first, x0), self._prior_std * eps
        if not later:
            return t, x_t
        place = rng.integers(1 + len(later))
        for number, time in enumerate(later, start=1):
            t = torch.where(place == number, time, t)
        begins = (place == 0).reshape(-1, *[1] * (x0.ndim - 1))
        return t, torch.where(begins, x_t, self.generator.process.perturb(x0, eps, t))

    def _guide(self, batch: Batch, rng: Rng) -> Loss:
        cond, process, flow = batch["pairs"].cond, self.generator.process, Rectified()
        t = process.time_of(flow.ratio(self.config.guided_times(rng.uniform(), flow)))
        eps = rng.normal(self.generator.denoiser.sample_shape)
        noise = self._prior_std * eps
        made = self.generator.rollout(noise, cond, rng, stop=0)
        with torch.no_grad():  # detached: SlimFlow holds the target still
            led = made if self.config.guided_from == "student" else self.teacher(noise, self._first(eps), cond)
            target = self.teacher(process.perturb(led, eps, t), t, cond)
        far = self._distance(made, target)
        return Loss(self.config.guided_weight * far, {"distance": far.detach()})

    def _first(self, like: Tensor) -> Tensor:
        return at(self.generator.grid[0], like)
