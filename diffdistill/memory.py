"""How much device memory was used, and running out of it, told with who ran out and what helps."""

import resource
import sys
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class OutOfMemory(RuntimeError):
    """The device is full; the message names who took the last of it, and what helps."""


@contextmanager
def memory_for(role: str):
    """Within the block, running out of device memory is an OutOfMemory that names `role`, or the term noted inside."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        where = ", ".join([role, *getattr(error, "__notes__", ())])
        raise OutOfMemory(
            f"out of memory in {where}: {' '.join(str(error).split())[:200]}. What helps most: a larger "
            "train.accumulate, train.gradient_checkpointing=true, or train.sharding=fsdp2 over more GPUs"
        ) from error


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has held so far: of the device where that counts it, else of its own."""
    match device.type:
        case "cuda":
            return torch.cuda.max_memory_allocated(device)
        case "mps":
            return torch.mps.driver_allocated_memory()
        case _:
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return used if sys.platform == "darwin" else used * 1024  # KiB, but for macOS


def peak_of(act: Callable[[], Any], device: torch.device) -> int:
    """The most bytes held at once during a call, less those held before: by CUDA's allocator, elsewhere counted.

    What is counted are the storages of tensors that torch's operators make, not what an operator holds for itself.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        act()
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as live:
        act()
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Within the block, counts the bytes of all storages that operators make and that are still alive.

    Attributes:
        live: of those alive now.
        peak: the most at once.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()  # addresses, which are given out again when a storage is gone
        self._before: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self._known:
                self._before.add(tensor.untyped_storage().data_ptr())
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if not size or address in self._known or address in self._before:
            return
        self._known.add(address)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live -= size
