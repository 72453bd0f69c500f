"""What a step of a method costs, counted and not declared: it is taken on toy networks, and every pass is noted."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from diffdistill.backbones.mlp import MLP
from diffdistill.config import Config, StepsConfig
from diffdistill.critic import Critic, Discriminator, DiscriminatorHead
from diffdistill.denoiser import Denoiser
from diffdistill.distances import Lpips, Measure, Squared
from diffdistill.generator import Generator
from diffdistill.method import Action, Method, Networks, Sample, Term, Weights, method_of
from diffdistill.prediction import Prediction
from diffdistill.process import VE
from diffdistill.rng import Rng
from diffdistill.teacher import Teacher

WIDTH, NUM_CLASSES, SAMPLES, IN_A_ROW = 4, 4, 4, 4
TAP = "layers.0"
ROLES = ("generator", "critic", "teacher")


@dataclass(frozen=True)
class Passes:
    """Through one kind of network, for each sample and step: a mean over the first four steps of a run
    and four in its middle.

    A guided teacher and a batch of real and generated samples count twice; a pass that ends at tapped features, and a
    backward pass that only carries gradient to the input, count as whole ones.
    """

    forward: float = 0.0
    backward: float = 0.0


@dataclass(frozen=True)
class Cost:
    """passes: by kind of network, generator, critic, teacher. networks: held in memory. trained: how many of them."""

    passes: Mapping[str, Passes]
    networks: int
    trained: int

    @property
    def memory(self) -> int:
        """What all networks hold throughout a run, in units of the generator's weights: those that train have a
        gradient and two moments as well. Averages of the generator and activations come on top."""
        return self.networks + 3 * self.trained


class Sketch:
    """A recipe's method on toy networks: its grid, guidance and trunk, and the teacher's shape for every network."""

    def __init__(self, config: Config):
        if getattr(config.method, "flip", False):  # points have no left and right
            config = replace(config, method=replace(config.method, flip=False))
        self.config, self.passes, self._denoisers = config, dict[str, Passes](), list[Denoiser]()
        grid = config.generator.grid
        first = VE().t_max if isinstance(grid, StepsConfig) else grid[0]
        self._process = VE(sigma_max=first)
        self._grid = self._process.grid(grid.steps) if isinstance(grid, StepsConfig) else grid
        kind = method_of(config.method)
        guidance = 1.0 if config.teacher is None else config.teacher.guidance_weight
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self._teacher = Teacher(self._denoiser("teacher"), guidance=guidance) if kind.needs_teacher else None
            networks = Networks(
                self._generator, self._critic, self._teacher, self._discriminator, _saved, _without_network
            )
            self.method: Method = kind(config.method, networks)

    def cost(self) -> Cost:
        """Of the steps, counted."""
        steps = [start + ahead for start in (0, self.config.train.steps // 2) for ahead in range(IN_A_ROW)]
        for step in steps:
            for index, item in enumerate(self.method.plan(step)):
                if isinstance(item, Action):
                    item.act(self.method.players())
                    continue
                for term in item.terms:
                    self._take(term, Rng((step, index, term.player, term.name), range(SAMPLES)))
        share = SAMPLES * len(steps)
        seen = sorted(self.passes.items(), key=lambda item: ROLES.index(item[0]))
        passes = {role: Passes(p.forward / share, p.backward / share) for role, p in seen}
        trained = {id(parameter) for spec in self.method.players().values() for parameter in spec.parameters.values()}
        training = sum(any(id(parameter) in trained for parameter in model.parameters()) for model in self._denoisers)
        copies = [*(spec.module for spec in self.method.averages().values()), *self.method.frozen().values()]
        return Cost(passes, len(self._denoisers) + sum(map(self._is_new, copies)), training)

    def _is_new(self, module: nn.Module) -> bool:
        """Whether a network is none of those made here, but a copy that the method made."""
        made = {id(parameter) for model in self._denoisers for parameter in model.parameters()}
        return all(id(parameter) not in made for parameter in module.parameters())

    def _take(self, term: Term, rng: Rng) -> None:
        """One term's forward and backward pass, as the loop does it: its player trains, the others are frozen."""
        for name, spec in self.method.players().items():
            for parameter in spec.parameters.values():
                parameter.requires_grad_(name == term.player)
        x0, noise = rng.normal(self._sample_shape), rng.normal(self._sample_shape)
        sample = Sample(x0=x0, cond={"label": rng.integers(NUM_CLASSES)}, noise=noise)
        term.loss({name: sample for name in self.method.streams()}, rng).value.sum().backward()

    @property
    def _sample_shape(self) -> tuple[int, ...]:
        return self._denoisers[0].sample_shape

    def _denoiser(self, role: str) -> Denoiser:
        backbone = MLP(width=WIDTH, depth=1, num_classes=NUM_CLASSES)
        nn.init.normal_(backbone.leave.weight)
        self.passes.setdefault(role, Passes())
        self._denoisers.append(Denoiser(backbone, self._process, Prediction.F, clock="log_ratio", scale_input=True))
        backbone.enter.register_forward_hook(self._noting(role))
        return self._denoisers[-1]

    def _noting(self, role: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        """A hook on the first layer: every pass begins there, and every backward pass ends there."""

        def back(gradient: Tensor) -> None:
            seen = self.passes[role]
            self.passes[role] = replace(seen, backward=seen.backward + len(gradient))

        def note(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            seen = self.passes[role]
            self.passes[role] = replace(seen, forward=seen.forward + len(output))
            if output.requires_grad:
                output.register_hook(back)

        return note

    def _generator(self) -> Generator:
        denoiser, wanted = self._denoiser("generator"), self.config.generator
        for name in wanted.told:
            denoiser.backbone.tell(name)
        return Generator(denoiser, self._grid, step_rule=wanted.step_rule, guidance=wanted.guidance)

    def _critic(self) -> Critic:
        own = self._denoiser("critic")
        if not method_of(self.config.method).discriminates(self.config.method):
            return Critic(own)
        trunk = self._teacher.denoiser if self.config.critic.trunk == "teacher" else None
        return Critic(own, head=DiscriminatorHead([(WIDTH,)]), taps=(TAP,), trunk=trunk)

    def _discriminator(self) -> Discriminator:
        return Discriminator([DiscriminatorHead([(WIDTH,)])], taps=(TAP,), trunk=self._teacher.denoiser)


def _without_network(wanted: Lpips) -> Measure:
    """In place of a distance that sees pictures; its network is not in units of the generator's."""
    return Squared().measure(None)


def _saved(folder: str, step: int) -> Weights:
    """Weights of the step alone, in place of those of another run."""

    def fill(denoiser: Denoiser) -> None:
        for parameter in denoiser.parameters():
            nn.init.constant_(parameter, 1 / step)

    return Weights(f"{folder} at step {step}", f"{folder} {step}", fill)
