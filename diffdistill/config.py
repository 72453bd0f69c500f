"""Gate 1: a YAML file and key=value overrides become typed, checked dataclasses. The only file that imports omegaconf.

A config is data, not a program: choices are made by name from registries, and every error names the key, the value and
the way out.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from diffdistill.generator import STEP_RULES
from diffdistill.methods import METHODS
from diffdistill.player import ConstantDecay, PowerDecay
from diffdistill.prediction import Prediction
from diffdistill.times import TIME_SAMPLERS, TimeSampler


class ConfigError(ValueError):
    """A mistake in a configuration; the message is for its author."""


@dataclass(frozen=True)
class VPConfig:
    table: Literal["linear", "scaled_linear", "cosine"] = "linear"
    steps: int = 1000
    beta_start: float = 0.0  # 0: the table's own
    beta_end: float = 0.0
    sigma_data: float = 1.0


@dataclass(frozen=True)
class VEConfig:
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    sigma_data: float = 0.5


@dataclass(frozen=True)
class RectifiedConfig:
    shift: float = 1.0
    sigma_data: float = 1.0


@dataclass(frozen=True)
class TrigConfig:
    sigma_data: float = 1.0


ProcessConfig = VPConfig | VEConfig | RectifiedConfig | TrigConfig


@dataclass(frozen=True)
class NetworkConfig:
    """A network made anew: the class's name, and its constructor's options."""

    name: str
    options: dict = field(default_factory=dict)


@dataclass(frozen=True)
class DenoiserConfig:
    """What a network's inputs, clock and output mean; as `denoiser.json` it lies beside the weights."""

    process: ProcessConfig
    prediction: Prediction
    clock: Literal["steps", "edm", "thousand", "log_ratio"]
    scale_input: bool = False
    null_label: int = -1  # of a UNet whose last label means "no class"; -1: none


@dataclass(frozen=True)
class TeacherConfig:
    path: str  # a folder written by diffdistill, or a diffusers pipeline or network
    guidance: float = 1.0
    denoiser: DenoiserConfig | None = None  # for a diffusers folder whose scheduler does not say it all


@dataclass(frozen=True)
class GeneratorConfig:
    grid: tuple[float, ...]  # times of its evaluations, descending; in the generator's process
    step_rule: Literal[STEP_RULES] = "renoise"
    denoiser: DenoiserConfig | None = None  # for a generator made anew; else it starts as the teacher
    network: NetworkConfig | None = None
    init_from: str = ""  # weights of another run's checkpoint or folder, for a new recipe


@dataclass(frozen=True)
class CriticConfig:
    taps: tuple[str, ...] = ("mid_block",)  # modules whose outputs the discriminator reads
    trunk: Literal["critic", "teacher"] = "critic"


@dataclass(frozen=True)
class DataConfig:
    name: Literal["fashion_mnist", "folder", "none"] = "none"
    path: str = ""  # empty: what ships with the package
    flip: bool = False


@dataclass(frozen=True)
class PlayerConfig:
    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    epsilon: float = 1e-8
    warmup_steps: int = 0
    decay: Literal["constant", "linear", "cosine"] = "constant"
    final: float = 0.0  # share of the learning rate left at the end of the decay
    max_norm: float = 10.0  # of the gradient; inf: no clipping

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.max_norm <= 0:
            raise ValueError(f"max_norm must be positive, got {self.max_norm}; inf turns clipping off")


@dataclass(frozen=True)
class HalfLifeConfig:
    images: float
    ramp_up: float = 0.0

    def __post_init__(self):
        if self.images <= 0 or self.ramp_up < 0:
            raise ValueError(f"images must be positive and ramp_up not negative, got {self.images} and {self.ramp_up}")


AverageConfig = ConstantDecay | HalfLifeConfig | PowerDecay


@dataclass(frozen=True)
class TrainConfig:
    steps: int
    batch: int
    accumulate: int = 1
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    sharding: Literal["replicated", "fsdp2"] = "replicated"
    gradient_checkpointing: bool = False
    log_every: int = 50
    save_every: int = 1000
    keep_last: int = 2
    keep_every: int = 0
    threads: int = 0  # of the CPU; 0: as torch chooses

    def __post_init__(self):
        for name in ("steps", "batch", "accumulate", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class PicturesConfig:
    every: int = 0  # steps between sample grids; 0: none
    count: int = 40
    columns: int = 10


@dataclass(frozen=True)
class EvaluateConfig:
    every: int = 0  # steps between evaluations while training; 0: none
    samples: int = 2000
    batch: int = 256
    seed: int = 1000
    features: str = ""  # folder of the feature extractor
    cache: str = ""  # where statistics of real data are kept; empty: the run's folder


@dataclass(frozen=True)
class Config:
    """One experiment."""

    output: str
    method: Any  # the Config of the method named by method.name
    method_name: str
    generator: GeneratorConfig
    train: TrainConfig
    players: dict[str, PlayerConfig]
    seed: int = 0
    teacher: TeacherConfig | None = None
    critic: CriticConfig = field(default_factory=CriticConfig)
    data: DataConfig = field(default_factory=DataConfig)
    averages: dict[str, AverageConfig] = field(default_factory=dict)
    pictures: PicturesConfig = field(default_factory=PicturesConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()


# Choices by name: {name: vp, ...} in the YAML picks the class whose fields the other keys fill.
CHOICES: dict[Any, Mapping[str, type]] = {
    ProcessConfig: {"vp": VPConfig, "ve": VEConfig, "rectified": RectifiedConfig, "trig": TrigConfig},
    AverageConfig: {"constant": ConstantDecay, "half_life": HalfLifeConfig, "power": PowerDecay},
    TimeSampler: TIME_SAMPLERS,
}


def load(path: Path, overrides: Sequence[str] = ()) -> tuple[Config, dict]:
    """The experiment in a YAML file, with key=value overrides on top, and the same as plain data (the recipe).

    Raises:
        ConfigError: anything that is not as it should be.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not path.is_file():
        raise ConfigError(f"there is no configuration at {path}; configs/ holds examples")
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"cannot read the override {override!r}; write key=value, e.g. train.steps=100")
    try:
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        plain = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{path} is not a valid configuration: {error}") from error
    except Exception as error:  # yaml's errors have no common ancestor that omegaconf exports
        if type(error).__module__.startswith("yaml"):
            raise ConfigError(f"{path} is not valid YAML: {error}") from error
        raise
    return parse(plain), plain


def parse(plain: Any) -> Config:
    """Plain data as a checked Config."""
    if not isinstance(plain, dict):
        raise ConfigError(f"a configuration must be a mapping of keys to values, got {plain!r}")
    plain = dict(plain)
    method = plain.pop("method", None)
    if not isinstance(method, dict) or "name" not in method:
        raise ConfigError(f"method.name is missing; known are {', '.join(METHODS)}")
    name = method["name"]
    if name not in METHODS:
        raise ConfigError(f"method.name={name!r} is unknown{_nearest(name, METHODS)}; known are {', '.join(METHODS)}")
    options = {key: value for key, value in method.items() if key != "name"}
    chosen = typed(METHODS[name].Config, options, "method")
    if "method_name" in plain:
        raise ConfigError("unknown key method_name; did you mean method.name?")
    return typed(Config, {**plain, "method": chosen, "method_name": name}, "")


def typed(kind: Any, value: Any, key: str) -> Any:
    """`value`, plain data, as an instance of `kind`; `key` is where it stands, for messages."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind in CHOICES:
        return _chosen(CHOICES[kind], value, key)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return typed(next(a for a in arguments if a is not type(None)), value, key)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, key)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{key}={value!r} must be one of {', '.join(map(str, arguments))}")
        return value
    if isinstance(kind, type) and issubclass(kind, Enum):
        names = [member.value for member in kind]
        if value not in names:
            raise ConfigError(f"{key}={value!r} must be one of {', '.join(names)}")
        return kind(value)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{key}={value!r} must be a list")
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise ConfigError(f"{key}={value!r} must have {len(arguments)} entries")
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(typed(k, v, f"{key}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{key}={value!r} must be a mapping")
        return {name: typed(arguments[1], entry, f"{key}.{name}") for name, entry in value.items()}
    return _leaf(kind, value, key)


def _leaf(kind: Any, value: Any, key: str) -> Any:
    if kind is Any:
        return value
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{key}={value!r} must be of type {kind.__name__}")
    return value


def _dataclass(kind: type, value: Any, key: str) -> Any:
    if not isinstance(value, dict):
        raise ConfigError(f"{key or 'the configuration'} must be a mapping, got {value!r}")
    hints, fields = typing.get_type_hints(kind), {f.name: f for f in dataclasses.fields(kind)}
    for name in value:
        if name not in fields:
            raise ConfigError(
                f"unknown key {_join(key, name)}{_nearest(name, fields)}; known here are {', '.join(fields)}"
            )
    for name, f in fields.items():
        if name not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{_join(key, name)} is missing; it has no default")
    try:
        return kind(**{name: typed(hints[name], entry, _join(key, name)) for name, entry in value.items()})
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{key}: {error}" if key else str(error)) from error


def _chosen(choices: Mapping[str, type], value: Any, key: str) -> Any:
    if not isinstance(value, dict) or "name" not in value:
        raise ConfigError(f"{key} must be a mapping with a name, one of {', '.join(choices)}; got {value!r}")
    name = value["name"]
    if name not in choices:
        raise ConfigError(
            f"{key}.name={name!r} is unknown{_nearest(name, choices)}; known are {', '.join(choices)}"
        )
    return _dataclass(choices[name], {k: v for k, v in value.items() if k != "name"}, key)


def _join(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def _nearest(name: Any, known) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
