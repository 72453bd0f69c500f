"""Prompts: what a text-conditioned network is told of each prompt, made once by its pipeline, and how it is called.

A prompt is a class here: its label is its place in the list, and the label behind the last is the negative prompt, the
unconditional branch of guidance. So whatever handles classes handles prompts, and training holds no text encoder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# The kinds of leaf in a call: a tensor with one row per prompt, a list with one entry of its own length per prompt, a
# tensor or a number that is the same for all, and a list that repeats one entry for each sample.
ROW, RAGGED, SHARED, VALUE, EACH = "row", "ragged", "shared", "value", "each"
MAPPING, TUPLE, LIST = "dict", "tuple", "list"
NULL = -1  # in files, the row of the negative prompt


@dataclass(frozen=True)
class Call:
    """How a pipeline calls its network.

    Args:
        sample, time: names of the arguments that take x and the time.
        time_scale, time_shift: the network is told time_scale * clock + time_shift, the clock as its denoiser says.
        sign: the network's output times this is what its scheduler takes.
        listed: x goes in, and the output comes out, as a list of samples with a frame axis of length 1 behind the
            channels.
        arguments: all others by name: a tree of {kind: ...}, whose leaves are of the kinds above.
    """

    sample: str
    time: str
    time_scale: float
    time_shift: float
    sign: int
    listed: bool
    arguments: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts as tensors; every copy of a network shares them.

    Args:
        texts: the prompts.
        shape: of a sample of the network, without the batch.
        call: how the network is called.
        network: the class of diffusers that it is of.
        meaning: what the network's inputs and outputs mean, the plain data of a `denoiser.json`.
        rows: by name, (P, ...) or, with the negative prompt behind the others, (P + 1, ...).
        shared: by name, what is the same for all prompts.
    """

    texts: Sequence[str]
    shape: tuple[int, ...]
    call: Call
    network: str
    meaning: Mapping[str, Any]
    rows: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]
    _placed: dict[torch.device, tuple[Mapping[str, Tensor], Mapping[str, Tensor]]] = field(default_factory=dict)

    def __deepcopy__(self, memo) -> "Prompts":
        return self

    @property
    def null(self) -> int | None:
        """The label of the negative prompt, or None where there is none."""
        return len(self.texts) if all(len(rows) > len(self.texts) for rows in self.rows.values()) else None

    def arguments(self, label: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """The arguments of the network's call for prompts `label`, int64 (N,), floating-point tensors in `dtype`."""
        rows, shared = self._on(label.device)
        chosen = {name: _as(table.index_select(0, label), dtype) for name, table in rows.items()}
        shared = {name: _as(tensor, dtype) for name, tensor in shared.items()}
        return {name: _built(tree, chosen, shared, len(label)) for name, tree in self.call.arguments.items()}

    def _on(self, device: torch.device) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        if device not in self._placed:
            self._placed[device] = tuple(
                {name: tensor.to(device) for name, tensor in group.items()} for group in (self.rows, self.shared)
            )
        return self._placed[device]


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _built(tree: Mapping[str, Any], rows: Mapping[str, Tensor], shared: Mapping[str, Tensor], count: int) -> Any:
    ((kind, content),) = tree.items()
    match kind:
        case "row":
            return rows[content]
        case "ragged":
            lengths = rows[f"{content}.length"]
            if lengths.device.type == "meta":
                return list(rows[content])
            lengths = lengths.tolist()  # waits for the device: networks that take lists leave no other way
            return [row[:length] for row, length in zip(rows[content], lengths, strict=True)]
        case "shared":
            return shared[content]
        case "value":
            return content
        case "each":
            return [_plain(content)] * count
        case "dict":
            return {name: _built(part, rows, shared, count) for name, part in content.items()}
        case "tuple":
            return tuple(_built(part, rows, shared, count) for part in content)
        case "list":
            return [_built(part, rows, shared, count) for part in content]
    raise ValueError(f"a call has a leaf of the unknown kind {kind!r}; make the prompts again by diffdistill prepare")


def _plain(value: Any) -> Any:
    """Lists of a JSON file as the tuples that pipelines give, but for the outermost."""
    return [tuple(part) if isinstance(part, list) else part for part in value] if isinstance(value, list) else value
