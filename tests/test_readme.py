"""What the README shows is run here as it stands there."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from oracle import denoiser, gaussian

from diffdistill import cli
from diffdistill.backbones.mlp import MLP
from diffdistill.critic import Critic
from diffdistill.data import Labels, Streams
from diffdistill.denoiser import Denoiser
from diffdistill.generator import Generator
from diffdistill.method import Networks
from diffdistill.methods import METHODS
from diffdistill.player import LearningRate, Player
from diffdistill.prediction import Prediction
from diffdistill.process import VE
from diffdistill.recipe import load_config
from diffdistill.rng import Rng
from diffdistill.teacher import Teacher
from diffdistill.trainer import Schedule, Trainer

README = (Path(__file__).parents[1] / "README.md").read_text()


def example() -> str:
    """The source of the README's method."""
    (found,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "(Method)" in block]
    return found


COMMANDS = re.findall(r"^diffdistill (.*?)(?:\s+#.*)?$", README, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_shown_exist(command):
    assert cli.parse(shlex.split(command)).command == command.split()[0]


def test_the_experiment_shown_is_valid(tmp_path):
    (shown,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "my.yaml").write_text(shown)
    config = load_config(tmp_path / "my.yaml")
    assert config.generator.grid == (1000.0,) and config.method_name == "dmd2"


def test_the_example_method_in_the_table_of_methods_trains_from_yaml(tmp_path, monkeypatch):
    (tmp_path / "imitate.py").write_text(example())
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(METHODS, "imitate", importlib.import_module("imitate").Imitate)
    teacher = Path(__file__).parents[1] / "checkpoints" / "fashion-edm"
    recipe = {
        "output": str(tmp_path / "run"),
        "teacher": {"path": str(teacher)},
        "method": {"name": "imitate", "steps": 1},
        "generator": {"grid": [80.0]},
        "players": {"generator": {"learning_rate": 1e-4}},
        "train": {"steps": 2, "batch": 2, "log_every": 1},
    }
    (tmp_path / "imitate.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    assert cli.main(["train", str(tmp_path / "imitate.yaml")]) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]
    assert all("generator/imitate" in record for record in records)


def test_the_example_method_is_short_and_distills_a_teacher(tmp_path):
    assert len(example().splitlines()) < 100
    namespace: dict = {}
    exec(compile(example(), "README.md", "exec"), namespace)
    method_class = namespace["Imitate"]

    law, process = gaussian([0.4, -0.3], [[0.5, 0.2], [0.2, 0.3]]), VE(sigma_max=5.0)
    teacher = Teacher(denoiser(law, process))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = MLP(width=64, depth=1).double()
    trained = Denoiser(network, process, Prediction.F, clock="log_ratio", scale_input=True)
    networks = Networks(lambda: Generator(trained, [5.0]), lambda: Critic(trained), teacher)
    method = method_class(method_class.Config(steps=8), networks)
    spec = method.players()["generator"]
    optimizer = torch.optim.AdamW(list(spec.parameters.values()), fused=True)
    player = Player(spec, optimizer, LearningRate(3e-3), max_norm=10.0, reduce=lambda flat: None)
    trainer = Trainer(
        method,
        {"generator": player},
        Streams({"conditions": Labels(0)}),
        Accelerator(cpu=True),
        Schedule(steps=300, batch=64, log_every=0, save_every=0),
        seed=0,
        output=tmp_path,
        dtype=torch.float64,
    )
    trainer.run()

    rng = Rng((1,), range(512), dtype=torch.float64)
    noise = method.generator.prior(rng)
    start = process.alpha(torch.full((512,), 5.0).double()), process.sigma(torch.full((512,), 5.0).double())
    end = law.flow(noise, start, (torch.ones(512).double(), torch.zeros(512).double()))
    error = (method.generator.sample(noise, {}, rng) - end).square().mean()
    assert error < 0.02 * end.var()  # the solver's own error and 300 steps of training; untrained it is 0.8
