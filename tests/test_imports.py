"""Who may import whom, and that `import diffdistill` is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "diffdistill"

# What each file may import: names of our own modules without "diffdistill.", and packages beyond torch, numpy, pillow,
# safetensors and the standard library. A folder's name stands for all of its files; "*" is everything of ours.
TENSORS = {"process", "prediction", "times", "time_pairs", "rng", "losses", "distances", "solvers", "told"}
NETWORKS = TENSORS | {"denoiser", "teacher", "generator", "relay", "critic", "intervals"}
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": {"api"},
    "__main__": {"cli"},
    "process": set(),
    "rng": set(),
    "prediction": {"process"},
    "times": {"process"},
    "time_pairs": {"process"},
    "solvers": {"process", "prediction"},
    "divergences": set(),
    "dual_layers": set(),
    "tangents": {"dual_layers", "process", "flash_jvp"},
    "kmeans": set(),
    "shares": {"kmeans"},
    "running_means": set(),
    "told": set(),
    "routed": {"denoiser", "generator", "rng"},
    "denoiser": {"process", "prediction", "told"},
    "losses": {"process", "prediction", "denoiser"},
    "distances": {"losses"},
    "perceptual": {"losses"},
    "teacher": TENSORS | {"denoiser"},
    "generator": TENSORS | {"denoiser"},
    "relay": TENSORS | {"denoiser", "generator"},
    "critic": TENSORS | {"denoiser"},
    "intervals": TENSORS | {"denoiser"},
    "readings": {"losses", "prediction", "process", "accelerate"},
    "health": set(),
    "straightness": TENSORS | {"denoiser"},
    "method": NETWORKS | {"readings", "running_means"},
    "methods": NETWORKS
    | {
        "method",
        "methods",
        "divergences",
        "readings",
        "routed",
        "running_means",
        "shares",
        "straightness",
        "tangents",
    },
    "player": {"method", "rng"},
    "checkpoint": {"player", "method"},
    "trainer": {"best", "checkpoint", "health", "memory", "player", "method", "readings", "rng", "accelerate", "tqdm"},
    "best": {"checkpoint"},
    "config": {
        "best",
        "denoiser",
        "distances",
        "evaluation",
        "generator",
        "player",
        "prediction",
        "shares",
        "tangents",
        "time_pairs",
        "times",
        "told",
    },
    "recipe": {"config", "method", "methods", "omegaconf", "yaml"},
    "memory": set(),
    "data": {"data", "method", "rng"},
    "coupling": {"checkpoint", "data", "denoiser", "evaluation", "generator", "rng", "tqdm"},
    "evaluation": {
        "evaluation",
        "data",
        "denoiser",
        "generator",
        "teacher",
        "solvers",
        "rng",
        "memory",
        "tqdm",
        "transformers",
    },
    "prompts": set(),
    "preparing": {
        "preparing",
        "backbones",
        "denoiser",
        "prediction",
        "process",
        "prompts",
        "teacher",
        "diffusers",
        "tqdm",
    },
    "prompting": {"*"},
    "backbones": {"backbones", "denoiser", "prompts", "process", "prediction", "told", "diffusers", "huggingface_hub"},
    "exporting": {
        "exporting",
        "evaluation",
        "relay",
        "denoiser",
        "generator",
        "routed",
        "process",
        "prediction",
        "backbones",
        "preparing",
        "rng",
        "diffusers",
    },
    "networks": NETWORKS
    | {"backbones", "preparing", "prompts", "checkpoint", "config", "evaluation", "memory", "method", "recipe", "run"},
    "run": {"__init__", "checkpoint", "config", "recipe"},
    "joining": {"checkpoint", "config", "methods", "run"},
    "spreading": {"checkpoint", "config", "joining", "methods"},
    "hooks": {"config", "evaluation", "player", "trainer"},
    "trial": {"backbones", "build", "config", "memory", "method", "methods", "networks", "trainer"},
    "build": {"*", "accelerate"},
    "api": {"*"},
    "loading": {"*"},
    "evaluating": {"*"},
    "pages": {"pages"},
    "comparing": {"*"},
    "reporting": {"*"},
    "cost": NETWORKS | {"backbones", "config", "method"},
    "catalogue": {"config", "cost", "method", "methods", "recipe", "yaml"},
    "cli": {
        "api",
        "catalogue",
        "evaluation",
        "comparing",
        "hooks",
        "kmeans",
        "memory",
        "methods",
        "recipe",
        "reporting",
        "trainer",
    },
    "demo": {"api", "cli", "config", "data", "evaluation", "generator", "recipe"},
}
ANYWHERE = {"torch", "numpy", "PIL", "safetensors", *sys.stdlib_module_names}
ONLY_INSIDE_FUNCTIONS = {"diffusers", "flash_jvp", "huggingface_hub", "omegaconf", "transformers", "wandb"}


def room(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path) -> list[tuple[str, bool]]:
    """(name, whether it is at module level) of everything that a file imports; our own without "diffdistill."."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    found: list[tuple[str, bool]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import; write the full name"
            names = [node.module]
            if node.module == "diffdistill":
                names = [f"diffdistill.{alias.name.replace('__version__', '__init__')}" for alias in node.names]
        else:
            continue
        found += [(name, id(node) in top) for name in names]
    return found


def own(name: str) -> str:
    return name.split(".")[1] if "." in name else "__init__"


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_file_imports_only_what_its_room_may(path):
    assert room(path) in MAY_IMPORT, "a new room: say in MAY_IMPORT what it may import"
    allowed = MAY_IMPORT[room(path)]
    for name, at_top in imports(path):
        package = name.split(".")[0]
        if package == "diffdistill":
            assert "*" in allowed or own(name) in allowed, f"{path.name} may not import {name}"
        else:
            assert package in ANYWHERE | allowed, f"{path.name} may not import {name}"
        assert not (at_top and package in ONLY_INSIDE_FUNCTIONS), f"{path.name} must import {name} inside a function"


def test_no_environment_is_read_outside_the_command_line():
    for path in FILES:
        text = path.read_text()
        assert path.name == "cli.py" or ("os.environ" not in text and "getenv" not in text), path


def test_importing_the_package_loads_torch_and_nothing_else_heavy():
    script = (
        "import sys, diffdistill\n"
        "assert 'torch' in sys.modules\n"
        "heavy = {'diffusers', 'transformers', 'accelerate', 'wandb', 'tensorboard', 'triton', 'omegaconf', 'PIL'}\n"
        "sys.exit(', '.join(heavy & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_functions_are_at_hand_and_a_wrong_name_says_which():
    import diffdistill
    from diffdistill import api

    for name in (
        "check",
        "couple",
        "distill",
        "evaluate",
        "export",
        "join",
        "load",
        "load_relay",
        "load_routed",
        "sample",
    ):
        assert getattr(diffdistill, name) is getattr(api, name)
    with pytest.raises(AttributeError, match="distill, evaluate, export, join, load, load_relay, load_routed, sample"):
        _ = diffdistill.destill


def test_no_room_hides_a_function_of_the_package():
    """Importing a submodule binds its name in the package, so that a room named like a function would replace it."""
    import diffdistill

    assert not {room(path) for path in FILES} & set(diffdistill._FROM_API)
