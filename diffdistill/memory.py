"""Running out of device memory, told with who ran out and what helps."""

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
