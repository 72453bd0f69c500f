"""Phased DMD from YAML to stock networks: trained, interrupted, sampled in the middle, measured, exported."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import refused, student_recipe, teacher_recipe, write_recipe

from diffdistill import api, checkpoint
from diffdistill.config import ConfigError
from diffdistill.relay import Relay


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    return api.export_denoiser(api.distill(teacher_recipe(folder), say=quiet), folder / "exported")


def phased_recipe(folder, teacher, **changes) -> dict:
    """Two experts, three updates each, pictures and averages of both."""
    recipe = student_recipe(folder, teacher)
    del recipe["critic"]
    recipe["method"] = {"name": "phased_dmd", "steps_per_phase": [3], "ratio": 1}
    recipe["generator"] = {"grid": [20.0, 1.0], "step_rule": "euler"}
    recipe["averages"] = {"fast": {"name": "constant", "beta": 0.5}}
    recipe["pictures"] = {"every": 3, "count": 3}
    recipe["train"] = {**recipe["train"], "steps": 6, "save_every": 3}
    return recipe | changes


def test_a_run_of_experts_goes_on_bit_for_bit_and_is_sampled_at_any_time(teacher, tmp_path):
    whole = api.distill(phased_recipe(tmp_path, teacher), say=quiet)
    short = phased_recipe(tmp_path, teacher, output=str(tmp_path / "parts"))
    short["train"] = {**short["train"], "steps": 3}
    parts = api.distill(short, say=quiet)

    halfway = api.load(parts, weights="raw")
    assert isinstance(halfway, Relay) and list(halfway.parts) == ["0/generator", "1/generator"]
    start = dict(api.load(teacher).denoiser.named_parameters())
    untrained = dict(halfway.experts[1].denoiser.named_parameters())
    assert all(torch.equal(untrained[name], start[name]) for name in start)  # what is not trained yet is its start
    samples, labels = api.sample(parts, 4)
    assert samples.isfinite().all() and labels.tolist() == [0, 1, 2, 0]

    short["train"] = {**short["train"], "steps": 6}
    api.distill(short, say=quiet)
    ours, theirs = (checkpoint.read_state(checkpoint.latest(run)) for run in (parts, whole))
    assert ours["files"] == theirs["files"]
    assert {name.split(".")[0] for name in ours["files"]} == {
        f"{k}/{role}" for k in (0, 1) for role in ("generator", "critic")
    }
    assert len(list((whole / "samples").iterdir())) == 3
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "train"]
    assert "0/generator/match" in lines[0] and "1/generator/match" in lines[-1]


def test_an_expert_that_starts_from_the_one_before_starts_its_averages_there_too(teacher, tmp_path):
    method = {"name": "phased_dmd", "steps_per_phase": [3], "ratio": 1, "initial": "previous"}
    recipe = phased_recipe(tmp_path, teacher, method=method) | {
        "output": str(tmp_path / "previous"),
        "averages": {"still": {"name": "constant", "beta": 0.999999}},
    }
    recipe["train"] = {**recipe["train"], "steps": 4, "save_every": 1, "keep_last": 9}
    folder = api.distill(recipe, say=quiet) / "checkpoints"
    handed = load_file(folder / "step-00000003" / "0/generator.weights.safetensors")
    average = load_file(folder / "step-00000004" / "1/generator.average-still.safetensors")
    for name, value in handed.items():  # but for a millionth part of one step
        torch.testing.assert_close(average[name], value, rtol=0, atol=1e-8)


def test_a_run_that_ends_before_its_last_phase_says_so(teacher, tmp_path):
    recipe, said = phased_recipe(tmp_path, teacher), []
    recipe["train"] = {**recipe["train"], "steps": 3}
    assert "train.steps=3 ends before the last part of what is trained is begun, at step 3" in api.check(recipe)
    api.distill(recipe, say=said.append)
    assert "Train longer" in said[0]
    recipe["train"]["steps"] = 4
    assert "Train longer" not in api.check(recipe)


def test_experts_are_exported_and_sampled_by_one_call(teacher, tmp_path):
    run = api.distill(phased_recipe(tmp_path, teacher), say=quiet)
    report = api.export(run, tmp_path / "experts")
    assert report.difference < 1e-5 and "2 experts" in str(report)
    pictures = api.load_relay(tmp_path / "experts")(4, labels=[2, 0, 1, 2], seed=3)
    assert [picture.size for picture in pictures] == [(8, 8)] * 4
    with pytest.raises(ConfigError, match="has 2 generators, and this needs a run with one"):
        api.export_denoiser(run, tmp_path / "denoiser")


def test_check_shows_every_player_and_the_settings_serve_all_phases(teacher, tmp_path):
    report = api.check(phased_recipe(tmp_path, teacher), run_steps=True)
    for player in ("0/generator", "1/generator", "0/critic", "1/critic"):
        assert player in report
    recipe = phased_recipe(tmp_path, teacher)
    recipe["players"] = {"generator": {"learning_rate": 1e-4}, "0/critic": {"learning_rate": 1e-4}}
    with pytest.raises(ConfigError, match="players must have exactly the keys"):
        api.check(recipe)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"generator": {"grid": [20.0, 1.0]}}, "generator.step_rule must be one of euler, ddim; got renoise"),
        ({"method": {"name": "phased_dmd"}}, "method.steps_per_phase is missing; it has no default"),
        (
            {"method": {"name": "phased_dmd", "steps_per_phase": [3], "phases": [2, 1]}},
            "method.phases=[2, 1] shares out 3",
        ),
        ({"method": {"name": "phased_dmd", "steps_per_phase": [3, 0]}}, "method.steps_per_phase must be positive"),
        (
            {"method": {"name": "phased_dmd", "steps_per_phase": [3], "weighting": "clamp"}},
            "must be one of clamp10, margin",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(changes, reason, teacher, tmp_path, capsys):
    path = write_recipe(tmp_path / "recipe.yaml", phased_recipe(tmp_path, teacher, **changes))
    assert reason in refused(capsys, "check", path)
