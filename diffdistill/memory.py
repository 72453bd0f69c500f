"""How much device memory was used, and running out of it, told with who ran out and what helps."""

import resource
import sys
from contextlib import contextmanager

import torch


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
