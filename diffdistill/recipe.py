"""Gate 1: a YAML file and key=value overrides become a checked Config, and back. The only file that imports omegaconf.

A config is data, not a program: choices are made by name from registries, and every error names the key, the value and
the way out.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from yaml import YAMLError

from diffdistill.config import CHOICES, NAMES, Config, ConfigError
from diffdistill.method import MethodConfig
from diffdistill.methods import METHODS


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The experiment in a YAML file, in which each key=value override replaces what stands at its key.

    A file may begin from another: `base: other.yaml`, a path from its own folder, takes all of that file but what it
    says itself. Mappings are joined key by key, anything else is replaced.

    Raises:
        ConfigError: anything that is not as it should be.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not path.is_file():
        raise ConfigError(f"there is no configuration at {path}; configs/ holds examples")
    try:
        tree = OmegaConf.load(path)
        if isinstance(tree, DictConfig) and "base" in tree:
            tree = _on_base(tree, path)
        for key, value in _assignments(overrides):
            OmegaConf.update(tree, key, value, merge=False)
        values = OmegaConf.to_container(tree, resolve=True)
    except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a valid configuration: {error}") from error
    return parse(values)


def _on_base(tree: Any, path: Path) -> Any:
    """What a file says, joined with the file that it names as its base."""
    from omegaconf import OmegaConf

    base = path.parent / str(tree.pop("base"))
    if not base.is_file():
        raise ConfigError(f"{path} names base={base}, which is no file; give a path from the folder of {path.name}")
    under = OmegaConf.load(base)
    if "base" in under:
        raise ConfigError(f"{path} names base={base}, which has a base of its own; name that one, and say all changes")
    return OmegaConf.merge(under, tree)


def sections(overrides: Sequence[str], known: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Overrides of the form section.key=value as {section: {key: value}}, for sections among `known`."""
    found: dict[str, dict[str, Any]] = {name: {} for name in known}
    for key, value in _assignments(overrides):
        section, _, name = key.partition(".")
        if section not in found or not name:
            raise ConfigError(f"unknown key {key}{_nearest(section, known)}; give keys of {', '.join(known)}")
        found[section][name] = value
    return found


def _assignments(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    """Each key=value as its key, and its value read as YAML."""
    from omegaconf import OmegaConf

    found = []
    for override in overrides:
        key, sign, _ = override.partition("=")
        if not sign or not key:
            raise ConfigError(f"cannot read the override {override!r}; write key=value, e.g. train.steps=100")
        try:
            found.append((key, OmegaConf.select(OmegaConf.from_dotlist([override]), key)))
        except (YAMLError, ValueError) as error:
            raise ConfigError(f"cannot read the override {override!r}: {error}") from error
    return found


def as_yaml(config: Config, comment: str) -> str:
    """The experiment as YAML that `load_config` reads back to an equal Config, every default written out."""
    from omegaconf import OmegaConf

    return f"# {comment}\n" + OmegaConf.to_yaml(plain(config))


def plain(config: Any) -> Any:
    """The plain data that `parse` makes a Config from; what is None is left out."""
    if isinstance(config, Config):
        values = {name: plain(getattr(config, name)) for name in (f.name for f in dataclasses.fields(config))}
        del values["method_name"]
        return {name: value for name, value in values.items() if value is not None}
    if dataclasses.is_dataclass(config):
        values = {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
        names = {kind.Config: name for name, kind in METHODS.items()} if isinstance(config, MethodConfig) else NAMES
        named = {"name": names[type(config)]} if type(config) in names else {}
        return named | {name: value for name, value in values.items() if value is not None}
    if isinstance(config, Enum):
        return config.value
    if isinstance(config, Mapping):
        return {name: plain(value) for name, value in config.items()}
    if isinstance(config, list | tuple):
        return [plain(value) for value in config]
    return config


def flat(values: Mapping, prefix: str = "") -> dict[str, Any]:
    """Nested plain data as {dotted key: value}; lists stay whole."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = isinstance(value, Mapping) and value
        found |= flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return found


def parse(values: Any) -> Config:
    """Plain data as a checked Config."""
    if not isinstance(values, dict):
        raise ConfigError(f"a configuration must be a mapping of keys to values, got {values!r}")
    values = dict(values)
    wanted = values.pop("method", None)
    chosen = _method(wanted, "method")
    if "method_name" in values:
        raise ConfigError("unknown key method_name; did you mean method.name?")
    return typed(Config, {**values, "method": chosen, "method_name": wanted["name"]}, "")


def _method(value: Any, key: str) -> MethodConfig:
    """The settings of the method that `value` names."""
    if not isinstance(value, dict) or "name" not in value:
        raise ConfigError(f"{key}.name is missing; known are {', '.join(METHODS)}")
    name = known_method(value["name"], f"{key}.name")
    return typed(METHODS[name].Config, {option: given for option, given in value.items() if option != "name"}, key)


def known_method(name: Any, key: str) -> str:
    """The name of a method, after looking that it is one; `key` is where it stands, for messages."""
    if name not in METHODS:
        raise ConfigError(f"{key}={name!r} is unknown{_nearest(name, METHODS)}; known are {', '.join(METHODS)}")
    return name


def typed(kind: Any, value: Any, key: str) -> Any:
    """`value`, plain data, as an instance of `kind`; `key` is where it stands, for messages."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is MethodConfig:
        return _method(value, key)
    if kind in CHOICES:
        return _chosen(CHOICES[kind], value, key)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = [a for a in arguments if a is not type(None)]
        mappings = [a for a in kinds if dataclasses.is_dataclass(a)] if isinstance(value, dict) else []
        sequences = [a for a in kinds if typing.get_origin(a) is tuple] if isinstance(value, list | tuple) else []
        return typed([*mappings, *sequences, *kinds][0], value, key)
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
                f"unknown key {_join(key, name)}{_nearest(name, fields)}; known here are {', '.join(fields) or 'none'}"
            )
    for name, f in fields.items():
        if name not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{_join(key, name)} is missing; it has no default")
    try:
        return kind(**{name: typed(hints[name], entry, _join(key, name)) for name, entry in value.items()})
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(_located(str(error), key, fields)) from error


def _located(message: str, key: str, fields: Collection[str]) -> str:
    """A dataclass's complaint with the key in front; most begin with the name of a field, some with the whole key."""
    if not key or message.startswith(f"{key}."):
        return message
    names_field = re.match(r"\w*", message).group() in fields
    return f"{key}.{message}" if names_field else f"{key}: {message}"


def _chosen(choices: Mapping[str, type], value: Any, key: str) -> Any:
    if not isinstance(value, dict) or "name" not in value:
        raise ConfigError(f"{key} must be a mapping with a name, one of {', '.join(choices)}; got {value!r}")
    name = value["name"]
    if name not in choices:
        raise ConfigError(f"{key}.name={name!r} is unknown{_nearest(name, choices)}; known are {', '.join(choices)}")
    return _dataclass(choices[name], {k: v for k, v in value.items() if k != "name"}, key)


def _join(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def _nearest(name: Any, known) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
