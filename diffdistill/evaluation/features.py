"""Networks that turn images into the features which distances are measured on.

The shipped one is a small classifier of Fashion-MNIST, trained by `train_features`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from diffdistill.evaluation.convention import InputConvention
from diffdistill.evaluation.resize import RESIZES

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
MOMENTS_FILE = "train60k_moments.safetensors"


@dataclass(frozen=True, eq=False)
class Extractor:
    """A frozen network that gives features and perhaps class logits.

    Attributes:
        name: printed beside every value that comes from it.
        module: maps images in its input convention to (features (N, num_features), logits (N, classes) or None).
        num_features: D.
        input: the images that the module takes.
        has_logits: whether the module also classifies.
        checksum: SHA-256 of the weights, as hex; values of different checksums are never compared.
        knows_classes: whether its classes are those of the images, so that it tells their accuracy.
        published: whether its Frechet distances at 50,000 samples stand beside published ones, as FID.
    """

    name: str
    module: nn.Module
    num_features: int
    input: InputConvention
    has_logits: bool
    checksum: str
    knows_classes: bool = True
    published: bool = False

    @torch.no_grad()
    def __call__(self, images: Tensor, *, batch_images: int = 100) -> tuple[Tensor, Tensor | None]:
        """Features and logits of images, on the CPU in float32, or in float64 where the module computes in it.

        Args:
            images: float (N, 3, height, width) in [-1, 1]; of any size where the input convention resizes.
            batch_images: images in one pass through the module.
        Returns:
            features (N, D); and logits (N, classes), or None where the module has none.
        Raises:
            ValueError: another shape, or features that are not finite.
        """
        size, resizes = (self.input.height, self.input.width), self.input.resize != "none"
        if images.ndim != 4 or images.shape[1] != 3 or not (resizes or images.shape[2:] == size) or not len(images):
            wanted = "any height, any width" if resizes else f"{size[0]}, {size[1]}"
            raise ValueError(
                f"{self.name} takes images (N, 3, {wanted}) with N >= 1, got {tuple(images.shape)}; "
                "resize them, or choose another extractor"
            )
        parameter = next(self.module.parameters())
        gain = (self.input.high - self.input.low) / 2
        passes = []
        for chunk in images.split(batch_images):
            chunk = chunk.to(parameter.device, parameter.dtype)
            if resizes:
                chunk = RESIZES[self.input.resize](chunk, *size)
            passes.append(self.module((chunk + 1) * gain + self.input.low))
        kept = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        features = torch.cat([each[0].to("cpu", kept) for each in passes])
        if features.shape != (len(images), self.num_features) or not features.isfinite().all():
            raise ValueError(
                f"{self.name} gave features {tuple(features.shape)} for {len(images)} images, or NaN among them; "
                f"(N, {self.num_features}) and finite values were expected"
            )
        return features, torch.cat([each[1].to("cpu", kept) for each in passes]) if self.has_logits else None


def check_pair(real: Tensor, generated: Tensor):
    """Refuses two sets of features that cannot be compared.

    Args:
        real: (N, D).
        generated: (M, D).
    Raises:
        ValueError: another shape, D differs, or a value is not finite.
    """
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"features must be (N, D) and (M, D), got {tuple(real.shape)} and {tuple(generated.shape)}; "
            "take both from the same feature extractor"
        )
    if not (real.isfinite().all() and generated.isfinite().all()):
        raise ValueError("features hold NaN or infinity; look at the images that were evaluated")


class Block(nn.Module):
    """Convolution, batch normalisation, SiLU; adds its input where `residual`."""

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel: int = 3, stride: int = 1, residual: bool = False
    ):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) to (N, out, H / stride, W / stride)."""
        y = F.silu(self.norm(self.conv(x)))
        return x + y if self.residual else y


class FashionFeatures(nn.Module):
    """A classifier of grey 28 x 28 images; its features are the last activation, averaged over the picture.

    Args:
        channels: widths at 28, 14 and 7 pixels.
        num_features, num_classes: widths of the two outputs.
    """

    def __init__(self, channels: Sequence[int], num_features: int, num_classes: int):
        super().__init__()
        wide, middle, small = channels
        self.trunk = nn.Sequential(
            Block(1, wide),
            Block(wide, middle, stride=2),
            Block(middle, middle, residual=True),
            Block(middle, small, stride=2),
            Block(small, small, residual=True),
            Block(small, num_features, kernel=1),
        )
        self.classify = nn.Linear(num_features, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, num_features) and logits (N, num_classes) of images (N, 3, 28, 28) in [-1, 1]."""
        features = self.trunk(images.mean(1, keepdim=True)).mean((2, 3))
        return features, self.classify(features)


def default_extractor(path: Path, *, device: torch.device | str = "cpu") -> Extractor:
    """The extractor kept in a folder: config.json and model.safetensors, as `train_features` writes them.

    Args:
        path: the folder; `checkpoints/fashion-features` of the repository is the shipped one.
    Raises:
        ValueError: a file is missing or damaged, or the weights are not those that config.json names.
    """
    weights, config_file = path / WEIGHTS_FILE, path / CONFIG_FILE
    for file in (weights, config_file):
        if not file.is_file():
            raise ValueError(
                f"there is no {file.name} at {path}; give the folder checkpoints/fashion-features of the repository, "
                f"or make one with python -m {__package__}.train_features"
            )
    try:
        config = json.loads(config_file.read_text())
    except ValueError as error:
        raise ValueError(f"{config_file} could not be read: {error}; restore the file") from error
    checksum = hashlib.sha256(weights.read_bytes()).hexdigest()
    if checksum != config["checksum"]:
        raise ValueError(
            f"{weights} has the checksum {checksum}, and {CONFIG_FILE} names {config['checksum']}; restore the folder"
        )
    module = FashionFeatures(**config["architecture"])
    try:
        module.load_state_dict(load_file(str(weights)))  # float16 on disk, widened to float32 here
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{weights} does not hold the weights of {CONFIG_FILE}: {error}") from error
    module = module.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    return Extractor(
        name=config["name"],
        module=module,
        num_features=config["architecture"]["num_features"],
        input=InputConvention(**config["input"]),
        has_logits=True,
        checksum=checksum,
    )
