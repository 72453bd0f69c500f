"""What an experiment may say: dataclasses that check their own values; `recipe` reads them from YAML."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffdistill.best import BETTER
from diffdistill.denoiser import CLOCKS
from diffdistill.distances import DISTANCES, Distance
from diffdistill.evaluation.convention import InputConvention
from diffdistill.generator import FLOW_MAP, STEP_RULES, check_descending
from diffdistill.player import RAW, ConstantDecay, PowerDecay
from diffdistill.prediction import Prediction
from diffdistill.shares import SHARES, Shares
from diffdistill.tangents import TANGENTS, Tangents
from diffdistill.time_pairs import LEVELS, TIME_PAIRS, Levels, TimePairs
from diffdistill.times import TIME_SAMPLERS, TimeSampler
from diffdistill.told import SCALE, SPAN


class ConfigError(ValueError):
    """A mistake in a configuration or in how a command was called; the message is for its author."""


def _positive(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) <= 0:
            raise ValueError(f"{name} must be positive, got {getattr(config, name)}")


def _not_negative(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 0:
            raise ValueError(f"{name} must not be negative, got {getattr(config, name)}; 0 turns it off")


@dataclass(frozen=True)
class VPConfig:
    """A DDPM table; index n of the table is t = n + 1."""

    table: Literal["linear", "scaled_linear", "cosine"] = "linear"
    steps: int = 1000
    beta_start: float = 0.0  # 0: the table's own
    beta_end: float = 0.0  # 0: the table's own
    betas: tuple[float, ...] = ()  # the whole table, in place of all of the above; empty: none
    zero_snr: bool = False  # rescaled to end at pure noise (Lin et al. 2024)
    sigma_data: float = 1.0  # standard deviation of the data

    def __post_init__(self):
        _positive(self, "steps", "sigma_data")
        _not_negative(self, "beta_start", "beta_end")
        if self.betas and (self.beta_start or self.beta_end):
            raise ValueError(
                "betas is a whole table, so beta_start and beta_end have no meaning beside it; leave them out"
            )


@dataclass(frozen=True)
class VEConfig:
    """x_t = x0 + t eps, as in EDM."""

    sigma_min: float = 0.002  # the last noise level of the customary grid
    sigma_max: float = 80.0  # t_max
    rho: float = 7.0  # how much the customary grid crowds towards the data
    sigma_data: float = 0.5

    def __post_init__(self):
        _positive(self, "sigma_min", "rho", "sigma_data")
        if self.sigma_max <= self.sigma_min:
            raise ValueError(f"sigma_max must be above sigma_min={self.sigma_min}, got {self.sigma_max}")


@dataclass(frozen=True)
class RectifiedConfig:
    """x_t = (1 - t) x0 + t eps: rectified flow and flow matching."""

    shift: float = 1.0  # above 1, the customary grid spends more steps near the noise
    sigma_data: float = 1.0

    def __post_init__(self):
        _positive(self, "shift", "sigma_data")


@dataclass(frozen=True)
class TrigConfig:
    """x_t = cos(t) x0 + sin(t) eps."""

    sigma_data: float = 1.0

    def __post_init__(self):
        _positive(self, "sigma_data")


ProcessConfig = VPConfig | VEConfig | RectifiedConfig | TrigConfig


@dataclass(frozen=True)
class NetworkConfig:
    """A network made anew."""

    name: str  # MLP, or a diffusers class with a family in backbones/
    options: dict = field(default_factory=dict)  # of its constructor


@dataclass(frozen=True)
class DenoiserConfig:
    """What a network's inputs, clock and output mean; as `denoiser.json` it lies beside the weights."""

    process: ProcessConfig  # that the network was, or will be, trained in
    prediction: Prediction  # what its output means
    clock: Literal[tuple(CLOCKS)]  # what it is told about t
    scale_input: bool = False  # feed it x_t / sqrt(alpha^2 sigma_data^2 + sigma^2), as EDM does
    null_label: int = -1  # of a UNet whose last label means "no class"; -1: none
    prompts: str = ""  # of a network that is told prompts: the folder that `diffdistill prepare` made
    boundary: float = 0.0  # noise level at which x0 is the input itself, of consistency models on ve; 0: EDM's x0

    def __post_init__(self):
        _not_negative(self, "boundary")


@dataclass(frozen=True)
class TeacherConfig:
    path: str  # a folder written by diffdistill, a diffusers pipeline's or network's, or hub:owner/name
    guidance: float = 1.0  # w of u + w (c - u), with 1 for none; or as guidance_from says
    guidance_from: Literal["unconditional", "conditional"] = "unconditional"  # conditional: c + w (c - u), 0 for none
    prompts: str = ""  # of a pipeline that takes prompts: the folder that `diffdistill prepare` made of it
    denoiser: DenoiserConfig | None = None  # for a diffusers folder whose scheduler does not say it all

    @property
    def guidance_weight(self) -> float:
        """w of u + w (c - u), in which 1 is none."""
        return self.guidance + (self.guidance_from == "conditional")


@dataclass(frozen=True)
class StepsConfig:
    """The customary grid of the process with this many times."""

    steps: int

    def __post_init__(self):
        _positive(self, "steps")


@dataclass(frozen=True)
class GeneratorConfig:
    grid: tuple[float, ...] | StepsConfig  # times of its evaluations, descending, in its process; or {steps: 18}
    step_rule: Literal[STEP_RULES] = "renoise"  # how it gets from one time to the next
    guidance: float | None = None  # scale it is sampled at where it learns a range, w of u + w (c - u), as LCM does
    denoiser: DenoiserConfig | None = None  # what `network` means; exactly when `network` is given
    network: NetworkConfig | None = None  # a network made anew, e.g. a smaller student; else it starts as the teacher
    init_from: str = ""  # a run, a checkpoint, or a denoiser's folder: its weights, for a new recipe
    init_weights: str = "raw"  # of a run or checkpoint: raw, or the name of one of its averages
    boundary: float = 0.0  # noise level on ve at which its x0 is its input itself, as in consistency models; 0: none

    @property
    def told(self) -> tuple[str, ...]:
        """What its network is told besides its time and class."""
        return (SPAN,) * (self.step_rule == FLOW_MAP) + (SCALE,) * (self.guidance is not None)

    def __post_init__(self):
        _not_negative(self, "boundary")
        if (self.network is None) != (self.denoiser is None):
            given, lacking = ("network", "denoiser") if self.denoiser is None else ("denoiser", "network")
            raise ValueError(
                f"{given} is given without {lacking}; a network made anew needs both, one like the teacher neither"
            )
        if isinstance(self.grid, StepsConfig):
            return
        check_descending(self.grid)
        if self.grid[-1] <= 0:
            raise ValueError(f"grid must lie in (0, t_max], got {list(self.grid)}; leave out the time of the data")


@dataclass(frozen=True)
class CriticConfig:
    taps: tuple[str, ...] = ("network.mid_block",)  # modules of the backbone whose outputs the discriminator reads
    trunk: Literal["critic", "teacher"] = "critic"  # whose modules they are

    def __post_init__(self):
        if not self.taps:
            raise ValueError("taps must name at least one module, e.g. network.mid_block")


@dataclass(frozen=True)
class DataConfig:
    name: Literal["fashion_mnist", "folder", "prepared", "none"] = "none"
    path: str = ""  # of pictures, or made by `diffdistill prepare --images`; empty: what ships with the package
    flip: bool = False  # mirror half of the images left to right
    pairs: str | tuple[str, ...] = ""  # folders made by `diffdistill couple`, for the methods that read pairs

    def __post_init__(self):
        if self.name == "folder" and not self.path:
            raise ValueError("path is missing; give a folder of pictures, or an .npz with the array images")
        if self.name == "prepared" and not self.path:
            raise ValueError("path is missing; give the folder that `diffdistill prepare ... --images` made")
        if self.name == "prepared" and self.flip:
            raise ValueError("flip=true mirrors pictures, and prepared ones are latents; leave it out")
        if not isinstance(self.pairs, str) and not all(self.pairs):
            raise ValueError(f"pairs={list(self.pairs)} has a folder without a name; give it one, or leave it out")

    @property
    def pair_folders(self) -> tuple[Path, ...]:
        folders = (self.pairs,) if isinstance(self.pairs, str) else self.pairs
        return tuple(Path(folder) for folder in folders if folder)


@dataclass(frozen=True)
class PlayerConfig:
    """How AdamW trains one player."""

    learning_rate: float  # the peak
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    epsilon: float = 1e-8
    warmup_steps: int = 0  # of linear growth from 0
    decay: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up, until train.steps
    final: float = 0.0  # share of the learning rate left at the end of the decay
    max_norm: float = 10.0  # of the gradient; inf: no clipping

    def __post_init__(self):
        _positive(self, "learning_rate", "epsilon")
        _not_negative(self, "weight_decay", "warmup_steps", "final")
        if self.max_norm <= 0:
            raise ValueError(f"max_norm must be positive, got {self.max_norm}; inf turns clipping off")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {list(self.betas)}")


@dataclass(frozen=True)
class HalfLifeConfig:
    images: float  # half of the weight lies on the last so many images
    ramp_up: float = 0.0  # early on, on the last `ramp_up` of all images so far; 0 for no ramp-up

    def __post_init__(self):
        _positive(self, "images")
        _not_negative(self, "ramp_up")


AverageConfig = ConstantDecay | HalfLifeConfig | PowerDecay


@dataclass(frozen=True)
class TrainConfig:
    steps: int  # generator updates
    batch: int  # samples of one update, over all processes
    accumulate: int = 1  # parts that each process cuts its share of the batch into, one after the other
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"  # bf16: autocast, parameters stay in float32
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    sharding: Literal["replicated", "fsdp2"] = "replicated"
    gradient_checkpointing: bool = False  # recompute activations: less memory, a third more time
    log_every: int = 50  # steps; 0: never, as for the next
    save_every: int = 1000
    keep_last: int = 2  # newest checkpoints that are kept
    keep_every: int = 0  # also keep those at multiples of so many steps; 0: none
    retries: int = 0  # times that a run which is not finite goes back to its newest checkpoint, for other draws
    threads: int = 0  # of the CPU; 0: as torch chooses

    def __post_init__(self):
        _positive(self, "steps", "batch", "accumulate", "keep_last")
        _not_negative(self, "log_every", "save_every", "keep_every", "retries", "threads")
        if self.batch % self.accumulate:
            raise ValueError(
                f"batch={self.batch} must be divisible by accumulate={self.accumulate}; choose a multiple of it"
            )


@dataclass(frozen=True)
class PicturesConfig:
    every: int = 0  # steps between sample grids; 0: none
    count: int = 40  # samples, always from the same noises and classes
    columns: int = 10
    scale: int = 2  # pixels of the picture per pixel of a sample

    def __post_init__(self):
        _not_negative(self, "every")
        _positive(self, "count", "columns", "scale")


@dataclass(frozen=True)
class EvaluateConfig:
    every: int = 0  # steps between evaluations while training; 0: none
    samples: int = 2000
    batch: int = 256  # samples made at once, which does not change them
    seed: int = 1000  # of their noises
    features: str = ""  # the feature extractor: a folder, a TorchScript file, or clip:NAME or dinov2:NAME of the hub
    input: InputConvention | None = None  # what images a TorchScript file takes; InceptionV3 of 2015-12-05 needs none
    cache: str = ""  # where features of real data are kept; empty: the run's folder
    lpips: str = ""  # torchvision's VGG16 as a file: the command also tells the diversity within classes by LPIPS
    lpips_size: int = 0  # pixels a side that pictures are enlarged to for it; 0: none
    clip: str = ""  # a CLIP model's folder or name of the hub: the command also tells how well prompts are met
    prompts: tuple[str, ...] = ()  # for it, one for each class
    weights: tuple[str, ...] = ()  # while training: raw and averages, each measured; none: the first average, or raw
    keep_best: str = (
        ""  # a metric, e.g. frechet_distance: the checkpoint where it was best is kept, by the first weights
    )
    patience: int = 0  # evaluations in which keep_best did not get better, then the run ends; 0: it does not

    def __post_init__(self):
        _not_negative(self, "every", "patience", "lpips_size")
        if bool(self.clip) != bool(self.prompts):
            raise ValueError(f"clip={self.clip!r} and prompts={list(self.prompts)} go together; give both, or neither")
        if self.keep_best and self.keep_best not in BETTER:
            raise ValueError(f"keep_best={self.keep_best!r} is unknown; known are {', '.join(BETTER)}")
        if self.patience and not self.keep_best:
            raise ValueError(f"patience={self.patience} needs keep_best, the metric that is waited for")
        if self.keep_best and not self.every:
            raise ValueError(f"keep_best={self.keep_best} needs evaluate.every, the steps between evaluations")
        _positive(self, "samples", "batch")
        if self.every and not self.features:
            raise ValueError("features is missing; name the extractor's folder, e.g. checkpoints/fashion-features")


@dataclass(frozen=True)
class Config:
    """One experiment."""

    output: str  # the run's folder
    method: Any  # the Config of the method named by method.name
    method_name: str
    generator: GeneratorConfig
    train: TrainConfig
    players: dict[str, PlayerConfig]  # by the names that the method gives them
    seed: int = 0  # of every random number
    teacher: TeacherConfig | None = None
    critic: CriticConfig = field(default_factory=CriticConfig)
    data: DataConfig = field(default_factory=DataConfig)
    averages: dict[str, AverageConfig] = field(default_factory=dict)  # of the generator; the first is shown in pictures
    pictures: PicturesConfig = field(default_factory=PicturesConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()

    def __post_init__(self):
        if not self.output:
            raise ValueError("output is empty; name the run's folder")
        if RAW in self.averages:
            raise ValueError(f"averages.{RAW} is the name of the weights themselves; choose another")
        for name in self.evaluate.weights:
            if name not in (RAW, *self.averages):
                raise ValueError(
                    f"evaluate.weights={name!r} is unknown; known here are {', '.join((RAW, *self.averages))}"
                )
        for name in self.averages:
            if not name.isidentifier():
                raise ValueError(f"averages.{name} cannot be a file name; use letters, digits and underscores")


# Choices by name: {name: vp, ...} in the YAML picks the class whose fields the other keys fill.
CHOICES: dict[Any, Mapping[str, type]] = {
    ProcessConfig: {"vp": VPConfig, "ve": VEConfig, "rectified": RectifiedConfig, "trig": TrigConfig},
    AverageConfig: {"constant": ConstantDecay, "half_life": HalfLifeConfig, "power": PowerDecay},
    TimeSampler: TIME_SAMPLERS,
    Shares: SHARES,
    Distance: DISTANCES,
    Tangents: TANGENTS,
    TimePairs: TIME_PAIRS,
    Levels: LEVELS,
}
NAMES: dict[type, str] = {kind: name for choices in CHOICES.values() for name, kind in choices.items()}
