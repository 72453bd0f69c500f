"""What a run does at intervals besides training: pictures, and evaluation on the weights that will be used."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffdistill.config import PicturesConfig
from diffdistill.evaluation.features import Extractor
from diffdistill.evaluation.grid import image_grid
from diffdistill.evaluation.metrics import Reference, evaluate_images
from diffdistill.evaluation.sampling import refuse_share, sample_images
from diffdistill.player import RAW
from diffdistill.trainer import Trainer

PICTURE_SEED = 0


@dataclass(frozen=True)
class Pictures:
    """Writes OUTPUT/samples/step-N.png, always of the same noises and classes."""

    config: PicturesConfig
    batch: int

    def __call__(self, trainer: Trainer, step: int) -> None:
        samples, _ = shown(trainer, self.config.count, seed=PICTURE_SEED, batch=self.batch)
        if trainer.main:
            path = trainer.output / "samples" / f"step-{step:08d}.png"
            write_grid(samples, path, columns=self.config.columns, scale=self.config.scale)
            trainer.show("samples", np.asarray(Image.open(path)))


@dataclass(frozen=True)
class Evaluation:
    """The numbers of `evaluation.metrics`, of samples that the same seeds make every time.

    Attributes:
        weights: raw and averages, each of which is measured on the same noises and named in its line; none for the
            first average, or raw, unnamed.
    """

    samples: int
    seed: int
    batch: int
    reference: Reference
    extractor: Extractor
    weights: tuple[str, ...] = ()

    def __call__(self, trainer: Trainer, step: int) -> list[Mapping[str, float | str]]:
        refuse_share(trainer.method.generator)
        found = []
        for weights in self.weights or ("",):
            samples, labels = shown(trainer, self.samples, seed=self.seed, batch=self.batch, weights=weights)
            if trainer.main:
                numbers = evaluate_images(samples.float(), labels, self.reference, self.extractor)
                found.append(({"weights": weights} if weights else {}) | numbers)
        return found


def shown(trainer: Trainer, count: int, *, seed: int, batch: int, weights: str = "") -> tuple[Tensor, Tensor | None]:
    """Samples joined over all ranks, under each generator's raw weights or an average; "" is its first, if any."""
    sampler, accelerator = trainer.method.generator, trainer.accelerator
    with ExitStack() as stack:
        for name in sampler.parts:
            averages = trainer.players[name].averages
            chosen = weights or next(iter(averages), RAW)
            if chosen != RAW:
                stack.enter_context(averages[chosen].swapped_in())
        samples, labels = sample_images(
            sampler,
            count,
            seed=seed,
            batch=batch,
            rank=accelerator.process_index,
            ranks=accelerator.num_processes,
        )
    samples = _joined(accelerator, samples)[:count]
    return samples, None if labels is None else _joined(accelerator, labels)[:count]


def _joined(accelerator, tensor: Tensor) -> Tensor:
    return accelerator.gather(tensor.to(accelerator.device)).cpu() if accelerator.num_processes > 1 else tensor


def write_grid(samples: Tensor, path: Path, *, columns: int, scale: int) -> None:
    """A PNG of the samples (N, 3, H, W), row by row."""
    if samples.ndim != 4 or samples.shape[1] != 3:
        raise ValueError(
            f"pictures need samples of shape (N, 3, H, W), got {tuple(samples.shape)}; for other data set "
            "pictures.every=0"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    image_grid(samples.to(torch.float32), columns=columns, scale=scale).save(path)
