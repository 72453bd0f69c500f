"""Every method at toy size: one entry per method or variant, so that the contract in test_contract.py covers it."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from diffdistill.backbones.diffusers import DiffusersBackbone
from diffdistill.backbones.mlp import MLP
from diffdistill.critic import Critic, Discriminator, DiscriminatorHead
from diffdistill.data import SomeLabels, Stream, Streams
from diffdistill.data.pairs import Pairs
from diffdistill.denoiser import Denoiser
from diffdistill.distances import Absolute, Lpips, PseudoHuber, Squared
from diffdistill.generator import FLOW_MAP, Generator
from diffdistill.method import Method, Networks, PlayerSpec, Sample, Source, Weights
from diffdistill.methods import METHODS
from diffdistill.methods.consistency import Consistency
from diffdistill.methods.dmd import DMD
from diffdistill.methods.dmd2 import DMD2
from diffdistill.perceptual import LpipsNetwork
from diffdistill.player import ConstantDecay, LearningRate, Player, PowerDecay
from diffdistill.prediction import Prediction
from diffdistill.process import VE
from diffdistill.rng import Rng
from diffdistill.tangents import Rotational, Semi
from diffdistill.teacher import Teacher
from diffdistill.time_pairs import (
    ContinuousPairs,
    DoublingLevels,
    FixedLevels,
    GrowingLevels,
    LogNormalPairs,
    UniformPairs,
)
from diffdistill.times import LogNormal, UShaped
from diffdistill.trainer import Schedule, Trainer

NUM_CLASSES = 3


@dataclass(frozen=True)
class Labelled(Stream):
    """Rows of a tensor with the class of each, drawn uniformly from those of `classes`."""

    points: Tensor
    classes: tuple[int, ...] = tuple(range(NUM_CLASSES))

    def draw(self, rng: Rng) -> Sample:
        labels = torch.arange(len(self.points)) % NUM_CLASSES
        kept = torch.tensor([i for i in range(len(labels)) if i % NUM_CLASSES in self.classes])
        index = kept[rng.integers(len(kept))]
        return Sample(x0=self.points[index].to(rng.dtype), cond={"label": labels[index]})


def mlp() -> MLP:
    return MLP(width=16, depth=2, num_classes=NUM_CLASSES, dropout=0.1)


def unet() -> DiffusersBackbone:
    from diffusers import UNet2DModel

    network = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
        dropout=0.1,
        num_class_embeds=NUM_CLASSES,
    )
    return DiffusersBackbone(network)


@dataclass(frozen=True)
class Case:
    """One method with its options and a toy backbone."""

    method: str
    options: dict
    backbone: Callable[[], nn.Module] = mlp
    grid: tuple[float, ...] = (20.0, 1.0)
    step_rule: str = "renoise"
    guidance: float = 2.0
    taps: tuple[str, ...] = ("layers.0", "layers.1")
    trunk: str = "critic"
    told_guidance: float | None = None

    @property
    def told(self) -> tuple[str, ...]:
        return ("span",) * (self.step_rule == FLOW_MAP) + ("scale",) * (self.told_guidance is not None)

    def make(self, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Method:
        """The method with networks of random weights."""
        kind = METHODS[self.method]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            first, second = self._denoiser(dtype, self.told), self._denoiser(dtype)
            head = None
            if kind.discriminates(kind.Config(**self.options)):
                x = torch.zeros(1, *second.sample_shape, dtype=dtype)
                cond = {"label": torch.zeros(1, dtype=torch.long)}
                with torch.no_grad():
                    _, features = second.with_features(x, torch.ones(1, dtype=torch.float64), cond, taps=self.taps)
                head = DiscriminatorHead([feature.shape[1:] for feature in features]).to(dtype)
            teacher = Teacher(self._denoiser(dtype), guidance=self.guidance)
        trunk = teacher.denoiser if self.trunk == "teacher" else None
        networks = Networks(
            lambda: Generator(copy.deepcopy(first), self.grid, step_rule=self.step_rule, guidance=self.told_guidance),
            lambda: Critic(
                copy.deepcopy(second),
                head=copy.deepcopy(head),
                taps=self.taps if head else (),
                trunk=trunk if head else None,
            ),
            teacher if kind.needs_teacher else None,
            lambda: self._discriminator(teacher.denoiser, dtype),
            random_weights,
            lambda wanted: small_lpips(wanted).to(dtype),
        )
        return kind(kind.Config(**self.options), networks)

    def _discriminator(self, trunk: Denoiser, dtype: torch.dtype) -> Discriminator:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            heads = [DiscriminatorHead([(16,)]).to(dtype) for _ in self.taps]  # the width of `mlp`
            for head in heads:  # within the hinge some of both, not as many: then a last bias has no gradient at all
                nn.init.normal_(head.heads[0][-1].weight, std=5.0)
        return Discriminator(heads, taps=self.taps, trunk=trunk)

    def _denoiser(self, dtype: torch.dtype, told: tuple[str, ...] = ()) -> Denoiser:
        backbone = self.backbone()
        for name in told:
            backbone.tell(name)
        for parameter in backbone.parameters():  # some layers start at zero, where a wrong gradient would not show
            nn.init.normal_(parameter, std=0.2)
        return Denoiser(backbone, VE(sigma_max=20.0), Prediction.F, clock="edm", scale_input=True).to(dtype)

    def streams(self, method: Method) -> Streams:
        """The streams that the method reads."""
        shape = method.generator.denoiser.sample_shape
        points = torch.randn(50, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 2
        sources = {name: method.source(name) for name in method.streams()}
        ends = Pairs(points * method.generator.process.t_max, points, torch.arange(50) % NUM_CLASSES)

        def stream(source: Source) -> Stream:
            classes = tuple(range(NUM_CLASSES)) if source.classes is None else source.classes
            labels = SomeLabels(torch.tensor(classes))
            pairs = replace(ends, noise=points) if source.unit_noise else ends
            return {"conditions": labels, "images": Labelled(points, classes), "pairs": pairs}[source.kind]

        return Streams({name: stream(source) for name, source in sources.items()})


def small_lpips(wanted: Lpips) -> LpipsNetwork:
    """LPIPS on two layers in place of VGG16."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3), nn.ReLU())
        heads = [torch.rand(4), torch.rand(5)]
    return LpipsNetwork(features, heads, size=wanted.size, taps=(1, 4))


def random_weights(run: str, step: int) -> Weights:
    """As if a run had saved them: a function of the step alone."""

    def fill(denoiser: Denoiser) -> None:
        generator = torch.Generator().manual_seed(step)
        for parameter in denoiser.parameters():
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    return Weights(f"{run}/step-{step}", f"checksum {step}", fill)


CASES: dict[str, Case] = {
    "consistency": Case("consistency", {"pairs": UniformPairs(FixedLevels(6)), "target_decay": 0.8}),
    "consistency-guided": Case(
        "consistency", {"solver": "ddim", "guidance_range": (1.5, 3.0), "distance": Absolute()}, grid=(20.0,)
    ),
    "consistency-told-its-scale": Case(
        "consistency", {"solver": "euler", "guidance_range": (1.5, 3.0), "target_decay": 0.8}, told_guidance=2.0
    ),
    "consistency_training": Case("consistency_training", {"pairs": ContinuousPairs(stage_steps=4)}),
    "consistency_training-annealed": Case(
        "consistency_training",
        {"pairs": UniformPairs(GrowingLevels(2, 9, 8)), "target_decay": 0.5, "target_annealed": True},
    ),
    "consistency_training-doubling": Case(
        "consistency_training", {"pairs": LogNormalPairs(DoublingLevels(2, 8, 9)), "weight": "c_out"}
    ),
    "degrade": Case("degrade", {}, guidance=1.0),
    "denoise": Case("denoise", {}),
    "diff_instruct": Case("diff_instruct", {}, grid=(20.0,)),
    "disback": Case(
        "disback",
        {"inside": DMD2.Config(ratio=2), "degraded": "run", "nodes": (1, 2, 3), "steps_per_node": 3},
        grid=(20.0,),
    ),
    "dmd": Case("dmd", {}, grid=(20.0,)),
    "dmd2": Case("dmd2", {"ratio": 2}),
    "dmd2-alternating-gan": Case(
        "dmd2", {"time_scale": "alternating", "ratio": 2, "gan_weight": 0.1, "gan_critic_weight": 0.1}
    ),
    "dmd2-noised-summed": Case("dmd2", {"ratio": 2, "inputs": "noised", "reduction": "sum"}),
    "dmd2-gan-on-teacher": Case(
        "dmd2", {"ratio": 1, "gan_weight": 0.1, "gan_critic_weight": 0.1}, grid=(20.0,), trunk="teacher"
    ),
    "f_distill": Case("f_distill", {"ratio": 1}, grid=(20.0,)),
    "ladd": Case("ladd", {}, guidance=1.0),
    "ladd-softplus-simulated": Case(
        "ladd",
        {
            "loss": "softplus",
            "same_noise": True,
            "discriminator_updates": 2,
            "inputs": "simulated",
            "step_probabilities": (0.25, 0.75),
            "first_probabilities": (1.0, 0.0),
            "first_steps": 2,
        },
        guidance=1.0,
    ),
    "mean_flow": Case("mean_flow", {"far": 0.5}, step_rule="flow_map"),
    "mean_flow-unet": Case("mean_flow", {"far": 0.5}, unet, (20.0,), "flow_map", 1.0),
    "mean_flow_training": Case("mean_flow_training", {"ends": LogNormal(-4.0, 1.6), "far": 0.75}, step_rule="flow_map"),
    "multi_student": Case(
        "multi_student", {"students": 2, "inside": DMD2.Config(ratio=2, gan_weight=0.1, gan_critic_weight=0.1)}
    ),
    "multi_student-one-alone": Case("multi_student", {"students": 2, "inside": DMD2.Config(ratio=1), "only": 1}),
    "multi_student-consistency": Case("multi_student", {"students": 2, "inside": Consistency.Config(target_decay=0.8)}),
    "multi_student-dmd": Case("multi_student", {"students": 2, "inside": DMD.Config()}, grid=(20.0,)),
    "phased_dmd": Case("phased_dmd", {"steps_per_phase": (2,), "ratio": 2}, step_rule="euler"),
    "phased_dmd-two-times-in-one-phase": Case(
        "phased_dmd",
        {"phases": (2, 1), "steps_per_phase": (1, 2), "initial": "previous", "time_scale": "alternating", "ratio": 2},
        grid=(20.0, 5.0, 1.0),
        step_rule="ddim",
    ),
    "rcm": Case("rcm", {"warmup_steps": 2, "ratio": 2, "drawn_steps": 3}),
    "rcm-discrete-on-its-grid": Case(
        "rcm",
        {"warmup_steps": 0, "ratio": 2, "drawn_steps": 0, "discrete": True, "tangents": Rotational(0.1)},
    ),
    "reflow": Case("reflow", {"straightness_every": 2}, step_rule="euler"),
    "reflow-annealed-plus": Case(
        "reflow",
        {
            "anneal_steps": 6,
            "times": UShaped(),
            "distance": PseudoHuber(0.03),
            "fading": True,
            "sample_distance": Squared(),
            "sample_over_time": True,
        },
        step_rule="ddim",
    ),
    "reflow-independent": Case("reflow", {"coupling": "independent"}, grid=(20.0,)),
    "reflow_distill": Case("reflow_distill", {}, guidance=1.0, grid=(20.0,)),
    "reflow_distill-guided": Case(
        "reflow_distill", {"guided_weight": 0.5, "guided_from": "teacher"}, step_rule="euler"
    ),
    "scm": Case("scm", {"warmup_steps": 4}),
    "scm-discrete-adaptive": Case(
        "scm",
        {"warmup_steps": 0, "adaptive": True, "discrete": True, "tangents": Rotational(0.1), "normalisation": "rms"},
    ),
    "score_matching": Case("score_matching", {}, guidance=1.5),
    "sct": Case("sct", {"warmup_steps": 4, "tangents": Semi(), "prior": True, "normalisation": "clip"}),
    "shortcut": Case("shortcut", {"levels": 3, "bootstrap": 0.5, "target_decay": 0.8}, step_rule="flow_map"),
    "shortcut-by-itself": Case("shortcut", {"target_decay": 0.0, "clip": 4.0}, grid=(20.0,), step_rule="flow_map"),
    "sid": Case("sid", {"alpha": 1.2}, grid=(2.5,)),
    "sim": Case("sim", {"ratio": 2}),
    "uni_instruct": Case("uni_instruct", {"divergence": "jensen_shannon"}, grid=(20.0,), trunk="teacher"),
}
UNET = Case(
    "dmd2",
    {"ratio": 2, "gan_weight": 0.1, "gan_critic_weight": 0.1},
    backbone=unet,
    guidance=1.0,
    taps=("network.mid_block",),
)
PERCEPTUAL = Case("dmd", {"distance": Lpips("small", size=16)}, backbone=unet, grid=(20.0,), guidance=1.0)


def make_player(
    spec: PlayerSpec, *, learning_rate: float = 1e-2, max_norm: float = 1.0, reduce: Callable | None = None
) -> Player:
    parameters = list(spec.parameters.values())
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.5, 0.9), weight_decay=0.1, fused=True)
    rate = LearningRate(learning_rate, warmup_steps=2, decay="cosine", steps=20)
    return Player(spec, optimizer, rate, max_norm=max_norm, reduce=reduce)


def make_trainer(
    case: Case,
    output: Path,
    *,
    schedule: Schedule,
    shard: Callable[[PlayerSpec], PlayerSpec] | None = None,
    dtype: torch.dtype = torch.float64,
    mixed_precision: str = "no",
    data: Streams | None = None,
    hooks=(),
    seed: int = 0,
    **options,
) -> Trainer:
    """A real Trainer of the case, on the CPU; every generator keeps two averages."""
    AcceleratorState._reset_state()  # it is global, and refuses a second precision
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    method = case.make(dtype=dtype)
    specs = method.players()
    if shard is not None:
        specs = {name: shard(spec) for name, spec in specs.items()}
        for average in method.averages().values():
            shard(PlayerSpec.of(average.module))
    reduce = torch.distributed.all_reduce if accelerator.num_processes > 1 and shard is None else None
    players = {name: make_player(spec, reduce=reduce, **options) for name, spec in specs.items()}
    for name in method.generator.parts:
        players[name].average("constant", ConstantDecay(0.9))
        players[name].average("power", PowerDecay(0.1))
    data = case.streams(method) if data is None else data
    return Trainer(method, players, data, accelerator, schedule, seed=seed, output=output, hooks=hooks, dtype=dtype)


def all_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """A copy of everything that training changes: weights, averages, and the optimizers' moments and counts."""
    from diffdistill.checkpoint import parts
    from diffdistill.player import whole

    return {
        f"{name}/{file}/{key}": whole(tensor.detach()).clone()
        for name, player in trainer.players.items()
        for file, tensors in parts(player).items()
        for key, tensor in tensors.items()
    }
