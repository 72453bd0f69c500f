"""Tile configurations of the kernels on one device, and the backward: right at a short length, then timed."""

from __future__ import annotations

import multiprocessing
import statistics
from dataclasses import astuple, dataclass, replace
from functools import cache
from typing import Any

import torch
from attention_roofline import Plan, attempt, measured
from attention_routes import GRADIENT_TOLERANCE, TOLERANCE, Inputs, Shape, accurate, errors, relative_error
from measure import Clock, Record
from torch import Tensor

from flash_jvp import backward, fused, library, reference
from flash_jvp.launch import Launch
from flash_jvp.logits import like_queries
from flash_jvp.tiles import ARCHITECTURES, Tile, architecture, tile_for

SWEPT = ("d128 8k", "d64 8k", "Wan 1.3B cross", "DiT-XL d72")
DIFFERENTIATED = ("d128 8k", "d64 8k", "DiT-XL d72")
# What each kernel multiplies; the first two depend on the tangents.
BACKWARD_PRODUCTS = {"queries": 3, "keys": 4}
# Tried beside all that the tables offer, by kernel and padded head size, each with and without a pipelined remainder.
# Triton says which do not fit.
ALTERNATIVES = {
    ("fused", 64): [
        (64, 64, 4, 3),
        (128, 64, 8, 2),
        (128, 32, 8, 3),
        (128, 128, 8, 2),
        (64, 64, 4, 2),
        (64, 128, 4, 2),
    ],
    ("fused", 128): [(128, 32, 8, 3), (128, 64, 8, 2), (64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 2), (128, 32, 8, 2)],
    ("tangent", 64): [(128, 128, 8, 2), (128, 64, 8, 2), (64, 64, 4, 3), (64, 128, 4, 2)],
    ("tangent", 128): [(128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 4, 2), (64, 32, 4, 3), (128, 64, 8, 3)],
    ("queries", 64): [(128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (128, 128, 8, 2)],
    ("queries", 128): [(128, 32, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (128, 64, 8, 1)],
    ("keys", 64): [(64, 64, 4, 2), (64, 128, 8, 3), (32, 128, 4, 2), (128, 128, 8, 2)],
    ("keys", 128): [(64, 64, 4, 2), (32, 128, 8, 2), (64, 64, 8, 2), (32, 64, 4, 2)],
}
FEW = 2  # tiles tried where the run is only a trial of this code
TASKS_PER_PROCESS = 16  # a kernel that breaks the device's context takes no more than these with it


@dataclass(frozen=True)
class Task:
    """One kernel with one tile on one shape."""

    shape: Shape
    kernel: str
    tile: Tile

    def products(self) -> int:
        known = {"fused": self.shape.products, "tangent": self.shape.products - 1, **BACKWARD_PRODUCTS}
        return known[self.kernel]


def candidates(kernel: str, shape: Shape, plan: Plan) -> list[Tile]:
    """Tiles of a kernel to be compared: the table's own for this device first, then all others, without repetition."""
    entries = [architecture(plan.device), *ARCHITECTURES]
    tangents = "" if kernel in BACKWARD_PRODUCTS else shape.tangents
    tiles = [tile_for(kernel, entry, plan.dtype, shape.size, tangents=tangents) for entry in entries]
    others = [Tile(*sizes) for sizes in ALTERNATIVES[kernel, 64 if shape.size <= 64 else 128]]
    tiles += [replace(tile, pipelined_remainder=pipelined) for tile in others for pipelined in (False, True)]
    return list(dict.fromkeys(tiles))[: FEW if plan.trial else None]


def tasks(plan: Plan) -> list[Task]:
    kernels = {name: ["fused", "tangent"] for name in SWEPT}
    for name in DIFFERENTIATED:
        kernels[name] = kernels[name] + list(BACKWARD_PRODUCTS)
    swept = [shape for shape in plan.shapes() if shape.name in kernels]
    return [
        Task(shape, kernel, tile)
        for shape in swept
        for kernel in kernels[shape.name]
        for tile in candidates(kernel, shape, plan)
    ]


class Bench:
    """One set of inputs, with room for all outputs, on which a kernel runs with any tile."""

    def __init__(self, inputs: Inputs) -> None:
        q, k, v = inputs.primals
        self.inputs, self.arch = inputs, architecture(q.device)
        self.o, self.to, self.do = (like_queries(q, q.shape[-1]) for _ in range(3))
        self.lse, self.mu = (q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(2))
        self.gradients = tuple(torch.empty_like(x) for x in inputs.primals)
        self.do.normal_(generator=torch.Generator(q.device).manual_seed(1))
        self.known = library.forward(q, k, v, inputs.logits)

    def poison(self) -> None:
        """Fill the outputs with nan, so that what a kernel leaves unwritten is seen."""
        for x in (self.o, self.to, self.lse, self.mu, *self.gradients):
            x.fill_(torch.nan)

    def launches(self, task: Task) -> tuple[Launch, ...]:
        """The launch of a task last, and before it those that it needs the results of."""
        primals, logits = self.inputs.primals, self.inputs.logits
        if task.kernel in BACKWARD_PRODUCTS:
            first = tile_for("queries", self.arch, primals[0].dtype, task.shape.size)
            pair = (task.tile, task.tile) if task.kernel == "queries" else (first, task.tile)
            both = backward.launches(*primals, *self.known, self.do, *self.gradients, logits, self.arch, tiles=pair)
            return both[:1] if task.kernel == "queries" else both
        known = task.kernel == "tangent"
        o, lse = self.known if known else (self.o, self.lse)
        outputs = (o, self.to, lse, self.mu)
        tangents = self.inputs.tangents
        return (fused.launch(*primals, *tangents, *outputs, logits, self.arch, known=known, tile=task.tile),)

    def errors(self, task: Task) -> dict[str, float]:
        """Of what the launches wrote, against float64."""
        if task.kernel not in BACKWARD_PRODUCTS:
            return errors(self.inputs, (self.known[0] if task.kernel == "tangent" else self.o, self.to))
        names = ("dq",) if task.kernel == "queries" else ("dk", "dv")
        every = gradient_errors(self.inputs, self.do, self.gradients)
        return {name: every[name] for name in names}


def gradient_errors(inputs: Inputs, do: Tensor, gradients: tuple[Tensor, ...]) -> dict[str, float]:
    """Relative L2 errors of dq, dk and dv in the first head against float64; nan anywhere makes an error nan."""
    head = (slice(0, 1), slice(0, 1))
    exact = [x[head].double().requires_grad_() for x in inputs.primals]
    with torch.enable_grad():
        o, _ = reference.attention(*exact, inputs.logits)
        truth = torch.autograd.grad(o, exact, do[head].double())
    return {
        name: relative_error(found[head], true) if found.isfinite().all() else float("nan")
        for name, found, true in zip(("dq", "dk", "dv"), gradients, truth, strict=True)
    }


def short(shape: Shape) -> Shape:
    """A shape for which the same machine code is compiled, in which lengths matter only by whether 16 divides them."""
    queries, keys = (min(n, 1024 if n % 16 == 0 else 1000) for n in (shape.queries, shape.keys))
    return replace(shape, batch=1, queries=queries, keys=keys)


@cache
def _bench(shape: Shape, plan: Plan) -> Bench:
    return Bench(plan.draw(shape))


def check(work: tuple[Task, Plan]) -> dict[str, Any]:
    """Errors of a task at a short length, or why it failed. What it compiles stays in Triton's cache."""
    task, plan = work

    def act() -> dict[str, Any]:
        if plan.is_over():
            return {"left_out": "out of time"}
        with torch.no_grad():
            bench = _bench(short(task.shape), plan)
            bench.poison()
            for launch in bench.launches(task):
                launch.run()
            found = bench.errors(task)
        limits = GRADIENT_TOLERANCE if task.kernel in BACKWARD_PRODUCTS else TOLERANCE
        right = accurate(found, limits[plan.dtype])
        return {"errors": found} if right else {"errors": found, "left_out": "not accurate"}

    return attempt(act)


def check_all(every: list[Task], plan: Plan, workers: int) -> list[dict[str, Any]]:
    """What `check` says of every task; several processes compile at once."""
    work = [(task, plan) for task in every]
    if workers < 2:
        return [check(item) for item in work]
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, maxtasksperchild=TASKS_PER_PROCESS) as pool:
        return pool.map(check, work, chunksize=1)


def sweep(record: Record, plan: Plan, clock: Clock, workers: int) -> None:
    """Seconds of every tile that is right, of every kernel, on the shapes that are swept."""
    every = tasks(plan)
    checked = dict(zip(every, check_all(every, plan, workers), strict=True))
    bench = None
    for task, found in checked.items():
        own = candidates(task.kernel, task.shape, plan)[0]
        row = {"shape": task.shape.name, "kernel": task.kernel, "tile": astuple(task.tile), "own": task.tile == own}
        if "left_out" in found or plan.is_over():
            record.add("tiles", **row, **{"left_out": "out of time", **found})
            continue
        if bench is None or bench.inputs.shape != task.shape:
            bench = None  # before the next one takes its memory
            bench = Bench(plan.draw(task.shape))
        record.add("tiles", **row, **found, **attempt(lambda bench=bench, task=task: _timed(bench, task, plan, clock)))


def _timed(bench: Bench, task: Task, plan: Plan, clock: Clock) -> dict[str, Any]:
    launches = bench.launches(task)
    for launch in launches:
        launch.run()
    seconds = clock.seconds(launches[-1].run, share=1 / 3)
    median = statistics.median(seconds)
    rate = task.shape.flop(task.products()) / median / 1e12
    return {"products": task.products(), "seconds": median, "repeats": len(seconds), "tflop_per_second": rate}


def compare_backward(record: Record, plan: Plan, clock: Clock) -> None:
    """Our backward and PyTorch's, from the same forward."""
    for shape in plan.shapes():
        if shape.name not in DIFFERENTIATED:
            continue
        bench = Bench(plan.draw(shape))
        for name, module in (("triton", backward), ("library", library)):
            row = {"shape": shape.name, "route": name}
            if plan.is_over():
                record.add("backward", **row, left_out="out of time")
                continue

            def run(bench=bench, module=module):
                return module.backward(*bench.inputs.primals, *bench.known, bench.do, bench.inputs.logits)

            def check_gradients(found, bench=bench):
                return gradient_errors(bench.inputs, bench.do, found)

            limit = GRADIENT_TOLERANCE[plan.dtype] if name == "triton" else None
            row |= attempt(lambda run=run, check=check_gradients, limit=limit: measured(run, check, plan, clock, limit))
            if "seconds" in row:
                row |= {"flop_credited": "10 B H M N d", "tflop_per_second": shape.flop(5) / row["seconds"] / 1e12}
            record.add("backward", **row)
        del bench
