"""A denoiser's folder: `denoiser.json` says what the network means, `network/` holds it."""

import dataclasses
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from diffdistill.backbones.diffusers import FAMILIES, DiffusersBackbone
from diffdistill.backbones.mlp import MLP
from diffdistill.denoiser import Backbone

MEANING, NETWORK = "denoiser.json", "network"


def make_backbone(name: str, options: Mapping[str, Any], *, null_label: int | None, checkpointing: bool) -> Backbone:
    """A network of random weights: MLP, or any diffusers class with a family."""
    if name == "MLP":
        return MLP(**options)
    if name not in FAMILIES:
        raise ValueError(f"network.name={name!r} is unknown; known are MLP, {', '.join(FAMILIES)}")
    network = getattr(importlib.import_module("diffusers"), name)(**options)
    return DiffusersBackbone(network, null_label=null_label, gradient_checkpointing=checkpointing)


def read_backbone(folder: Path, *, null_label: int | None, checkpointing: bool) -> Backbone:
    """A network in diffusers' format, or an MLP in ours, in float32."""
    config = json.loads((folder / "config.json").read_text())
    name = config.get("_class_name")
    if name == "MLP":
        backbone = MLP(**{key: value for key, value in config.items() if key != "_class_name"})
        backbone.load_state_dict(load_file(folder / "weights.safetensors"))
        return backbone
    if name not in FAMILIES:
        raise ValueError(f"{folder / 'config.json'} is a {name}; known are MLP, {', '.join(FAMILIES)}")
    kind = getattr(importlib.import_module("diffusers"), name)
    variant = "fp16" if list(folder.glob("*.fp16.safetensors")) else None
    network = kind.from_pretrained(folder, variant=variant, torch_dtype=torch.float32, use_safetensors=True)
    return DiffusersBackbone(network, null_label=null_label, gradient_checkpointing=checkpointing)


def write_backbone(backbone: Backbone, folder: Path, *, half: bool) -> None:
    """The network in diffusers' format, or an MLP in ours; half: as fp16."""
    if isinstance(backbone, MLP):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"_class_name": "MLP", **backbone.options}, indent=1))
        save_file(backbone.state_dict(), folder / "weights.safetensors")
        return
    network: nn.Module = backbone.network
    if half:
        with_half = type(network).from_config(network.config).half()
        with_half.load_state_dict(network.state_dict())
        network = with_half
    network.save_pretrained(folder, variant="fp16" if half else None, safe_serialization=True)


def read_meaning(folder: Path) -> dict:
    """The plain data of `denoiser.json`."""
    return json.loads((folder / MEANING).read_text())
