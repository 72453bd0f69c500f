"""What a sample costs: evaluations of a network, milliseconds, images a second, parameters, memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from diffdistill.evaluation.sampling import Solved, classes_of, denoisers, draw, evaluating
from diffdistill.generator import Sampler
from diffdistill.memory import peak_of

REPEATS = 5  # of each timing, whose median counts
GAIN = 1.05  # a batch twice as large must be faster by so much per image to go on
LARGEST_BATCH = 1024


@dataclass(frozen=True)
class Cost:
    """What sampling costs on one device.

    Attributes:
        evaluations: of a network, per sample; both branches of guidance count.
        num_parameters: of all networks that take part.
        milliseconds: of one sample alone, the median of five.
        images_per_second: at `best_batch`, whose rate no batch twice as large beats by five per cent.
        peak_bytes: that tensors held at once at the best batch, beyond the weights.
    """

    evaluations: float
    num_parameters: int
    milliseconds: float
    images_per_second: float
    best_batch: int
    peak_bytes: int


def cost_of(source: Sampler | Solved, *, largest_batch: int = LARGEST_BATCH) -> Cost:
    """What its samples cost on the device that its networks are on."""
    classes = list(classes_of(source))
    device = next(denoisers(source)[0].parameters()).device

    def make(batch: int) -> None:
        labels = torch.tensor([classes[slot % len(classes)] for slot in range(batch)]) if classes else None
        draw(source, range(batch), labels, seed=0)

    with evaluating(*denoisers(source)):
        milliseconds, rate, batch = timed(make, device, largest_batch=largest_batch)
        peak = peak_of(lambda: make(batch), device)
    return Cost(evaluations_per_sample(source), num_parameters(denoisers(source)), milliseconds, rate, batch, peak)


def timed(
    make: Callable[[int], None], device: torch.device, *, largest_batch: int = LARGEST_BATCH
) -> tuple[float, float, int]:
    """Milliseconds of one image, images a second at the best batch, and that batch.

    Args:
        make: makes so many images.
    """
    alone = _seconds(make, 1, device)
    rate, batch = 1 / alone, 1
    while 2 * batch <= largest_batch:
        try:
            larger = 2 * batch / _seconds(make, 2 * batch, device)
        except torch.OutOfMemoryError:
            break
        if larger < GAIN * rate:
            break
        rate, batch = larger, 2 * batch
    return 1000 * alone, rate, batch


def _seconds(make: Callable[[int], None], batch: int, device: torch.device) -> float:
    """The median time of a batch, behind one that warms up."""
    make(batch)
    times = []
    for _ in range(REPEATS):
        _wait(device)
        start = time.perf_counter()
        make(batch)
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def evaluations_per_sample(source: Sampler | Solved) -> float:
    """How many times a network is evaluated for one sample, counted; both branches of guidance count."""
    rows = 0

    def count(module, inputs, output) -> None:
        nonlocal rows
        rows += len(output)

    classes = list(classes_of(source))  # one sample of each, if a router sends them apart
    handles = [model.backbone.register_forward_hook(count) for model in denoisers(source)]
    try:
        with evaluating(*denoisers(source)):
            draw(source, range(max(1, len(classes))), torch.tensor(classes) if classes else None, seed=0)
    finally:
        for handle in handles:
            handle.remove()
    return rows / max(1, len(classes))


def num_parameters(networks: Sequence[nn.Module]) -> int:
    """Of all networks together."""
    return sum(parameter.numel() for network in networks for parameter in network.parameters())
