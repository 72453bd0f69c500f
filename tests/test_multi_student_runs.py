"""Several students from the command line: trained, left and resumed, joined, sampled, measured and exported."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import NUM_CLASSES, refused, student_recipe, teacher_recipe, write_recipe

from diffdistill import api, build, checkpoint
from diffdistill.cli import main
from diffdistill.evaluation.sampling import sample_images
from diffdistill.kmeans import write_centroids
from diffdistill.recipe import load_config, parse
from diffdistill.rng import Rng

PLAYERS = ("0/critic", "0/generator", "1/critic", "1/generator")


def command(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def recipe(folder, teacher) -> dict:
    """Two students of the tiny teacher's three classes, with the GAN term."""
    made = student_recipe(folder, teacher)
    inside = made["method"] | {"ratio": 1}
    made |= {"method": {"name": "multi_student", "students": 2, "inside": inside}, "output": str(folder / "students")}
    made["train"]["log_every"] = 0  # so that running sums stay in the checkpoint
    return made | {"averages": {"slow": {"name": "constant", "beta": 0.5}}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A teacher, two students of it in one run and, alone, in two more; read, never written."""
    folder = tmp_path_factory.mktemp("trained")
    command("train", write_recipe(folder / "teacher.yaml", teacher_recipe(folder)))
    command("export", folder / "teacher", "--as", "denoiser", "--out", folder / "exported")
    students = write_recipe(folder / "students.yaml", recipe(folder, folder / "exported"))
    command("train", students, "pictures={every: 2, count: 4, columns: 2, scale: 1}")
    for number in range(2):
        command("train", students, f"method.only={number}", f"output={folder / f'only-{number}'}")
    return folder


def test_every_student_has_its_own_weights_averages_and_moments_on_disk(trained):
    (saved,) = (trained / "students" / "checkpoints").iterdir()
    parts = ("weights", "optimizer")
    expected = {f"{player}.{part}.safetensors" for player in PLAYERS for part in parts}
    expected |= {f"{k}/generator.average-slow.safetensors" for k in range(2)}
    assert checkpoint.read_state(saved)["files"].keys() == expected
    assert (trained / "students" / "samples" / "step-00000002.png").is_file()


def test_a_run_is_sampled_class_by_class_by_its_students(trained):
    loaded = api.load(trained / "students")
    assert loaded.table == (0, 0, 1)
    together, labels = api.sample(trained / "students", 7)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    for number, student in loaded.students.items():
        averaged = load_file(
            trained / f"students/checkpoints/step-00000002/{number}/generator.average-slow.safetensors"
        )
        held = dict(student.denoiser.named_parameters())
        assert all(torch.equal(held[name], value) for name, value in averaged.items())
        alone, _ = sample_images(student, 7, seed=0, batch=7)
        mine = torch.tensor([loaded.table[label] == number for label in labels.tolist()])
        # float32, and another number of rows in a call
        torch.testing.assert_close(together[mine], alone[mine], rtol=0, atol=1e-5)
        assert (together[~mine] - alone[~mine]).abs().max() > 1e-5


def test_students_trained_alone_are_joined_to_the_run_of_all(trained, tmp_path):
    joined = api.join([trained / "only-1", trained / "only-0"], tmp_path / "joined")
    ours, theirs = (checkpoint.read_state(checkpoint.latest(run)) for run in (joined, trained / "students"))
    assert ours["files"] == theirs["files"]  # SHA-256 of every file
    assert ours["readings"] == theirs["readings"] and ours["references"] == theirs["references"]
    parts = [checkpoint.read_state(checkpoint.latest(trained / f"only-{number}")) for number in range(2)]
    assert ours["training_seconds"] == sum(part["training_seconds"] for part in parts)
    assert {"0/generator/match", "1/critic/fit"} <= ours["readings"][0].keys()
    assert ours["step"] == theirs["step"] == 2
    assert torch.equal(api.sample(joined, 5)[0], api.sample(trained / "students", 5)[0])
    further = ("train.steps=3", "train.save_every=3")
    shutil.copytree(trained / "students", tmp_path / "students")
    for run in (joined, tmp_path / "students"):
        command("train", trained / "students.yaml", f"output={run}", *further)
    ours, theirs = (checkpoint.read_state(checkpoint.latest(run)) for run in (joined, tmp_path / "students"))
    assert ours["files"] == theirs["files"] and ours["step"] == theirs["step"] == 3


def test_runs_that_make_no_whole_are_not_joined(trained, tmp_path, capsys):
    def said(*runs):
        return refused(capsys, "join", *runs, "--out", tmp_path / "joined")

    one, other = trained / "only-0", trained / "only-1"
    assert "these are the runs of students [0]; give one run for each of 0 to 1" in said(one)
    assert "[0, 0]" in said(one, one)
    assert "is not the run of one student" in said(one, trained / "students")
    changed = ("method.only=1", f"output={tmp_path / 'changed'}", "players.critic.learning_rate=1e-3")
    command("train", trained / "students.yaml", *changed)
    assert "players.critic.learning_rate is 0.001, and 0.0001 there" in said(one, tmp_path / "changed")
    unsaved = ("method.only=0", f"output={tmp_path / 'unsaved'}", "train.save_every=0")
    command("train", trained / "students.yaml", *unsaved)
    assert "unsaved is at no checkpoint" in said(tmp_path / "unsaved", other)
    further = ("method.only=1", f"output={tmp_path / 'further'}", "train.steps=4")
    command("train", trained / "students.yaml", *further)
    assert "is at step-00000004, and " in said(one, tmp_path / "further")
    assert not (tmp_path / "joined").exists()
    (tmp_path / "joined").mkdir()
    (tmp_path / "joined" / "notes.txt").touch()
    assert "joined exists" in said(one, other)


def test_a_join_that_was_killed_is_made_again(trained, tmp_path, monkeypatch):
    def killed(path):
        raise KeyboardInterrupt

    runs, output = [trained / "only-0", trained / "only-1"], tmp_path / "joined"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(checkpoint, "to_disk", killed)
        api.join(runs, output)
    assert output.exists() and checkpoint.latest(output) is None
    again, whole = (checkpoint.read_state(checkpoint.latest(api.join(runs, o))) for o in (output, tmp_path / "whole"))
    assert again == whole


def test_a_student_alone_is_not_measured_against_all_in_training_or_comparison(trained, tmp_path, capsys):
    alone = ("train", trained / "students.yaml", "method.only=0", f"output={tmp_path / 'alone'}")
    assert "method.only=0 trains a share of the classes" in refused(
        capsys, *alone, "evaluate.every=1", "evaluate.features=nowhere"
    )
    compared = ("compare", trained / "students", trained / "only-1", "--out", tmp_path / "page")
    assert "is student 1 alone" in refused(capsys, *compared)


def launch(*arguments: object, processes: int) -> subprocess.CompletedProcess:
    """The command line by torchrun's own launcher, on gloo."""
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m", "diffdistill"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    line += [str(argument) for argument in arguments]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)


def test_students_spread_over_processes_are_those_of_one_process_bit_for_bit(trained, tmp_path):
    spread = ("train", trained / "students.yaml", f"output={tmp_path / 'spread'}", "--spread")
    left = launch(*spread, "--steps", 1, processes=2)
    assert left.returncode == 0 and not (tmp_path / "spread").exists(), left.stderr
    for number in range(2):
        assert checkpoint.latest(tmp_path / f"spread-student-{number}").name == "step-00000001"
    done = launch(*spread, processes=2)
    assert done.returncode == 0, done.stderr
    assert "going on from step 1" in done.stdout and "spread has all 2 students" in done.stdout
    ours, theirs = (checkpoint.latest(run) for run in (tmp_path / "spread", trained / "students"))
    assert checkpoint.read_state(ours)["files"] == checkpoint.read_state(theirs)["files"]  # SHA-256 of every file
    assert ours.name == theirs.name == "step-00000002"
    again = launch(*spread, processes=2)
    assert again.returncode == 0, again.stderr


def test_what_cannot_be_spread_is_refused_before_anything_is_written(trained, tmp_path, capsys):
    output = f"output={tmp_path / 'spread'}"
    spread = ("train", trained / "students.yaml", output, "--spread")
    assert "1 processes do not share out among method.students=2" in refused(capsys, *spread)
    assert "only a run of all students" in refused(capsys, *spread, "method.only=1")
    assert "only a run of all students" in refused(capsys, "train", trained / "teacher.yaml", output, "--spread")
    (tmp_path / "spread").mkdir()
    (tmp_path / "spread" / "notes.txt").touch()
    assert "spread exists; name another folder" in refused(capsys, *spread, "method.students=1")
    assert [path.name for path in tmp_path.iterdir()] == ["spread"]


def test_a_run_of_one_student_makes_its_classes_alone_and_is_not_measured_against_all(trained, tmp_path, capsys):
    alone, labels = api.sample(trained / "only-0", 4)
    assert labels.tolist() == [0, 1, 0, 1]
    together, _ = api.sample(trained / "students", 4, labels=[0, 1, 0, 1])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
    said = refused(capsys, "sample", trained / "only-0", "--out", tmp_path / "x.png", "--label", 2)
    assert "labels must be 40 numbers in [0, 2)" in said
    assert "makes only the classes [0, 1]" in refused(capsys, "evaluate", trained / "only-0")
    assert "trained by another run" in refused(capsys, "export", trained / "only-0", "--out", tmp_path / "pipelines")


def test_settings_of_players_serve_all_students_but_one_that_is_named(trained, tmp_path, capsys):
    values = recipe(tmp_path, trained / "exported")
    values["players"]["1/generator"] = {"learning_rate": 7e-4}
    config = parse(values)
    chosen = build.method(config, torch.device("cpu"))
    settings = build.player_settings(config, chosen.players())
    rates = {name: setting.learning_rate for name, setting in settings.items()}
    assert rates == dict.fromkeys(PLAYERS, 1e-4) | {"1/generator": 7e-4}
    for only in range(2):  # what is said of another run's student is no mistake
        values["method"]["only"] = only
        alone = parse(values)
        settings = build.player_settings(alone, build.method(alone, torch.device("cpu")).players())
        assert settings[f"{only}/generator"].learning_rate == (7e-4 if only else 1e-4)
    for players, words in (
        ({"generator": 1}, "exactly the keys"),
        ({"generator": 1, "critic": 1, "2/generator": 1}, "the whole name for one alone: 0/generator"),
        ({"generator": 1, "critic": 1, "0/generator": 1, "1/generator": 1}, "exactly the keys generator, critic"),
    ):
        values = recipe(tmp_path, trained / "exported")
        values["players"] = {name: {"learning_rate": 1e-4} for name in players}
        assert words in refused(capsys, "check", write_recipe(tmp_path / "bad.yaml", values))


def test_check_plans_the_memory_of_every_student_and_refuses_shares_that_are_none(trained, tmp_path, capsys):
    path = write_recipe(tmp_path / "students.yaml", recipe(tmp_path, trained / "exported"))
    command("check", path, "--run")
    said = capsys.readouterr().out
    assert all(player in said for player in PLAYERS) and "0/generator by match and 0/critic by fit" in said
    for shares, words in (
        ("{name: lists, classes: [[0], [1]]}", "gives class 2 to no student"),
        ("{name: lists, classes: [[0, 1, 2], [2]]}", "gives class 2 to students 0 and 1"),
        ("{name: blocs}", "did you mean blocks?"),
    ):
        assert words in refused(capsys, "check", path, f"method.shares={shares}")
    assert "leaves student 3 of 4 without a class" in refused(capsys, "check", path, "method.students=4")
    config = load_config(path, ["method.shares={name: lists, classes: [[2, 0], [1]]}"])
    assert build.method(config, torch.device("cpu")).generator.table == (0, 1, 0)


def test_classes_are_shared_by_the_centroids_in_a_file(trained, tmp_path, capsys):
    points, file, stored = (
        torch.tensor([[0.0, 1.0], [5.0, 5.0], [0.1, 0.9]]),
        tmp_path / "classes.safetensors",
        tmp_path / "c.safetensors",
    )
    save_file({"embeddings": points}, file)
    command("cluster", file, "--students", 2, "--out", stored)
    shares = f"method.shares={{name: clusters, embeddings: {file}, centroids: {stored}}}"
    path = write_recipe(tmp_path / "students.yaml", recipe(tmp_path, trained / "exported"))
    chosen = build.method(load_config(path, [shares]), torch.device("cpu"))
    assert sorted(chosen.shares) == [(0, 2), (1,)]
    write_centroids(torch.zeros(3, 2), stored)
    assert "for 3 classes and 2 students" in refused(capsys, "check", path, shares)


def test_a_smaller_student_matches_the_teacher_first_and_then_starts_from_what_it_learnt(trained, tmp_path):
    """The weights go from a score_matching run to every student's generator; the critics are the teacher's size."""
    teacher = teacher_recipe(tmp_path)
    network = copy.deepcopy(teacher["generator"]["network"])
    network["options"] |= {"block_out_channels": [4, 8]}
    small = {"network": network, "denoiser": teacher["generator"]["denoiser"]}
    matching = recipe(tmp_path, trained / "exported") | {
        "output": str(tmp_path / "matching"),
        "method": {"name": "score_matching"},
        "players": {"generator": {"learning_rate": 1e-3}},
        "generator": {"grid": {"steps": 3}, "step_rule": "heun", **small},
    }
    del matching["critic"]
    command("train", write_recipe(tmp_path / "matching.yaml", matching))
    students = recipe(tmp_path, trained / "exported")
    start = {"init_from": str(tmp_path / "matching"), "init_weights": "slow"}
    students["generator"] = {"grid": [20.0], **small, **start}
    path = write_recipe(tmp_path / "students.yaml", students)
    chosen = build.method(load_config(path), torch.device("cpu"))
    learnt = load_file(tmp_path / "matching/checkpoints/step-00000002/generator.average-slow.safetensors")
    for number in range(2):
        held = chosen.players()[f"{number}/generator"].parameters
        assert held.keys() == learnt.keys() and all(torch.equal(held[name], learnt[name]) for name in learnt)
    sizes = {name: sum(p.numel() for p in spec.parameters.values()) for name, spec in chosen.players().items()}
    assert sizes["0/generator"] < 0.6 * sizes["0/critic"]
    command("train", path)
    assert api.sample(tmp_path / "students", 3)[0].shape == (3, 3, 8, 8)


def test_a_second_stage_starts_each_student_from_its_own_of_the_first(trained, tmp_path, capsys):
    """As the paper's adversarial stage does; from the run of all, or, for one student, from that one's own."""
    values = recipe(tmp_path, trained / "exported")
    for source, only in (("students", -1), ("students", 1), ("only-1", 1)):
        values["generator"] = {"grid": [20.0], "init_from": str(trained / source), "init_weights": "slow"}
        values["method"]["only"] = only
        chosen = build.method(parse(values), torch.device("cpu"))
        for name, part in chosen.generator.parts.items():
            file = trained / source / f"checkpoints/step-00000002/{name}.average-slow.safetensors"
            held = dict(part.denoiser.named_parameters())
            assert all(torch.equal(held[key], value) for key, value in load_file(file).items())
    values["generator"]["init_from"], values["method"]["only"] = str(trained / "only-1"), -1
    said = refused(capsys, "train", write_recipe(tmp_path / "students.yaml", values))
    assert "has no 0/generator.average-slow; it has 1/critic.weights, 1/generator.average-slow" in said


def test_labels_and_images_of_a_run_are_those_of_the_share(trained):
    config = load_config(trained / "students.yaml")
    chosen = build.method(config, torch.device("cpu"))
    data = build.streams(config, chosen, torch.device("cpu"))
    batch, real = data.draw(Rng(("share",), range(100))), build.images(config.data, "train")
    for number, share in enumerate(((0, 1), (2,))):
        assert set(batch[f"{number}/conditions"].cond["label"].tolist()) == set(share)
        images = batch[f"{number}/images"]
        assert set(images.cond["label"].tolist()) == set(share)
        for label in share:
            known = real.select((real.labels == label).nonzero()[:, 0])[0]
            mine = images.x0[images.cond["label"] == label]
            assert all((image == known).flatten(1).all(1).any() for image in mine)
    with pytest.raises(ValueError, match=r"no image of the classes \[7\]"):
        real.of_classes([7])


def test_an_export_is_sampled_through_its_router_and_reproduces_the_run(trained, tmp_path, capsys):
    command("export", trained / "students", "--out", tmp_path / "pipelines")
    assert "2 students behind router.json" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "pipelines" / "router.json").read_text())
    assert manifest["router"] == [0, 0, 1] and len(manifest["students"]) == 2
    pictures = api.load_routed(tmp_path / "pipelines")(labels=[2, 0, 1, 2], seed=3)
    assert [picture.size for picture in pictures] == [(8, 8)] * 4
    assert NUM_CLASSES == len(manifest["router"])
