"""The kernels on a GPU: right first, then how far from the floor that arithmetic and bandwidth set.

On a CPU the same code runs, with the kernels in Triton's interpreter: its numbers mean nothing, its paths are tested.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from attention_routes import (
    OURS,
    ROUTES,
    TOLERANCE,
    Inputs,
    Outputs,
    Shape,
    accurate,
    errors,
    foreign_is_there,
    fresh_memory_is_nan,
)
from measure import MIB, REPOSITORY, Clock, Record, peak_mib

# kernel/README table 1.6; the first two are what others publish, and have lengths that every package takes
SHAPES = [
    Shape("d128 8k", 2, 16, 8192, 8192, 128),
    Shape("d64 8k", 2, 16, 8192, 8192, 64),
    Shape("Wan 1.3B cross", 1, 12, 32760, 512, 128, tangents="q", layout="BSHD"),
    Shape("Wan 1.3B 480p", 1, 12, 32760, 32760, 128, layout="BSHD"),
    Shape("FLUX.1 1024px", 1, 24, 4608, 4608, 128, layout="BSHD"),
    Shape("SD3.5-M 1024px", 1, 24, 4429, 4429, 64, layout="BSHD"),
    Shape("DiT-XL d72", 4, 16, 4096, 4096, 72, layout="BSHD"),
    Shape("Wan 14B 480p", 1, 40, 32760, 32760, 128, layout="BSHD"),
    Shape("Wan 14B 720p", 1, 40, 75600, 75600, 128, layout="BSHD"),
]
TESTING_SHARE = 0.6  # of the minutes of a run, at the most
TRIED = ("d64 8k", "Wan 1.3B cross", "DiT-XL d72")  # at tiny lengths, where only this code is tried
MATH_MATRICES = 8  # (M, N) matrices of float32 that math attention may hold at once under torch.func.jvp


@dataclass(frozen=True)
class Plan:
    """How a run is made.

    Fields:
        dtype: of the inputs; device: where they are.
        trial: tiny sizes and few tiles, to try this code.
        deadline: when no further one is begun, by time.monotonic.
    """

    dtype: torch.dtype
    device: torch.device
    seed: int
    trial: bool
    deadline: float

    def shapes(self) -> list[Shape]:
        if not self.trial:
            return SHAPES
        return [
            replace(shape, batch=1, heads=2, queries=min(40, shape.queries), keys=min(32, shape.keys))
            for shape in SHAPES
            if shape.name in TRIED
        ]

    def draw(self, shape: Shape) -> Inputs:
        return Inputs.draw(shape, self.dtype, self.device, self.seed)

    def is_over(self) -> bool:
        return time.monotonic() > self.deadline


def correctness(record: Record, plan: Plan, workers: int) -> bool:
    """Whether the matrix of tests/kernels passes on this device; every failure is recorded."""
    files = ["fused", "tangent", "backward", "library", "chunked"]
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", "-p", "no:cacheprovider"]
        if plan.trial:
            command += ["-k", f"{plan.device.type} and sees_no_key", "tests/kernels/test_jvp_fused.py"]
        else:
            command += ["-n", str(workers), "-k", plan.device.type]
            command += [f"tests/kernels/test_jvp_{name}.py" for name in files]
        left = max(1.0, plan.deadline - time.monotonic())
        try:
            run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=TESTING_SHARE * left)
        except subprocess.TimeoutExpired as expired:
            record.add("correctness", passed=0, failed=[f"pytest was stopped after {expired.timeout:.0f} s"])
            return False
        if not report.exists():
            said = run.stdout[-2000:] + run.stderr[-2000:]
            record.add("correctness", passed=0, failed=[f"pytest wrote no report: {said}"])
            return False
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = []
    for case in cases:
        for fault in (*case.iter("failure"), *case.iter("error")):
            failed.append(f"{case.get('name')}: {fault.get('message', '')[:300]}")
    record.add("correctness", passed=len(cases) - len(failed), failed=failed)
    return bool(cases) and not failed


def ceilings(record: Record, plan: Plan, clock: Clock) -> tuple[float, float]:
    """FLOP per second of a matrix product of these inputs' dtype, and bytes per second of a copy, read plus written."""
    size, length = (128, 1 << 16) if plan.trial else (8192, 1 << 30)
    generator = torch.Generator(plan.device).manual_seed(plan.seed)
    a, b = (torch.randn(size, size, generator=generator, dtype=plan.dtype, device=plan.device) for _ in range(2))
    product = statistics.median(clock.seconds(lambda: a @ b))
    source = torch.randn(length // 4, generator=generator, device=plan.device)
    target = torch.empty_like(source)
    copy = statistics.median(clock.seconds(lambda: target.copy_(source)))
    flop_rate, byte_rate = 2 * size**3 / product, 2 * length / copy
    record.add("ceilings", size=size, tflop_per_second=flop_rate / 1e12, tb_per_second=byte_rate / 1e12)
    return flop_rate, byte_rate


def attempt(act: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What act returns, or why it could not: one route that fails must not cost the others their turn."""
    try:
        return act()
    except Exception as reason:
        return {"left_out": f"{type(reason).__name__}: {str(reason)[:300]}"}


def measured(
    act: Callable[[], Outputs],
    check: Callable[[Outputs], dict[str, float]],
    plan: Plan,
    clock: Clock,
    limit: float | None,
) -> dict[str, Any]:
    """Errors, memory and seconds of one call; no seconds if an error is above the limit."""
    with fresh_memory_is_nan():
        found = check(act())
    if limit is not None and not accurate(found, limit):
        return {"errors": found, "left_out": "not accurate"}
    memory = peak_mib(act, plan.device)
    seconds = clock.seconds(act)
    return {"errors": found, "peak_mib": memory, "seconds": statistics.median(seconds), "repeats": len(seconds)}


def compare_routes(record: Record, plan: Plan, clock: Clock, rates: tuple[float, float], names: list[str]) -> None:
    """Every route on every shape."""
    for shape in plan.shapes():
        inputs = plan.draw(shape)
        for name in names:
            row = {"shape": shape.name, "route": name}
            reason = "out of time" if plan.is_over() else unfit(name, shape, plan.device)
            if reason is not None:
                record.add("routes", **row, left_out=reason)
                continue
            limit = TOLERANCE[plan.dtype] if name in OURS else None
            found = attempt(
                lambda inputs=inputs, name=name, limit=limit: measured(
                    lambda: ROUTES[name](inputs), lambda outputs: errors(inputs, outputs), plan, clock, limit
                )
            )
            if "seconds" in found:
                found |= roofline(shape, plan.dtype, found, rates, forward="forward" in name)
                forward = _seconds(record, shape, "flash forward")
                found |= {} if forward is None else {"over_flash_forward": found["seconds"] / forward}
            record.add("routes", **row, **found)
        del inputs


def _seconds(record: Record, shape: Shape, name: str) -> float | None:
    rows = record.content.get("routes", [])
    timed = [row for row in rows if row["shape"] == shape.name and row["route"] == name and "seconds" in row]
    return timed[0]["seconds"] if timed else None


def unfit(name: str, shape: Shape, device: torch.device) -> str | None:
    """Why a route is not run on a shape, known beforehand."""
    if name == "math func.jvp" and device.type == "cuda":
        need = MATH_MATRICES * 4 * shape.batch * shape.heads * shape.queries * shape.keys
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        if need > free:
            return f"it would hold up to {need / 2**30:.0f} GiB"
    if name == "jvp_flash_attention":
        if not foreign_is_there():
            return "not installed"
        if shape.queries != shape.keys or shape.queries % 32 or shape.layout != "BHND" or shape.size not in (64, 128):
            return "it takes contiguous tensors of one length, which 32 divides, and head sizes that are powers of two"
    return None


def roofline(shape: Shape, dtype: torch.dtype, found: dict, rates: tuple[float, float], forward: bool) -> dict:
    """Rate, share of the measured matrix product, time over the floor, and memory beside inputs and outputs.

    Every route of primal and tangent is credited with the same operations, 12 B H M N d with all tangents and 8 with
    that of q alone, whatever it computes in fact; a plain forward with 4.
    """
    products = 2 if forward else shape.products
    flop, element = shape.flop(products), torch.finfo(dtype).bits // 8
    floor = max(flop / rates[0], shape.minimal_bytes(element) / rates[1])
    outputs = (1 if forward else 2) * shape.batch * shape.heads * shape.queries * shape.size * element
    rows = 8 * shape.batch * shape.heads * shape.queries
    return {
        "flop_credited": f"{2 * products} B H M N d",
        "tflop_per_second": flop / found["seconds"] / 1e12,
        "share_of_product": flop / found["seconds"] / rates[0],
        "over_floor": found["seconds"] / floor,
        "peak_over_outputs": found["peak_mib"] * MIB / (outputs + rows),
    }
