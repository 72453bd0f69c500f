"""Gate 1: what a recipe may say, and the one line that answers what it may not."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from tiny import student_recipe, teacher_recipe, write_recipe

from diffdistill import build, networks, run
from diffdistill.backbones.folder import META
from diffdistill.config import ConfigError, TeacherConfig
from diffdistill.method import MethodConfig, method_of
from diffdistill.methods import METHODS
from diffdistill.methods.dmd2 import DMD2
from diffdistill.methods.sid import SiD
from diffdistill.recipe import as_yaml, flat, load_config, parse, plain

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("**/*.yaml"))


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path / "recipe.yaml", teacher_recipe(tmp_path))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid(path):
    assert load_config(path).method_name in METHODS


def test_a_config_survives_its_own_yaml(tmp_path):
    plain_recipe = student_recipe(tmp_path, tmp_path / "teacher")
    plain_recipe["players"]["critic"] = {"learning_rate": 1e-4, "max_norm": math.inf}
    plain_recipe["averages"] = {
        "slow": {"name": "half_life", "images": 500.0},
        "wide": {"name": "power", "sigma_rel": 0.1},
    }
    plain_recipe["method"]["match_times"] = {"name": "log_normal", "mean": 0.5}
    config = parse(plain_recipe)
    path = tmp_path / "again.yaml"
    path.write_text(as_yaml(config, "a comment"))
    assert load_config(path) == config
    assert load_config(path).players["critic"].max_norm == math.inf


class Wrapping(DMD2):
    """A method around another, as far as its settings go."""

    @dataclasses.dataclass(frozen=True)
    class Config(MethodConfig):
        inside: MethodConfig


def test_a_method_may_hold_another_in_its_settings(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "wrapping", Wrapping)
    values = student_recipe(tmp_path, tmp_path / "teacher")
    values["method"] = {"name": "wrapping", "inside": {"name": "sid", "alpha": 0.7}}
    config = parse(values)
    assert isinstance(config.method.inside, SiD.Config) and config.method.inside.alpha == 0.7
    assert method_of(config.method) is Wrapping and method_of(config.method.inside) is SiD
    assert parse(plain(config)) == config
    for inside, complaint in (
        ({"name": "uni_instrct"}, r"method.inside.name='uni_instrct' is unknown \(did you mean uni_instruct\?\)"),
        ({"name": "sid", "alhpa": 1.0}, r"unknown key method.inside.alhpa \(did you mean alpha\?\)"),
        ({"name": "sid", "ratio": 0}, "method.*ratio must be at least 1"),
        ("sid", "method.inside.name is missing"),
    ):
        values["method"]["inside"] = inside
        with pytest.raises(ConfigError, match=complaint):
            parse(values)


def test_settings_that_no_recipe_could_name_are_refused():
    with pytest.raises(TypeError, match="must inherit from MethodConfig"):
        type("Nameless", (DMD2,), {"Config": dataclasses.make_dataclass("Config", [])})


def test_an_override_replaces_what_stands_at_its_key(recipe):
    config = load_config(
        recipe, ["train.steps=7", "generator.grid=[2.0, 1.0]", "method.times={name: uniform}", "seed=3"]
    )
    assert (config.train.steps, config.generator.grid, config.seed) == (7, (2.0, 1.0), 3)
    assert type(config.method.times).__name__ == "Uniform"
    assert config.train.batch == 6  # what stands beside it stays


MISTAKES = {
    "trian.steps=3": r"unknown key trian \(did you mean train\?\)",
    "train.step=3": r"unknown key train.step \(did you mean steps\?\)",
    "players.generator.learning_rat=1": r"unknown key players.generator.learning_rat \(did you mean learning_rate\?\)",
    "method.tims=1": r"unknown key method.tims \(did you mean times\?\)",
    "method_name=dmd2": "did you mean method.name",
    "method={name: scm, tangents: {name: exact, step: 0.1}}": r"unknown key method.tangents.step; known here are none",
    "data.pairs=[runs/pairs, '']": r"data.pairs=\['runs/pairs', ''\] has a folder without a name",
    "train.steps=many": "train.steps='many' must be of type int",
    "train.steps=1.5": "train.steps=1.5 must be of type int",
    "train.steps=true": "train.steps=True must be of type int",
    "generator.grid=5.0": r"generator.grid=5.0 must be a list",
    "players.generator.betas=[0.9]": "players.generator.betas=.* must have 2 entries",
    "train=3": "train must be a mapping",
    "train.steps=0": "train.steps must be positive, got 0",
    "train.log_every=-1": "train.log_every must not be negative, got -1",
    "train.accumulate=4": "train.batch=6 must be divisible by accumulate=4",
    "players.generator.learning_rate=-1.0": "players.generator.learning_rate must be positive, got -1.0",
    "players.generator.betas=[0.9, 1.0]": r"players.generator.betas must lie in \[0, 1\)",
    "method.condition_dropout=1.0": r"method.condition_dropout must be in \[0, 1\), got 1.0",
    "method.times={name: log_normal, std: 0.0}": "std > 0",
    "generator.grid=[1.0, 2.0]": "generator.grid must be strictly decreasing",
    "generator.grid=[2.0, 2.0]": "generator.grid must be strictly decreasing",
    "generator.grid=[]": "generator.grid must be strictly decreasing",
    "generator.grid=[2.0, 0.0]": r"generator.grid must lie in \(0, t_max\]",
    "generator.grid={steps: 0}": "generator.grid.steps must be positive, got 0",
    "method.name=denois": r"method.name='denois' is unknown \(did you mean denoise\?\); known are .*denoise, .*dmd2",
    "generator.denoiser.process.name=ev": r"process.name='ev' is unknown; known are vp, ve, rectified, trig",
    "method.times.name=lognormal": r"method.times.name='lognormal' is unknown \(did you mean log_normal\?\)",
    "averages.fast.name=ema": "averages.fast.name='ema' is unknown; known are constant, half_life, power",
    "generator.step_rule=hune": "generator.step_rule='hune' must be one of renoise, same_noise, flow_map",
    "generator.denoiser.prediction=noise": "generator.denoiser.prediction='noise' must be one of x0, eps",
    "generator.denoiser.clock=sundial": "generator.denoiser.clock='sundial' must be one of steps, edm",
    "data.name=imagenet": "data.name='imagenet' must be one of fashion_mnist, folder, prepared, none",
    "train.precision=fp8": "train.precision='fp8' must be one of fp32, bf16, fp64",
    "trackers=[mlflow]": r"trackers\[0\]='mlflow' must be one of tensorboard, wandb",
    "generator.denoiser=null": "generator.network is given without denoiser",
    "generator.network=null": "generator.denoiser is given without network",
    "averages.raw={name: constant, beta: 0.9}": "averages.raw is the name of the weights themselves",
    "evaluate.every=10": "evaluate.features is missing",
    "output=''": "output is empty",
    "train.steps": "cannot read the override 'train.steps'; write key=value",
    "train.steps=[1": "cannot read the override",
    "output=${nowhere}": "nowhere",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_answered_with_its_key_and_the_way_out(recipe, override):
    with pytest.raises(ConfigError, match=MISTAKES[override]):
        load_config(recipe, [override])


@pytest.mark.parametrize("lost", ["output", "method", "generator", "train", "players"])
def test_a_missing_key_is_named(tmp_path, lost):
    values = teacher_recipe(tmp_path)
    del values[lost]
    with pytest.raises(ConfigError, match=f"{lost}.* is missing"):
        parse(values)


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", "\x00", "a: ${oc.env:DIFFDISTILL_NEVER_SET}"])
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="configuration"):
        load_config(path)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="there is no configuration at"):
        load_config(tmp_path / "nowhere.yaml")


def test_a_number_of_steps_is_the_customary_grid_of_the_process(recipe):
    config = load_config(recipe, ["generator.grid={steps: 5}"])
    model, _ = networks.starting_denoiser(config, META)
    assert networks.generator(config, model).grid == model.process.grid(5)


def test_a_grid_beyond_the_process_is_refused(recipe):
    config = load_config(recipe, ["generator.grid=[99.0]"])
    with pytest.raises(ValueError, match=r"generator.grid must lie in \(0, 20\]"):
        build.method(config, torch.device("meta"))


def test_only_keys_that_change_what_is_computed_count_as_another_recipe(recipe):
    before = load_config(recipe)
    after = load_config(
        recipe,
        ["output=elsewhere", "train.log_every=1", "train.keep_last=9", "pictures.every=5", "trackers=[tensorboard]"],
    )
    assert run.differences(before, after) == {}
    after = load_config(recipe, ["seed=4", "train.batch=12", "averages.slow={name: constant, beta: 0.9}"])
    assert run.differences(before, after) == {
        "seed": (0, 4),
        "train.batch": (6, 12),
        "averages.slow.name": ("(not set)", "constant"),
        "averages.slow.beta": ("(not set)", 0.9),
    }


def test_a_run_may_become_longer_only_where_nothing_decays_towards_its_end(recipe):
    longer, falling = ["train.steps=9"], ["players.generator.decay=cosine"]
    assert run.differences(load_config(recipe), load_config(recipe, longer)) == {}
    assert run.differences(load_config(recipe, falling), load_config(recipe, falling + longer)) == {
        "train.steps": (4, 9)
    }


def test_every_option_of_every_dataclass_can_be_written_in_yaml(recipe):
    config = load_config(recipe, ["evaluate.input={height: 4, width: 4}"])  # None by default, which is left out
    keys = flat(plain(config))
    for section in ("train", "pictures", "evaluate", "data", "critic"):
        for each in dataclasses.fields(getattr(config, section)):
            name = f"{section}.{each.name}"
            assert name in keys or any(key.startswith(f"{name}.") for key in keys)


def test_guidance_may_be_said_from_either_prediction():
    """u + w (c - u) = c + (w - 1) (c - u)."""
    assert TeacherConfig("t", guidance=1.5).guidance_weight == 1.5
    assert TeacherConfig("t", guidance=0.5, guidance_from="conditional").guidance_weight == 1.5
    assert (
        TeacherConfig("t").guidance_weight
        == TeacherConfig("t", guidance=0.0, guidance_from="conditional").guidance_weight
    )
