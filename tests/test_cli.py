"""The commands: a chain in which each reads what the one before wrote, and every mistake told in one line."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import refused, student_recipe, teacher_recipe, write_images, write_recipe

from diffdistill import api, networks
from diffdistill.cli import main, parse
from diffdistill.methods.dmd2 import DMD2

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
LONG = ("train.log_every=1", "train.save_every=100000")


def command(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished teacher run and its export; read, never written."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(folder / "teacher.yaml", teacher_recipe(folder))
    command("train", recipe, "pictures={every: 2, count: 6, columns: 3, scale: 1}")
    command("export", folder / "teacher", "--as", "denoiser", "--weights", "fast", "--out", folder / "exported")
    return folder


@pytest.fixture
def teacher(tmp_path):
    return write_recipe(tmp_path / "teacher.yaml", teacher_recipe(tmp_path))


@pytest.fixture
def student(tmp_path, trained):
    return write_recipe(tmp_path / "student.yaml", student_recipe(tmp_path, trained / "exported"))


def test_a_run_leaves_its_recipe_log_checkpoints_and_pictures(trained):
    run = trained / "teacher"
    assert api.run.read_config(run).train.steps == 4
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == [2, 4]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    pictures = sorted(path.name for path in (run / "samples").iterdir())
    assert pictures == ["step-00000000.png", "step-00000002.png", "step-00000004.png"]
    assert Image.open(run / "samples" / pictures[0]).size == (3 * 9 - 1, 2 * 9 - 1)


def test_the_exported_denoiser_is_the_average_that_was_asked_for(trained):
    averaged = load_file(trained / "teacher/checkpoints/step-00000004/generator.average-fast.safetensors")
    exported = dict(networks.read_denoiser(trained / "exported")[0].named_parameters())
    assert exported.keys() == averaged.keys()
    for name, value in averaged.items():
        assert torch.equal(exported[name], value)


def test_a_student_is_distilled_sampled_measured_and_exported(trained, student, tmp_path, capsys):
    command("train", student)
    run = tmp_path / "student"
    said = refused(capsys, "sample", trained / "exported/network", "--out", tmp_path / "samples.png")
    assert "teacher.denoiser is missing" in said
    for source, more in ((run, ()), (run, ("--teacher-steps", 2)), (trained / "exported", ("--teacher-steps", 2))):
        command("sample", source, "--out", tmp_path / "samples.png", "--count", 6, "--columns", 3, "--scale", 1, *more)
        assert Image.open(tmp_path / "samples.png").size == (26, 17)
    capsys.readouterr()
    command("export", run, "--out", tmp_path / "pipeline")
    assert "maximum absolute difference" in capsys.readouterr().out
    assert (tmp_path / "pipeline" / "model_index.json").is_file()
    said = refused(capsys, "sample", tmp_path / "pipeline", "--out", tmp_path / "samples.png")
    assert "in how many steps" in said
    command("sample", tmp_path / "pipeline", "--out", tmp_path / "samples.png", "--teacher-steps", 1)


@pytest.mark.parametrize("trunk", ["critic", "teacher"])
def test_the_gan_term_trains_its_head_on_the_default_taps_of_either_trunk(trained, tmp_path, trunk):
    recipe = student_recipe(tmp_path, trained / "exported")
    del recipe["critic"]  # so that the taps are the default
    student = write_recipe(tmp_path / "student.yaml", recipe)
    command("train", student, f"critic.trunk={trunk}", "train.save_every=1")
    lines = [json.loads(line) for line in (tmp_path / "student/log.jsonl").read_text().splitlines()]
    trained_lines = [line for line in lines if line["kind"] == "train"]
    assert all(line["generator/match/gan"] > 0 and line["critic/fit/gan"] > 0 for line in trained_lines)
    first, second = (
        load_file(tmp_path / f"student/checkpoints/step-0000000{step}/critic.weights.safetensors") for step in (1, 2)
    )
    heads = [name for name in first if name.startswith("head.")]
    assert heads and all(not torch.equal(first[name], second[name]) for name in heads)


def test_check_reads_no_weights_and_plans_the_memory_of_every_role(trained, student, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(trained / "exported", bare)
    for file in bare.glob("network/*.safetensors"):
        file.unlink()
    command("check", student, f"teacher.path={bare}")
    out = capsys.readouterr().out
    config = api.as_config(student, [f"teacher.path={bare}"])
    roles = {role.name: role for role in api.trial.plan_memory(config)}
    assert list(roles) == ["teacher", "generator", "critic"] and all(name in out for name in roles)
    model, _ = networks.read_denoiser(trained / "exported")
    size = sum(parameter.numel() for parameter in model.parameters())
    assert roles["teacher"].num_parameters == roles["generator"].num_parameters == size
    assert roles["critic"].num_parameters > size  # and its discriminator's head
    assert roles["generator"].total == 4 * (4 * size) and roles["teacher"].total == 4 * size
    assert not (tmp_path / "student").exists()


def test_check_run_tries_every_update_and_writes_nothing(student, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    command("check", student, "--run")
    out = capsys.readouterr().out
    assert "generator by match and critic by fit" in out and "2. critic by fit" in out
    assert re.search(r"[\d.]+ seconds per step, [\d.]+ [KMG]iB peak memory", out)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_same_command_goes_on_by_itself_and_says_so(teacher, tmp_path, capsys):
    command("train", teacher, "train.steps=2")
    first = (tmp_path / "teacher/log.jsonl").read_text()
    capsys.readouterr()
    command("train", teacher, "train.steps=4")  # longer is the same recipe while no learning rate decays
    assert "going on from step 2 of 4" in capsys.readouterr().out
    assert (tmp_path / "teacher/log.jsonl").read_text().startswith(first)
    whole = tmp_path / "whole"
    command("train", teacher, f"output={whole}")
    names = "generator.weights.safetensors", "generator.average-fast.safetensors", "generator.optimizer.safetensors"
    for name in names:
        ours = load_file(tmp_path / "teacher/checkpoints/step-00000004" / name)
        theirs = load_file(whole / "checkpoints/step-00000004" / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_pictures_and_evaluation_change_nothing_that_is_computed(teacher, trained, tmp_path):
    command("train", teacher, "pictures={every: 1, count: 4}")
    name = "checkpoints/step-00000004/generator.optimizer.safetensors"
    ours, theirs = load_file(tmp_path / "teacher" / name), load_file(trained / "teacher" / name)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_methods_are_listed_with_reference_and_needs(capsys):
    command("methods")
    out = " ".join(capsys.readouterr().out.split())  # wherever its lines are broken
    assert "dmd2" in out and "arXiv:2405.14867" in out
    reads = "conditions, and images where the GAN term is on or inputs are noised"
    assert f"needs a teacher; reads {reads}; trains generator, critic" in out
    assert "memory 9 (3 networks, 2 trained)" in out
    command("methods", "sid")
    out = capsys.readouterr().out
    assert "alpha: 1.0" in out and "configs/cifar10/sid.yaml" in out and "method: {name: sid}" in out
    assert "METHOD='denois' is unknown (did you mean denoise?)" in refused(capsys, "methods", "denois")


@pytest.mark.parametrize(
    "name",
    [
        "train",
        "check",
        "prepare",
        "check-teacher",
        "compare",
        "sample",
        "evaluate",
        "export",
        "report",
        "join",
        "cluster",
        "methods",
    ],
)
def test_every_command_has_help_with_an_example(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    assert f"example:\n  diffdistill {name}" in capsys.readouterr().out


def test_times_that_are_no_numbers_are_named(capsys):
    with pytest.raises(SystemExit):
        main(["sample", "run", "--out", "a.png", "--grid", "80,a"])
    assert "argument --grid: '80,a' must be numbers with commas between, e.g. 80,0.982" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["trian"], ["sample"], ["train"], ["sample", "x", "--out", "y", "--count", "z"]]
)
def test_a_wrong_command_line_is_one_line_and_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "--help" in err


def test_a_mistake_in_the_recipe_is_one_line_and_leaves_nothing(teacher, tmp_path, capsys):
    for name in ("train", "check"):
        assert "unknown key train.stepz (did you mean steps?)" in refused(capsys, name, teacher, "train.stepz=3")
    assert not (tmp_path / "teacher").exists()


def test_a_missing_teacher_is_named(student, tmp_path, capsys):
    for name in ("train", "check"):
        assert "nowhere" in refused(capsys, name, student, f"teacher.path={tmp_path / 'nowhere'}")
    assert "needs a teacher; set teacher.path" in refused(
        capsys, "train", student, "teacher=null", *network_overrides(tmp_path)
    )
    assert "nothing to start from" in refused(capsys, "train", student, "teacher=null")
    assert not (tmp_path / "student").exists()


def network_overrides(tmp_path, **options) -> list[str]:
    made = teacher_recipe(tmp_path)["generator"]
    made["network"]["options"] |= options
    return [f"generator.{key}={json.dumps(made[key])}" for key in ("network", "denoiser")]


@pytest.mark.parametrize("damage", ["truncated", "missing", "renamed", "reshaped", "config"])
def test_damaged_weights_of_a_teacher_are_refused(trained, student, tmp_path, capsys, damage):
    copy = tmp_path / "copy"
    shutil.copytree(trained / "exported", copy)
    (weights,) = copy.glob("network/*.safetensors")
    tensors = load_file(weights)
    match damage:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "missing":
            weights.unlink()
        case "renamed":
            save_file({name.replace("conv_in", "conv_im"): tensor for name, tensor in tensors.items()}, weights)
        case "reshaped":
            save_file(tensors | {"conv_in.weight": tensors["conv_in.weight"][:, :2].contiguous()}, weights)
        case "config":
            (copy / "denoiser.json").write_text('{"process": ')
    assert str(copy) in refused(capsys, "train", student, f"teacher.path={copy}")
    assert not (tmp_path / "student").exists()


def test_a_student_that_is_not_of_the_teachers_shape_or_classes_is_refused(student, tmp_path, capsys):
    smaller = network_overrides(tmp_path, sample_size=4)
    assert "samples of shape (3, 4, 4), the teacher of (3, 8, 8)" in refused(capsys, "train", student, *smaller)
    fewer = network_overrides(tmp_path, num_class_embeds=2)
    assert "knows 2 classes, the teacher 3" in refused(capsys, "train", student, *fewer)


def test_a_smaller_student_has_weights_of_its_own(student, tmp_path):
    command("train", student, *network_overrides(tmp_path, block_out_channels=[4, 4], attention_head_dim=4))
    stored = load_file(tmp_path / "student/checkpoints/step-00000002/generator.weights.safetensors")
    assert stored["backbone.network.conv_in.weight"].shape[0] == 4


def test_data_that_does_not_fit_the_network_is_refused(teacher, tmp_path, capsys):
    def answer(**options) -> str:
        return refused(capsys, "train", teacher, f"data.path={write_images(tmp_path / 'other.npz', **options)}")

    assert "images of shape (3, 16, 16), but the network takes (3, 8, 8)" in answer(size=16)
    assert "must be uint8 (N, H, W, 3)" in answer(channels=1)
    assert "has 5 classes, but the network 3" in answer(classes=5)
    assert "must hold levels 0 to 255, and not 0 to 1" in answer(high=2)
    assert "nowhere" in refused(capsys, "train", teacher, f"data.path={tmp_path / 'nowhere'}")
    assert "data.name is none" in refused(capsys, "train", teacher, "data={name: none}")
    assert not (tmp_path / "teacher").exists()


def test_other_exclusive_or_unknown_choices_are_refused(student, teacher, capsys):
    assert "players must have exactly the keys generator, critic" in refused(
        capsys, "train", student, "players={generator: {learning_rate: 0.1}}"
    )
    assert "critic.taps names 'middle'" in refused(capsys, "train", student, "critic.taps=[middle]")
    assert "gan_critic_weight=0.0 must be both positive" in refused(
        capsys, "train", student, "method.gan_critic_weight=0.0"
    )
    assert "torchrun" in refused(capsys, "train", teacher, "train.sharding=fsdp2")
    unguided = "this network was trained without an unconditional label"
    assert f"teacher.guidance=2.0: {unguided}" in refused(capsys, "train", student, "teacher.guidance=2.0")
    assert "norm_num_group" in refused(capsys, "check", teacher, "generator.network.options.norm_num_group=4")
    assert "fails on a sample" in refused(capsys, "check", teacher, "generator.network.options.attention_head_dim=16")
    assert "gives shape (1, 8, 8)" in refused(capsys, "check", teacher, "generator.network.options.out_channels=1")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without cuda")
def test_a_device_that_is_not_there_is_refused(teacher, capsys):
    assert "train.device=cuda" in refused(capsys, "train", teacher, "train.device=cuda")


def test_a_changed_recipe_is_refused_with_both_values_and_nothing_is_lost(teacher, trained, tmp_path, capsys):
    run = tmp_path / "teacher"
    command("train", teacher)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    said = refused(capsys, "train", teacher, "seed=1", "players.generator.learning_rate=0.5")
    assert "is at step 4 already" in refused(capsys, "train", teacher, "train.steps=3")
    assert "seed was 0 and is 1" in said and "players.generator.learning_rate was 0.001 and is 0.5" in said
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_new_recipe_begins_from_the_weights_of_a_run(teacher, trained, tmp_path):
    fresh = tmp_path / "fresh"
    source = f"generator.init_from={trained / 'teacher'}", "generator.init_weights=fast"
    still = "train.steps=1", "train.save_every=1", "players.generator.learning_rate=1e-30"
    command("train", teacher, f"output={fresh}", *source, *still)
    ours = load_file(fresh / "checkpoints/step-00000001/generator.weights.safetensors")
    theirs = load_file(trained / "teacher/checkpoints/step-00000004/generator.average-fast.safetensors")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_unknown_weights_or_sources_are_refused(teacher, trained, tmp_path, capsys):
    said = refused(capsys, "sample", trained / "teacher", "--out", tmp_path / "a.png", "--weights", "slow")
    assert "known are raw, fast" in said
    said = refused(
        capsys, "train", teacher, f"generator.init_from={trained / 'teacher'}", "generator.init_weights=slow"
    )
    assert "average-slow" in said
    assert "nowhere" in refused(capsys, "sample", tmp_path / "nowhere", "--out", tmp_path / "a.png")
    assert "nowhere" in refused(capsys, "train", teacher, f"generator.init_from={tmp_path / 'nowhere'}")
    assert "nowhere" in refused(capsys, "export", tmp_path / "nowhere", "--out", tmp_path / "out")


def test_an_output_that_cannot_be_written_is_refused(teacher, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for name in ("train", "check"):
        assert "is no folder; choose another" in refused(capsys, name, teacher, f"output={tmp_path / 'file' / 'run'}")


@pytest.mark.parametrize("file", ["generator.weights.safetensors", "generator.optimizer.safetensors", "state.json"])
def test_a_corrupt_checkpoint_is_refused_and_nothing_is_lost(teacher, tmp_path, capsys, file):
    command("train", teacher)
    newest = tmp_path / "teacher/checkpoints/step-00000004"
    content = bytearray((newest / file).read_bytes())
    content[len(content) // 2] ^= 0xFF
    (newest / file).write_bytes(content)
    log = (tmp_path / "teacher/log.jsonl").read_bytes()
    assert "use an earlier checkpoint" in refused(capsys, "train", teacher, "train.steps=6")
    assert (tmp_path / "teacher/log.jsonl").read_bytes() == log
    shutil.rmtree(newest)
    command("train", teacher)  # as the message says: from the earlier one


def test_a_run_without_its_recipe_is_refused(teacher, tmp_path, capsys):
    command("train", teacher)
    (tmp_path / "teacher/config.yaml").unlink()
    assert "holds checkpoints but no config.yaml" in refused(capsys, "train", teacher)


def test_a_run_that_is_not_finite_stops_with_status_1_and_one_line(teacher, tmp_path, capsys):
    status = main(["train", str(teacher), "players.generator.learning_rate=1e30", "players.generator.epsilon=1e-30"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert status == 1 and "was not finite" in said and "player generator" in said


def test_running_out_of_memory_names_who_and_what_helps(student, capsys, monkeypatch):
    def full(self, *arguments):
        raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")

    monkeypatch.setattr(DMD2, "_critic_loss", full)
    assert main(["train", str(student)]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    for word in ("term fit of player critic", "20.00 GiB", "teacher ", "generator ", " KiB"):
        assert word in said
    for way_out in ("train.accumulate", "train.gradient_checkpointing", "train.sharding"):
        assert way_out in said


def stopped_run(teacher: Path, run: Path, number: signal.Signals) -> int:
    """Start a long run, send it a signal once it has taken a step; the step that it says it saved."""
    line = [sys.executable, "-m", "diffdistill", "train", str(teacher), *LONG, "train.steps=100000"]
    first = subprocess.Popen(line, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not ((run / "log.jsonl").is_file() and (run / "log.jsonl").stat().st_size):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(number)
    said = first.communicate(timeout=60)[1]
    assert first.returncode == 128 + number
    assert "Traceback" not in said
    found = re.search(rf"stopped by {number.name} at step (\d+) .* Run the same command again", said.splitlines()[-1])
    return int(found[1])


def test_sigterm_saves_and_leaves(teacher, tmp_path):
    step = stopped_run(teacher, tmp_path / "teacher", signal.SIGTERM)
    assert (tmp_path / "teacher/checkpoints" / f"step-{step:08d}" / "state.json").is_file()


def test_ctrl_c_saves_and_leaves_and_the_second_command_finishes(teacher, tmp_path, capsys):
    run = tmp_path / "teacher"
    step = stopped_run(teacher, run, signal.SIGINT)
    command("train", teacher, *LONG, f"train.steps={step + 2}")
    assert f"going on from step {step} of {step + 2}" in capsys.readouterr().out
    logged = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert logged == list(range(1, step + 3))


def test_a_folder_that_another_process_writes_is_refused_until_that_one_is_killed(teacher, tmp_path, capsys):
    line = [sys.executable, "-m", "diffdistill", "train", str(teacher), *LONG, "train.steps=100000"]
    first = subprocess.Popen(line, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    try:
        log, deadline = tmp_path / "teacher/log.jsonl", time.monotonic() + 60
        while not (log.is_file() and log.stat().st_size):
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        said = refused(capsys, "train", teacher, *LONG)
        assert f"another process is writing into {tmp_path / 'teacher'}; wait" in said
        assert first.poll() is None
    finally:
        first.kill()
        first.wait(timeout=60)
    command("train", teacher)


def test_a_mistake_in_a_real_process_is_one_line_and_status_2(teacher):
    line = [sys.executable, "-m", "diffdistill", "train", str(teacher), "train.stepz=3"]
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "did you mean steps?" in done.stderr


def test_overrides_may_stand_behind_options():
    options = parse(["check", "my.yaml", "train.steps=3", "--run", "train.batch=4"])
    assert options.overrides == ["train.steps=3", "train.batch=4"] and options.run
    for wrong in (["check", "my.yaml", "--nope=3"], ["check", "my.yaml", "--run", "word"], ["sample", "run", "a=1"]):
        with pytest.raises(SystemExit) as left:
            parse(wrong)
        assert left.value.code == 2
