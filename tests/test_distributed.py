"""Two gloo processes compute what one does. One spawn runs all cases, since starting processes is what costs time."""

import dataclasses
import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from cases import CASES, PERCEPTUAL, UNET, all_tensors, make_trainer
from safetensors.torch import load_file, save_file
from test_contract import assert_same, assert_same_lines, log_lines

from diffdistill import build, checkpoint
from diffdistill.player import whole
from diffdistill.trainer import NonFinite, Schedule

SCHEDULE = Schedule(steps=2, batch=12, accumulate=3, log_every=2, save_every=1, keep_last=5)
ALL = {**CASES, "unet": UNET, "perceptual": PERCEPTUAL}
KINDS = ("replicated", "fsdp2")
RESUMED = ("denoise", "dmd2-alternating-gan")


def shard(spec):
    return build.shard(spec, torch.device("cpu"))


def worker(rank: int, folder: str, port: int) -> None:
    """One of two ranks: train every case in both ways, and leave tensors and logs in the folder."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    for kind in KINDS:
        for name, case in ALL.items():
            run, options = Path(folder) / kind / name, {"shard": shard} if kind == "fsdp2" else {}
            trainer = make_trainer(case, run, schedule=SCHEDULE, **options)
            trainer.run()
            leave(trainer, run / "tensors.safetensors", rank)
            if name in RESUMED:
                trainer = make_trainer(case, run, schedule=SCHEDULE, **options)
                trainer.resume(run / "checkpoints" / "step-00000001")
                trainer.run()
                leave(trainer, run / "resumed.safetensors", rank)
        stop_together(Path(folder) / kind / "stopped", rank, **options)
    low_precision(Path(folder) / "bf16", rank)
    follow_sharded(Path(folder) / "averages", rank)
    torch.distributed.destroy_process_group()


def leave(trainer, path: Path, rank: int) -> None:
    tensors = all_tensors(trainer)
    if rank == 0:
        save_file({key: value.contiguous() for key, value in tensors.items()}, path)


def stop_together(run: Path, rank: int, **options) -> None:
    """An infinite sample on the second rank alone, and then a signal to the first rank alone."""
    schedule = dataclasses.replace(SCHEDULE, steps=6, save_every=0)
    trainer = make_trainer(CASES["denoise"], run / "bad", schedule=schedule, **options)
    trainer.data = Poisoned(trainer.data, slot=11, step=3)
    try:
        trainer.run()
        message = "nothing was raised"
    except NonFinite as error:
        message = str(error)
    (run / f"message-{rank}.txt").write_text(message)
    leave(trainer, run / "bad.safetensors", rank)
    trainer = make_trainer(CASES["denoise"], run / "signalled", schedule=schedule, **options)
    if rank == 0:
        trainer.data = Signalling(trainer.data, step=3)
    (run / f"signal-{rank}.txt").write_text(str(trainer.run()))


def low_precision(run: Path, rank: int) -> None:
    """bf16 with sharded parameters: the network's inputs as it saw them, and the dtypes of what the optimizer reads."""
    case = dataclasses.replace(CASES["dmd2"], grid=(20.0, 1.0))
    trainer = make_trainer(case, run, schedule=SCHEDULE, shard=shard, dtype=torch.float32, mixed_precision="bf16")
    times: list[torch.Tensor] = []
    backbone = trainer.method.generator.denoiser.backbone
    backbone.register_forward_hook(lambda module, inputs, output: times.append(inputs[1].detach().clone()))
    trainer.update(0, trainer.method.plan(0)[0])
    parameters = trainer.players["generator"].parameters
    tensors = {f"time-{number}": time for number, time in enumerate(times)}
    tensors |= {f"parameter-{number}": whole(parameter.detach()) for number, parameter in enumerate(parameters)}
    if rank == 0:
        run.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in tensors.items()}, run / "seen.safetensors")


def follow_sharded(run: Path, rank: int) -> None:
    """A whole network that is to follow a sharded player."""
    trainer = make_trainer(CASES["denoise"], run, schedule=SCHEDULE, shard=shard)
    player = trainer.players["generator"]
    try:
        player.follow_with("target", CASES["denoise"].make().generator.denoiser, lambda step: 0)
        message = "nothing was raised"
    except ValueError as error:
        message = str(error)
    run.mkdir(parents=True, exist_ok=True)
    (run / f"message-{rank}.txt").write_text(message)


@dataclasses.dataclass
class Poisoned:
    """A stream whose sample in one slot is infinite from one step on."""

    data: object
    slot: int
    step: int

    def draw(self, rng):
        batch = self.data.draw(rng)
        if self.slot in rng.slots and rng.key[2] >= self.step:
            batch["images"].x0[rng.slots.index(self.slot)] = float("inf")
        return batch


@dataclasses.dataclass
class Signalling:
    """A stream in whose draw a SIGTERM reaches this process."""

    data: object
    step: int

    def draw(self, rng):
        if rng.key[2] == self.step and rng.slots[0] == 0:  # once: a second signal would act at once
            os.kill(os.getpid(), 15)
        return self.data.draw(rng)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "accelerate"])
    port = 20000 + os.getpid() % 12000  # below those that the system lends to other programs
    processes = [context.Process(target=worker, args=(rank, str(folder), port)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0, 0]
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    made = {}
    for name, case in ALL.items():
        trainer = make_trainer(case, folder / name, schedule=SCHEDULE)
        trainer.run()
        made[name] = (all_tensors(trainer), folder / name)
    return made


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(kind, name, two, one):
    tensors, run = one[name]
    # float64: only the order of sums differs
    assert_same(load_file(two / kind / name / "tensors.safetensors"), tensors, rtol=1e-12, atol=1e-12)
    assert_same_lines(log_lines(two / kind / name), log_lines(run), rel=1e-12)


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_resume_bit_for_bit(kind, name, two):
    first, second = (load_file(two / kind / name / f"{file}.safetensors") for file in ("tensors", "resumed"))
    assert_same(second, first, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_two_processes_resumes_in_one(kind, two, one, tmp_path):
    trainer = make_trainer(CASES["dmd2"], tmp_path, schedule=SCHEDULE)
    trainer.resume(two / kind / "dmd2" / "checkpoints" / "step-00000001")
    trainer.run()
    assert_same(all_tensors(trainer), one["dmd2"][0], rtol=1e-12, atol=1e-12)
    assert_same_lines(log_lines(tmp_path)[-1:], log_lines(one["dmd2"][1])[-1:], rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_value_on_one_rank_stops_all_before_the_optimizer(kind, two, tmp_path):
    stopped = two / kind / "stopped"
    for rank in range(2):
        assert "step 3: term denoise of player generator" in (stopped / f"message-{rank}.txt").read_text()
    trainer = make_trainer(CASES["denoise"], tmp_path, schedule=dataclasses.replace(SCHEDULE, steps=3))
    trainer.run()
    assert_same(load_file(stopped / "bad.safetensors"), all_tensors(trainer), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_to_one_rank_stops_all_at_one_step(kind, two):
    stopped = two / kind / "stopped"
    assert [(stopped / f"signal-{rank}.txt").read_text() for rank in range(2)] == ["15", "15"]
    assert checkpoint.read_state(checkpoint.latest(stopped / "signalled"))["step"] == 4


def test_a_whole_network_that_follows_a_sharded_player_is_refused(two):
    for rank in range(2):
        said = (two / "averages" / f"message-{rank}.txt").read_text()
        assert said.startswith("target is a network that follows a player whose parameters are sharded")
        assert "shard it in the same way" in said


def test_sharded_bf16_keeps_times_and_masters_in_float32(two, tmp_path):
    """FSDP2's own mixed precision would cast a module's inputs: a time of 748.9 would become 748."""
    seen = load_file(two / "bf16" / "seen.safetensors")
    trainer = make_trainer(
        CASES["dmd2"],
        tmp_path,
        schedule=SCHEDULE,
        dtype=torch.float32,
        mixed_precision="bf16",
    )
    trainer.update(0, trainer.method.plan(0)[0])
    for number, parameter in enumerate(trainer.players["generator"].parameters):
        sharded = seen[f"parameter-{number}"]
        assert sharded.dtype == parameter.dtype == torch.float32
        # one AdamW step moves a weight by at most about the learning rate, 0.005 here; bf16 may round its gradient
        torch.testing.assert_close(sharded, parameter.detach(), rtol=0, atol=2e-2)
    times = [value for key, value in seen.items() if key.startswith("time-")]
    assert times and all(time.dtype == torch.float32 for time in times)
    expected = torch.tensor(20.0, dtype=torch.float64).log().mul(250).float()
    assert any(torch.all((time - expected).abs() < 1e-3) for time in times)
