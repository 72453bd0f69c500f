"""The folder of a stock pipeline, opened by stock diffusers and called as its export says, image by image seeded."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffdistill.evaluation.checksums import file_checksum
from diffdistill.evaluation.stream import Drawn
from diffdistill.exporting.write import INDEX, VERIFY, quiet

NETWORKS = ("unet", "transformer")  # the part of a pipeline that is evaluated at every step


def is_pipeline(folder: Path) -> bool:
    """Whether a folder is a stock pipeline's."""
    return (folder / INDEX).is_file()


class StockPipeline:
    """Images of a stock pipeline; image i is a function of its seed, i and its label alone.

    Args:
        folder: of an export, or any pipeline that needs no prompt, for which `call` says how to call it.
        call: arguments of every call, over those of the export.
    Raises:
        ValueError: how to call it is neither in the folder nor given, or the folder cannot be read.
    """

    def __init__(self, folder: Path, *, call: Mapping[str, Any] | None = None, device: str = "cpu"):
        from diffusers import DiffusionPipeline

        known = folder / VERIFY
        if not known.is_file() and not call:
            raise ValueError(
                f"{folder} does not say how it is called ({VERIFY} is missing); say it, e.g. call.num_inference_steps=1"
            )
        try:
            said = json.loads(known.read_text()) if known.is_file() else {}
        except ValueError as error:
            raise ValueError(f"{known} could not be read: {error}; export the run again") from error
        self.call = {**said.get("call", {}), **(call or {})}
        self.classes = range(said.get("num_classes", 0) if said.get("takes_labels") else 0)
        self._takes_batch_size = said.get("takes_batch_size", True)
        with quiet():
            pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        self.folder, self.pipeline, self._device = folder, pipeline.to(device), device

    def drawn(self) -> Drawn:
        """Its images, for `look_at`."""
        files = sorted(path for path in self.folder.rglob("*") if path.suffix in (".safetensors", ".json"))
        said = [(str(path.relative_to(self.folder)), file_checksum(path)) for path in files if path.name != VERIFY]
        key = hashlib.sha256(repr((said, sorted(self.call.items()))).encode()).hexdigest()
        return Drawn(key, self.classes, self.images)

    def images(self, slots: Sequence[int], labels: Tensor | None, seed: int) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1]; the noise of image i is torch's own for `seed_of(seed, i)`."""
        generators = [torch.Generator().manual_seed(seed_of(seed, slot)) for slot in slots]
        size = {"batch_size": len(slots)} if self._takes_batch_size else {}
        told = {} if labels is None else {"class_labels": labels.tolist()}
        with torch.no_grad():
            made = self.pipeline(**{**self.call, **size, **told}, generator=generators, output_type="np").images
        return torch.from_numpy(np.asarray(made)).movedim(-1, 1).float() * 2 - 1

    def make(self, count: int) -> None:
        """Images to time."""
        labels = torch.arange(count) % len(self.classes) if self.classes else None
        self.images(range(count), labels, 0)

    def evaluations_per_sample(self) -> float:
        """How often its network is evaluated for one image, counted; both branches of guidance count."""
        rows = 0

        def count(module, inputs, output) -> None:
            nonlocal rows
            rows += len(inputs[0])

        handles = [network.register_forward_hook(count) for network in self._networks]
        try:
            self.make(1)
        finally:
            for handle in handles:
                handle.remove()
        return float(rows)

    @property
    def num_parameters(self) -> int:
        """Of the network that is evaluated at every step."""
        return sum(parameter.numel() for network in self._networks for parameter in network.parameters())

    @property
    def _networks(self) -> list[torch.nn.Module]:
        return [part for name, part in self.pipeline.components.items() if name in NETWORKS]


def seed_of(seed: int, slot: int) -> int:
    """The seed of image `slot` among those of `seed`."""
    return int.from_bytes(hashlib.sha256(f"{seed} {slot}".encode()).digest()[:7], "big")
