"""Write a generator as a stock pipeline, reopen it, compare, and only then give it its name."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffdistill.exporting.card import card
from diffdistill.exporting.compare import compare
from diffdistill.exporting.exporters import find
from diffdistill.exporting.place import beside, require_free
from diffdistill.exporting.stock import request
from diffdistill.generator import Generator

INDEX = "model_index.json"  # diffusers' own, of every pipeline
VERIFY = "verify.json"  # how an export is called, and how far it was from the generator
TOLERANCE = 1e-5  # absolute, of samples in about [-1, 1]: the rounding of float32 through a network


@dataclass(frozen=True)
class Report:
    """What was written.

    Args:
        folder: where.
        pipeline, scheduler: the classes of diffusers.
        call: arguments of every call of the pipeline, beside labels, batch size and generator.
        difference: the largest absolute difference of its samples from the generator's, in float32, before clamping.
        notes: what a user of the folder should know.
        takes_batch_size: False where the number of labels says how many images to make.
    """

    folder: Path
    pipeline: str
    scheduler: str
    call: dict[str, Any]
    difference: float
    notes: tuple[str, ...]
    takes_batch_size: bool

    def __str__(self) -> str:
        call = ", ".join(f"{name}={value!r}" for name, value in self.call.items())
        return (
            f"{self.folder}: {self.pipeline}({call}) with {self.scheduler}; "
            f"maximum absolute difference from the generator {self.difference:.1e}"
        )


def write_pipeline(
    generator: Generator,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    vae: nn.Module | None = None,
    tolerance: float = TOLERANCE,
    replace: bool = False,
) -> Report:
    """Write `generator` as a stock diffusers pipeline that reproduces `Generator.sample`.

    The folder is written beside, reopened with `DiffusionPipeline.from_pretrained`, run, compared and then renamed; an
    export that fails leaves nothing.

    Args:
        folder: a path that does not exist yet.
        dtype: of the weights on disk. The comparison runs in float32, on weights rounded to `dtype` on both sides.
        vae: an AutoencoderKL, for latent generators.
        tolerance: the largest absolute difference allowed.
        replace: put the new folder in the place of an existing export.
    Raises:
        Refusal: no stock class expresses the generator; the message has the reasons and alternatives.
        ValueError: the folder exists, or the difference is too large.
    """
    import diffusers
    from diffusers import DiffusionPipeline

    folder = Path(folder)
    require_free(folder, replace, marker=INDEX)
    asked = request(generator, vae, dtype)
    stock = find(asked)
    with beside(folder) as made:
        nn.Module.to(asked.network, dtype)  # diffusers' own `to` warns about modules that this call does not concern
        stock.pipeline.save_pretrained(made, safe_serialization=True)
        with quiet():
            reopened = DiffusionPipeline.from_pretrained(made, dtype=torch.float32)
        if type(reopened) is not type(stock.pipeline):
            raise RuntimeError(f"{made} reopened as {type(reopened)}, not as {type(stock.pipeline)}")
        difference = compare(stock, reopened, asked.generator)
        if not difference < tolerance:  # NaN fails too
            raise ValueError(
                f"{type(reopened).__name__} differs from the generator by {difference:.2e}, and {tolerance:.0e} is "
                "allowed; nothing was written. A network that predicts eps has its rounding errors divided by alpha at "
                "the first time: if that is the cause, use a v or x0 prediction, or export with a larger tolerance"
            )
        text = card(stock, num_classes=asked.num_classes, num_steps=len(asked.grid), difference=difference)
        (made / "README.md").write_text(text)
        said = {
            "call": dict(stock.call),
            "takes_batch_size": stock.takes_batch_size,
            "takes_labels": stock.takes_labels,
            "num_classes": asked.num_classes,
            "difference": difference,
            "diffusers": diffusers.__version__,
        }
        (made / VERIFY).write_text(json.dumps(said, indent=1) + "\n")
    return Report(
        folder,
        type(stock.pipeline).__name__,
        type(stock.pipeline.scheduler).__name__,
        dict(stock.call),
        difference,
        stock.notes,
        stock.takes_batch_size,
    )


@contextlib.contextmanager
def quiet():
    """No progress bar for a folder that opens in a second."""
    from diffusers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
