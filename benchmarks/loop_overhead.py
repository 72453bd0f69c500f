"""What the loop costs: seconds per step of the Trainer over the seconds of its bare forward and backward passes.

    python benchmarks/loop_overhead.py --out benchmarks/results/loop_overhead.json

The step is DMD2's (interleaved) with the network of configs/fashion/teacher.yaml and random weights. "Bare" makes the
same calls of the same networks on tensors that lie ready, in the same modes, and calls backward; "whole" is
`Trainer.one_step`, with draws, losses, reduction, clipping, AdamW and averages. Both take turns in one process, and the
medians are compared.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
import yaml
from accelerate import Accelerator
from diffusers import UNet2DModel

from diffdistill.backbones.diffusers import DiffusersBackbone
from diffdistill.critic import Critic
from diffdistill.data import Labels, Streams
from diffdistill.denoiser import Denoiser
from diffdistill.generator import Generator
from diffdistill.method import Networks
from diffdistill.methods.dmd2 import DMD2
from diffdistill.player import LearningRate, Player, PowerDecay, only
from diffdistill.prediction import Prediction
from diffdistill.process import VE
from diffdistill.teacher import Teacher
from diffdistill.trainer import Schedule, Trainer

REPOSITORY = Path(__file__).parents[1]


def make_trainer(options: dict, *, batch: int, ratio: int, seed: int) -> Trainer:
    """A Trainer of DMD2 with networks of random weights."""
    torch.manual_seed(seed)

    def denoiser() -> Denoiser:
        backbone = DiffusersBackbone(UNet2DModel(**options))
        return Denoiser(backbone, VE(sigma_data=0.5), Prediction.F, clock="edm", scale_input=True)

    networks = Networks(lambda: Generator(denoiser(), (80.0,)), lambda: Critic(denoiser()), Teacher(denoiser()))
    method = DMD2(DMD2.Config(ratio=ratio), networks)
    players = {}
    for name, spec in method.players().items():
        optimizer = torch.optim.AdamW(list(spec.parameters.values()), lr=1e-4, fused=True)
        players[name] = Player(spec, optimizer, LearningRate(1e-4), max_norm=1.0, reduce=None)
    players["generator"].average("power", PowerDecay(0.1))
    return Trainer(
        method,
        players,
        Streams({"conditions": Labels(options["num_class_embeds"])}),
        Accelerator(cpu=True),
        Schedule(steps=10**9, batch=batch, log_every=0, save_every=0),
        seed=seed,
        output=Path(tempfile.gettempdir()),
    )


def bare_step(trainer: Trainer, *, batch: int, ratio: int) -> Callable[[], None]:
    """The forward and backward passes of one step and nothing else."""
    method = trainer.method
    generator, critic, teacher = method.generator.denoiser.backbone, method.critic.denoiser.backbone, method.teacher
    real = teacher.denoiser.backbone
    x, time_ = torch.randn(batch, *generator.sample_shape), torch.randn(batch) * 100
    cond = {"label": torch.randint(0, generator.num_classes, (batch,))}
    upstream = torch.randn_like(x)

    def step() -> None:
        with only("generator", trainer.players):
            fake = generator(x, time_, cond)
            with torch.no_grad():
                real(x, time_, cond)
                critic(x, time_, cond)
            fake.backward(upstream)
        with only("critic", trainer.players):
            critic(x, time_, cond).backward(upstream)
            for _ in range(ratio - 1):
                with torch.no_grad():
                    generator(x, time_, cond)
                critic(x, time_, cond).backward(upstream)
        for player in trainer.players.values():
            player.optimizer.zero_grad(set_to_none=True)

    return step


def seconds(act: Callable[[], None]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(("git", *arguments), cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout

    return git("rev-parse", "HEAD").strip() + (" with changes" if git("status", "--porcelain", "diffdistill") else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--ratio", type=int, default=2, help="DMD2's critic updates per generator update")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    parser.add_argument("--profile", action="store_true", help="print where one whole step spends its time, and stop")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = yaml.safe_load((REPOSITORY / "configs/fashion/teacher.yaml").read_text())
    network = config["generator"]["network"]["options"]
    trainer = make_trainer(network, batch=options.batch, ratio=options.ratio, seed=options.seed)
    bare = bare_step(trainer, batch=options.batch, ratio=options.ratio)
    for act in (bare, trainer.one_step):  # warm-up: allocations, kernels, the optimizer's state
        act()
    if options.profile:
        with torch.profiler.profile() as profile:
            trainer.one_step()
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=30))
        return
    times: dict[str, list[float]] = {"bare": [], "whole": []}
    for repeat in range(options.repeats):
        pair = [("bare", bare), ("whole", trainer.one_step)]
        for name, act in pair if repeat % 2 else pair[::-1]:
            times[name].append(seconds(act))
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio = medians["whole"] / medians["bare"]
    print(f"{'':8}{'median s':>10}{'min s':>10}{'max s':>10}")
    for name, values in times.items():
        print(f"{name:8}{medians[name]:10.4f}{min(values):10.4f}{max(values):10.4f}")
    print(f"whole / bare = {ratio:.4f} (at most 1.05 is wanted)")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "command": "python benchmarks/loop_overhead.py " + " ".join(sys.argv[1:]),
            "commit": commit(),
            "hardware": f"{platform.processor() or platform.machine()}, {options.threads} thread(s)",
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "diffusers": diffusers.__version__,
            },
            "seed": options.seed,
            "batch": options.batch,
            "critic_updates_per_step": options.ratio,
            "repeats": options.repeats,
            "seconds": times,
            "median_seconds": medians,
            "ratio": ratio,
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
