"""What attention with its tangent costs, beside what else gives the tangent, in time and in memory.

    python benchmarks/attention.py --out benchmarks/results/attention_cpu.json                    on a CPU
    python benchmarks/attention.py --device cuda --out benchmarks/results/attention_h200.json     on a GPU

On a CPU the row-chunked path takes turns, in one process, with math attention under torch.func.jvp, with attention
written out under torch.func.jvp, and with a plain flash forward; medians are compared. On a GPU the tests of the
kernels run first, then every route and every tile is checked against float64 and timed, beside the rates of a matrix
product and of a copy measured in the same run. Memory is what the allocator held at its peak beyond the inputs.
"""

import argparse
import multiprocessing
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from attention_roofline import Plan, ceilings, compare_routes, correctness
from attention_routes import OURS, ROUTES, TOLERANCE, Inputs, Shape, accurate, errors, fresh_memory_is_nan
from attention_tiles import compare_backward, sweep
from measure import Clock, Record, header, peak_mib, resident_mib

ON_CPU = ("chunked", "math func.jvp", "naive func.jvp", "flash forward")
ON_GPU = ("flash forward", "cudnn forward", "triton forward", "triton", "split", "math func.jvp")
# The kernels of others come last: should they break the device's context, nothing of ours is lost.
FOREIGN = ("jvp_flash_attention",)
PARTS = ("correctness", "routes", "tiles", "backward")


def compare_on_cpu(record: Record, inputs: Inputs, clock: Clock, repeats: int, seed: int) -> None:
    """Seconds and memory of the routes that run on a CPU, and the ratios to ours.

    Raises:
        RuntimeError: ours is not accurate.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ON_CPU}
    rows = {}
    for name in ON_CPU:
        with fresh_memory_is_nan():
            found = errors(inputs, ROUTES[name](inputs))
        if name in OURS and not accurate(found, TOLERANCE[torch.float32]):
            raise RuntimeError(f"{name} is off by {found}; there is nothing to time")
        peak = peak_mib(lambda name=name: ROUTES[name](inputs), inputs.primals[0].device)
        resident = _in_fresh_process(name, inputs.shape, seed)
        rows[name] = {"errors": found, "peak_mib": peak, "resident_mib": resident}
    for repeat in range(repeats):
        for name in ON_CPU if repeat % 2 else ON_CPU[::-1]:
            seconds[name] += clock.seconds_of(lambda name=name: ROUTES[name](inputs), 1)
    for name, row in rows.items():
        record.add("cpu", route=name, **row, median_seconds=statistics.median(seconds[name]), seconds=seconds[name])
    ours = record.content["cpu"][0]
    record.content["ratios"] = {
        row["route"]: {name: row[name] / ours[name] for name in ("median_seconds", "peak_mib", "resident_mib")}
        for row in record.content["cpu"]
    }
    record.save()


def _in_fresh_process(name: str, shape: Shape, seed: int) -> float:
    # glibc otherwise raises this limit as it goes, and keeps what was freed below it: a ratio of 7 to 13, run by run
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_resident, (name, shape, seed, torch.get_num_threads()))


def _resident(name: str, shape: Shape, seed: int, threads: int) -> float:
    torch.set_num_threads(threads)
    cpu = torch.device("cpu")
    small = Shape(shape.name, shape.batch, shape.heads, 64, 64, shape.size)
    with torch.no_grad():
        ROUTES[name](Inputs.draw(small, torch.float32, cpu, seed))  # loads what the first call loads
        inputs = Inputs.draw(shape, torch.float32, cpu, seed)
        return resident_mib(lambda: ROUTES[name](inputs))


def measure_kernels(record: Record, plan: Plan, clock: Clock, parts: list[str], workers: int) -> bool:
    """The parts that were asked for, in order of importance; whether the kernels are right."""
    right = correctness(record, plan, workers) if "correctness" in parts else True
    rates = ceilings(record, plan, clock)
    if "routes" in parts:
        compare_routes(record, plan, clock, rates, ON_GPU)
    if "backward" in parts:
        compare_backward(record, plan, clock)
    if "tiles" in parts:
        sweep(record, plan, clock, workers)
    if "routes" in parts:
        compare_routes(record, plan, clock, rates, FOREIGN)
    return right


def table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """Rows of text; what was left out says why."""
    lines = []
    for row in [dict(zip(columns, columns, strict=True)), *rows]:
        cells = [row.get(name, "") for name in columns]
        texts = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
        line = "".join(text.ljust(22) if at < 2 else f"  {text:>{len(columns[at])}}" for at, text in enumerate(texts))
        lines.append(f"{line}   {row.get('left_out', '')[:60]}".rstrip())
    return "\n".join(lines)


def summary(content: dict[str, Any]) -> str:
    """The short tables that a run ends with."""
    parts = []
    if "cpu" in content:
        columns = ["route", "", "median_seconds", "peak_mib", "resident_mib"]
        ratios = [{"route": f"{name}, over ours", **row} for name, row in content["ratios"].items()]
        parts.append(table(content["cpu"] + ratios, columns))
    rates = ["seconds", "tflop_per_second", "share_of_product", "over_floor", "over_flash_forward"]
    rates.append("peak_over_outputs")
    if "routes" in content:
        parts.append(table(content["routes"], ["shape", "route", *rates]))
    if "backward" in content:
        parts.append(table(content["backward"], ["shape", "route", "seconds", "tflop_per_second", "peak_mib"]))
    if "tiles" in content:
        timed = [row for row in content["tiles"] if "seconds" in row]
        groups: dict[tuple[str, str], list[dict]] = {}
        for row in timed:
            groups.setdefault((row["shape"], row["kernel"]), []).append(row)
        best = []
        for rows in groups.values():
            rows = sorted(rows, key=lambda row: row["seconds"])
            best += [row for at, row in enumerate(rows) if at < 2 or row["own"]]
        parts.append(table(best, ["shape", "kernel", "seconds", "tflop_per_second", "own", "tile"]))
    for row in content.get("correctness", []):
        parts.append(
            f"correctness: {row['passed']} passed, {len(row['failed'])} failed " + "; ".join(row["failed"][:9])
        )
    for row in content.get("ceilings", []):
        parts.append(f"measured: {row['tflop_per_second']:.0f} TFLOP/s, {row['tb_per_second']:.2f} TB/s")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kernels", action="store_true", help="on a CPU: try the code for GPUs, at tiny sizes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="of the measurements on a GPU")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no measurement on a GPU after these")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for the repeats of one measurement on a GPU")
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count()), help="processes that compile kernels")
    parser.add_argument("--length", type=int, default=4096, help="N, on a CPU")
    parser.add_argument("--repeats", type=int, default=9, help="on a CPU")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file, row by row")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    trial = device.type == "cpu"
    clock = Clock(device, budget_seconds=0.0 if trial else options.budget, least=1 if trial else 3)
    right = True
    with torch.no_grad():
        if trial and not options.kernels:
            shape = Shape("cpu", 1, 4, options.length, options.length, 64)
            record = Record(options.out, header(device, options.seed, shape=vars(shape), dtype="float32"))
            inputs = Inputs.draw(shape, torch.float32, device, options.seed)
            compare_on_cpu(record, inputs, clock, options.repeats, options.seed)
        else:
            plan = Plan(
                dtype=torch.bfloat16,
                device=device,
                seed=options.seed,
                trial=trial,
                deadline=time.monotonic() + 60 * options.minutes,
            )
            record = Record(options.out, header(device, options.seed, dtype="bfloat16"))
            right = measure_kernels(record, plan, clock, options.parts, options.workers)
    print()
    print(summary(record.content))
    if not right:
        raise SystemExit("tests of the kernels fail on this device; what is timed was checked on its own")


if __name__ == "__main__":
    main()
