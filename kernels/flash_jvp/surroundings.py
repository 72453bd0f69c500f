"""What a block reads besides its arguments, so that it can be computed again as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Surroundings:
    """What a block reads besides its arguments: random numbers and autocast."""

    random: dict[torch.device, Tensor]
    autocast: dict[str, tuple[torch.dtype, bool]]

    @classmethod
    def now(cls, values: list[Tensor]) -> Surroundings:
        devices = {value.device for value in values if value.device.type not in ("cpu", "meta")}
        random = {device: torch.get_device_module(device).get_rng_state(device) for device in devices}
        random[torch.device("cpu")] = torch.get_rng_state()
        kinds = {"cpu", *(device.type for device in devices)}
        autocast = {kind: (torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds}
        return cls(random, autocast)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """A context with the same surroundings, which leaves the present random states as they are."""
        with contextlib.ExitStack() as stack:
            for kind, (dtype, enabled) in self.autocast.items():
                # its cache would keep the casts of a recomputation until the outermost autocast ends
                stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
            for device, state in self.random.items():
                stack.enter_context(_random_state(device, state))
            yield


@contextlib.contextmanager
def _random_state(device: torch.device, state: Tensor) -> Iterator[None]:
    if device.type == "cpu":
        read, write = torch.get_rng_state, torch.set_rng_state
    else:
        module = torch.get_device_module(device)
        read, write = lambda: module.get_rng_state(device), lambda state: module.set_rng_state(state, device)
    present = read()
    write(state)
    try:
        yield
    finally:
        write(present)
