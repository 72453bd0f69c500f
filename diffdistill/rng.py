"""Randomness by slots: every number is a function of (seed, place in the run, sample), so there is no state to save.

A slot is the index of a sample in the global batch. Because each sample's draws are keyed by its slot and never by rank
or micro-batch, one process or eight, accumulated or not, compute the same thing, and a resumed run goes on bit for bit.
"""

import hashlib
import random
from collections.abc import Iterable, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def _hash(*key: int | str) -> int:
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


class Shared:
    """Draws that every slot, and so every rank, agrees on; plain Python numbers, so that the host never waits."""

    def __init__(self, key: int):
        self._random = random.Random(key)

    def integer(self, high: int) -> int:
        """An integer in [0, high)."""
        return self._random.randrange(high)

    def uniform(self) -> float:
        """A number in [0, 1)."""
        return self._random.random()


class Rng:
    """Draws for the samples `slots`, on `device`.

    Args:
        key: where in the run this is, e.g. (seed, attempt, step, index, term). Equal keys give equal draws.
        slots: global indices of the samples at hand; a draw has len(slots) rows.
        dtype: of the normal draws.
    """

    def __init__(self, key: Iterable[int | str], slots: Sequence[int], *, device="cpu", dtype=torch.float32):
        self.key = tuple(key)
        self.slots = slots
        self.device, self.dtype = torch.device(device), dtype
        self.shared = Shared(_hash(*self.key, "shared"))
        self._generator = torch.Generator(self.device)
        self._count = 0

    def fork(self, name: str) -> "Rng":
        """An independent stream for the same slots."""
        return Rng((*self.key, name), self.slots, device=self.device, dtype=self.dtype)

    def rows(self, places: Sequence[int]) -> "Rng":
        """This stream, from here on, for the slots at `places` alone: each sample draws the same numbers either way."""
        part = Rng(self.key, [self.slots[place] for place in places], device=self.device, dtype=self.dtype)
        part._count = self._count
        return part

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers of shape (N, *shape)."""
        rows = torch.empty(len(self.slots), *shape, device=self.device, dtype=self.dtype)
        return self._fill(rows, Tensor.normal_)

    def uniform(self) -> Tensor:
        """Numbers in (0, 1), shape (N,), in float64 where the device has it."""
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        rows = torch.empty(len(self.slots), 1, device=self.device, dtype=dtype)
        return self._fill(rows, Tensor.uniform_).squeeze(1).clamp_(min=torch.finfo(dtype).tiny)

    def integers(self, high: int) -> Tensor:
        """Integers in [0, high), shape (N,), int64."""
        rows = torch.empty(len(self.slots), 1, device=self.device, dtype=torch.int64)
        return self._fill(rows, lambda row, generator: row.random_(0, high, generator=generator)).squeeze(1)

    def keep(self, name: str, shape: Sequence[int], probability: float) -> Tensor:
        """A mask of shape (N, *shape), True with `probability`; the same for every call with this name.

        It leaves the other draws untouched, so that a network evaluated twice in one term, or recomputed by gradient
        checkpointing, sees one mask.
        """
        rows = torch.empty(len(self.slots), *shape, device=self.device)
        return self._fill(rows, Tensor.uniform_, name) < probability

    def _fill(self, rows: Tensor, fill, name: str = "") -> Tensor:
        if not name:
            name, self._count = f"draw {self._count}", self._count + 1
        for row, slot in zip(rows, self.slots, strict=True):
            fill(row, generator=self._generator.manual_seed(_hash(*self.key, name, slot)))
        return rows


DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class SlotDropout(nn.Module):
    """Dropout whose masks are drawn by slot; it replaces `nn.Dropout`.

    It drops only inside `drawn_from(dropouts, rng)`, which the Trainer opens for the player in training, around forward
    and backward pass: so frozen networks and evaluation never drop, whatever their training flag says, and gradient
    checkpointing recomputes with the same masks. Dimension 0 of its input must be the batch, or whole copies of it.
    """

    def __init__(self, probability: float, name: str):
        super().__init__()
        self.probability, self.name = probability, name
        self.rng: Rng | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.rng is None or self.probability == 0:
            return x
        keep = self.rng.keep(self.name, x.shape[1:], 1 - self.probability)
        copies, rest = divmod(len(x), len(keep))
        if rest:
            raise ValueError(f"dropout {self.name} got {len(x)} rows for {len(keep)} slots; the batch must come first")
        return x * keep.repeat(copies, *[1] * (x.ndim - 1)).to(x.dtype) / (1 - self.probability)


@contextmanager
def drawn_from(dropouts: Iterable[SlotDropout], rng: Rng):
    """Within the block, these drop, with masks from `rng`; after it, as they did before."""
    dropouts = list(dropouts)
    before = [dropout.rng for dropout in dropouts]
    for dropout in dropouts:
        dropout.rng = rng
    try:
        yield
    finally:
        for dropout, earlier in zip(dropouts, before, strict=True):
            dropout.rng = earlier


def replace_dropout(module: nn.Module) -> list[SlotDropout]:
    """Put a SlotDropout in place of every `nn.Dropout` inside `module`; returns those with a positive probability.

    Raises:
        ValueError: another kind of dropout, whose masks would not be drawn by slot.
    """
    for path, child in list(module.named_modules()):
        for name, part in child.named_children():
            if type(part) is nn.Dropout:
                setattr(child, name, SlotDropout(part.p, f"{path}.{name}"))
            elif isinstance(part, DROPOUTS) and part.p > 0:
                raise ValueError(
                    f"{path}.{name} is a {type(part).__name__}, whose masks depend on rank and batch; "
                    "use nn.Dropout, or set its probability to 0"
                )
    return slot_dropouts(module)


def slot_dropouts(module: nn.Module) -> list[SlotDropout]:
    """Those in the module with a positive probability."""
    return [part for part in module.modules() if isinstance(part, SlotDropout) and part.probability > 0]
