"""Gate 2: from a checked config to a run: the method with its networks, data, players and the loop around them."""

import copy
import dataclasses
import functools
import importlib.util
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from diffdistill import networks
from diffdistill.backbones.folder import MEANING, META
from diffdistill.backbones.pipeline import PipelineBackbone
from diffdistill.best import Best
from diffdistill.config import Config, ConfigError, CriticConfig, DataConfig, HalfLifeConfig, PlayerConfig
from diffdistill.coupling import meaning_of
from diffdistill.critic import Critic, Discriminator, DiscriminatorHead
from diffdistill.data import Images, Labels, SomeLabels, Stream, Streams, refuse_unfit
from diffdistill.data.fashion_mnist import Split, load_fashion_mnist
from diffdistill.data.folder import load_images
from diffdistill.data.image_set import ImageSet
from diffdistill.data.latents import Latents
from diffdistill.data.pairs import PairRecipe, fingerprint, joined_pairs, read_pairs, read_recipe
from diffdistill.denoiser import Backbone, Denoiser
from diffdistill.distances import Lpips
from diffdistill.evaluation.extractors import KNOWN
from diffdistill.evaluation.pretrained import KINDS
from diffdistill.generator import Generator
from diffdistill.health import WARM_STEPS
from diffdistill.memory import memory_for
from diffdistill.method import Method, Networks, PlayerSpec, Source
from diffdistill.methods import METHODS
from diffdistill.methods.continuous import TimeWeight
from diffdistill.methods.multi_student import MultiStudent
from diffdistill.perceptual import LpipsNetwork, read_lpips
from diffdistill.player import RAW, HalfLifeDecay, LearningRate, Player
from diffdistill.preparing.files import read_index, read_latents
from diffdistill.recipe import plain
from diffdistill.rng import Rng
from diffdistill.shares import Classes
from diffdistill.teacher import Teacher
from diffdistill.trainer import Every, Schedule, Trainer

NO_IMAGES = "data.name is none, but real images are needed; set it, e.g. data.name=fashion_mnist"


def method(config: Config, device: torch.device) -> Method:
    """The method with its networks, on the device."""
    refuse_unused(config)
    kind = METHODS[config.method_name]
    dtype = networks.DTYPES[config.train.precision]
    with memory_for("the generator's weights"):
        start, _ = networks.starting_denoiser(config, device)
        start = start.to(dtype)
        networks.refuse_unfit_network(start, "the generator")
    frozen = None
    if kind.needs_teacher:
        frozen = networks.teacher(config, device)
        networks.refuse_disagreement(start, frozen.denoiser)
        if not start.process.same_law(frozen.process):
            frozen = Teacher(frozen.denoiser.seen_in(start.process), guidance=frozen.guidance)

    def new_generator() -> Generator:
        with memory_for("the generator's weights"):
            return networks.generator(config, copy.deepcopy(start))

    def new_critic() -> Critic:
        with memory_for("the critic's weights"):
            own = copy.deepcopy(frozen.denoiser).requires_grad_(True)
            if config.train.gradient_checkpointing:
                networks.recompute_activations(own)
            if not kind.discriminates(config.method):
                return Critic(own)
            trunk = frozen.denoiser if config.critic.trunk == "teacher" else None
            shapes = networks.feature_shapes(own, config.critic.taps)
            with torch.random.fork_rng():
                torch.manual_seed(config.seed)
                head = DiscriminatorHead(shapes).to(device, dtype)
            return Critic(own, head=head, taps=config.critic.taps, trunk=trunk)

    def new_discriminator() -> Discriminator:
        if config.critic.trunk != "teacher":
            raise ConfigError(
                f"critic.trunk={config.critic.trunk}, but method {config.method_name} has no critic, and its heads "
                "read the teacher; set critic.trunk=teacher"
            )
        with memory_for("the discriminator's weights"), torch.random.fork_rng():
            shapes = networks.feature_shapes(frozen.denoiser, config.critic.taps)
            torch.manual_seed(config.seed)
            heads = [DiscriminatorHead([shape]).to(device, dtype) for shape in shapes]
        return Discriminator(heads, taps=config.critic.taps, trunk=frozen.denoiser)

    @functools.cache  # frozen, so that students can share it
    def perceptual(wanted: Lpips) -> LpipsNetwork:
        wanted.refuse_unseen(tuple(start.sample_shape))
        networks.refuse_latents(config)
        with memory_for("the weights of LPIPS"):
            return read_lpips(Path(wanted.weights), size=wanted.size).to(device, dtype)

    saved = functools.partial(networks.node, config, device)
    chosen = kind(config.method, Networks(new_generator, new_critic, frozen, new_discriminator, saved, perceptual))
    if device != META:
        networks.start_parts(config, chosen.generator)
    return chosen


def refuse_unused(config: Config) -> None:
    """Refuses what is written in a config and would change nothing."""
    wanted, frozen, name = config.generator, config.teacher, config.method_name
    if wanted.init_weights != RAW:
        if not wanted.init_from:
            raise ConfigError(
                f"generator.init_weights={wanted.init_weights} is given without generator.init_from; name the run or "
                "checkpoint that has these weights, or leave it out"
            )
        if (Path(wanted.init_from) / MEANING).is_file():
            raise ConfigError(
                f"generator.init_weights={wanted.init_weights} has no meaning: generator.init_from={wanted.init_from} "
                "is a denoiser's folder, which holds one set of weights; leave init_weights out, or give a run"
            )
    if wanted.guidance is not None and not getattr(config.method, "guidance_range", ()):
        raise ConfigError(
            f"generator.guidance={wanted.guidance} is for a network that learns a range of scales, and method {name} "
            "as it is set learns none; give consistency a method.guidance_range, or set teacher.guidance"
        )
    if frozen is not None and not METHODS[name].needs_teacher:
        if wanted.network is not None:
            raise ConfigError(
                f"teacher.path={frozen.path} is given, but method {name} needs no teacher and the generator starts as "
                "generator.network; leave out teacher, or leave out generator.network and generator.denoiser to "
                "start from the teacher"
            )
        if frozen.guidance_weight != 1:
            raise ConfigError(
                f"teacher.guidance={frozen.guidance} has no meaning for method {name}, which takes only the weights of "
                "the teacher; leave guidance out"
            )
    every = config.evaluate.every
    if every and isinstance(config.method, MultiStudent.Config) and config.method.only >= 0:
        raise ConfigError(
            f"method.only={config.method.only} trains a share of the classes, and evaluate.every={every} would measure "
            "it against all; set evaluate.every=0, and evaluate the joined run"
        )
    if not METHODS[name].discriminates(config.method):
        for f in dataclasses.fields(CriticConfig):
            given = getattr(config.critic, f.name)
            if given != f.default:
                raise ConfigError(
                    f"critic.{f.name}={plain(given)} is about a discriminator, and method {name} has none with these "
                    "options; leave it out, or turn the method's GAN term on where it has one"
                )


def shard(spec: PlayerSpec, device: torch.device) -> PlayerSpec:
    """The player's modules under FSDP2, block by block; its parameters are sharded tensors from here on.

    Parameters are gathered as they are, and bf16 is left to autocast, as in replicated training. FSDP2's own policy
    would halve the traffic, but it casts a module's inputs too: a time of 748.9 would become 748 in bf16.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for module in spec.modules:
        roots = [part for part in module.modules() if isinstance(part, Backbone | DiscriminatorHead | TimeWeight)]
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
    return dataclasses.replace(spec, parameters=parameters)


def _first_forward(module: torch.nn.Module) -> None:
    """One forward with gradient: FSDP2 keeps a wrong reduce dtype if the first one runs frozen (pytorch#186998)."""
    match module:
        case Denoiser():
            module(*networks.blank_batch(module))
        case Critic(head=None):
            module.denoiser(*networks.blank_batch(module.denoiser))
        case Critic():
            module.denoiser(*networks.blank_batch(module.denoiser))
            module.logits(*networks.blank_batch(module.denoiser))
        case Discriminator():
            module(*networks.blank_batch(module.trunk))
        case TimeWeight():
            module(module.waves[:1])


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
        case "prepared":
            raise ConfigError(f"data.name=prepared has latents at {path}, and this needs pictures; name their folder")
        case "none":
            raise ConfigError(NO_IMAGES)


def streams(config: Config, chosen: Method, device: torch.device) -> Streams:
    """The data a method reads, by name of stream, checked against what its networks expect."""
    model = chosen.generator.denoiser
    sources = {name: chosen.source(name) for name in sorted(chosen.streams())}
    pairs = functools.cache(functools.partial(pair_stream, config, chosen, device))  # one copy, whoever reads them
    makers: dict[str, Callable[[Source], Stream]] = {
        "conditions": lambda source: label_stream(model, device, source.classes),
        "images": lambda source: image_stream(config, model, device, source.classes),
        "pairs": lambda source: pairs(source.unit_noise),
    }
    unknown = sorted({source.kind for source in sources.values()} - makers.keys())
    if unknown:
        raise ConfigError(
            f"method.name={config.method_name} reads the stream {unknown[0]}, which nothing makes; known are "
            f"{', '.join(makers)}; read one of these, or add {unknown[0]} to build.streams"
        )
    return Streams({name: makers[source.kind](source) for name, source in sources.items()})


def refuse_absent(config: Config, chosen: Method) -> None:
    """Refuses data that is not there, or not of this run, as far as can be told without reading it.

    Raises:
        ConfigError: real images, pairs, or the extractor of an evaluation.
    """
    kinds = {chosen.source(name).kind for name in chosen.streams()}
    if "images" in kinds and config.data.name == "none":
        raise ConfigError(NO_IMAGES)
    if "images" in kinds and config.data.path and not Path(config.data.path).exists():
        raise ConfigError(f"data.path={config.data.path} does not exist; name the folder or file of the real images")
    if "pairs" in kinds:
        _refuse_other_pairs(config, chosen, weights=False)
    features = config.evaluate.features
    if config.evaluate.every and not (Path(features).exists() or features.partition(":")[0] in KINDS):
        raise ConfigError(f"evaluate.features={features} does not exist; give {KNOWN}")


def label_stream(model: Denoiser, device: torch.device, classes: Classes | None) -> Stream:
    """Labels of these classes, or of all that the network knows."""
    if classes is None:
        return Labels(model.backbone.num_classes)
    return SomeLabels(torch.tensor(classes, device=device))


def image_stream(config: Config, model: Denoiser, device: torch.device, classes: Classes | None) -> Stream:
    """The training images of a config, or those of these classes alone, on the device."""
    if config.data.name == "prepared":
        return latent_stream(Path(config.data.path), model, device, classes)
    num_classes, found = model.backbone.num_classes, images(config.data, "train")
    shape, wanted = tuple(found.images.shape[1:]), tuple(model.sample_shape)
    if shape != wanted:
        raise ConfigError(
            f"data.name={config.data.name} has images of shape {shape}, but the network takes {wanted}; choose data or "
            "network of one shape"
        )
    if num_classes and found.num_classes != num_classes:
        raise ConfigError(
            f"data.name={config.data.name} has {found.num_classes} classes, but the network {num_classes}; choose data "
            "or network of the same classes"
        )
    if classes is not None:
        found = found.of_classes(classes)
    found = dataclasses.replace(found, images=found.images.to(device), labels=found.labels.to(device))
    return Images(found, labelled=num_classes > 0, flip=config.data.flip)


def latent_stream(folder: Path, model: Denoiser, device: torch.device, classes: Classes | None) -> Stream:
    """The prepared pictures of a folder, or those of these prompts alone, on the device.

    Raises:
        ConfigError: there are none, or their captions are not the prompts of the network.
    """
    try:
        x0, labels = read_latents(folder)
    except ValueError as error:
        raise ConfigError(f"data.path: {error}") from error
    backbone = model.backbone
    if not isinstance(backbone, PipelineBackbone) or list(backbone.prompts.texts) != read_index(folder)["texts"]:
        raise ConfigError(
            f"data.path={folder} was prepared with other prompts than the network is told; give one folder for both, "
            "as teacher.prompts and as data.path"
        )
    if classes is not None:
        kept = torch.isin(labels, torch.tensor(list(classes)))
        x0, labels = x0[kept], labels[kept]
    return Latents(x0.to(device), labels.to(device))


def pair_stream(config: Config, chosen: Method, device: torch.device, unit_noise: bool) -> Stream:
    """The pairs of a config's folders, on the device; with `unit_noise`, their noise divided by its deviation.

    Raises:
        ConfigError: there are none, or they are of another teacher or, where the noise is taken as it is, begin with
            another one than the generator.
    """
    _refuse_other_pairs(config, chosen, weights=True)
    found = []
    for folder in config.data.pair_folders:
        recipe, pairs = read_pairs(folder, device)
        if unit_noise:
            pairs.noise.div_(recipe.noise_std)
        found.append(pairs)
    return joined_pairs(found)


def _pair_recipes(config: Config) -> dict[Path, PairRecipe]:
    if not config.data.pair_folders:
        raise ConfigError(
            f"method {config.method_name} reads pairs, and data.pairs is missing; make some by: diffdistill couple "
            "TEACHER --out FOLDER --count N, and give that folder"
        )
    try:
        return {folder: read_recipe(folder) for folder in config.data.pair_folders}
    except ValueError as error:
        raise ConfigError(f"data.pairs: {error}") from error


def _refuse_other_pairs(config: Config, chosen: Method, *, weights: bool) -> None:
    """Refuses pairs that do not fit the run; of another teacher's weights only where these were read."""
    recipes, model = _pair_recipes(config), chosen.generator.denoiser
    wanted = {"shape": tuple(model.sample_shape), "num_classes": model.backbone.num_classes}
    if not all(chosen.source(name).unit_noise for name in chosen.streams() if chosen.source(name).kind == "pairs"):
        first = max(part.grid[0] for part in chosen.generator.parts.values())
        wanted |= {"start": first, "noise_std": model.process.prior_std(first)}
    if chosen.teacher is not None:
        frozen = chosen.teacher.denoiser  # perhaps seen in the generator's process, where its own made the pairs
        wanted |= {"meaning": meaning_of(frozen.seen_in(frozen.native)), "guidance": chosen.teacher.guidance}
        wanted |= {"source": fingerprint(frozen)} if weights else {}
    for (folder, recipe), (name, here) in itertools.product(recipes.items(), wanted.items()):
        there = getattr(recipe, name)
        if there != here:
            raise ConfigError(
                f"data.pairs={folder} has {name} {there!r}, and this run needs {here!r}; make pairs for it by "
                "diffdistill couple, or change the run to fit them"
            )


def processes(device: str) -> PartialState:
    """The processes that share a command's work, torchrun's or this one alone."""
    return PartialState(cpu=device == "cpu")


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
    model, dtype = chosen.generator.denoiser, networks.DTYPES[config.train.precision]
    data = streams(config, chosen, accelerate.device)
    first = range(accelerate.process_index, accelerate.process_index + min(config.train.batch, 64))
    rng = Rng((config.seed, "first batch"), first, device=accelerate.device, dtype=dtype)
    refuse_unfit(data.draw(rng), tuple(model.sample_shape), dtype, pictures=config.data.name != "prepared")
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
        watch_from=WARM_STEPS + max(player.warmup_steps for player in config.players.values()),
        best=best(config),
        patience=config.evaluate.patience,
    )


def best(config: Config) -> Best | None:
    """Which evaluation of a config's run is the best, where it is to be kept."""
    wanted = config.evaluate
    return Best(wanted.keep_best, (*wanted.weights, "")[0]) if wanted.keep_best else None


def schedule(config: Config) -> Schedule:
    """How long the run of a config is, and what happens when."""
    return Schedule(**{f.name: getattr(config.train, f.name) for f in dataclasses.fields(Schedule)})


def trained(config: Config, chosen: Method, accelerate: Accelerator) -> Mapping[str, Player]:
    """The method's players, sharded where the config says so, with the generator's averages."""
    sharded = config.train.sharding == "fsdp2"
    specs = chosen.players()
    settings = player_settings(config, specs)
    if sharded:
        specs = {name: shard(spec, accelerate.device) for name, spec in specs.items()}
        for average in chosen.averages().values():
            shard(PlayerSpec.of(average.module), accelerate.device)
    players = {
        name: player(spec, settings[name], config.train.steps, accelerate, sharded=sharded)
        for name, spec in specs.items()
    }
    for name, decay in config.averages.items():
        if isinstance(decay, HalfLifeConfig):
            decay = HalfLifeDecay(decay.images, config.train.batch, decay.ramp_up)
        for part in chosen.generator.parts:
            players[part].average(name, decay)
    return players


def player_settings(config: Config, specs: Mapping[str, PlayerSpec]) -> dict[str, PlayerConfig]:
    """The settings of each player: those given under its whole name, or under what is behind its last slash.

    So `generator` serves 0/generator and 1/generator, and `0/generator` is for that one alone.

    Raises:
        ConfigError: settings for no player of the method, or the lack of some.
    """
    given, known = config.players, _known_players(config, specs)
    keys = {name: name if name in given else name.rpartition("/")[2] for name in known}
    if set(keys.values()) != given.keys():
        wanted = ", ".join(dict.fromkeys(name.rpartition("/")[2] for name in known))
        alone = f" (or the whole name for one alone: {', '.join(known)})" if any("/" in name for name in known) else ""
        raise ConfigError(
            f"players must have exactly the keys {wanted}{alone} for method {config.method_name}, got "
            f"{', '.join(given) or 'none'}"
        )
    return {name: given[keys[name]] for name in specs}


def _known_players(config: Config, specs: Mapping[str, PlayerSpec]) -> list[str]:
    """The names of the run's players, and those of students that other runs of the recipe train (method.only)."""
    if not isinstance(config.method, MultiStudent.Config):
        return list(specs)
    inside = dict.fromkeys(name.partition("/")[2] for name in specs)
    return [f"{number}/{name}" for number in range(config.method.students) for name in inside]
