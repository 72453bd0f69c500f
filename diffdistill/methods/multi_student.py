"""Multi-student distillation: several students, each with all that one method trains, on shares of the classes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from diffdistill.generator import Generator, Sampler
from diffdistill.method import (
    Action,
    AverageSpec,
    Batch,
    Method,
    MethodConfig,
    Networks,
    PlayerSpec,
    Source,
    Term,
    Update,
    method_of,
)
from diffdistill.readings import Reading
from diffdistill.rng import Rng
from diffdistill.routed import Routed
from diffdistill.shares import Blocks, Shares, table

PAIRS = "pairs"  # the kind of stream that is never narrowed


class MultiStudent(Method):
    """K students of one teacher, each a whole method inside, on disjoint classes; a table routes a class to its own.

    A step is one update of every student, and `train.batch` is each student's, so that a step costs K of the method
    inside: at one total cost, K students have a K-th of the batch, as in the paper, or a K-th of the steps.

    Students share nothing but the teacher, so `only` trains one of them as a run of its own, on any machine, to the
    very weights that it has in the run of all; `diffdistill join` makes one run of the K. `torchrun ... --spread` does
    both: its processes fall into a group for each student, which have nothing to tell each other.

    Conditions and real images of student k are those of its classes. Pairs for a regression are not narrowed, since a
    share of them alone costs modes.

    A student of another size cannot start from the teacher's weights: `score_matching` first trains the smaller network
    to denoise as the teacher does, and generator.init_from takes it up. The critics keep the teacher's size.

    Source: Song et al. 2024 (MSD).
    """

    @dataclass(frozen=True)
    class Config(MethodConfig):
        students: int  # how many
        inside: MethodConfig  # what trains each
        shares: Shares = field(default_factory=Blocks)  # of the classes: blocks, lists, or clusters
        only: int = -1  # train this student alone, as a run of its own; -1: all in this run

        def __post_init__(self):
            if self.students < 1:
                raise ValueError(f"method.students must be at least 1, got {self.students}")
            if not -1 <= self.only < self.students:
                raise ValueError(
                    f"method.only must be a student from 0 to {self.students - 1}, or -1 for all, got {self.only}"
                )
            if isinstance(self.inside, MultiStudent.Config):
                raise ValueError("method.inside must not be multi_student itself; give more students instead")

        @property
        def trained(self) -> Sequence[int]:
            """The students of this run."""
            return range(self.students) if self.only < 0 else (self.only,)

    reference = "Song et al. 2024, arXiv:2410.23274"
    presets = ("cifar10", "imagenet64")
    example = {"method": {"students": 2, "inside": {"name": "dmd2", "ratio": 1}}}
    needs_teacher = True
    reads = "what the method inside reads, for each student k as k/conditions, k/images, k/pairs"
    trains = "what the method inside trains, for each student k as k/generator, k/critic, ..."

    def __init__(self, config: Config, networks: Networks):
        kind = method_of(config.inside)
        self.config, self.teacher = config, networks.teacher
        self.students = {number: kind(config.inside, networks) for number in config.trained}
        self.generator, self.shares = _routed(config, {n: student.generator for n, student in self.students.items()})

    def players(self) -> Mapping[str, PlayerSpec]:
        return {
            f"{number}/{name}": spec
            for number, student in self.students.items()
            for name, spec in student.players().items()
        }

    def streams(self) -> frozenset[str]:
        return frozenset(f"{number}/{name}" for number, student in self.students.items() for name in student.streams())

    def source(self, stream: str) -> Source:
        number, _, name = stream.partition("/")
        inner = self.students[int(number)].source(name)
        return inner if inner.kind == PAIRS else Source(inner.kind, self.shares[int(number)])

    def plan(self, step: int) -> Sequence[Update | Action]:
        plans = [[_owned(number, item) for item in student.plan(step)] for number, student in self.students.items()]
        return tuple(_joined(items) for items in zip(*plans, strict=True))

    def references(self, batch: Batch, rng: Rng) -> Mapping[str, Reading]:
        every = range(len(rng.slots))  # a stream for each student, so that alone it draws the same
        return {
            f"{number}/{name}": reading
            for number, student in self.students.items()
            for name, reading in student.references(_own(f"{number}/", batch), rng.rows(every)).items()
        }

    def averages(self) -> Mapping[str, AverageSpec]:
        return {
            f"{name}_{number}": AverageSpec(f"{number}/{spec.player}", spec.module, spec.decay)
            for number, student in self.students.items()
            for name, spec in student.averages().items()
        }

    @property
    def settings(self) -> str:
        inner = next(iter(self.students.values())).settings
        return inner.replace("method", "method.inside", 1)

    def least_steps(self) -> int:
        return max(student.least_steps() for student in self.students.values())

    def frozen(self) -> Mapping[str, nn.Module]:
        found = {f"{n}/{name}": net for n, student in self.students.items() for name, net in student.frozen().items()}
        once = {id(net): name for name, net in found.items()}  # students may share one
        return {name: found[name] for name in once.values()}

    @staticmethod
    def discriminates(config: Config) -> bool:
        return method_of(config.inside).discriminates(config.inside)

    @staticmethod
    def new_sampler(config: Config, new_generator: Callable[[], Generator]) -> Sampler:
        kind = method_of(config.inside)
        return _routed(config, {n: kind.new_sampler(config.inside, new_generator) for n in config.trained})[0]


def _routed(config: MultiStudent.Config, students: Mapping[int, Sampler]) -> tuple[Routed, tuple[tuple[int, ...], ...]]:
    """The students behind one router, and the classes of each student of the config."""
    num_classes = next(iter(students.values())).denoiser.backbone.num_classes
    if not num_classes:
        raise ValueError("multi_student divides classes, and this network has none; use a teacher with classes")
    shares = config.shares.divide(config.students, num_classes)
    return Routed(students, table(shares)), shares


def _own(prefix: str, entries: Mapping) -> dict:
    """The entries of a student, under the names that it knows."""
    return {name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix)}


def _owned(number: int, item: Update | Action) -> Update | Action:
    """An item of a student's plan, under the names that its players and streams have in the run."""
    prefix = f"{number}/"

    def term(inner: Term) -> Term:
        def loss(batch: Batch, rng):
            return inner.loss(_own(prefix, batch), rng)

        return Term(prefix + inner.player, inner.name, loss)

    if isinstance(item, Action):
        restarts = tuple(prefix + name for name in item.restarts)
        return Action(prefix + item.name, lambda specs: item.act(_own(prefix, specs)), restarts)
    return Update(tuple(term(inner) for inner in item.terms))


def _joined(items: Sequence[Update | Action]) -> Update | Action:
    """The items that stand at one place of the students' plans, as one: their methods and settings are the same."""
    if isinstance(items[0], Update):
        return Update(tuple(term for update in items for term in update.terms))

    def act(specs: Mapping[str, PlayerSpec]) -> None:
        for action in items:
            action.act(specs)

    restarts = tuple(name for action in items for name in action.restarts)
    return Action(", ".join(action.name for action in items), act, restarts)
