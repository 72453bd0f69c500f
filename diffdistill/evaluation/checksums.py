"""SHA-256 of networks and files: values of different extractors are told apart by it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn


def weights_checksum(module: nn.Module) -> str:
    """Of all weights, in the order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def file_checksum(path: Path) -> str:
    """Of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
