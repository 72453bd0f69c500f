"""From a checked config to networks: denoisers read, made anew or written, the teacher and the generator."""

import dataclasses
import json
from pathlib import Path

import torch

from diffdistill import checkpoint, run
from diffdistill.backbones.diffusers import DiffusersBackbone
from diffdistill.backbones.folder import (
    MEANING,
    META,
    NETWORK,
    make_backbone,
    read_backbone,
    read_diffusers,
    read_json,
    write_backbone,
)
from diffdistill.backbones.pipeline import PipelineBackbone
from diffdistill.config import (
    Config,
    ConfigError,
    DenoiserConfig,
    ProcessConfig,
    RectifiedConfig,
    StepsConfig,
    TeacherConfig,
    TrigConfig,
    VEConfig,
    VPConfig,
)
from diffdistill.denoiser import Backbone, Denoiser, refuse_no_null
from diffdistill.evaluation.sampling import evaluating
from diffdistill.generator import GENERATOR, Generator, Sampler
from diffdistill.memory import memory_for
from diffdistill.method import Weights
from diffdistill.preparing.files import read_prompts
from diffdistill.process import VE, VP, Process, Rectified, Trig
from diffdistill.prompts import Prompts
from diffdistill.recipe import plain, typed
from diffdistill.solvers import at
from diffdistill.teacher import Teacher

DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}  # of parameters; bf16 is autocast
TOLD = "backbone.told."  # begins the names of the weights that tell a network more than its time
HUB = "hub:"  # begins a teacher.path that is downloaded, so that a mistyped folder never reaches the network


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
        backbone,
        process(config.process),
        config.prediction,
        clock=config.clock,
        scale_input=config.scale_input,
        boundary=config.boundary,
    )


def read_denoiser(
    folder: Path, *, checkpointing: bool = False, device: torch.device | str = "cpu", prompts: str = ""
) -> tuple[Denoiser, DenoiserConfig]:
    """A denoiser's folder, as written by `write_denoiser`, and its meaning.

    Args:
        prompts: of a network that is told prompts, another folder of them than it was written with.
        device: on META the weights are not read, and hold no memory.
    Raises:
        ValueError: the folder or a file is missing, damaged, or does not fit.
    """
    if not (folder / MEANING).is_file():
        raise ConfigError(f"there is no {MEANING} in {folder}; give a folder written by diffdistill")
    config = typed(DenoiserConfig, read_json(folder / MEANING, "restore the folder"), str(folder / MEANING))
    if prompts:
        config = dataclasses.replace(config, prompts=prompts)
    options = {"null_label": _null_label(config), "checkpointing": checkpointing, "device": device}
    options["prompts"] = _prompts(config.prompts)
    return denoiser(read_backbone(folder / NETWORK, **options), config), config


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
        return read_denoiser(Path(path), checkpointing=checkpointing, device=device, prompts=config.prompts)
    elif Path(path).is_dir():
        source = Path(path)
    else:
        raise ConfigError(f"teacher.path={path} is no folder; give one, or {HUB}owner/name for a pipeline on the hub")
    null_label = None if given is None else _null_label(given)
    told = config.prompts or ("" if given is None else given.prompts)
    backbone, said = read_diffusers(
        source, null_label=null_label, checkpointing=checkpointing, device=device, prompts=_prompts(told)
    )
    if given is None and said is None:
        raise ConfigError(f"teacher.denoiser is missing: {path} holds a network, and nothing that says what it means")
    config = dataclasses.replace(given or typed(DenoiserConfig, said, f"the scheduler in {path}"), prompts=told)
    return denoiser(backbone, config), config


def write_denoiser(model: Denoiser, config: DenoiserConfig, folder: Path, *, half: bool = False) -> None:
    """Write network and meaning, so that `read_denoiser` gives the same denoiser; half: the network in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    write_backbone(model.backbone, folder / NETWORK, half=half)
    (folder / MEANING).write_text(json.dumps(plain(config), indent=1) + "\n")


def starting_denoiser(config: Config, device: torch.device | str = "cpu") -> tuple[Denoiser, DenoiserConfig]:
    """What the generator starts from: the teacher, a network made anew, or the folder in generator.init_from; with
    the boundary that the generator is to have."""
    model, meaning = _starting_network(config, device)
    if not config.generator.boundary:
        return model, meaning
    boundary = config.generator.boundary
    try:
        return model.bounded(boundary), dataclasses.replace(meaning, boundary=boundary)
    except ValueError as error:
        raise ConfigError(f"generator.{error}") from error


def _starting_network(config: Config, device: torch.device | str) -> tuple[Denoiser, DenoiserConfig]:
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
                    prompts=_prompts(wanted.denoiser.prompts),
                )
            except ValueError as error:
                raise ConfigError(f"generator.{error}") from error
        model, meaning = denoiser(backbone, wanted.denoiser).to(device), wanted.denoiser
    elif config.teacher is not None:
        model, meaning = teacher_denoiser(config.teacher, checkpointing=checkpointing, device=device)
    elif (Path(wanted.init_from) / MEANING).is_file():
        model, meaning = read_denoiser(Path(wanted.init_from), checkpointing=checkpointing, device=device)
        tell(model, config)
        return model, meaning
    else:
        raise ConfigError(
            "nothing to start from: give teacher.path, generator.network with generator.denoiser, or the folder of a "
            "denoiser as generator.init_from"
        )
    tell(model, config)
    if wanted.init_from and torch.device(device) != META:
        source, parameters = Path(wanted.init_from), dict(model.named_parameters())
        if (source / MEANING).is_file():
            stored = {name: value.detach() for name, value in read_denoiser(source)[0].named_parameters()}
            if not any(name.startswith(TOLD) for name in stored):  # the weights of a network that was told less
                parameters = {name: value for name, value in parameters.items() if not name.startswith(TOLD)}
            checkpoint.fill(parameters, stored, source=source)
        elif not _holds_several(source):
            checkpoint.initialise(parameters, source, player=GENERATOR, weights=wanted.init_weights)
    return model, meaning


def tell(model: Denoiser, config: Config) -> None:
    """The denoiser's network is told from here on what the generator of a config is to be told besides its time: where
    a flow map leads, and the scale of guidance. At first it makes no difference to it."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        for name in config.generator.told:
            model.backbone.tell(name)


def start_parts(config: Config, sampler: Sampler) -> None:
    """Where generator.init_from is a run of several generators, each of the sampler's starts as its namesake there.

    Raises:
        CheckpointError: one has no namesake, or its weights do not fit.
    """
    wanted = config.generator
    if wanted.init_from and _holds_several(Path(wanted.init_from)):
        for name, part in sampler.parts.items():
            parameters = dict(part.denoiser.named_parameters())
            checkpoint.initialise(parameters, Path(wanted.init_from), player=name, weights=wanted.init_weights)


def _holds_several(source: Path) -> bool:
    """Whether a run or checkpoint is of several generators."""
    if (source / MEANING).is_file():
        return False
    files = checkpoint.read_state(checkpoint.latest(source) or source)["files"]
    return f"{GENERATOR}.weights.safetensors" not in files


def recompute_activations(model: Denoiser) -> None:
    """Change the denoiser to what `read_denoiser` gives with checkpointing=True; an MLP keeps its few activations."""
    if isinstance(model.backbone, DiffusersBackbone | PipelineBackbone):
        model.backbone.network.enable_gradient_checkpointing()


def generator(config: Config, model: Denoiser) -> Generator:
    """The denoiser with the times and the step rule of the config."""
    grid = config.generator.grid
    grid = model.process.grid(grid.steps) if isinstance(grid, StepsConfig) else grid
    wanted = config.generator
    return Generator(model, grid, step_rule=wanted.step_rule, guidance=wanted.guidance)


def teacher(config: Config, device: torch.device) -> Teacher:
    """The frozen teacher of the config, in its precision; it too recomputes activations where gradients run through it
    and the config says so."""
    if config.teacher is None:
        raise ConfigError(f"method {config.method_name} needs a teacher; set teacher.path")
    with memory_for("the teacher's weights"):
        frozen, _ = teacher_denoiser(config.teacher, checkpointing=config.train.gradient_checkpointing, device=device)
        frozen = frozen.to(DTYPES[config.train.precision])
    refuse_unguidable(frozen, config.teacher.guidance_weight, config.teacher.path)
    return Teacher(frozen, guidance=config.teacher.guidance_weight)


def refuse_unguidable(model: Denoiser, guidance: float, path: str | Path) -> None:
    """Refuses guidance of a network that knows no classes, or was not trained without them."""
    if guidance == 1:
        return
    if not model.backbone.condition_names:
        raise ConfigError(
            f"teacher.guidance={guidance} needs a teacher with classes, and {path} has none; leave guidance out"
        )
    refuse_no_null(model.backbone, f"teacher.guidance={guidance}")


def node(config: Config, device: torch.device, degraded: str, step: int) -> Weights:
    """What the `degrade` run in the folder `degraded` saved at a step, for a run that backtracks.

    Args:
        device: on META the weights are not read.
    Raises:
        ConfigError: it is no such run, or had another teacher or generator, or no checkpoint is left of that step.
        CheckpointError: the checkpoint is damaged.
    """
    folder = Path(degraded)
    if not run.is_run(folder):
        raise ConfigError(f"method.degraded={folder} holds no run; give the output of a run of degrade")
    theirs = run.read_config(folder)
    if theirs.method_name != "degrade":
        raise ConfigError(
            f"method.degraded={folder} is a run of {theirs.method_name}; give the output of a run of degrade"
        )
    unguided, taught = dataclasses.replace(config.teacher, guidance=1.0, guidance_from="unconditional"), theirs.teacher
    if Path(unguided.path).resolve() == Path(taught.path).resolve():
        taught = dataclasses.replace(taught, path=unguided.path)
    for key, ours, other in (("teacher", unguided, taught), ("generator", config.generator, theirs.generator)):
        if ours != other:
            raise ConfigError(
                f"{folder} degraded towards another generator: its {key} is {plain(other)}, and here {plain(ours)}; "
                "run degrade again for this one"
            )
    if config.generator.network is not None and config.seed != theirs.seed:
        raise ConfigError(
            f"seed={config.seed} makes another generator.network than the one that {folder} degraded towards, with "
            f"seed={theirs.seed}; use one seed for both"
        )
    found = {int(path.name.removeprefix("step-")): path for path in checkpoint.checkpoints(folder)}
    if step not in found:
        raise ConfigError(
            f"{folder} has no checkpoint of step {step}; it has those of {', '.join(map(str, found)) or 'none'}. "
            "train.save_every and train.keep_every of degrade say which are kept"
        )
    file, state = "generator.weights.safetensors", checkpoint.read_state(found[step])
    if torch.device(device) != META:
        checkpoint.read_tensors(found[step], file, state)  # so that damage is found now, and not thousands of steps on
    return Weights(
        str(found[step]),
        state["files"][file],
        lambda model: checkpoint.initialise(dict(model.named_parameters()), found[step], player="generator"),
    )


def refuse_unfit_network(model: Denoiser, role: str) -> None:
    """One tiny forward: refuses a network that does not take its own samples and conditions, or changes their shape."""
    x, _, cond = blank_batch(model)
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


def refuse_latents(config: Config) -> None:
    """Refuses, for LPIPS, a teacher whose samples another network in its pipeline's folder decodes to pictures."""
    if config.teacher is None:
        return
    index = Path(config.teacher.path) / "model_index.json"
    named = read_json(index, "restore it") if index.is_file() else {}
    for decoder in ("vae", "vqvae"):
        if decoder in named:
            raise ConfigError(
                f"distance.name=lpips compares pictures in pixels, and teacher.path={config.teacher.path} makes "
                f"latents for its {decoder}; take name: pseudo_huber or squared"
            )


def refuse_disagreement(student: Denoiser, frozen: Denoiser) -> None:
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
        _, features = model.with_features(*blank_batch(model), taps=taps)
    return [feature.shape[1:] for feature in features]


def blank_batch(model: Denoiser) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """A batch of one that the denoiser accepts: x_t, t and condition."""
    parameter = next(model.parameters())
    x = torch.zeros(1, *model.sample_shape, device=parameter.device, dtype=parameter.dtype)
    cond = {name: torch.zeros(1, dtype=torch.long, device=x.device) for name in model.backbone.condition_names}
    return x, at(model.process.t_max / 2, x), cond


def _prompts(folder: str) -> Prompts | None:
    return read_prompts(Path(folder)) if folder else None


def _null_label(config: DenoiserConfig) -> int | None:
    return None if config.null_label < 0 else config.null_label
