"""Phased DMD: distribution matching by experts, each on the noise levels of one phase of sampling."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

from diffdistill.critic import Critic
from diffdistill.denoiser import Condition
from diffdistill.generator import Generator
from diffdistill.intervals import Interval
from diffdistill.losses import full, inject, matching_direction
from diffdistill.method import Action, Batch, Loss, Method, MethodConfig, Networks, PlayerSpec, Term, Update
from diffdistill.prediction import Prediction
from diffdistill.process import lift
from diffdistill.readings import Reading, Sketch, of_difference, of_samples
from diffdistill.relay import Relay
from diffdistill.rng import Rng
from diffdistill.times import TimeSampler, Uniform

CLAMP = 10.0  # of the weight 1 / b^2
REFERENCE_STEPS = 10  # of the teacher's solver over all noise levels, for the readings that a run is compared with


class PhasedDMD(Method):
    """Experts trained one after the other, each to carry samples to the teacher's law at the end of its phase.

    Expert k serves the times of generator.grid in its phase. Its samples x_s stop at the edge s, the first time of the
    next phase, where no clean sample exists. Noised on to t > s they are compared with the teacher, score against
    score, and the phase's own critic learns theirs from targets that hold for any law at s (`diffdistill.intervals`).
    Earlier experts are frozen and simulate. In the last phase s = 0, and all of it is DMD2 without the GAN term.

    In a phase of several steps the one that has the gradient is drawn at random, the same on every rank, and goes from
    its time straight to the edge. One step is one generator update of the present phase; the last phase goes on for as
    long as the run does.

    Deviations: the generator's direction is normalised as in DMD and acts on the predicted x0, as in LightX2V's code;
    normalised=False is the paper's gradient with respect to x_s, whose direction differs only in scale. On a rectified
    flow the paper's critic_space is velocity; F is its like on every process. The margin of LightX2V is a share of the
    process's customary spacing, and its floor of b^2, which no time above the margin reaches, is left out.

    Source: Phased DMD (Fan et al. 2025); targets and gradient are derived in intervals.py and checked by quadrature.
    """

    @dataclass(frozen=True)
    class Config(MethodConfig):
        steps_per_phase: tuple[int, ...]  # generator updates: one number for all phases, or one for each
        phases: tuple[int, ...] = ()  # times of generator.grid in each phase; empty: one each
        initial: Literal["teacher", "previous"] = "teacher"  # what an expert starts from: as built, or its predecessor
        time_scale: Literal["interleaved", "alternating"] = "interleaved"  # alternating: no fit in the first iteration
        ratio: int = 5  # iterations per generator update
        match_times: TimeSampler = field(default_factory=lambda: Uniform(0.02, 0.98))  # those above the edge
        critic_times: TimeSampler = field(default_factory=Uniform)  # those above the edge
        critic_space: Prediction = Prediction.F  # the space whose squared error the critic minimises
        weighting: Literal["clamp10", "margin"] = "clamp10"  # of the critic: the paper's, or equal above a margin
        margin: float = 0.02  # of weighting=margin: the share of the time that lies idle above an edge
        normalised: bool = True  # by mean |x0 - mu_real| of each sample, as DMD
        normaliser_floor: float = 1e-4  # of that mean

        def __post_init__(self):
            for name in ("steps_per_phase", "phases"):
                if any(number < 1 for number in getattr(self, name)):
                    raise ValueError(f"method.{name} must be positive, got {list(getattr(self, name))}")
            if not self.steps_per_phase:
                raise ValueError("method.steps_per_phase is empty; give generator updates, e.g. [300]")
            if self.ratio < 1 + (self.time_scale == "alternating"):
                raise ValueError(
                    f"method.ratio must be at least 1, and 2 for alternating updates, or the critic never learns; got "
                    f"{self.ratio}"
                )
            if not 0 < self.margin < 1:
                raise ValueError(f"method.margin must be in (0, 1), got {self.margin}; weighting=clamp10 has none")
            if self.normaliser_floor <= 0:
                raise ValueError(f"method.normaliser_floor must be positive, got {self.normaliser_floor}")

    reference = "Fan et al. 2025, arXiv:2510.27684"
    presets = ("cifar10", "imagenet64")
    example = {
        "method": {"steps_per_phase": [500]},
        "generator": {"grid": [80.0, 2.5], "step_rule": "euler"},
    }
    needs_teacher = True
    reads = "conditions"
    trains = "generator, critic of each phase"

    def __init__(self, config: Config, networks: Networks):
        self.config, self.teacher = config, networks.teacher
        self.generator: Relay = self.new_sampler(config, networks.new_generator)
        experts, process = self.generator.experts, self.generator.process
        self.critics: Sequence[Critic] = [networks.new_critic() for _ in experts]
        for role, other in (("teacher", self.teacher.process), ("critic", self.critics[0].process)):
            if not other.same_law(process):
                raise ValueError(
                    f"the {role} speaks {other} and the generator {process}, with another alpha or sigma: scores of "
                    "one noisy sample need one law; wrap a denoiser by Denoiser.seen_in(process)"
                )
        given = config.steps_per_phase
        steps = given * len(experts) if len(given) == 1 else given
        if len(steps) != len(experts):
            raise ValueError(
                f"method.steps_per_phase has {len(steps)} numbers for {len(experts)} phases; give one for each, or one"
            )
        self.starts = tuple(accumulate(steps, initial=0))[:-1]  # the first step of each phase
        self.edges = (*[expert.grid[0] for expert in experts[1:]], 0.0)
        margin = config.margin if config.weighting == "margin" else 0.0
        self.intervals = [Interval(process, edge, margin=margin) for edge in self.edges]
        self._match_times = [interval.restricted(config.match_times) for interval in self.intervals]
        self._sketch = Sketch(self.generator.denoiser.sample_shape)
        self._critic_times = [interval.restricted(config.critic_times) for interval in self.intervals]

    @staticmethod
    def new_sampler(config: Config, new_generator: Callable[[], Generator]) -> Relay:
        """The experts, each with the times of its phase."""
        first = new_generator()
        grid, phases = first.grid, config.phases or (1,) * len(first.grid)
        if sum(phases) != len(grid):
            raise ValueError(
                f"method.phases={list(phases)} shares out {sum(phases)} times, and generator.grid has {len(grid)}; let "
                "the numbers add up to it"
            )
        ends = tuple(accumulate(phases))
        wholes = [first, *[new_generator() for _ in phases[1:]]]
        return Relay(
            [
                Generator(whole.denoiser, grid[end - length : end], step_rule=whole.step_rule)
                for whole, end, length in zip(wholes, ends, phases, strict=True)
            ]
        )

    def least_steps(self) -> int:
        return self.starts[-1] + 1

    def players(self) -> Mapping[str, PlayerSpec]:
        players = {}
        for (name, expert), critic in zip(self.generator.parts.items(), self.critics, strict=True):
            players[name] = PlayerSpec.of(expert.denoiser)
            players[_critic(name)] = PlayerSpec.of(critic)
        return players

    def streams(self) -> frozenset[str]:
        return frozenset({"conditions"})

    def phase(self, step: int) -> int:
        """The phase that trains at a step."""
        return sum(start <= step for start in self.starts) - 1

    def plan(self, step: int) -> Sequence[Update | Action]:
        phase = self.phase(step)
        names = list(self.generator.parts)
        name, made = names[phase], []  # the samples of the generator's update, for the critic's term of the same one

        def match(batch: Batch, rng: Rng) -> Loss:
            cond = batch["conditions"].cond
            x0, x_s = self._carried(phase, cond, rng)
            made[:] = [x_s.detach()]
            return self._match(phase, x0, x_s, cond, rng)

        def fit_made(batch: Batch, rng: Rng) -> Loss:
            return self._fit(phase, made.pop(), batch["conditions"].cond, rng)

        def fit(batch: Batch, rng: Rng) -> Loss:
            cond = batch["conditions"].cond
            with torch.no_grad():
                _, x_s = self._carried(phase, cond, rng)
            return self._fit(phase, x_s, cond, rng)

        generate, fit_new = Term(name, "match", match), Update((Term(_critic(name), "fit", fit),))
        first = (generate,)
        if self.config.time_scale == "interleaved":
            first = (generate, Term(_critic(name), "fit", fit_made))
        updates = (Update(first), *[fit_new] * (self.config.ratio - 1))
        if self.config.initial == "previous" and phase and step == self.starts[phase]:
            return (_hand_over(names[phase - 1], name), *updates)
        return updates

    def references(self, batch: Batch, rng: Rng) -> Mapping[str, Reading]:
        """The readings of the teacher's own steps: of the x0 by which each expert, from its times on the teacher's way
        from noise to data, would come to the teacher's state at the edge of its phase.

        In the last phase these are the teacher's samples, and an expert's law must be theirs. In the others the law of
        x_s alone must be the teacher's, and x0 is what the readings can see of it beneath the noise: it has their law
        for an expert that keeps to the teacher's way, with which it starts.
        """
        relay, cond = self.generator, batch["conditions"].cond
        fine = self.teacher.process.grid(REFERENCE_STEPS)
        states = {relay.grid[0]: relay.prior(rng)}
        for t, r in pairwise((*relay.grid, 0.0)):
            states[r] = self.teacher.solve(states[t], (t, *[time for time in fine if r < time < t], r), cond)
        found = {}
        for name, expert, edge in zip(relay.parts, relay.experts, self.edges, strict=True):
            steps = torch.cat([self._implied(states[t], states[edge], t, edge) for t in expert.grid])
            found |= {f"{name}/match/{reading}": told for reading, told in of_samples(steps, self._sketch).items()}
        return found

    def _implied(self, x: Tensor, x_s: Tensor, t: float, edge: float) -> Tensor:
        """The x0 along which one step of the ODE leads from x at t to x_s at the edge."""
        move, nothing = self.generator.move, torch.zeros_like(x)
        return (x_s - move(x, nothing, t, edge)) / move(nothing, torch.ones_like(x), t, edge)

    def _carried(self, phase: int, cond: Condition, rng: Rng) -> tuple[Tensor, Tensor]:
        """The predicted x0 of the phase's expert at one of its times, and the x_s it leads to; earlier steps have no
        gradient."""
        relay = self.generator
        own = relay.experts[phase].grid
        stop = relay.grid.index(own[0]) + rng.shared.integer(len(own))
        x = relay.simulate(relay.prior(rng), cond, stop=stop)
        x0 = relay.predict(x, cond, stop=stop)
        return x0, relay.move(x, x0, relay.grid[stop], self.edges[phase])

    def _match(self, phase: int, x0: Tensor, x_s: Tensor, cond: Condition, rng: Rng) -> Loss:
        config, process, interval = self.config, self.generator.process, self.intervals[phase]
        with torch.no_grad():  # detached: DMD treats both scores as constants
            t = self._match_times[phase](rng.uniform(), process)
            eps = rng.normal(x_s.shape[1:])
            x_t = interval.perturb(x_s, eps, t)
            x0_real, x0_fake = self.teacher(x_t, t, cond), self.critics[phase](x_t, t, cond)
            if config.normalised:
                moved = x0
                direction = matching_direction(x0, x0_real, x0_fake, floor=config.normaliser_floor)
            else:  # a (S_fake - S_real), the gradient of KL(fake || real) at t with respect to x_s
                moved = x_s
                weight = interval.transition(t)[0] * process.alpha(t) / process.sigma(t) ** 2
                direction = lift(weight, x0_real) * (full(x0_fake) - full(x0_real))
            clean = interval.target(x_s, eps, t, Prediction.X0)  # what the critic learns from, where x0 is not
            compared = of_difference(clean, t, x0_real, x0_fake, process, trust=interval.trust(t))
            if interval.edge:  # beneath the noise there an expert soon has no fault, and its critic's own is left
                compared["edge_agreement"] = compared.pop("agreement")
        readings = {**of_samples(x0, self._sketch), **compared, "direction": direction.abs().flatten(1).mean(1)}
        return Loss(inject(moved, direction), readings)

    def _fit(self, phase: int, x_s: Tensor, cond: Condition, rng: Rng) -> Loss:
        config, critic = self.config, self.critics[phase]
        t = self._critic_times[phase](rng.uniform(), self.generator.process)
        eps = rng.normal(x_s.shape[1:])
        clamp = CLAMP if config.weighting == "clamp10" else None
        value = self.intervals[phase].denoising(critic, x_s, eps, t, cond, space=config.critic_space, clamp=clamp)
        return Loss(value, {"score": value.detach()})


def _critic(generator: str) -> str:
    """The player that is the critic of a generator."""
    return generator.replace("generator", "critic")


def _hand_over(earlier: str, later: str) -> Action:
    """The later expert's weights become the earlier one's."""

    @torch.no_grad()
    def act(players: Mapping[str, PlayerSpec]) -> None:
        for name, parameter in players[later].parameters.items():
            parameter.copy_(players[earlier].parameters[name])

    return Action(f"start {later} from {earlier}", act, restarts=(later,))
