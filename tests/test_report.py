"""The report: whole without a network, every section filled or saying what would fill it."""

import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_api import write_images
from test_pages import Reader
from tiny import refused, student_recipe, teacher_recipe

from diffdistill import api, build
from diffdistill.cli import main
from diffdistill.config import EvaluateConfig
from diffdistill.evaluation.grid import image_grid
from diffdistill.evaluation.metrics import quantise
from diffdistill.pages.chart import Series, line_chart
from diffdistill.recipe import load_config
from diffdistill.reporting.page import _groups
from diffdistill.reporting.reading import differing, read, spaced
from diffdistill.reporting.samples import nearest

FEATURES = Path(__file__).parents[1] / "checkpoints" / "fashion-features"
ROWS = [
    {"name": "a at 80", "evaluations": 1, "frechet_distance": 3.0},
    {"name": "a at 80,1", "evaluations": 2, "frechet_distance": 2.0},
    {"name": "teacher, 18 steps", "evaluations": 35, "frechet_distance": 0.5},
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A run that says everything, its student that says little, and a copy of it before its first checkpoint."""
    folder = tmp_path_factory.mktemp("report")
    data = {"name": "folder", "path": str(write_images(folder / "real.npz", size=28))}
    recipe = teacher_recipe(folder) | {"data": data, "output": str(folder / "full")}
    recipe["generator"]["network"]["options"]["sample_size"] = 28
    recipe["train"] |= {"steps": 9, "log_every": 1}
    recipe["pictures"] = {"every": 1, "count": 6, "columns": 3, "scale": 1}
    recipe["evaluate"] = {"every": 3, "samples": 12, "features": str(FEATURES)}
    full = api.distill(recipe, say=lambda line: None)
    teacher = api.export_denoiser(full, folder / "exported")
    bare = api.distill(
        student_recipe(folder, teacher) | {"output": str(folder / "bare"), "data": data}, say=lambda line: None
    )
    shutil.copytree(full, folder / "young")
    shutil.rmtree(folder / "young" / "checkpoints")
    shutil.rmtree(folder / "young" / "samples")
    (folder / "table.json").write_text(json.dumps(ROWS))
    return {"full": full, "bare": bare, "young": folder / "young", "table": folder / "table.json"}


def page_of(tmp_path: Path, *words) -> tuple[str, Reader]:
    assert main(["report", *map(str, words), "--out", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    return text, Reader(text)


def test_a_report_is_whole_and_loads_nothing(runs, tmp_path):
    text, reader = page_of(tmp_path, runs["full"], "--table", runs["table"])
    assert reader.open == [] and "script" not in {tag for tag, _ in reader.tags}
    for _, attributes in reader.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "http" not in re.sub(r"data:image/png;base64,[^\"]*", "", text)
    pictures = [attributes for tag, attributes in reader.tags if tag == "img"]
    assert len(pictures) == 6 + 2 and all(picture["alt"] for picture in pictures)
    for picture in pictures:
        Image.open(io.BytesIO(base64.b64decode(picture["src"].partition(",")[2]))).load()
    said = " ".join(reader.text)
    for title in ("Numbers", "Warnings", "Quality while training", "Quality against cost", "Samples over time",
                  "Losses and readings", "Configuration", "How this was made"):  # fmt: skip
        assert title in said
    for words in (
        "full: denoise, complete, Frechet distance",
        "update 0",
        "update 9",
        "teacher, 18 steps",
        "far below 1",
    ):
        assert words in said, words
    assert not list(tmp_path.glob(".page*"))


def test_the_numbers_are_those_of_the_log(runs, tmp_path):
    _, reader = page_of(tmp_path, runs["full"])
    lines = [json.loads(line) for line in (runs["full"] / "log.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "evaluate"][-1]
    shown = {attributes["data-value"] for tag, attributes in reader.tags if tag == "td" and "data-value" in attributes}
    for name in ("frechet_distance", "recall", "class_accuracy"):
        assert repr(last[name]) in shown


def test_what_is_missing_is_said_with_the_key_that_gives_it(runs, tmp_path):
    said = " ".join(page_of(tmp_path, runs["bare"])[1].text)
    for words in ("evaluate.every=500 evaluate.features=FOLDER does so", "bare drew no pictures; pictures.every=500",
                  "nearest training images need an extractor", "--table table.json"):  # fmt: skip
        assert words in said, words
    young = " ".join(page_of(tmp_path, runs["young"])[1].text)
    assert "young: denoise, at update 0 of 9, Frechet distance" in young
    assert "there is no checkpoint yet, so nothing could be sampled; train.save_every says when" in young


def test_several_runs_stand_side_by_side_with_what_differs(runs, tmp_path):
    _, reader = page_of(tmp_path, runs["full"], runs["bare"])
    said = " ".join(reader.text)
    assert "Keys that differ." in said and "method.name" in said and "train.steps" in said
    assert "full" in said and "bare" in said
    differ = differing([read(runs["full"], "a"), read(runs["full"], "b")])
    assert differ == {}


def test_two_runs_of_one_name_are_told_apart(runs, tmp_path):
    shutil.copytree(runs["bare"], tmp_path / "other" / "bare")
    said = " ".join(page_of(tmp_path, runs["bare"], tmp_path / "other" / "bare")[1].text)
    assert "other/bare" in said and "The recipes are the same." in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{full}", "--table", "nowhere.json"], "there is no table at nowhere.json; write one by diffdistill evaluate"),
        (["{full}", "--table", "{broken}"], "could not be read"),
        (["{full}", "--table", "{other}"], "holds no table of rows with evaluations, frechet_distance, name"),
        (["{full}", "--table", "{short}"], "holds no table of rows with evaluations, frechet_distance, name"),
        (["{nothing}"], "holds no run"),
    ],
)
def test_mistakes_are_refused(words, message, runs, tmp_path, capsys):
    (tmp_path / "broken.json").write_text("[")
    (tmp_path / "other.json").write_text('{"name": 1}')
    (tmp_path / "short.json").write_text('[{"name": "a", "evaluations": 1}]')
    files = {
        "short": tmp_path / "short.json",
        "broken": tmp_path / "broken.json",
        "other": tmp_path / "other.json",
        "nothing": tmp_path,
    }
    given = [word.format(**runs, **files) for word in words]
    assert message in refused(capsys, "report", *given, "--out", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_log_that_is_being_written_is_read_up_to_its_last_whole_line(runs, tmp_path):
    shutil.copytree(runs["bare"], tmp_path / "run")
    whole = read(tmp_path / "run", "run").lines
    log = tmp_path / "run" / "log.jsonl"
    log.write_text(log.read_text() + '{"kind": "tra')
    assert read(tmp_path / "run", "run").lines == whole
    log.write_text('{"kind"\n' + log.read_text())
    with pytest.raises(ValueError, match=r"log\.jsonl, line 1: .*restore the file"):
        read(tmp_path / "run", "run")


def test_a_few_of_many_are_evenly_chosen_with_both_ends():
    assert spaced(3, 6) == [0, 1, 2] and spaced(11, 6) == [0, 2, 4, 6, 8, 10]
    assert spaced(100, 6)[0] == 0 and spaced(100, 6)[-1] == 99


def test_readings_at_several_noise_levels_share_a_chart():
    names = ["g/match/rms", "g/match", "g/match/d/below_2", "g/match/d/2_to_8", "g/match/d/above_8"]
    levels = names[2:]
    assert _groups(names, alone=False) == {"g/match": ["g/match"], "g/match/rms": ["g/match/rms"], "g/match/d": levels}
    assert _groups(names, alone=True) == {"g/match": ["g/match"], "g/match/rms": ["g/match/rms"]}


def test_a_copy_of_a_training_image_is_its_nearest_and_0_away(runs):
    config = load_config(runs["full"] / "config.yaml")
    extractor, reference = api.yardstick(
        EvaluateConfig(features=str(FEATURES)), config.data, cache=runs["full"] / "cache", device="cpu"
    )
    data = build.images(config.data, "train")
    source = api.load(runs["full"])
    copies = data.select(torch.arange(6))[0]
    source.sample = lambda x, cond, rng: copies[: len(x)]  # as if it had learnt them by heart
    found = nearest(source, extractor, reference, data)
    assert found.share == pytest.approx(0.0, abs=1e-3)
    made = quantise(-copies)
    source.sample = lambda x, cond, rng: made[: len(x)]
    found = nearest(source, extractor, reference, data)
    near = data.select(torch.cdist(extractor(made)[0], reference.features).argmin(1))[0]
    assert not torch.equal(near, made) and found.share > 0.1
    expected = image_grid(torch.cat([made[:3], near[:3], made[3:], near[3:]]), columns=3, scale=2)
    shown = Image.open(io.BytesIO(found.png))
    assert shown.size == expected.size and np.array_equal(np.asarray(shown), np.asarray(expected))


def test_a_logarithmic_axis_across_has_equal_ratios_equally_wide():
    chart = line_chart(
        [Series("a", [(1, 1), (4, 1), (16, 2)], 0)], title="t", x_label="x", y_label="y", x_logarithmic=True
    )
    places = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', chart.partition("<ul")[0])]
    assert places[1] - places[0] == pytest.approx(places[2] - places[1], abs=0.2)
    linear = line_chart([Series("a", [(0, 1), (4, 1)], 0)], title="t", x_label="x", y_label="y", x_logarithmic=True)
    assert "NaN" not in linear and "nan" not in linear
