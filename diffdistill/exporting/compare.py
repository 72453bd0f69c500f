"""The proof of an export: the stock pipeline and the generator, from the same noise and labels."""

import functools
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diffdistill.exporting.stock import Stock
from diffdistill.generator import Generator

COUNT = 4


class Replay:
    """The numbers that a stock pipeline draws from `torch.manual_seed(seed)`, for `Generator.prior` and `sample`.

    Pipelines draw the initial noise first and then, step by step, the noise of the whole batch.
    """

    def __init__(self, seed: int, count: int):
        self._generator = torch.Generator().manual_seed(seed)
        self._count = count

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers of shape (count, *shape)."""
        return torch.randn((self._count, *shape), generator=self._generator)


def compare(stock: Stock, pipeline: Any, generator: Generator, *, seed: int = 0) -> float:
    """The largest absolute difference of the pipeline's samples from the generator's, NaN if one is not finite.

    Args:
        stock: how to call it.
        pipeline: the pipeline, reopened from disk.
        generator: on the CPU, in float32.
    """
    classes = generator.denoiser.backbone.num_classes
    labels = [index % classes for index in range(COUNT)] if classes else None
    theirs = final_state(pipeline, stock.arguments(labels, COUNT), seed)
    rng = Replay(seed, COUNT)
    cond = {"label": torch.tensor(labels)} if classes else None
    ours = generator.sample(generator.prior(rng), cond, rng)
    return (theirs - ours).abs().max().item()


def final_state(pipeline: Any, arguments: dict[str, Any], seed: int) -> Tensor:
    """What the scheduler's last step returned, shape (N, ...): samples before the pipeline clamps or decodes them."""
    pipeline.set_progress_bar_config(disable=True)
    with watched(pipeline) as states, torch.random.fork_rng(devices=[]):
        # the global generator itself, because DiTPipeline draws the noise between its steps from there
        pipeline(**arguments, generator=torch.manual_seed(seed), output_type="pt")
    return states[-1]


@contextmanager
def watched(pipeline: Any):
    """Within the block, what each step of the pipeline's scheduler returns goes to the list yielded."""
    states: list[Tensor] = []
    step = pipeline.scheduler.step

    @functools.wraps(step)
    def watching(*args, **kwargs):
        result = step(*args, **kwargs)
        states.append(result[0])
        return result

    pipeline.scheduler.step = watching
    try:
        yield states
    finally:
        del pipeline.scheduler.step
