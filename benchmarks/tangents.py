"""What the tangent of a network costs beside its forward pass, and an sCM step too long for math attention.

    python benchmarks/tangents.py --out benchmarks/results/tangents_cpu.json                     on a CPU
    python benchmarks/tangents.py --device cuda --out benchmarks/results/tangents_h200.json      on a GPU

Passes take turns in one process, and medians are compared; memory is what the allocator held at its peak beyond weights
and inputs. The long step is a whole one: loss, tangent and backward pass through a transformer of 16,384 tokens. It is
taken once freely, and then by both kinds of attention in processes that may use a quarter more than it did.
"""

import argparse
import multiprocessing
import resource
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import MIB, Clock, Record, header, peak_mib, resident_mib
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffdistill.backbones.diffusers import DiffusersBackbone
from diffdistill.denoiser import Denoiser
from diffdistill.generator import Generator
from diffdistill.method import Networks, Sample
from diffdistill.methods.scm import SCM
from diffdistill.networks import read_denoiser
from diffdistill.prediction import Prediction
from diffdistill.process import Rectified, Trig, lift
from diffdistill.rng import Rng
from diffdistill.tangents import Exact, Field, Tangents, directional
from diffdistill.teacher import Teacher

TEACHER = Path(__file__).parents[1] / "checkpoints" / "fashion-edm"
ALLOWANCE = 1.25  # of what the long step took: room for what allocators and threads do differently from run to run


@dataclass(frozen=True)
class MathExact(Tangents):
    """`Exact` as PyTorch has it: forward mode through math attention, whose matrices of scores it holds."""

    def __call__(self, field: Field, x: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
        pace = t.sin() * t.cos()
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(field, (x, t), (lift(pace, x) * velocity, pace))[1]


ATTENTION: dict[str, type[Tangents]] = {"flash_jvp": Exact, "math": MathExact}


def transformer(size: int, *, layers: int, heads: int, seed: int) -> Denoiser:
    """A DiT of (size / 2)^2 tokens with random weights, a flow's."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        sample_size=size,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    return Denoiser(
        DiffusersBackbone(model), Rectified(), Prediction.VELOCITY, clock="thousand", scale_input=False
    ).eval()


def passes(model: Denoiser, batch: int, device: torch.device, seed: int) -> dict[str, Callable[[], Any]]:
    """A forward pass without a graph, one with its tangent, and one with its backward pass."""
    rng = Rng((seed,), range(batch), device=device)
    seen = model.seen_in(Trig(sigma_data=model.process.sigma_data))
    x, dx = (rng.normal(model.sample_shape) for _ in range(2))
    t = 0.1 + 1.3 * rng.uniform()
    cond = {"label": torch.zeros(batch, dtype=torch.long, device=device)}

    def field(x: Tensor, time: Tensor) -> Tensor:
        return seen(x, time, cond, to=Prediction.VELOCITY)

    def plain() -> None:
        with torch.no_grad():
            field(x, t)

    pace = t.sin() * t.cos()
    return {
        "forward": plain,
        "tangent": lambda: directional(field, x, t, lift(pace, x) * dx, pace),
        "training": lambda: field(x, t).square().mean().backward(),
    }


def compare_passes(record: Record, name: str, model: Denoiser, batch: int, clock: Clock, options: Any) -> None:
    device = clock.device
    acts = passes(model.to(device), batch, device, options.seed)
    for act in acts.values():
        act()
    peaks = {kind: peak_mib(act, device) for kind, act in acts.items()}
    seconds: dict[str, list[float]] = {kind: [] for kind in acts}
    for repeat in range(options.repeats):
        for kind in acts if repeat % 2 else list(acts)[::-1]:
            seconds[kind] += clock.seconds_of(acts[kind], 1)
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    weights = sum(p.nbytes for p in model.parameters()) / MIB
    record.add(
        "passes",
        network=name,
        batch=batch,
        weights_mib=weights,
        peak_mib=peaks,
        median_seconds=medians,
        peak_over_forward=peaks["tangent"] / peaks["forward"],
        with_weights_over_forward=(weights + peaks["tangent"]) / (weights + peaks["forward"]),
        peak_over_training=peaks["tangent"] / peaks["training"],
        seconds_over_forward=medians["tangent"] / medians["forward"],
    )
    for p in model.parameters():
        p.grad = None


def long_step(attention: str, size: int, layers: int, heads: int, device: torch.device, seed: int) -> Callable:
    """One update of sCM by distillation, but for the optimizer, on one sample."""
    student, teacher = (transformer(size, layers=layers, heads=heads, seed=seed).to(device) for _ in range(2))
    networks = Networks(lambda: Generator(student, (1.0,)), lambda: None, Teacher(teacher.requires_grad_(False)))
    method = SCM(SCM.Config(tangents=ATTENTION[attention](), warmup_steps=0), networks)
    rng = Rng((seed,), range(1), device=device)
    cond = {"label": torch.zeros(1, dtype=torch.long, device=device)}
    batch = {"images": Sample(x0=rng.normal(student.sample_shape), cond=cond)}
    (term,) = method.plan(0)[0].terms
    return lambda: term.loss(batch, rng).value.sum().backward()


def in_own_process(*arguments: Any) -> dict[str, Any]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_one_long_step, arguments)


def _one_long_step(
    attention: str, size: int, layers: int, heads: int, device: torch.device, seed: int, threads: int, mib: float | None
) -> dict[str, Any]:
    """Seconds and peak MiB of a long step, in at most so many MiB beyond its networks; or why it ended."""
    torch.set_num_threads(threads)
    # before the limit: what the first calls load and keep
    long_step(attention, 16, layers, heads, device, seed)()
    act = long_step(attention, size, layers, heads, device, seed)
    clock = Clock(device, budget_seconds=0.0, least=1)
    if mib is not None:
        _limit(mib, device)
    found: dict[str, Any] = {}

    def timed() -> None:
        (found["seconds"],) = clock.seconds_of(act, 1)

    try:
        found["mib"] = resident_mib(timed) if device.type == "cpu" else peak_mib(timed, device)
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error):
            raise
        return {"ended": str(error).splitlines()[0][:120]}
    return found


def _limit(mib: float, device: torch.device) -> None:
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + mib * MIB) / total, device)
        return
    lines = Path("/proc/self/status").read_text().splitlines()
    held = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))
    limit = held + int(mib * MIB)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def compare_long_steps(record: Record, device: torch.device, options: Any) -> None:
    shape = (options.size, options.layers, options.heads, device, options.seed, options.threads)
    free = in_own_process("flash_jvp", *shape, None)
    limit = ALLOWANCE * free["mib"]
    tokens = (options.size // 2) ** 2
    record.add("long", tokens=tokens, attention="flash_jvp", limit_mib=None, **free)
    for attention in ATTENTION:
        record.add(
            "long", tokens=tokens, attention=attention, limit_mib=limit, **in_own_process(attention, *shape, limit)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, default=256, help="pixels of the long step's latents: (size / 2)^2 tokens")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64, help="images of the passes that are compared")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file, row by row")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    record = Record(options.out, header(device, options.seed, options=vars(options) | {"out": str(options.out)}))
    clock = Clock(device, budget_seconds=0.0, least=1)
    teacher, _ = read_denoiser(TEACHER)
    compare_passes(record, "UNet2DModel of fashion-edm", teacher.eval(), options.batch, clock, options)
    dit = transformer(32, layers=options.layers, heads=options.heads, seed=options.seed)
    compare_passes(record, "DiT, 256 tokens", dit, options.batch, clock, options)
    compare_long_steps(record, device, options)


if __name__ == "__main__":
    main()
