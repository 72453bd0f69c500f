"""The comparison takes methods without a critic, and methods that read pairs, beside DMD2."""

import json
from pathlib import Path

import pytest
from test_pages import Reader
from tiny import large_teacher, student_recipe, write_recipe

from diffdistill import api
from diffdistill.cli import main

ROOT = Path(__file__).parents[1]
MEASURE = ("--features", ROOT / "checkpoints" / "fashion-features", "--samples", 12, "--teacher-steps", 2)
PAIR = {"grid": [20.0, 1.0]}
# name: (method, generator)
ENTRANTS = {
    "dmd2": ({"name": "dmd2", "ratio": 1}, {"grid": [20.0]}),
    "cd": ({"name": "consistency"}, {"grid": [20.0, 0.821], "boundary": 0.002}),
    "scm": ({"name": "scm", "warmup_steps": 1}, PAIR),
    "mean_flow": ({"name": "mean_flow", "far": 0.5}, PAIR | {"step_rule": "flow_map"}),
    "reflow": ({"name": "reflow", "straightness_every": 1}, PAIR | {"step_rule": "euler"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher, pairs of it, and a recipe for each entrant."""
    folder = tmp_path_factory.mktemp("compare")
    api.couple(large_teacher(folder), folder / "pairs", count=6, steps=2)
    for name, (method, generator) in ENTRANTS.items():
        recipe = student_recipe(folder, folder / "exported") | {"method": method, "generator": generator}
        del recipe["critic"]
        if name != "dmd2":
            del recipe["players"]["critic"]
        recipe["data"] = {"name": "folder", "path": str(folder / "large.npz")}
        if name == "reflow":
            recipe["data"] |= {"pairs": str(folder / "pairs")}
        recipe["train"] |= {"steps": 2, "batch": 2, "save_every": 2}
        write_recipe(folder / f"{name}.yaml", recipe)
    return folder


def test_all_are_trained_measured_and_told_beside_dmd2(folder):
    recipes = [folder / f"{name}.yaml" for name in ENTRANTS]
    line = ["compare", *recipes, "--steps", 2, "--out", folder / "out", *MEASURE, "train.log_every=1"]
    assert main([str(word) for word in line]) == 0
    rows = {row["name"]: row for row in json.loads((folder / "out/results.json").read_text())["rows"]}
    assert list(rows) == ["teacher, 2 steps", "teacher, 1 step", *ENTRANTS]
    for name, (method, generator) in ENTRANTS.items():
        row = rows[name]
        assert row["method"] == method["name"] and row["updates"] == 2
        assert row["evaluations"] == len(generator["grid"])
        assert row["metrics"]["frechet_distance"] > 0
        assert row["losses"] and all(len(points) == 2 for points in row["losses"].values())
    text = "".join(Reader((folder / "out/index.html").read_text()).text)
    assert all(name in text for name in ENTRANTS)
