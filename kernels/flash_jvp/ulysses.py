"""Attention over a sequence that several ranks share, with tangents (Ulysses; Jacobs et al. 2023).

Each rank holds a stretch of the sequence for all heads. One all-to-all turns that into the whole sequence for some of
the heads, attention runs as ever, and one all-to-all brings its output back. The functional collectives of torch drop
tangents without a word, so tangents travel as tensors of their own, in the same buffer as the primals.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from flash_jvp import levels
from flash_jvp.api import attention, attention_jvp


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: ProcessGroup | None = None,
    attn_bias: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """This rank's stretch (B, H, M/P, dv) of the attention over the sequences of all P ranks, with its tangent.

    Stretches are equally long and in the order of the ranks; those of keys may be longer or shorter than those of
    queries. Tangents and gradients are those of one process. All ranks must call it with the same shapes and options,
    and with tangents of the same inputs: only those that exist are sent.

    Args:
        q: (B, H, M/P, d); k: (B, Hk, N/P, d); v: (B, Hk, N/P, dv), with H and Hk multiples of P.
        group: the ranks that share the sequence; all of them if not given.
        attn_bias: as in `attention`, for whole sequences: broadcastable to (B, H, M, N), the same on every rank, which
            takes its own heads from it.
        options: those of `attention`: kv_lens counts keys of the whole sequence; causal compares places in it;
            with tangent_grad the cotangents of tangents travel back as well.

    Raises:
        ValueError: what `attention` raises; heads that P does not divide; torch.distributed not initialised.
        NotImplementedError: what `attention` raises; inside torch.compile.
    """
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "ulysses_attention inside torch.compile, where collectives drop tangents; keep it out of "
            "the compiled function"
        )
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("ulysses_attention needs torch.distributed; call init_process_group, or attention on one rank")
    group = dist.group.WORLD if group is None else group
    _check(q, k, v, dist.get_world_size(group))
    tangents: tuple[Tensor | None, ...] = (None, None, None)
    if levels.tangents_are_visible():
        (q, k, v), tangents = zip(*(forward_ad.unpack_dual(x, level=levels.LEVEL) for x in (q, k, v)), strict=True)
    bias = _own_heads(attn_bias, q.shape[1], group)
    present = [t for t in tangents if t is not None]
    whole = iter(_Exchange.apply(group, True, q, k, v, *present))
    q, k, v = (next(whole) for _ in range(3))
    if not present:
        (o,) = _Exchange.apply(group, False, attention(q, k, v, attn_bias=bias, **options))
        return o
    tangents = tuple(None if t is None else next(whole) for t in tangents)
    o, to, _ = attention_jvp(q, k, v, *tangents, attn_bias=bias, **options)
    return forward_ad.make_dual(*_Exchange.apply(group, False, o, to))


def _check(q: Tensor, k: Tensor, v: Tensor, ranks: int) -> None:
    for name, x in zip("qkv", (q, k, v), strict=True):
        if x.ndim != 4:
            raise ValueError(f"{name} must be (batch, heads, length of this rank, head size), got {tuple(x.shape)}")
        if x.dtype != q.dtype:
            raise ValueError(f"q, k and v must share a dtype, got {x.dtype} for {name} and {q.dtype} for q")
    if q.shape[1] % ranks:
        raise ValueError(
            f"q has {q.shape[1]} heads, which {ranks} ranks cannot share equally; pass a group whose size "
            "divides the heads"
        )
    for name, x in (("k", k), ("v", v)):
        if x.shape[1] % ranks:
            raise ValueError(
                f"{name} has {x.shape[1]} heads, which {ranks} ranks cannot share equally; repeat them, as in "
                f"{name}.repeat_interleave({q.shape[1]} // {x.shape[1]}, dim=1), or pass a smaller group"
            )


def _own_heads(bias: Tensor | None, heads: int, group: ProcessGroup) -> Tensor | None:
    if bias is None or bias.ndim < 3 or bias.shape[-3] == 1:
        return bias
    if bias.shape[-3] != heads:
        raise ValueError(f"attn_bias must have 1 or {heads} heads, those of all ranks, got {bias.shape[-3]}")
    share = heads // dist.get_world_size(group)
    return bias.narrow(-3, dist.get_rank(group) * share, share)


class _Exchange(torch.autograd.Function):
    """Tensors (B, H, L/P, d) of all heads as (B, H/P, L, d) of all places, or back, in one all-to-all of one buffer.

    It permutes the entries of all ranks, so its transpose, which is the gradient, is the way back. Every input that
    requires a gradient is sent back, zeros included: ranks must agree on what they send without asking.
    """

    @staticmethod
    def forward(group: ProcessGroup, gathers_sequence: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        ranks = dist.get_world_size(group)
        parts = [_split(x, ranks, gathers_sequence) for x in tensors]
        sent = torch.cat([part.reshape(ranks, -1) for part in parts], dim=1)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        pieces = received.split([math.prod(part.shape[1:]) for part in parts], dim=1)
        return tuple(
            _joined(piece.reshape(part.shape), gathers_sequence) for piece, part in zip(pieces, parts, strict=True)
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.group, ctx.gathers_sequence, *tensors = inputs
        constants = [x for x, source in zip(output, tensors, strict=True) if not source.requires_grad]
        ctx.mark_non_differentiable(*constants)

    @staticmethod
    def backward(ctx, *cotangents: Tensor):
        needed = ctx.needs_input_grad[2:]
        wanted = [x for x, need in zip(cotangents, needed, strict=True) if need]
        back = iter(_Exchange.apply(ctx.group, not ctx.gathers_sequence, *wanted))
        return None, None, *(next(back) if need else None for need in needed)


def _split(x: Tensor, ranks: int, gathers_sequence: bool) -> Tensor:
    """(P, B, heads, length, d): what goes to each rank, its heads of these places or its places of these heads."""
    return x.unflatten(1 if gathers_sequence else 2, (ranks, -1)).movedim(1 if gathers_sequence else 2, 0)


def _joined(parts: Tensor, gathers_sequence: bool) -> Tensor:
    """What came from each rank, (P, B, heads, length, d), one after another along the sequence or along the heads."""
    dim = 2 if gathers_sequence else 1
    return parts.movedim(0, dim).flatten(dim, dim + 1)
