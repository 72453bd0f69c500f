"""The main job on the shipped teacher, from end to end, with too little training to be good."""

import json
from pathlib import Path

import pytest
from PIL import Image

from diffdistill import demo

ROOT = Path(__file__).parents[1]


def test_the_shipped_teacher_is_small():
    files = [path for path in (ROOT / "checkpoints" / "fashion-edm").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path.suffix == ".safetensors") <= 6e6


def test_the_demo_distills_exports_measures_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    output = tmp_path / "demo"
    assert demo.main(["--samples", "100", "train.steps=2", "train.batch=8", f"output={output}"]) == 0
    rows = {row["name"]: row for row in json.loads((output / "results.json").read_text())["rows"]}
    teacher, one_step, student, real = rows.values()
    assert list(rows) == ["teacher, 35 steps of euler", "teacher, 1 step", "student, 1 step", "real, held out"]
    assert real["frechet_distance"] < teacher["frechet_distance"] < one_step["frechet_distance"]
    assert student["frechet_distance"] == pytest.approx(
        one_step["frechet_distance"], rel=0.2
    )  # two steps change little
    assert teacher["class_accuracy"] > 0.8 > one_step["class_accuracy"]
    assert (output / "pipeline" / "model_index.json").is_file()
    assert Image.open(output / "samples.png").width > 800
    printed = capsys.readouterr().out
    assert "maximum absolute difference from the generator" in printed and "real, held out" in printed


@pytest.mark.parametrize("wrong", [["--samples", "3"], ["train.stepz=3"], ["teacher.path=nowhere"]])
def test_a_mistake_in_the_demo_is_one_line(wrong, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert demo.main([*wrong, f"output={tmp_path / 'demo'}"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
