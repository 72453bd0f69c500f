"""DisBack: degradation recorded as checkpoints, and the way back over them, node by node."""

import copy
import dataclasses
import json
import shutil

import pytest
import torch
from cases import CASES, Case, all_tensors, make_trainer, random_weights
from oracle import Affine, Oracle, Quadrature, Slope, denoiser
from safetensors.torch import load_file
from test_dmd2 import CORNERS, DATA, SIGMA, A, Always, assert_reaches_the_law, start, train  # noqa: F401
from tiny import refused, student_recipe, teacher_recipe, write_recipe

from diffdistill import api, checkpoint
from diffdistill.backbones.mlp import MLP
from diffdistill.build import accelerator, schedule
from diffdistill.build import trainer as build_trainer
from diffdistill.cli import main
from diffdistill.critic import Critic
from diffdistill.denoiser import Backbone, Denoiser
from diffdistill.generator import Generator
from diffdistill.method import Action, Networks, Sample, Weights
from diffdistill.methods.degrade import Degrade
from diffdistill.methods.disback import DisBack, checksum
from diffdistill.methods.dmd2 import DMD2
from diffdistill.methods.ladd import LADD
from diffdistill.methods.sid import SiD
from diffdistill.prediction import Prediction
from diffdistill.process import VE
from diffdistill.recipe import load_config, parse
from diffdistill.teacher import Teacher
from diffdistill.trainer import Schedule

float64 = torch.float64
SHORT = Schedule(steps=4, batch=12, log_every=1, save_every=0)


def test_the_degraded_teacher_is_the_denoiser_of_the_untrained_generators_samples():
    """The normal equation: the loss is quadratic in the slope, so that one Newton step is its minimum."""
    process = VE()
    networks = Networks(
        lambda: Generator(Denoiser(Affine(0.0, A, 80.0), process, Prediction.X0, clock="thousand"), (80.0,)),
        lambda: Critic(Denoiser(Slope(), process, Prediction.X0, clock="thousand")),
        Teacher(denoiser(DATA, process)),
    )
    method = Degrade(Degrade.Config(times=Always(SIGMA)), networks)
    rng = Quadrature(2, 20)
    weights, slope = rng.weights, method.generator.denoiser.backbone.slope
    loss = (weights * method.plan(0)[0].terms[0].loss({"conditions": Sample()}, rng).value).sum()
    (first,) = torch.autograd.grad(loss, slope, create_graph=True)
    (second,) = torch.autograd.grad(first, slope)
    assert (slope - first / second).item() == pytest.approx(A**2 / (A**2 + SIGMA**2), rel=1e-10)


def test_degradation_starts_at_the_teacher_and_leaves_the_generator_as_it_is(tmp_path):
    trainer = make_trainer(CASES["degrade"], tmp_path, schedule=SHORT)
    method = trainer.method
    fixed = copy.deepcopy(method.untrained.denoiser.state_dict())
    trainer.run()
    for name, value in method.untrained.denoiser.state_dict().items():
        assert torch.equal(value, fixed[name])
    assert not any(parameter.requires_grad for parameter in method.untrained.denoiser.parameters())
    assert method.generator.denoiser is not method.untrained.denoiser
    assert method.players()["generator"].modules == (method.generator.denoiser,)


def inside(**config):
    return DMD2.Config(ratio=2, **config)


def way_back(nodes=(1, 2, 3), steps_per_node=3, **config) -> Case:
    folder = {"degraded": "run"} if nodes else {}
    options = {"inside": inside(**config), "nodes": nodes, "steps_per_node": steps_per_node, **folder}
    return dataclasses.replace(CASES["disback"], options=options)


@pytest.mark.parametrize("gan", [{}, {"gan_weight": 0.1, "gan_critic_weight": 0.1}], ids=["match", "match and gan"])
def test_without_nodes_it_is_the_method_inside_bit_for_bit(gan, tmp_path):
    ours = make_trainer(way_back(nodes=(), **gan), tmp_path / "ours", schedule=SHORT)
    options = {"ratio": 2, **gan}
    theirs = make_trainer(Case("dmd2", options, grid=(20.0,)), tmp_path / "theirs", schedule=SHORT)
    for trainer in (ours, theirs):
        trainer.run()
    first, second = all_tensors(ours), all_tensors(theirs)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    logs = [
        [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in path.open()]
        for path in (ours.output / "log.jsonl", theirs.output / "log.jsonl")
    ]
    assert logs[0] == logs[1]


def weights_of(model: Denoiser) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def holds(model: Denoiser, wanted: list[torch.Tensor]) -> bool:
    return all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), wanted, strict=True))


def node_weights(model: Denoiser, step: int) -> list[torch.Tensor]:
    model = copy.deepcopy(model)
    random_weights("run", step).fill(model)
    return weights_of(model)


def test_the_order_is_from_the_most_degraded_node_strictly_to_the_teacher():
    """N = 3: the critic starts as node 3; nodes 2 and 1 stand for the teacher for 3 steps each, then the teacher."""
    method = way_back().make()
    teacher = weights_of(method.teacher.denoiser)
    assert holds(method.critic.denoiser, node_weights(method.teacher.denoiser, 3))
    target = method.inside.teacher.denoiser
    expected = [node_weights(target, 2)] * 3 + [node_weights(target, 1)] * 3 + [teacher] * 4
    for step, wanted in enumerate(expected):
        action, *updates = method.plan(step)
        assert isinstance(action, Action)
        assert [update.players for update in updates] == [update.players for update in method.inside.plan(step)]
        action.act({})
        assert holds(target, wanted), step
    assert holds(method.teacher.denoiser, teacher)
    for step in (8, 2, 4, 0):  # pure in the step: whichever comes after whichever
        method.plan(step)[0].act({})
        assert holds(target, expected[step])


def test_every_node_has_the_teachers_guidance_and_no_gradient():
    method = way_back().make()
    assert method.inside.teacher.guidance == method.teacher.guidance == 2.0
    assert not any(parameter.requires_grad for parameter in method.inside.teacher.denoiser.parameters())
    assert not method.inside.teacher.denoiser.training


def test_one_network_beside_the_teacher_holds_whichever_node():
    method = way_back().make()
    target = method.inside.teacher.denoiser
    places = [parameter.data_ptr() for parameter in target.parameters()]
    for step in range(10):
        method.plan(step)[0].act({})
        assert [parameter.data_ptr() for parameter in target.parameters()] == places
    assert list(method.frozen()) == ["node"] and method.frozen()["node"] is target
    assert method.inside.teacher.denoiser is not method.teacher.denoiser
    assert not way_back(nodes=()).make().frozen()


def unchanged_at(which: int):
    """Nodes of which one, when it is loaded, leaves the weights as they are."""

    def node(run, step):
        weights = random_weights(run, step)
        return dataclasses.replace(weights, fill=lambda model: None) if step == which else weights

    return node


def with_nodes(node, **options) -> DisBack:
    made = way_back().make()
    networks = Networks(
        lambda: Generator(copy.deepcopy(made.teacher.denoiser), (20.0,)),
        lambda: Critic(copy.deepcopy(made.teacher.denoiser).requires_grad_(True)),
        made.teacher,
        node=node,
    )
    config = {"inside": inside(), "degraded": "run", "nodes": (1, 2, 3), "steps_per_node": 3, **options}
    return DisBack(DisBack.Config(**config), networks)


def test_a_node_that_changes_no_weight_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="run/step-3 holds the very weights that it was to replace"):
        with_nodes(unchanged_at(3))
    method = with_nodes(unchanged_at(1))
    for step in range(3):
        method.plan(step)[0].act({})
    with pytest.raises(ValueError, match="run/step-1 holds the very weights"):
        method.plan(3)[0].act({})


def test_two_nodes_of_one_checksum_are_refused_before_anything_is_built():
    def node(run, step):
        return dataclasses.replace(random_weights(run, step), checksum="the same" if step > 1 else "another")

    with pytest.raises(ValueError, match="run/step-3 holds the weights of run/step-2"):
        with_nodes(node)


def test_the_checksum_sees_every_number_of_every_parameter():
    model = way_back().make().teacher.denoiser
    before = checksum(model)
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        kept = flat[-1].item()
        flat[-1] = torch.nextafter(flat[-1], flat[-1] + 1)
        assert checksum(model) != before
        flat[-1] = kept
        assert checksum(model) == before


def test_bad_settings_are_refused_by_name():
    for options, complaint in (
        ({"nodes": (2, 1)}, "strictly ascending, got \\[2, 1\\]"),
        ({"nodes": (1, 1)}, "strictly ascending"),
        ({"nodes": (0, 1)}, "must be steps of the degrade run"),
        ({"nodes": ()}, "degraded='run' and nodes=\\[\\] belong together"),
        ({"steps_per_node": 0}, "steps_per_node must be at least 1"),
        ({"inside": LADD.Config()}, "method.inside must be a score method.*LADD is none"),
    ):
        with pytest.raises(ValueError, match=complaint):
            DisBack.Config(**{"inside": SiD.Config(), "degraded": "run", "nodes": (1, 2)} | options)
    networks = Networks(lambda: None, lambda: None, Teacher(denoiser(DATA, VE()), guidance=2.0))
    with pytest.raises(ValueError, match="guidance=2.0 has no meaning for degrade"):
        Degrade(Degrade.Config(), networks)


class Corrected(Backbone):
    """The exact network of a law plus one that begins at zero: an exact teacher with weights that can degrade."""

    sample_shape, condition_names, num_classes = (2,), (), 0

    def __init__(self, process: VE):
        super().__init__()
        self.exact = Oracle(CORNERS, process, Prediction.F, scaled=True)
        self.correction = MLP(width=64, depth=2)

    def forward(self, x, time, cond):
        return self.exact(x, time, cond) + self.correction(x, (time / 1000).log() / 4, cond)

    def null(self, cond):
        raise ValueError("no unconditional branch")

    def blocks(self):
        return []


def test_the_way_back_ends_at_the_law_of_an_exact_teacher(start):  # noqa: F811
    """Three nodes of a real degradation, then DMD2 inside; the samples of node 3 are far from the law."""
    torch.manual_seed(1)
    exact = Denoiser(Corrected(start.process), start.process, Prediction.F, clock="thousand", scale_input=True)
    teacher, nodes = Teacher(copy.deepcopy(exact)), {}
    networks = Networks(
        lambda: Generator(copy.deepcopy(start), (10.0,)),
        lambda: Critic(copy.deepcopy(exact)),
        teacher,
        node=lambda run, step: stored(nodes[step], step),
    )
    degrade = Degrade(Degrade.Config(), networks)
    for step in (1, 2, 3):
        train(degrade, 40)
        nodes[step] = weights_of(degrade.generator.denoiser)
    config = DisBack.Config(inside=DMD2.Config(), degraded="run", nodes=(1, 2, 3), steps_per_node=30)
    method = DisBack(config, networks)
    train(method, 250)
    assert_reaches_the_law(method.generator)


def stored(weights: list[torch.Tensor], step: int) -> Weights:
    return Weights(f"step {step}", str(step), lambda model: replace_weights(model, weights))


def replace_weights(model: Denoiser, weights: list[torch.Tensor]) -> None:
    for parameter, value in zip(model.parameters(), weights, strict=True):
        parameter.data.copy_(value)


# From here on with real checkpoints, as a user runs it.


def degrade_recipe(folder) -> dict:
    recipe = student_recipe(folder, folder / "exported")
    del recipe["critic"], recipe["data"]
    train = recipe["train"] | {"steps": 3, "save_every": 1, "keep_every": 1, "precision": "fp64"}
    players = {"generator": {"learning_rate": 1e-3}}
    return recipe | {
        "method": {"name": "degrade"},
        "output": str(folder / "degraded"),
        "train": train,
        "players": players,
    }


def disback_recipe(folder, output="student", **options) -> dict:
    recipe = student_recipe(folder, folder / "exported")
    del recipe["critic"], recipe["data"]
    method = {
        "name": "disback",
        "inside": {"name": "dmd2", "ratio": 2},
        "degraded": str(folder / "degraded"),
        "nodes": [1, 2, 3],
        "steps_per_node": 2,
    }
    train = recipe["train"] | {"steps": 7, "save_every": 100, "keep_every": 1, "precision": "fp64"}
    return recipe | {"method": method | options, "output": str(folder / output), "train": train}


@pytest.fixture(scope="module")
def degraded(tmp_path_factory):
    """A folder with a teacher and a finished degradation; read, never written."""
    folder = tmp_path_factory.mktemp("degraded")
    assert main(["train", str(write_recipe(folder / "teacher.yaml", teacher_recipe(folder)))]) == 0
    assert main(["export", str(folder / "teacher"), "--as", "denoiser", "--out", str(folder / "exported")]) == 0
    assert main(["train", str(write_recipe(folder / "degrade.yaml", degrade_recipe(folder)))]) == 0
    return folder


@pytest.fixture
def folder(degraded, tmp_path):
    shutil.copytree(degraded, tmp_path, dirs_exist_ok=True)
    recipe = degrade_recipe(tmp_path)
    (tmp_path / "degraded/config.yaml").write_text(json.dumps(recipe))
    return tmp_path


def final(run) -> dict:
    return checkpoint.read_state(checkpoint.latest(run))


def test_the_nodes_are_loaded_from_the_checkpoints_exactly(folder):
    config = parse(disback_recipe(folder))
    method = build_trainer(config, accelerator(config), output=folder / "none", schedule=schedule(config)).method
    nodes = {
        step: load_file(folder / f"degraded/checkpoints/step-{step:08d}/generator.weights.safetensors")
        for step in (1, 2, 3)
    }
    teacher = {name: parameter.clone() for name, parameter in method.teacher.denoiser.named_parameters()}
    assert same(method.critic.denoiser, nodes[3])
    for step, wanted in ((0, nodes[2]), (1, nodes[2]), (2, nodes[1]), (3, nodes[1]), (4, teacher), (6, teacher)):
        method.plan(step)[0].act({})
        assert same(method.inside.teacher.denoiser, wanted), step


def same(model, wanted) -> bool:
    found = dict(model.named_parameters())
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_run_stopped_at_any_step_ends_like_one_that_was_not(folder):
    """Stops at 1 and 3 are inside a node, at 2 and 4 between two, at 5 with the teacher; SHA-256 of every file."""
    whole = write_recipe(folder / "whole.yaml", disback_recipe(folder, "whole"))
    assert main(["train", str(whole)]) == 0
    expected = final(folder / "whole")
    for stop in (1, 2, 3, 4, 5):
        recipe = disback_recipe(folder, f"stopped-{stop}")
        path = write_recipe(folder / f"stopped-{stop}.yaml", recipe)
        assert main(["train", str(path), f"train.steps={stop}"]) == 0
        assert main(["train", str(path)]) == 0
        found = final(folder / f"stopped-{stop}")
        assert found["step"] == expected["step"] == 7 and found["files"] == expected["files"]


def test_degradation_goes_on_bit_for_bit_and_keeps_its_nodes(folder):
    again = degrade_recipe(folder) | {"output": str(folder / "again")}
    path = write_recipe(folder / "again.yaml", again)
    assert main(["train", str(path), "train.steps=1"]) == 0 and main(["train", str(path)]) == 0
    for step in (1, 2, 3):
        ours, theirs = (folder / run / f"checkpoints/step-{step:08d}" for run in ("again", "degraded"))
        assert checkpoint.read_state(ours)["files"] == checkpoint.read_state(theirs)["files"]


def test_mistakes_about_the_nodes_are_told_before_the_run(folder, capsys):
    def said(recipe) -> str:
        return refused(capsys, "check", write_recipe(folder / "wrong.yaml", recipe))

    assert "has no checkpoint of step 4; it has those of 1, 2, 3" in said(disback_recipe(folder, nodes=[1, 4]))
    assert "is a run of denoise" in said(disback_recipe(folder, degraded=str(folder / "teacher")))
    assert "method.degraded=" in (complaint := said(disback_recipe(folder, degraded=str(folder / "exported"))))
    assert "holds no run" in complaint
    elsewhere = disback_recipe(folder)
    elsewhere["teacher"] = {"path": str(folder / "degraded" / ".." / "exported")}  # the same folder
    api.check(elsewhere)
    other = disback_recipe(folder)
    other["generator"] = {"grid": [10.0]}
    assert "degraded towards another generator" in said(other)
    (folder / "degraded/checkpoints/step-00000001/generator.weights.safetensors").write_bytes(b"damaged")
    assert "is damaged" in refused(capsys, "train", write_recipe(folder / "wrong.yaml", disback_recipe(folder)))


def test_check_plans_the_network_that_holds_the_node(folder):
    roles = [role.name for role in api.trial.plan_memory(parse(disback_recipe(folder)))]
    assert roles == ["teacher", "node", "generator", "critic"]
    assert "target node 2" in api.check(write_recipe(folder / "student.yaml", disback_recipe(folder)), run_steps=True)


def test_the_recipe_of_a_run_is_read_back(folder):
    assert main(["train", str(write_recipe(folder / "s.yaml", disback_recipe(folder))), "train.steps=1"]) == 0
    config = load_config(folder / "student/config.yaml")
    assert config.method.inside == DMD2.Config(ratio=2) and config.method.nodes == (1, 2, 3)
