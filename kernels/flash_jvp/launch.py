"""Running a Triton kernel on the device of its tensors: compiled on CUDA, by Triton's interpreter on a CPU.

Triton decides at import, by TRITON_INTERPRET, whether its functions are compiled or interpreted. Here both live in
one process: a CPU tensor runs an interpreted copy of the compiled kernel, made on first use. The interpreter is for
checking numerics; it is thousands of times slower than anything else.
"""

from __future__ import annotations

import inspect
import threading
import types
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy
import torch
import triton
import triton.experimental.gluon  # noqa: F401  the interpreter imports it late, and it insists on compiled functions
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from flash_jvp.tiles import Tile

_interpreting = threading.RLock()


@dataclass(frozen=True)
class Launch:
    """A kernel with all it is called with: what runs it and what compiles it ahead of time see the same.

    Fields:
        kernel: a @triton.jit function.
        num_programs: the size of its one-dimensional grid.
        arguments: tensors, integers, floats or None by name; None and 1 are constants to Triton.
        constants: its tl.constexpr arguments by name, without the tile's BLOCK_M and BLOCK_N.
        tile: the configuration.
    """

    kernel: Any
    num_programs: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    tile: Tile

    def all_constants(self) -> dict[str, Any]:
        """The constants with those of the tile."""
        return {**self.constants, "BLOCK_M": self.tile.block_m, "BLOCK_N": self.tile.block_n}

    def run(self) -> None:
        """Run on the device of the tensors; a grid of no programs does nothing.

        Raises:
            NotImplementedError: a CPU without a working interpreter.
        """
        if self.num_programs == 0:
            return
        device = next(x.device for x in self.arguments.values() if isinstance(x, torch.Tensor))
        options = {"num_warps": self.tile.num_warps, "num_stages": self.tile.num_stages}
        call = {**self.arguments, **self.all_constants(), **options}
        if device.type == "cuda":
            with torch.cuda.device(device):
                self.kernel[(self.num_programs,)](**call)
            return
        require_interpreter(triton.__version__, numpy.__version__)
        if isinstance(self.kernel, InterpretedFunction):  # the process itself has TRITON_INTERPRET=1
            self.kernel[(self.num_programs,)](**call)
            return
        with _interpreted_language():
            _interpreted(self.kernel)[(self.num_programs,)](**call)


def require_interpreter(triton_version: str, numpy_version: str) -> None:
    """Raise NotImplementedError for versions with which Triton's interpreter does not work."""
    older, newer = (tuple(int(part) for part in v.split(".")[:2]) for v in (triton_version, numpy_version))
    if older < (3, 7) and newer >= (2, 4):
        raise NotImplementedError(
            f"the interpreter of Triton {triton_version} does not work with numpy {numpy_version}; "
            'install numpy<2.4 or triton>=3.7, or use backend="chunked"'
        )


class _DeviceFunction(InterpretedFunction):
    """A function called by interpreted kernels. The kernel's launch has patched the language already, and undoes it."""

    def __call__(self, *args, **kwargs):
        return self.rewrite()(*args, **kwargs)


@cache
def _interpreted(function: JITFunction) -> InterpretedFunction:
    return _with_globals(function, InterpretedFunction, _interpreted_globals(inspect.getmodule(function.fn)))


def _with_globals(function: JITFunction, kind: type[InterpretedFunction], namespace: dict) -> InterpretedFunction:
    original = function.fn
    copy = types.FunctionType(original.__code__, namespace, original.__name__, original.__defaults__)
    copy.__annotations__ = original.__annotations__
    copy.__kwdefaults__ = original.__kwdefaults__
    return kind(copy)


@cache
def _interpreted_globals(module: types.ModuleType) -> dict:
    """A copy of a module's names in which every compiled function is an interpreted one."""
    # tl.core too, so that the launch patches what the functions of Triton's own standard library call
    namespace = {**vars(module), "_core_of_interpreter": tl.core}
    for name, value in vars(module).items():
        if isinstance(value, JITFunction):
            if value.fn.__module__ == module.__name__:
                namespace[name] = _with_globals(value, _DeviceFunction, namespace)
            else:
                namespace[name] = _interpreted_globals(inspect.getmodule(value.fn))[value.fn.__name__]
    return namespace


@contextmanager
def _interpreted_language():
    """Put interpreted functions into triton.language, whose own are compiled ones (tl.sum, tl.max, tl.zeros)."""
    with _interpreting:
        before = [
            (place, name, value)
            for place in (tl, tl.standard)
            for name, value in vars(place).items()
            if isinstance(value, JITFunction)
        ]
        try:
            for place, name, value in before:
                setattr(place, name, _interpreted_globals(inspect.getmodule(value.fn))[value.fn.__name__])
            yield
        finally:
            for place, name, value in before:
                setattr(place, name, value)
