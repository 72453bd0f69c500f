"""Gate 2: from a checked config to the objects of a run. The only file that sees both sides."""

import copy
import dataclasses
import importlib.util
import json
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from diffdistill import checkpoint
from diffdistill.backbones.folder import (
    COMPONENTS,
    MEANING,
    NETWORK,
    make_backbone,
    read_backbone,
    read_diffusers,
    write_backbone,
)
from diffdistill.backbones.scheduler import meaning as scheduler_meaning
from diffdistill.config import (
    RAW,
    Config,
    ConfigError,
    DataConfig,
    DenoiserConfig,
    HalfLifeConfig,
    PlayerConfig,
    ProcessConfig,
    RectifiedConfig,
    StepsConfig,
    TeacherConfig,
    TrigConfig,
    VEConfig,
    VPConfig,
    plain,
    typed,
)
from diffdistill.critic import Critic, DiscriminatorHead
from diffdistill.data import Images, Labels, Stream, Streams, refuse_unfit
from diffdistill.data.fashion_mnist import Split, load_fashion_mnist
from diffdistill.data.folder import load_images
from diffdistill.data.image_set import ImageSet
from diffdistill.denoiser import Backbone, Denoiser
from diffdistill.evaluation.sampling import evaluating
from diffdistill.generator import Generator
from diffdistill.method import Method, Networks, PlayerSpec
from diffdistill.methods import METHODS
from diffdistill.player import HalfLifeDecay, LearningRate, Player
from diffdistill.process import VE, VP, Process, Rectified, Trig
from diffdistill.rng import Rng
from diffdistill.solvers import at
from diffdistill.teacher import Teacher
from diffdistill.trainer import Every, Schedule, Trainer

DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}  # of parameters; bf16 is autocast
HUB = "hub:"  # begins a teacher.path that is downloaded, so that a mistyped folder never reaches the network
META = torch.device("meta")  # shapes without numbers: what `check` plans memory on


class OutOfMemory(RuntimeError):
    """The device is full; the message names who took the last of it, and what helps."""


@contextmanager
def memory_for(role: str):
    """Within the block, running out of device memory is an OutOfMemory that names `role`, or the term noted inside."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        where = ", ".join([role, *getattr(error, "__notes__", ())])
        raise OutOfMemory(
            f"out of memory in {where}: {' '.join(str(error).split())[:200]}. What helps most: a larger "
            "train.accumulate, train.gradient_checkpointing=true, or train.sharding=fsdp2 over more GPUs"
        ) from error


def process(config: ProcessConfig) -> Process:
    """The Process that a config describes."""
    match config:
        case VPConfig():
            return _table(config)
        case VEConfig():
            return VE(**dataclasses.asdict(config))
        case RectifiedConfig():
            return Rectified(**dataclasses.asdict(config))
        case TrigConfig():
            return Trig(**dataclasses.asdict(config))


def _table(config: VPConfig) -> VP:
    if config.betas:
        made = VP((1 - torch.tensor(config.betas, dtype=torch.float64)).cumprod(0), sigma_data=config.sigma_data)
    elif config.table == "cosine":
        made = VP.cosine(config.steps, sigma_data=config.sigma_data)
    else:
        betas = {"beta_start": config.beta_start, "beta_end": config.beta_end}
        betas = {name: value for name, value in betas.items() if value}
        made = getattr(VP, config.table)(config.steps, sigma_data=config.sigma_data, **betas)
    if not config.zero_snr:
        return made
    alpha = made.alpha(torch.arange(1, int(made.t_max) + 1, dtype=torch.float64))
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])  # Lin et al. 2024, algorithm 1
    return VP(alpha**2, sigma_data=config.sigma_data)


def denoiser(backbone: Backbone, config: DenoiserConfig) -> Denoiser:
    """The backbone with what its inputs and outputs mean."""
    return Denoiser(
        backbone, process(config.process), config.prediction, clock=config.clock, scale_input=config.scale_input
    )


def read_denoiser(
    folder: Path, *, checkpointing: bool = False, device: torch.device | str = "cpu"
) -> tuple[Denoiser, DenoiserConfig]:
    """A denoiser's folder, as written by `write_denoiser`, and its meaning.

    Args:
        device: on META the weights are not read, and hold no memory.
    Raises:
        ConfigError: the folder or a file is missing, damaged, or does not fit.
    """
    if not (folder / MEANING).is_file():
        raise ConfigError(f"there is no {MEANING} in {folder}; give a folder written by diffdistill")
    config = typed(DenoiserConfig, _read_json(folder / MEANING), str(folder / MEANING))
    if torch.device(device) == META:
        backbone = _backbone_without_weights(folder / NETWORK, _null_label(config), checkpointing)
    else:
        backbone = read_backbone(folder / NETWORK, null_label=_null_label(config), checkpointing=checkpointing)
    return denoiser(backbone, config).to(device), config


def _backbone_without_weights(folder: Path, null_label: int | None, checkpointing: bool) -> Backbone:
    options = _read_json(folder / "config.json")
    name = options.get("_class_name", "")
    options = {key: value for key, value in options.items() if not key.startswith("_")}
    with META:
        return make_backbone(name, options, null_label=null_label, checkpointing=checkpointing)


def _read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{file} could not be read: {error}; restore the folder") from error


def teacher_denoiser(
    config: TeacherConfig, *, checkpointing: bool = False, device: torch.device | str = "cpu"
) -> tuple[Denoiser, DenoiserConfig]:
    """The denoiser at teacher.path, of whichever kind, and its meaning; on META without weights.

    Raises:
        ConfigError, ValueError: nothing readable is there, or it is not clear what the network means.
    """
    path, given = config.path, config.denoiser
    if path.startswith(HUB):
        source: str | Path = path.removeprefix(HUB)
    elif (Path(path) / MEANING).is_file():
        if given is not None:
            raise ConfigError(f"teacher.denoiser is given, but {path} has a {MEANING} of its own; leave it out")
        return read_denoiser(Path(path), checkpointing=checkpointing, device=device)
    elif Path(path).is_dir():
        source = Path(path)
    else:
        raise ConfigError(f"teacher.path={path} is no folder; give one, or {HUB}owner/name for a pipeline on the hub")
    null_label = None if given is None else _null_label(given)
    if torch.device(device) == META and isinstance(source, Path):
        backbone, said = _diffusers_without_weights(source, null_label, checkpointing)
    else:
        backbone, said = read_diffusers(source, null_label=null_label, checkpointing=checkpointing)
    if given is None and said is None:
        raise ConfigError(f"teacher.denoiser is missing: {path} holds a network, and nothing that says what it means")
    config = given or typed(DenoiserConfig, said, f"the scheduler in {path}")
    return denoiser(backbone, config).to(device), config


def _diffusers_without_weights(
    folder: Path, null_label: int | None, checkpointing: bool
) -> tuple[Backbone, dict | None]:
    """As `read_diffusers`, on META."""
    if not (folder / "model_index.json").is_file():
        return _backbone_without_weights(folder, null_label, checkpointing), None
    said = scheduler_meaning(_read_json(folder / "scheduler" / "scheduler_config.json"))
    network = next((folder / name for name in COMPONENTS if (folder / name).is_dir()), folder / COMPONENTS[0])
    said["null_label"] = -1 if null_label is None else null_label
    return _backbone_without_weights(network, null_label, checkpointing), said


def write_denoiser(model: Denoiser, config: DenoiserConfig, folder: Path, *, half: bool = False) -> None:
    """Write network and meaning, so that `read_denoiser` gives the same denoiser; half: the network in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    write_backbone(model.backbone, folder / NETWORK, half=half)
    (folder / MEANING).write_text(json.dumps(plain(config), indent=1) + "\n")


def starting_denoiser(config: Config, device: torch.device | str = "cpu") -> tuple[Denoiser, DenoiserConfig]:
    """What the generator starts from: the teacher, a network made anew, or the folder in generator.init_from."""
    checkpointing, wanted = config.train.gradient_checkpointing, config.generator
    if wanted.network is not None:
        with torch.random.fork_rng(), META if torch.device(device) == META else torch.device("cpu"):
            torch.manual_seed(config.seed)
            try:
                backbone = make_backbone(
                    wanted.network.name,
                    wanted.network.options,
                    null_label=_null_label(wanted.denoiser),
                    checkpointing=checkpointing,
                )
            except ValueError as error:
                raise ConfigError(f"generator.{error}") from error
        model, meaning = denoiser(backbone, wanted.denoiser).to(device), wanted.denoiser
    elif config.teacher is not None:
        model, meaning = teacher_denoiser(config.teacher, checkpointing=checkpointing, device=device)
    elif (Path(wanted.init_from) / MEANING).is_file():
        return read_denoiser(Path(wanted.init_from), checkpointing=checkpointing, device=device)
    else:
        raise ConfigError(
            "nothing to start from: give teacher.path, generator.network with generator.denoiser, or the folder of a "
            "denoiser as generator.init_from"
        )
    if wanted.init_from and torch.device(device) != META:
        initialise(model, Path(wanted.init_from), wanted.init_weights)
    return model, meaning


def initialise(model: Denoiser, source: Path, weights: str) -> None:
    """Give the denoiser the weights of a run, a checkpoint or a denoiser's folder, exactly; nothing else is taken over.

    Args:
        weights: of a run or checkpoint: "raw", or the name of one of its averages.
    """
    parameters = dict(model.named_parameters())
    if (source / MEANING).is_file():
        stored = dict(read_denoiser(source)[0].named_parameters())
        checkpoint.fill(parameters, {name: value.detach() for name, value in stored.items()}, source=source)
        return
    folder = checkpoint.latest(source) or source
    checkpoint.initialise(parameters, folder, player="generator", average=None if weights == RAW else weights)


def generator(config: Config, model: Denoiser) -> Generator:
    """The denoiser with the times and the step rule of the config."""
    grid = config.generator.grid
    grid = model.process.grid(grid.steps) if isinstance(grid, StepsConfig) else grid
    return Generator(model, grid, step_rule=config.generator.step_rule)


def teacher(config: Config, device: torch.device) -> Teacher:
    """The frozen teacher of the config, in its precision."""
    if config.teacher is None:
        raise ConfigError(f"method {config.method_name} needs a teacher; set teacher.path")
    with memory_for("the teacher's weights"):
        frozen, _ = teacher_denoiser(config.teacher, device=device)
        frozen = frozen.to(DTYPES[config.train.precision])
    if config.teacher.guidance != 1 and frozen.backbone.condition_names:
        frozen.backbone.null({name: torch.zeros(1, dtype=torch.long) for name in frozen.backbone.condition_names})
    return Teacher(frozen, guidance=config.teacher.guidance)


def method(config: Config, device: torch.device) -> Method:
    """The method with its networks, on the device."""
    kind = METHODS[config.method_name]
    dtype = DTYPES[config.train.precision]
    with memory_for("the generator's weights"):
        start, _ = starting_denoiser(config, device)
        start = start.to(dtype)
        refuse_unfit_network(start, "the generator")
    frozen = None
    if kind.needs_teacher:
        frozen = teacher(config, device)
        _agree(start, frozen.denoiser)
        if not start.process.same_law(frozen.process):
            frozen = Teacher(frozen.denoiser.seen_in(start.process), guidance=frozen.guidance)

    def new_generator() -> Generator:
        with memory_for("the generator's weights"):
            return generator(config, copy.deepcopy(start))

    def new_critic() -> Critic:
        with memory_for("the critic's weights"):
            own = copy.deepcopy(frozen.denoiser).requires_grad_(True)
            if not getattr(config.method, "uses_gan", False):
                return Critic(own)
            trunk = frozen.denoiser if config.critic.trunk == "teacher" else None
            shapes = feature_shapes(own, config.critic.taps)
            with torch.random.fork_rng():
                torch.manual_seed(config.seed)
                head = DiscriminatorHead(shapes).to(device, dtype)
            return Critic(own, head=head, taps=config.critic.taps, trunk=trunk)

    return kind(config.method, Networks(new_generator, new_critic, frozen))


def refuse_unfit_network(model: Denoiser, role: str) -> None:
    """One tiny forward: refuses a network that does not take its own samples and conditions, or changes their shape."""
    x, _, cond = _blank(model)
    shape = tuple(x.shape[1:])
    try:
        with torch.no_grad(), evaluating(model):
            output = model.backbone(x, x.new_ones(1), cond)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # foreign code may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"the network of {role} fails on a sample of shape {shape}: {reason}; look at its options"
        ) from error
    if output.shape != x.shape:
        raise ConfigError(
            f"the network of {role} gives shape {tuple(output.shape[1:])} for samples of shape {shape}; its inputs and "
            "outputs must be of one shape"
        )


def _agree(student: Denoiser, frozen: Denoiser) -> None:
    """Refuses a student whose samples or classes are not the teacher's."""
    if student.sample_shape != frozen.sample_shape:
        raise ConfigError(
            f"generator.network makes samples of shape {tuple(student.sample_shape)}, the teacher of "
            f"{tuple(frozen.sample_shape)}; build the network for the teacher's shape"
        )
    ours, theirs = student.backbone.num_classes, frozen.backbone.num_classes
    if ours != theirs:
        raise ConfigError(
            f"generator.network knows {ours} classes, the teacher {theirs}; build the network for the teacher's classes"
        )


def feature_shapes(model: Denoiser, taps: tuple[str, ...]) -> list[torch.Size]:
    """Shape, without the batch, of what each tapped module gives."""
    names = {name for name, _ in model.backbone.named_modules()}
    for tap in taps:
        if tap not in names:
            example = next((name for name in names if name.endswith("mid_block")), sorted(names)[-1])
            raise ConfigError(f"critic.taps names {tap!r}, which the network does not have; e.g. {example}")
    with torch.no_grad():
        _, features = model.with_features(*_blank(model), taps=taps)
    return [feature.shape[1:] for feature in features]


def _blank(model: Denoiser) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """A batch of one that the denoiser accepts: x_t, t and condition."""
    parameter = next(model.parameters())
    x = torch.zeros(1, *model.sample_shape, device=parameter.device, dtype=parameter.dtype)
    cond = {name: torch.zeros(1, dtype=torch.long, device=x.device) for name in model.backbone.condition_names}
    return x, at(model.process.t_max / 2, x), cond


def shard(spec: PlayerSpec, device: torch.device) -> PlayerSpec:
    """The player's modules under FSDP2, block by block; its parameters are sharded tensors from here on.

    Parameters are gathered as they are, and bf16 is left to autocast, as in replicated training. FSDP2's own policy
    would halve the traffic, but it casts a module's inputs too: a time of 748.9 would become 748 in bf16.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for module in spec.modules:
        roots = [part for part in module.modules() if isinstance(part, Backbone | DiscriminatorHead)]
        for root in roots:
            blocks = root.blocks() if isinstance(root, Backbone) else ()
            for part in (*blocks, root):
                # A root stays gathered until its player steps or swaps (Player.reshard): a backward pass that begins at
                # tapped features never meets the root's output, which is where FSDP2 would gather it again.
                fully_shard(part, mesh=mesh, reshard_after_forward=part is not root)
                part.set_gradient_divide_factor(1.0)  # losses are divided by the global batch already
                part.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sums
        _first_forward(module)
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()  # so that the parameters below are the sharded ones
    parameters = {name: parameter for module in spec.modules for name, parameter in module.named_parameters()}
    return PlayerSpec(spec.modules, parameters)


def _first_forward(module: torch.nn.Module) -> None:
    """One forward with gradient: FSDP2 keeps a wrong reduce dtype if the first one runs frozen (pytorch#186998)."""
    match module:
        case Denoiser():
            module(*_blank(module))
        case Critic(head=None):
            module.denoiser(*_blank(module.denoiser))
        case Critic():
            module.denoiser(*_blank(module.denoiser))
            module.logits(*_blank(module.denoiser))


def player(spec: PlayerSpec, config: PlayerConfig, steps: int, accelerator: Accelerator, *, sharded: bool) -> Player:
    """The player with its AdamW, learning rate, clipping, and the way its gradients are summed over the ranks."""
    optimizer = torch.optim.AdamW(
        list(spec.parameters.values()),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )
    rate = LearningRate(config.learning_rate, config.warmup_steps, config.decay, steps, config.final)
    reduce = torch.distributed.all_reduce if accelerator.num_processes > 1 and not sharded else None
    return Player(spec, optimizer, rate, max_norm=config.max_norm, reduce=reduce)


def images(config: DataConfig, split: Split) -> ImageSet:
    """The real images that a config names; a user's own are the same in both splits."""
    path = Path(config.path) if config.path else None
    match config.name:
        case "fashion_mnist":
            return load_fashion_mnist(path, split)
        case "folder":
            return load_images(path)
        case "none":
            raise ConfigError("data.name is none, but real images are needed; set it, e.g. data.name=fashion_mnist")


def streams(config: Config, names: frozenset[str], model: Denoiser, device: torch.device) -> Streams:
    """The data a method reads, checked against what the denoiser expects."""
    classes, made = model.backbone.num_classes, {}
    if "conditions" in names:
        made["conditions"] = Labels(classes)
    if "images" in names:
        made["images"] = image_stream(config, model, device)
    return Streams(made)


def image_stream(config: Config, model: Denoiser, device: torch.device) -> Stream:
    """The training images of a config, on the device."""
    classes, found = model.backbone.num_classes, images(config.data, "train")
    shape, wanted = tuple(found.images.shape[1:]), tuple(model.sample_shape)
    if shape != wanted:
        raise ConfigError(
            f"data.name={config.data.name} has images of shape {shape}, but the network takes {wanted}; choose data or "
            "network of one shape"
        )
    if classes and found.num_classes != classes:
        raise ConfigError(
            f"data.name={config.data.name} has {found.num_classes} classes, but the network {classes}; choose data or "
            "network of the same classes"
        )
    found = dataclasses.replace(found, images=found.images.to(device), labels=found.labels.to(device))
    return Images(found, labelled=classes > 0, flip=config.data.flip)


def accelerator(config: Config) -> Accelerator:
    """Device, precision, collectives and trackers."""
    device, precision = config.train.device, config.train.precision
    for kind, present in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        if device == kind and not present:
            raise ConfigError(
                f"train.device={kind}, but torch finds none on this machine; use train.device=auto or cpu"
            )
    for name, package in {"tensorboard": "tensorboard", "wandb": "wandb"}.items():
        if name in config.trackers and importlib.util.find_spec(package) is None:
            raise ConfigError(f"trackers names {name}, which is not installed; try: pip install {package}")
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    AcceleratorState._reset_state(reset_partial_state=True)  # else a second run in one process keeps the first one's
    made = Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        cpu=device == "cpu",
        log_with=list(config.trackers) or None,
        project_dir=config.output,
    )
    if device not in ("auto", made.device.type):
        raise ConfigError(
            f"train.device={device}, but this machine computes on {made.device.type}; use train.device=auto"
        )
    if made.device.type == "mps" and precision == "fp64":
        raise ConfigError("train.precision=fp64 does not exist on mps; use fp32, or train.device=cpu")
    if config.train.sharding == "fsdp2" and not torch.distributed.is_initialized():
        raise ConfigError("train.sharding=fsdp2 shards over processes; start it by: torchrun -m diffdistill train ...")
    return made


def trainer(
    config: Config, accelerate: Accelerator, *, output: Path, schedule: Schedule, hooks: Sequence[Every] = ()
) -> Trainer:
    """Everything for a run, at step 0.

    Args:
        output: where it writes.
        schedule: `schedule(config)`, or a shorter one for a trial.
        hooks: evaluation and pictures.
    """
    chosen = method(config, accelerate.device)
    model, dtype = chosen.generator.denoiser, DTYPES[config.train.precision]
    data = streams(config, chosen.streams(), model, accelerate.device)
    first = range(accelerate.process_index, accelerate.process_index + min(config.train.batch, 64))
    rng = Rng((config.seed, "first batch"), first, device=accelerate.device, dtype=dtype)
    refuse_unfit(data.draw(rng), tuple(model.sample_shape), dtype)
    return Trainer(
        chosen,
        trained(config, chosen, accelerate),
        data,
        accelerate,
        schedule,
        seed=config.seed,
        output=output,
        hooks=hooks,
        dtype=dtype,
    )


def schedule(config: Config) -> Schedule:
    """How long the run of a config is, and what happens when."""
    return Schedule(**{f.name: getattr(config.train, f.name) for f in dataclasses.fields(Schedule)})


def trained(config: Config, chosen: Method, accelerate: Accelerator) -> Mapping[str, Player]:
    """The method's players, sharded where the config says so, with the generator's averages."""
    sharded = config.train.sharding == "fsdp2"
    specs = chosen.players()
    check_players(config, specs)
    if sharded:
        specs = {name: shard(spec, accelerate.device) for name, spec in specs.items()}
    players = {
        name: player(spec, config.players[name], config.train.steps, accelerate, sharded=sharded)
        for name, spec in specs.items()
    }
    for name, decay in config.averages.items():
        if isinstance(decay, HalfLifeConfig):
            decay = HalfLifeDecay(decay.images, config.train.batch, decay.ramp_up)
        players["generator"].average(name, decay)
    return players


def check_players(config: Config, specs: Mapping[str, PlayerSpec]) -> None:
    """Refuses settings for players that the method does not have, or the lack of some that it has."""
    if specs.keys() != config.players.keys():
        raise ConfigError(
            f"players must have exactly the keys {', '.join(specs)} for method {config.method_name}, got "
            f"{', '.join(config.players) or 'none'}"
        )


def _null_label(config: DenoiserConfig) -> int | None:
    return None if config.null_label < 0 else config.null_label
