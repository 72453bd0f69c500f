"""The interface between methods and the loop: what a method trains, what it reads, and what happens in one step."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from diffdistill.critic import Critic, Discriminator
from diffdistill.denoiser import Condition, Denoiser
from diffdistill.distances import Lpips, Measure
from diffdistill.generator import Generator, Sampler
from diffdistill.readings import Reading
from diffdistill.rng import Rng
from diffdistill.running_means import RunningMeans
from diffdistill.teacher import Teacher


@dataclass(frozen=True)
class Sample:
    """What one stream gives for the slots of a micro-batch; a stream fills the fields it has."""

    x0: Tensor | None = None
    cond: Condition = field(default_factory=dict)
    noise: Tensor | None = None


Batch = Mapping[str, Sample]  # by name of stream


@dataclass(frozen=True)
class Loss:
    """One value per sample, shape (N,); the loop averages it over the global batch. Readings are logged, detached."""

    value: Tensor
    readings: Mapping[str, Reading] = field(default_factory=dict)


@dataclass(frozen=True)
class Term:
    """A loss that trains one player; its name appears in logs and errors, and keys its randomness."""

    player: str
    name: str
    loss: Callable[[Batch, Rng], Loss]


@dataclass(frozen=True)
class Update:
    """All backward passes in order, then each named player steps once."""

    terms: tuple[Term, ...]

    @property
    def players(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(term.player for term in self.terms))


@dataclass(frozen=True)
class Action:
    """A plain act between updates, such as copying weights from one player to another.

    restarts: the players whose averages begin anew, with the weights that they then have.
    """

    name: str
    act: Callable[[Mapping[str, "PlayerSpec"]], None]
    restarts: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlayerSpec:
    """Something trained: its modules, and its parameters by name (a subset of the modules' for LoRA).

    means: what its losses divide by and add to; they move as it steps, and belong to its state.
    """

    modules: tuple[nn.Module, ...]
    parameters: Mapping[str, nn.Parameter]
    means: Mapping[str, RunningMeans] = field(default_factory=dict)

    @staticmethod
    def of(module: nn.Module) -> "PlayerSpec":
        """All of a module's parameters."""
        return PlayerSpec((module,), dict(module.named_parameters()))


@dataclass(frozen=True)
class AverageSpec:
    """A frozen copy of a player's network that follows it: copy <- decay(step) copy + (1 - decay(step)) player."""

    player: str
    module: nn.Module
    decay: Callable[[int], float]


@dataclass(frozen=True)
class Weights:
    """The weights of a denoiser that another run saved, read and checked only when they are asked for.

    name: what they are, for errors.
    checksum: of the file; files that differ in it hold different weights.
    fill: copies them into a denoiser of the same kind, exactly.
    """

    name: str
    checksum: str
    fill: Callable[[Denoiser], None]


@dataclass(frozen=True)
class Networks:
    """What a method builds itself from. Each call of a factory gives a network of its own.

    new_discriminator: heads on the teacher's features.
    node: the weights that a `degrade` run, given by its folder, saved at a step.
    perceptual: the frozen network behind a distance; the same one each time it is asked for.
    """

    new_generator: Callable[[], Generator]
    new_critic: Callable[[], Critic]
    teacher: Teacher | None = None
    new_discriminator: Callable[[], Discriminator] | None = None
    node: Callable[[str, int], Weights] | None = None
    perceptual: Callable[[Lpips], Measure] | None = None


class MethodConfig:
    """The settings of one method. A field of this type in another method's settings holds a whole method, by name."""


@dataclass(frozen=True)
class Source:
    """What one of a method's streams draws from."""

    kind: str  # images, conditions, pairs
    classes: tuple[int, ...] | None = None  # draw from these alone; None for everything
    unit_noise: bool = False  # of pairs: their noise in deviation 1, whatever process and time it was drawn for


class Method(ABC):
    """One paper. Subclasses set the class variables and are listed in `diffdistill.methods.METHODS`.

    Config: a frozen dataclass, a MethodConfig of its own, whose ranges are checked in __post_init__.
    reference: the paper.
    needs_teacher: whether `Networks.teacher` must be there.
    presets: data sets with a recipe of the paper's in configs/ and a recommended one beside it.
    example: what a recipe of this method must say beyond the customary, section by section.
    """

    Config: ClassVar[type[MethodConfig]]
    reference: ClassVar[str]
    needs_teacher: ClassVar[bool]
    reads: ClassVar[str]  # in words: the names in streams(), and when
    trains: ClassVar[str]  # in words: the names in players()
    presets: ClassVar[tuple[str, ...]] = ()
    example: ClassVar[Mapping[str, Mapping]] = {}

    generator: Sampler  # what is sampled, evaluated and exported
    teacher: Teacher | None = None  # what it learns from, if anything

    _by_config: ClassVar[dict[type[MethodConfig], type["Method"]]] = {}

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if "Config" in vars(cls):
            if not issubclass(cls.Config, MethodConfig):
                raise TypeError(f"{cls.__name__}.Config must inherit from MethodConfig, to be readable by name")
            Method._by_config[cls.Config] = cls

    @abstractmethod
    def __init__(self, config, networks: Networks): ...

    @abstractmethod
    def players(self) -> Mapping[str, PlayerSpec]:
        """Everything trained, by name."""

    @abstractmethod
    def streams(self) -> frozenset[str]:
        """Names of the data streams that the terms read: images, conditions, pairs."""

    def source(self, stream: str) -> Source:
        """What a stream draws from: everything of the kind that its name says, unless a method says otherwise."""
        return Source(stream)

    @abstractmethod
    def plan(self, step: int) -> Sequence[Update | Action]:
        """What happens in one step, which is one generator update. Pure in `step`."""

    @staticmethod
    def discriminates(config) -> bool:
        """Whether the critic needs a discriminator under this Config; it has none unless a method says so."""
        return False

    @staticmethod
    def new_sampler(config, new_generator: Callable[[], Generator]) -> Sampler:
        """What a method of this Config samples with, of generators made anew; one generator unless a method says so."""
        return new_generator()

    def references(self, batch: Batch, rng: Rng) -> Mapping[str, Reading]:
        """What readings of the log should come to, under their names there; none unless a method says so.

        Taken once, before the first step, over some samples.
        """
        return {}

    def averages(self) -> Mapping[str, AverageSpec]:
        """Averaged networks that a loss reads; none unless a method says so."""
        return {}

    @property
    def settings(self) -> str:
        """The key of a recipe under which the settings lie that the readings depend on."""
        return "method"

    def least_steps(self) -> int:
        """The generator updates without which a part of what it trains is never reached."""
        return 1

    def frozen(self) -> Mapping[str, nn.Module]:
        """Networks that it keeps in memory, by role, beside the teacher and what is trained; none unless it says so."""
        return {}


def method_of(config: MethodConfig) -> type[Method]:
    """The method that these settings are of."""
    return Method._by_config[type(config)]
