"""What `diffdistill methods` prints: every method with what it needs, what it costs, its settings and its recipes."""

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize
from collections.abc import Mapping
from typing import Any

import yaml

from diffdistill.config import Config
from diffdistill.cost import Cost, Sketch
from diffdistill.method import Method, MethodConfig
from diffdistill.methods import METHODS
from diffdistill.recipe import parse, plain

CUSTOMARY = {
    "teacher": {"path": "checkpoints/fashion-edm"},
    "generator": {"grid": [80.0]},
    "train": {"steps": 1000, "batch": 64},
}
DATA = {"images": ("name", "fashion_mnist"), "pairs": ("pairs", "runs/pairs")}  # by kind of stream
EVERY_PLAYER = {"learning_rate": 1e-4}
ENDS = {"the paper's": "", "recommended": "-recommended"}  # of the names of recipes in configs/


def example(name: str) -> dict:
    """A short recipe of a method, as plain data."""
    kind = METHODS[name]
    said = {section: {**CUSTOMARY.get(section, {}), **given} for section, given in kind.example.items()}
    recipe = {"output": f"runs/{name.replace('_', '-')}", **CUSTOMARY, **said}
    recipe["method"] = {"name": name, **recipe.get("method", {})}
    method = Sketch(parse({**recipe, "players": {}})).method
    kinds = {method.source(stream).kind for stream in method.streams()}
    data = {key: value for kind, (key, value) in DATA.items() if kind in kinds}
    names = dict.fromkeys(player.rpartition("/")[2] for player in method.players())  # one entry serves all students
    return recipe | ({"data": data} if data else {}) | {"players": {player: dict(EVERY_PLAYER) for player in names}}


def overview() -> str:
    """All methods, a paragraph each, and what the numbers mean."""
    width = max(map(len, METHODS)) + 2
    lines = []
    for name, kind in METHODS.items():
        config = parse(example(name))
        told = [kind.reference, needs(kind, config), *costs(Sketch(config).cost())]
        if kind.presets:
            told.append(f"recipes for {', '.join(kind.presets)}")
        text = "\n".join(textwrap.fill(line, 118 - width, subsequent_indent="  ") for line in told)
        lines.append(name.ljust(width) + textwrap.indent(text, " " * width).lstrip())
    return "\n".join(
        [
            *lines,
            "",
            "A step is one generator update, here with default settings and one sampling step. Memory is in weights",
            "of the generator: 4 for a network that AdamW trains, 1 for any other, averages and activations aside. A",
            "guided teacher counts twice. `diffdistill methods METHOD` has the settings, the recipes and an example.",
        ]
    )


def needs(kind: type[Method], config: Config) -> str:
    """What a method takes, in words."""
    teacher = "a teacher" if kind.needs_teacher else "no teacher"
    head = " with a discriminator" if kind.discriminates(config.method) and "discriminator" not in kind.trains else ""
    return f"needs {teacher}; reads {kind.reads}; trains {kind.trains}{head}"


def costs(cost: Cost) -> tuple[str, str]:
    """A cost in words: memory, and the passes of a step."""
    through = [f"{role} {passes.forward:g} forward {passes.backward:g} back" for role, passes in cost.passes.items()]
    networks = f"{cost.networks} network{'s' * (cost.networks > 1)}, {cost.trained} trained"
    return f"memory {cost.memory} ({networks})", f"a step: {', '.join(through)}"


def details(name: str) -> str:
    """One method: its docstring, needs, costs, settings, recipes and an example."""
    kind = METHODS[name]
    recipe = example(name)
    config = parse(recipe)
    lines = [f"{name}: {inspect.getdoc(kind)}", "", kind.reference]
    lines += [textwrap.fill(line, 118) for line in (needs(kind, config), *costs(Sketch(config).cost()))]
    lines += ["", "settings, under method:", *settings(config.method)]
    if kind.presets:
        lines += ["", "recipes"]
        lines += [f"  configs/{data}/{name}{end}.yaml: {whose}" for data in kind.presets for whose, end in ENDS.items()]
    shown = yaml.safe_dump(recipe, default_flow_style=None, sort_keys=False, width=120)
    return "\n".join([*lines, "", "example", textwrap.indent(shown.rstrip(), "  ")])


def settings(config: MethodConfig) -> list[str]:
    """Each setting with its value and its meaning, a line each; of a method inside, its name alone."""
    told = meanings(type(config))
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    shown = {
        name: f"{name}: {written(plain(value)['name'] if isinstance(value, MethodConfig) else plain(value))}"
        for name, value in values.items()
    }
    width = max(map(len, shown.values()), default=0) + 2
    return [f"  {text:<{width}}{told[name]}" for name, text in shown.items()]


def written(value: Any) -> str:
    """Plain data as YAML in one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {written(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def meanings(kind: type[MethodConfig]) -> dict[str, str]:
    """What each setting means: the comment behind it in the source of its class, or of the one that it refines."""
    found: dict[str, str] = {}
    for part in reversed(kind.__mro__):
        if part is not MethodConfig and issubclass(part, MethodConfig):
            found |= _comments(textwrap.dedent(inspect.getsource(part)))
    return found


def _comments(source: str) -> dict[str, str]:
    """By name, the comment at the end of each annotated field of a class."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    behind = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    (defined,) = ast.parse(source).body
    fields = {node.target.id: node.end_lineno for node in defined.body if isinstance(node, ast.AnnAssign)}
    return {name: behind[line] for name, line in fields.items() if line in behind}
