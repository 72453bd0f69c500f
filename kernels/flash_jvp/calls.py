"""A block as a function of the tensors among its arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from flash_jvp.modes import carries_tangent

Tensors = Tensor | tuple[Tensor | None, ...] | dict[str, Tensor | None]


@dataclass(frozen=True)
class Structure:
    """Where tensors are among what a block returned; the rest is None."""

    spec: TreeSpec
    is_tensor: tuple[bool, ...]

    def halves(self, tensors: tuple[Tensor, ...]) -> tuple[Any, Any]:
        """The first half of the tensors, and the second, each in the structure of the block's output."""
        half = len(tensors) // 2
        return self._whole(tensors[:half]), self._whole(tensors[half:])

    def _whole(self, tensors: tuple[Tensor, ...]) -> Any:
        rest = iter(tensors)
        return tree_unflatten([next(rest) if tensor else None for tensor in self.is_tensor], self.spec)


@dataclass(frozen=True)
class Call:
    """A block as a function of the tensors among its arguments.

    Fields:
        leaves: x, args and kwargs flattened, with None where tensors belong.
        slots: where they belong.
    """

    block: Callable
    spec: TreeSpec
    leaves: tuple[Any, ...]
    slots: tuple[int, ...]

    def __call__(self, values: Iterable[Tensor]) -> tuple[list[Tensor], Structure]:
        leaves = list(self.leaves)
        for slot, value in zip(self.slots, values, strict=True):
            leaves[slot] = value
        x, args, kwargs = tree_unflatten(leaves, self.spec)
        if isinstance(x, dict):
            result = self.block(*args, **x, **kwargs)
        else:
            result = self.block(*(x if isinstance(x, tuple) else (x,)), *args, **kwargs)
        flat, spec = tree_flatten(result)
        for leaf in flat:
            if leaf is not None and not isinstance(leaf, Tensor):
                raise ValueError(f"a block must return tensors and None only, got a {type(leaf).__name__}; wrap it")
        is_tensor = tuple(leaf is not None for leaf in flat)
        return [leaf for leaf in flat if leaf is not None], Structure(spec, is_tensor)

    def jvp(self, values: Iterable[Tensor], tangents: Iterable[Tensor | None]):
        """The tensors that the block returns, their tangents, and the structure of what it returns."""
        values, structures = list(values), []
        moving = {index: tangent for index, tangent in enumerate(tangents) if tangent is not None}

        def primal(*moved: Tensor) -> tuple[Tensor, ...]:
            at = list(values)
            for index, value in zip(moving, moved, strict=True):
                at[index] = value
            tensors, structure = self(at)
            structures.append(structure)
            return tuple(tensors)

        o, to = torch.func.jvp(primal, tuple(values[index] for index in moving), tuple(moving.values()))
        return o, to, structures[0]


def bound(block: Callable, x: Tensors, tx: Tensors, args: tuple, kwargs: dict):
    """The call, the tensors among its arguments, and a tangent or None for each."""
    alike = isinstance(x, Tensor) and isinstance(tx, Tensor) or type(x) is type(tx)
    if not alike or isinstance(x, dict) and x.keys() != tx.keys():
        raise ValueError(f"x and tx must have the same structure, got {type(x).__name__} and {type(tx).__name__}")
    if isinstance(x, dict):
        pairs = [(x[name], tx[name]) for name in x]
    elif isinstance(x, tuple):
        pairs = list(zip(x, tx, strict=True))
    elif isinstance(x, Tensor):
        pairs = [(x, tx)]
    else:
        raise ValueError(f"x must be a tensor, a tuple or a dict of tensors, got {type(x).__name__}")
    for primal, tangent in pairs:
        if not isinstance(primal, Tensor) and not (primal is None and tangent is None):
            raise ValueError(
                f"x must hold tensors, got a {type(primal).__name__}; pass other arguments in args or kwargs"
            )
        if tangent is not None and (tangent.shape != primal.shape or tangent.dtype != primal.dtype):
            raise ValueError(
                f"a tangent must have the shape and dtype of its primal, got {tuple(tangent.shape)} of {tangent.dtype} "
                f"for {tuple(primal.shape)} of {primal.dtype}"
            )
    if all(tangent is None for _, tangent in pairs):
        raise ValueError("tx holds no tangent; call the block itself")
    leaves, spec = tree_flatten((x, args, kwargs))
    slots = tuple(index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    values = [leaves[slot] for slot in slots]
    if any(carries_tangent(value) for value in values):
        raise ValueError("an argument of jvp_block carries a tangent of its own; unpack it, and pass the tangent in tx")
    of_x = [tangent for primal, tangent in pairs if primal is not None]
    tangents = of_x + [None] * (len(values) - len(of_x))  # x is flattened first, in its own order
    constants = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    return Call(block, spec, constants, slots), values, tangents
