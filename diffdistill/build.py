"""Gate 2: from a checked config to the objects of a run. The only file that sees both sides."""

import copy
import dataclasses
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from diffdistill.backbones.folder import MEANING, NETWORK, make_backbone, read_backbone, read_meaning, write_backbone
from diffdistill.config import (
    CHOICES,
    Config,
    ConfigError,
    DenoiserConfig,
    HalfLifeConfig,
    PlayerConfig,
    ProcessConfig,
    RectifiedConfig,
    TrigConfig,
    VEConfig,
    VPConfig,
    typed,
)
from diffdistill.critic import Critic, DiscriminatorHead
from diffdistill.data import Images, Labels, Stream, Streams
from diffdistill.data.fashion_mnist import load_fashion_mnist
from diffdistill.denoiser import Backbone, Denoiser
from diffdistill.generator import Generator
from diffdistill.method import Method, Networks, PlayerSpec
from diffdistill.methods import METHODS
from diffdistill.player import HalfLifeDecay, LearningRate, Player
from diffdistill.process import VE, VP, Process, Rectified, Trig
from diffdistill.solvers import at
from diffdistill.teacher import Teacher
from diffdistill.trainer import Every, Schedule, Trainer

DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}


def process(config: ProcessConfig) -> Process:
    """The Process that a config describes."""
    match config:
        case VPConfig(table="cosine"):
            return VP.cosine(config.steps, sigma_data=config.sigma_data)
        case VPConfig():
            betas = {"beta_start": config.beta_start, "beta_end": config.beta_end}
            betas = {name: value for name, value in betas.items() if value}
            return getattr(VP, config.table)(config.steps, sigma_data=config.sigma_data, **betas)
        case VEConfig():
            return VE(**dataclasses.asdict(config))
        case RectifiedConfig():
            return Rectified(**dataclasses.asdict(config))
        case TrigConfig():
            return Trig(**dataclasses.asdict(config))


def denoiser(backbone: Backbone, config: DenoiserConfig) -> Denoiser:
    return Denoiser(
        backbone, process(config.process), config.prediction, clock=config.clock, scale_input=config.scale_input
    )


def null_label(config: DenoiserConfig) -> int | None:
    return None if config.null_label < 0 else config.null_label


def read_denoiser(folder: Path, *, checkpointing: bool = False) -> tuple[Denoiser, DenoiserConfig]:
    """A denoiser's folder, as written by `write_denoiser`."""
    if not (folder / MEANING).is_file():
        raise ConfigError(f"there is no {MEANING} in {folder}; give a folder written by diffdistill")
    config = typed(DenoiserConfig, read_meaning(folder), str(folder / MEANING))
    backbone = read_backbone(folder / NETWORK, null_label=null_label(config), checkpointing=checkpointing)
    return denoiser(backbone, config), config


def write_denoiser(model: Denoiser, config: DenoiserConfig, folder: Path, *, half: bool = False) -> None:
    """Write network and meaning, so that `read_denoiser` gives the same denoiser."""
    write_backbone(model.backbone, folder / NETWORK, half=half)
    name = next(name for name, kind in CHOICES[ProcessConfig].items() if isinstance(config.process, kind))
    meaning = {
        "process": {"name": name, **dataclasses.asdict(config.process)},
        "prediction": config.prediction.value,
        "clock": config.clock,
        "scale_input": config.scale_input,
        "null_label": config.null_label,
    }
    (folder / MEANING).write_text(json.dumps(meaning, indent=1) + "\n")


def starting_denoiser(config: Config) -> tuple[Denoiser, DenoiserConfig]:
    """What generator and critic start from: the teacher's folder, or a network made anew."""
    checkpointing = config.train.gradient_checkpointing
    if config.generator.network is None:
        if config.teacher is None:
            raise ConfigError("give a teacher, or generator.network and generator.denoiser for a network made anew")
        return read_denoiser(Path(config.teacher.path), checkpointing=checkpointing)
    meaning = config.generator.denoiser
    if meaning is None:
        raise ConfigError("generator.denoiser is missing: say what the new network's inputs and outputs mean")
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        network = config.generator.network
        backbone = make_backbone(
            network.name, network.options, null_label=null_label(meaning), checkpointing=checkpointing
        )
    return denoiser(backbone, meaning), meaning


def method(config: Config, device: torch.device) -> Method:
    """The method with its networks, on the device."""
    kind = METHODS[config.method_name]
    dtype = DTYPES[config.train.precision]
    start, _ = starting_denoiser(config)
    start = start.to(device, dtype)
    teacher = None
    if kind.needs_teacher:
        if config.teacher is None:
            raise ConfigError(f"method {config.method_name} needs a teacher; set teacher.path")
        frozen, _ = read_denoiser(Path(config.teacher.path))
        teacher = Teacher(frozen.to(device, dtype), guidance=config.teacher.guidance)

    def new_generator() -> Generator:
        return Generator(copy.deepcopy(start), config.generator.grid, step_rule=config.generator.step_rule)

    def new_critic() -> Critic:
        own = copy.deepcopy(teacher.denoiser).requires_grad_(True)
        if not getattr(config.method, "uses_gan", False):
            return Critic(own)
        trunk = teacher.denoiser if config.critic.trunk == "teacher" else None
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            head = DiscriminatorHead(feature_shapes(own, config.critic.taps)).to(device, dtype)
        return Critic(own, head=head, taps=config.critic.taps, trunk=trunk)

    return kind(config.method, Networks(new_generator, new_critic, teacher))


def feature_shapes(model: Denoiser, taps: tuple[str, ...]) -> list[torch.Size]:
    """Shape, without the batch, of what each tapped module gives."""
    names = {name.removeprefix("network.") for name, _ in model.backbone.named_modules()}
    for tap in taps:
        if tap.removeprefix("network.") not in names:
            raise ConfigError(f"critic.taps names {tap!r}, which the network does not have; e.g. mid_block")
    parameter = next(model.parameters())
    x = torch.zeros(1, *model.sample_shape, device=parameter.device, dtype=parameter.dtype)
    cond = {name: torch.zeros(1, dtype=torch.long, device=x.device) for name in model.backbone.condition_names}
    with torch.no_grad():
        _, features = model.with_features(x, at(model.process.t_max / 2, x), cond, taps=taps)
    return [feature.shape[1:] for feature in features]


def shard(spec: PlayerSpec, precision: str) -> PlayerSpec:
    """The player's modules under FSDP2, block by block; its parameters are sharded tensors from here on."""
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None, reduce_dtype=torch.float32 if precision == "bf16" else None
    )
    for module in spec.modules:
        roots = [part for part in module.modules() if isinstance(part, Backbone | DiscriminatorHead)]
        for root in roots:
            blocks = root.blocks() if isinstance(root, Backbone) else ()
            for part in (*blocks, root):
                fully_shard(part, mp_policy=policy)
                part.set_gradient_divide_factor(1.0)  # losses are divided by the global batch already
    parameters = {name: parameter for module in spec.modules for name, parameter in module.named_parameters()}
    return PlayerSpec(spec.modules, parameters)


def player(spec: PlayerSpec, config: PlayerConfig, steps: int, accelerator: Accelerator, *, sharded: bool) -> Player:
    optimizer = torch.optim.AdamW(
        list(spec.parameters.values()),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )
    rate = LearningRate(config.learning_rate, config.warmup_steps, config.decay, steps, config.final)
    reduce = None
    if accelerator.num_processes > 1 and not sharded:
        reduce = torch.distributed.all_reduce
    return Player(spec, optimizer, rate, max_norm=config.max_norm, reduce=reduce or (None if sharded else _alone))


def _alone(flat: torch.Tensor) -> None:
    """The sum over one process."""


def streams(config: Config, names: frozenset[str], generator: Generator, device: torch.device) -> Streams:
    """The data a method reads, checked against what the generator expects."""
    backbone = generator.denoiser.backbone
    classes = backbone.num_classes
    made: dict[str, Stream] = {}
    if "conditions" in names:
        made["conditions"] = Labels(classes)
    if "images" in names:
        if config.data.name == "none":
            raise ConfigError(f"method {config.method_name} reads images; set data.name, e.g. fashion_mnist")
        path = Path(config.data.path) if config.data.path else None
        images = load_fashion_mnist(path, "train")
        images = dataclasses.replace(images, images=images.images.to(device), labels=images.labels.to(device))
        if tuple(images.images.shape[1:]) != tuple(generator.denoiser.sample_shape):
            raise ConfigError(
                f"data.name={config.data.name} has images of shape {tuple(images.images.shape[1:])}, but the network takes "
                f"{tuple(generator.denoiser.sample_shape)}; choose data or network of one shape"
            )
        if classes and images.num_classes != classes:
            raise ConfigError(f"the data has {images.num_classes} classes, but the network {classes}")
        made["images"] = Images(images, labelled=classes > 0, flip=config.data.flip)
    return Streams(made)


def accelerator(config: Config) -> Accelerator:
    """Device, precision and trackers."""
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    return Accelerator(
        mixed_precision="bf16" if config.train.precision == "bf16" else "no",
        cpu=config.train.device == "cpu",
        log_with=list(config.trackers) or None,
        project_dir=config.output,
    )


def trainer(config: Config, recipe: dict, hooks: list[Every] = ()) -> Trainer:
    """Everything for `diffdistill train`: a Trainer at step 0, or where the run in `output` left off."""
    accelerate = accelerator(config)
    chosen = method(config, accelerate.device)
    sharded = config.train.sharding == "fsdp2"
    specs = chosen.players()
    missing, unknown = specs.keys() - config.players.keys(), config.players.keys() - specs.keys()
    if missing or unknown:
        raise ConfigError(f"players must have exactly the keys {', '.join(specs)}, got {', '.join(config.players)}")
    if sharded:
        specs = {name: shard(spec, config.train.precision) for name, spec in specs.items()}
    players = {
        name: player(spec, config.players[name], config.train.steps, accelerate, sharded=sharded)
        for name, spec in specs.items()
    }
    for name, decay in config.averages.items():
        if isinstance(decay, HalfLifeConfig):
            decay = HalfLifeDecay(decay.images, config.train.batch, decay.ramp_up)
        players["generator"].average(name, decay)
    data = streams(config, chosen.streams(), chosen.generator, accelerate.device)
    kept = {field.name for field in dataclasses.fields(Schedule)}
    schedule = Schedule(**{name: value for name, value in dataclasses.asdict(config.train).items() if name in kept})
    return Trainer(
        chosen,
        players,
        data,
        accelerate,
        schedule,
        seed=config.seed,
        output=Path(config.output),
        hooks=hooks,
        dtype=DTYPES[config.train.precision],
    )
