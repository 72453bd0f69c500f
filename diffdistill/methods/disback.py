"""DisBack: distribution backtracking around any score method."""

import copy
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from diffdistill.critic import Critic
from diffdistill.denoiser import Denoiser
from diffdistill.method import (
    Action,
    AverageSpec,
    Batch,
    Method,
    MethodConfig,
    Networks,
    PlayerSpec,
    Source,
    Update,
    Weights,
    method_of,
)
from diffdistill.methods.score import ScoreMethod
from diffdistill.readings import Reading
from diffdistill.rng import Rng
from diffdistill.teacher import Teacher


class DisBack(Method):
    """A score method whose teacher comes back, node by node, from the generator's law before training to its own.

    The nodes are checkpoints of a `degrade` run of the same teacher and generator. The critic starts as the last one.
    Each of the others, from the most degraded down, then stands for the teacher for `steps_per_node` steps, and the
    teacher itself for the rest. Which one it is depends on the step alone, so that a run goes on in the middle of a
    node. The teacher's guidance is every node's, as in the paper; with it the first direction is not zero, although
    critic and generator agree. A discriminator on the teacher's features keeps to the teacher itself.

    One network beside the teacher holds the node at hand; each time it takes other weights, it must change. (The
    released code loads its nodes by names of which, as far as one can read, none matches, and goes on.)

    Source: Zhang et al. 2024 (DisBack).
    """

    @dataclass(frozen=True)
    class Config(MethodConfig):
        inside: MethodConfig  # a score method with its settings
        degraded: str = ""  # folder of the `degrade` run; exactly where there are nodes
        nodes: tuple[int, ...] = ()  # steps of its checkpoints, the least degraded first; none: the method inside alone
        steps_per_node: int = 1000  # generator updates towards each node, before the next

        def __post_init__(self):
            if not issubclass(method_of(self.inside), ScoreMethod):
                raise ValueError(
                    f"method.inside must be a score method, whose critic can start from a node; "
                    f"{method_of(self.inside).__name__} is none"
                )
            if any(after <= before for before, after in pairwise(self.nodes)) or any(step < 1 for step in self.nodes):
                raise ValueError(
                    f"method.nodes must be steps of the degrade run, strictly ascending, got {list(self.nodes)}"
                )
            if bool(self.degraded) != bool(self.nodes):
                raise ValueError(
                    f"method.degraded={self.degraded!r} and nodes={list(self.nodes)} belong together; give the folder "
                    "and the steps of its checkpoints, or neither"
                )
            if self.steps_per_node < 1:
                raise ValueError(f"method.steps_per_node must be at least 1, got {self.steps_per_node}")

    reference = "Zhang et al. 2024, arXiv:2408.15991"
    presets = ("cifar10", "imagenet64")
    example = {"method": {"inside": {"name": "dmd2"}, "degraded": "runs/degrade", "nodes": [100, 200, 300]}}
    needs_teacher = True
    reads = "what the method inside does: conditions, and images or pairs where its terms need them"
    trains = "what the method inside trains: generator, critic"

    def __init__(self, config: Config, networks: Networks):
        self.config, self.teacher = config, networks.teacher
        self.nodes = [networks.node(config.degraded, step) for step in config.nodes]
        for before, after in pairwise(self.nodes):
            if before.checksum == after.checksum:
                raise ValueError(
                    f"method.nodes: {after.name} holds the weights of {before.name}, so that one of them is no node; "
                    "list nodes that differ"
                )
        within = networks
        if self.nodes:
            self._target = copy.deepcopy(self.teacher.denoiser)
            self._held = 0  # the index of the node whose weights it has; 0 is the teacher
            target = Teacher(self._target, guidance=self.teacher.guidance)

            def new_critic() -> Critic:
                critic = networks.new_critic()
                refill(critic.denoiser, self.nodes[-1])
                return critic

            within = dataclasses.replace(networks, new_critic=new_critic, teacher=target)
        self.inside: ScoreMethod = method_of(config.inside)(config.inside, within)
        self.generator, self.critic = self.inside.generator, self.inside.critic

    def source(self, stream: str) -> Source:
        return self.inside.source(stream)

    def players(self) -> Mapping[str, PlayerSpec]:
        return self.inside.players()

    def references(self, batch: Batch, rng: Rng) -> Mapping[str, Reading]:
        return self.inside.references(batch, rng)  # of the teacher itself: before the first step it holds no node

    @property
    def settings(self) -> str:
        return "method.inside"

    def least_steps(self) -> int:
        return max(0, len(self.nodes) - 1) * self.config.steps_per_node + 1

    def frozen(self) -> Mapping[str, nn.Module]:
        own = {"node": self._target} if self.nodes else {}
        return {**own, **self.inside.frozen()}

    def streams(self) -> frozenset[str]:
        return self.inside.streams()

    @staticmethod
    def discriminates(config: Config) -> bool:
        return method_of(config.inside).discriminates(config.inside)

    def averages(self) -> Mapping[str, AverageSpec]:
        return self.inside.averages()

    def plan(self, step: int) -> Sequence[Update | Action]:
        if not self.nodes:
            return self.inside.plan(step)
        wanted = self.target_at(step)
        # in every step, since a run may be resumed in any; it does nothing where the node is there
        return (Action(f"target node {wanted}", lambda players: self._hold(wanted)), *self.inside.plan(step))

    def target_at(self, step: int) -> int:
        """The index of the node that stands for the teacher in a step: N - 1, ..., 1, and 0 for the teacher itself."""
        return max(0, len(self.nodes) - 1 - step // self.config.steps_per_node)

    def _hold(self, wanted: int) -> None:
        if wanted == self._held:
            return
        teacher = Weights("the teacher", "", lambda model: _copy(self.teacher.denoiser, model))
        refill(self._target, self.nodes[wanted - 1] if wanted else teacher)
        self._held = wanted


def refill(denoiser: Denoiser, weights: Weights) -> None:
    """Give the denoiser these weights.

    Raises:
        ValueError: they do not fit, or change nothing.
    """
    if next(denoiser.parameters()).is_meta:
        return  # a plan of memory, for which nothing is read
    before = checksum(denoiser)
    weights.fill(denoiser)
    if checksum(denoiser) == before:
        raise ValueError(
            f"{weights.name} holds the very weights that it was to replace, so that it would change nothing; list in "
            "method.nodes steps whose weights differ from each other's and from the teacher's"
        )


def checksum(denoiser: Denoiser) -> str:
    """SHA-256 of the parameters."""
    found = hashlib.sha256()
    for parameter in denoiser.parameters():
        found.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


@torch.no_grad()
def _copy(source: Denoiser, target: Denoiser) -> None:
    for ours, theirs in zip(target.parameters(), source.parameters(), strict=True):
        ours.copy_(theirs)
