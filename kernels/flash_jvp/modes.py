"""Networks as they are, with attention that carries tangents.

`scaled_dot_product_attention` raises in forward mode on every backend but its math one, which holds several matrices of
length times length. `dual_attention` puts `flash_jvp.attention` in its place wherever a tangent is present.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C._functorch import TransformType, get_unwrapped, maybe_get_level
from torch._functorch.pyfunctorch import (
    retrieve_all_functorch_interpreters,
    retrieve_current_functorch_interpreter,
)
from torch.nn import functional
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from flash_jvp import levels
from flash_jvp.api import attention

_sdpa = functional.scaled_dot_product_attention


@contextmanager
def dual_attention() -> Iterator[None]:
    """A context in which every scaled_dot_product_attention whose inputs carry a tangent is `flash_jvp.attention`.

    It covers any caller in this thread (diffusers, transformers, timm, nn.MultiheadAttention), and touches no call
    without a tangent. The whole signature is understood: boolean and additive masks of any shape that broadcasts,
    is_causal (aligned at the top left, as there), scale, enable_gqa, and any number of leading dimensions.

    Raises, from within a call that carries a tangent:
        NotImplementedError: dropout; a mask with a gradient or a tangent; a tangent of a transform that
            is not the innermost one.
        ValueError: shapes that do not fit.
    """
    with _Mode():
        yield


def dual_attention_is_on() -> bool:
    """Whether this thread is within `dual_attention`."""
    return any(isinstance(mode, _Mode) for mode in _get_current_function_mode_stack())


def carries_tangent(x: Tensor) -> bool:
    """Whether x has a tangent in any open forward-mode level: of dual_level, or of torch.func.jvp however nested."""
    if not levels.level_is_open():
        return False
    if torch.compiler.is_compiling() or not retrieve_all_functorch_interpreters():
        return forward_ad.unpack_dual(x, level=levels.LEVEL).tangent is not None
    interpreter = retrieve_current_functorch_interpreter()
    if interpreter.key() == TransformType.Jvp and forward_ad.unpack_dual(x, level=levels.LEVEL).tangent is not None:
        return True
    inner = get_unwrapped(x) if maybe_get_level(x) == interpreter.level() else x
    with interpreter.lower():
        return carries_tangent(inner)


class _Mode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is _sdpa:
            return routed_attention(*args, **(kwargs or {}))
        if func is functional.multi_head_attention_forward:
            return _multi_head_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def routed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scaled_dot_product_attention of the arguments: ours if one carries a tangent, and torch's if none does."""
    tensors = [query, key, value] if attn_mask is None else [query, key, value, attn_mask]
    if not any(carries_tangent(x) for x in tensors):
        return _sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    _refuse(attn_mask, dropout_p, is_causal)
    q, k, v, lead = _folded(query, key, value, enable_gqa)
    mask = None if attn_mask is None else _folded_mask(attn_mask, lead)
    o = attention(q, k, v, scale=scale, causal="top_left" if is_causal else False, attn_bias=mask)
    return o.reshape(*lead, *o.shape[-2:])


def _refuse(attn_mask: Tensor | None, dropout_p: float, is_causal: bool) -> None:
    if dropout_p:
        raise NotImplementedError(
            f"attention with a tangent has no dropout, got dropout_p={dropout_p}: one mask would have to fall on the "
            "weights of the output and of its tangent, and they are never held; set it to 0 (network.eval(), or the "
            "dropout of the attention alone)"
        )
    if attn_mask is not None and is_causal:
        raise ValueError("is_causal and attn_mask exclude each other, as in torch; put the causal pattern in the mask")


def _folded(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor, torch.Size]:
    """q, k, v as (B, H, length, size), and the leading dimensions of the output."""
    tensors = [x.unsqueeze(0) if x.ndim == 2 else x for x in (query, key, value)]
    outer = torch.broadcast_shapes(*(x.shape[:-3] for x in tensors))
    heads = [x.shape[-3] for x in tensors]
    if not enable_gqa:
        heads = [torch.broadcast_shapes(*((count,) for count in heads))[0]] * 3
    elif heads[1] != heads[2]:
        raise ValueError(f"key and value must have equally many heads, got {heads[1]} and {heads[2]}")
    batch = math.prod(outer)
    q, k, v = (
        x.expand(*outer, count, *x.shape[-2:]).reshape(batch, count, *x.shape[-2:])
        for x, count in zip(tensors, heads, strict=True)
    )
    ndim = max(x.ndim for x in (query, key, value))
    return q, k, v, torch.Size((*outer, heads[0]) if ndim > 2 else ())


def _folded_mask(mask: Tensor, lead: torch.Size) -> Tensor:
    """The mask with its leading dimensions folded as those of the queries."""
    if mask.ndim < 4:
        return mask
    return mask.expand(*lead[:-1], *mask.shape[-3:]).reshape(-1, *mask.shape[-3:])


# nn.MultiheadAttention: torch hands its whole Python body to the mode at once, and no mode is on within that. So this
# is the same body with the one name replaced, and without the question whether a mode is on.
_multi_head_attention = FunctionType(
    functional.multi_head_attention_forward.__code__,
    {
        **vars(functional),
        "scaled_dot_product_attention": routed_attention,
        "has_torch_function": lambda tensors: False,
    },
    "multi_head_attention_forward",
    functional.multi_head_attention_forward.__defaults__,
)
