"""What `diffdistill methods` tells: costs against counts by hand, and that nothing of any method is left untold."""

import dataclasses
from pathlib import Path

import pytest

from diffdistill import api
from diffdistill.catalogue import details, example, meanings, overview
from diffdistill.cost import Passes, Sketch
from diffdistill.methods import METHODS
from diffdistill.recipe import parse

ROOT = Path(__file__).parents[1]
GAN = {"gan_weight": 0.1, "gan_critic_weight": 0.1}


def cost(name, *, guidance=1.0, trunk="critic", grid=(80.0,), rule="renoise", **options):
    recipe = example(name)
    recipe["method"] = {"name": name, **options}
    recipe["teacher"] = recipe["teacher"] | {"guidance": guidance}
    recipe["critic"] = {"trunk": trunk}
    recipe["generator"] = {"grid": list(grid), "step_rule": rule}
    return Sketch(parse(recipe)).cost()


# Forward and backward passes of one step through generator, critic and teacher, counted by hand from the papers' loops.
COUNTED = [
    # each of five iterations makes samples, one with a graph; the critic is asked once, and fitted five times
    ("dmd2", {}, (5, 1), (1 + 5, 5), (1, 0)),
    ("dmd2", {"time_scale": "alternating"}, (5, 1), (1 + 4, 4), (1, 0)),
    # the discriminator's passes: one of the generator's samples, and one each of real and generated for every fit
    ("dmd2", {"ratio": 2, **GAN}, (2, 1), (1 + 1 + 2 * 3, 1 + 2 * 3), (1, 0)),
    # the same on the teacher's features, whose weights are frozen: only the generator's samples carry gradient
    ("dmd2", {"ratio": 2, "trunk": "teacher", **GAN}, (2, 1), (1 + 2, 2), (1 + 1 + 2 * 2, 1)),
    ("dmd2", {"ratio": 1, "guidance": 2.0}, (1, 1), (2, 1), (2, 0)),
    # two sampling steps, taking turns: the stop of the update, and of the critic's samples for the next one
    ("dmd2", {"ratio": 2, "stops": "rotating", "grid": (80.0, 1.0)}, (1.5 + 1.5, 1), (1 + 2, 2), (1, 0)),
    ("diff_instruct", {}, (1, 1), (2, 1), (1, 0)),
    ("sid", {}, (1, 1), (2, 2), (1, 1)),  # attached: gradient flows through the teacher's and the critic's inputs
    ("sim", {}, (1, 1), (2, 2), (1, 1)),
    ("f_distill", {"ratio": 1}, (1, 1), (1 + 1 + 3, 1 + 3), (1, 0)),  # one pass for score and ratio
    ("f_distill", {"ratio": 1, "trunk": "teacher"}, (1, 1), (1 + 1, 1), (1 + 1 + 1 + 2, 1)),
    ("uni_instruct", {}, (1, 1), (1 + 1 + 3, 1 + 1 + 3), (1, 1)),
    ("disback", {"inside": {"name": "dmd2", "ratio": 1}}, (1, 1), (2, 1), (1, 0)),
    # the expert at work is one of two, as the first phase needs no simulation and the second one step of it
    (
        "phased_dmd",
        {"steps_per_phase": [500], "ratio": 1, "grid": (80.0, 1.0), "rule": "euler"},
        (1.5, 1),
        (2, 1),
        (1, 0),
    ),
]


@pytest.mark.parametrize(("name", "options", "generator", "critic", "teacher"), COUNTED)
def test_the_passes_of_a_step_are_those_counted_by_hand(name, options, generator, critic, teacher):
    expected = {"generator": Passes(*generator), "critic": Passes(*critic), "teacher": Passes(*teacher)}
    assert cost(name, **options).passes == expected


def test_consistency_takes_a_pass_for_the_tangent_and_one_for_the_gradient():
    """The tangent's pass carries derivatives along, and is counted as one; two, without, where it is a difference."""
    assert cost("scm").passes == {"generator": Passes(2, 1), "teacher": Passes(1, 0)}
    assert cost("scm", tangents={"name": "central"}).passes["generator"] == Passes(3, 1)
    assert cost("sct").passes["generator"] == Passes(2, 1)
    assert cost("scm", adaptive=True).memory == 4 + 1


def test_memory_counts_networks_and_what_training_them_adds():
    """Weights, gradient and two moments of generator and critic, and the teacher's weights."""
    assert cost("dmd2").memory == 4 + 4 + 1
    assert Sketch(parse(example("denoise"))).cost().memory == 4
    assert Sketch(parse(example("ladd"))).cost().memory == 4 + 1  # the heads are no network


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_has_a_meaning(name):
    kind = METHODS[name]
    told = meanings(kind.Config)
    assert {field.name for field in dataclasses.fields(kind.Config)} <= told.keys()
    assert all(told.values())


@pytest.mark.parametrize("name", METHODS)
def test_the_example_of_a_method_is_a_recipe_that_builds(name, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    recipe = example(name)
    if name == "disback":
        recipe["method"] |= {"degraded": "", "nodes": []}  # no run of the first stage is here
    if "pairs" in recipe.get("data", {}):
        recipe["data"]["pairs"] = str(api.couple(recipe["teacher"]["path"], tmp_path / "pairs", count=1, steps=1))
    assert f"method {name}, output runs/" in api.check(recipe)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_told_with_all_there_is_to_it(name):
    text, kind = details(name), METHODS[name]
    assert text.startswith(f"{name}: ") and kind.reference in text and "a step: generator" in text
    for field in dataclasses.fields(kind.Config):
        assert f"\n  {field.name}: " in text
    for data in kind.presets:
        assert f"configs/{data}/{name}.yaml" in text and f"configs/{data}/{name}-recommended.yaml" in text
    assert f"method: {{name: {name}" in text.split("example")[-1].replace("\n   ", "") or kind.example


def test_the_overview_has_every_method_and_reads_well():
    text = overview()
    for name, kind in METHODS.items():
        assert f"\n{name} " in f"\n{text}" and kind.reference in text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_a_comment_is_the_meaning_of_the_setting_it_stands_behind():
    """A method that refines a setting may say what it means there, or leave it as it was."""
    assert meanings(METHODS["dmd2"].Config)["ratio"] == "iterations per generator update"
    assert meanings(METHODS["sid"].Config)["match_times"] == "up to sigma 24.4 on EDM"
    assert meanings(METHODS["sim"].Config)["match_times"] == "at which scores are compared"
