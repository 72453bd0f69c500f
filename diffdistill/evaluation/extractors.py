"""Feature extractors by what a user has at hand: a folder, a TorchScript file, a transformers model, any module."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from diffdistill.evaluation.checksums import file_checksum, weights_checksum
from diffdistill.evaluation.convention import InputConvention
from diffdistill.evaluation.features import CONFIG_FILE, Extractor, default_extractor
from diffdistill.evaluation.inception import InceptionFeatures, inception_features, is_inception
from diffdistill.evaluation.pretrained import KINDS, pretrained_extractor

KNOWN = (
    "a folder that train_features wrote (checkpoints/fashion-features is one), a TorchScript file (.pt), a folder of a "
    f"transformers model, or {' or '.join(f'{kind}:NAME' for kind in KINDS)} for one of the hub"
)


def open_extractor(name: str, *, input: InputConvention | None = None, device: torch.device | str = "cpu") -> Extractor:
    """The extractor that a name stands for.

    Args:
        name: a folder of `train_features`; a TorchScript file; a folder of a transformers model (CLIP, DINOv2); or
            clip:NAME or dinov2:NAME, which transformers fetches from the hub unless it has it.
        input: what images a TorchScript file takes. InceptionV3 of 2015-12-05 is known by its features, and needs none.
    Raises:
        ValueError: nothing is there, or it cannot be used; the message says how to get one.
    """
    kind, colon, model = name.partition(":")
    path = Path(name)
    if colon and kind in KINDS:
        found = pretrained_extractor(model, kind=kind, device=device)
    elif path.is_file():
        return torchscript_extractor(path, input=input, device=device)
    elif (path / CONFIG_FILE).is_file() and "model_type" in _read(path / CONFIG_FILE):
        found = pretrained_extractor(name, kind=_read(path / CONFIG_FILE)["model_type"], device=device)
    elif path.is_dir():
        found = default_extractor(path, device=device)
    else:
        raise ValueError(f"there is no feature extractor at {name}; give {KNOWN}")
    if input is not None:
        raise ValueError(f"{name} knows what images it takes; leave the input convention out")
    return found


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} could not be read: {error}; restore the file") from error


def torchscript_extractor(
    path: Path, *, input: InputConvention | None = None, device: torch.device | str = "cpu"
) -> Extractor:
    """The network in a TorchScript file, which gives features (N, D), or those and logits (N, classes).

    Args:
        input: needed for any but InceptionV3 of 2015-12-05, as which a file counts that gives its features.
    Raises:
        ValueError: the file cannot be read, or is not that network and `input` is missing.
    """
    try:
        module = torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} is no TorchScript file: {first}; feature networks may be {KNOWN}") from error
    if next(module.parameters(), None) is None:  # which tell the device and the dtype of its images
        raise ValueError(f"{path} has no parameters, as after torch.jit.freeze; save the module before it is frozen")
    if input is not None:
        return module_extractor(module, name=path.stem, input=input, checksum=file_checksum(path))
    wrapped = inception_features(module)
    if not is_inception(wrapped, device):
        raise ValueError(
            f"{path} is not InceptionV3 of 2015-12-05 (its features of a known picture are others), so it does not say "
            "what images it takes; give evaluate.input={height: 224, width: 224, low: 0, high: 1, resize: bicubic}"
        )
    return Extractor(
        name="inception-v3-2015-12-05",
        module=wrapped,
        num_features=InceptionFeatures.num_features,
        input=InceptionFeatures.input,
        has_logits=wrapped.has_logits,
        checksum=file_checksum(path),
        knows_classes=False,
        published=True,
    )


def module_extractor(
    module: nn.Module, *, name: str, input: InputConvention, checksum: str = "", knows_classes: bool = False
) -> Extractor:
    """Any network as an extractor; what it gives is tried out on one black picture.

    Args:
        module: takes images in its input convention, and gives features (N, D), or those and logits (N, classes) or
            None. Put in eval mode and frozen.
        name: printed beside every value.
        checksum: of its weights; empty to compute it.
        knows_classes: whether its logits are of the images' own classes.
    Raises:
        ValueError: it gives something else.
    """
    module = Pair(module).eval().requires_grad_(False)
    parameter = next(module.parameters())
    black = torch.full((2, 3, input.height, input.width), input.low, device=parameter.device, dtype=parameter.dtype)
    with torch.no_grad():
        features, logits = module(black)
    if features.ndim != 2 or len(features) != 2 or not (logits is None or logits.ndim == 2):
        raise ValueError(
            f"{name} gave {tuple(features.shape)} for 2 images, and features are (2, D); average them over the picture"
        )
    return Extractor(
        name=name,
        module=module,
        num_features=features.shape[1],
        input=input,
        has_logits=logits is not None,
        checksum=checksum or weights_checksum(module),
        knows_classes=knows_classes,
    )


class Pair(nn.Module):
    """A network that gives features alone, or a pair, as one that gives a pair."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (N, D), and logits (N, classes) or None."""
        found = self.module(images)
        return found if isinstance(found, tuple) else (found, None)
