"""Attention that carries tangents: the public functions, their checks, and the choice of a path."""

from __future__ import annotations

import importlib.util
import math
from typing import Literal

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn import functional

from flash_jvp import levels, ops
from flash_jvp.logits import Logits

Causal = bool | Literal["top_left", "bottom_right"]
Backend = Literal["auto", "chunked", "triton", "split"]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: Causal = False,
    kv_lens: Tensor | None = None,
    attn_bias: Tensor | None = None,
    softcap: float = 0.0,
    tangent_grad: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """softmax(scale q k^T) v, (B, H, M, dv) in the memory order of q, together with its tangent where inputs carry one.

    A tangent is carried by torch.func.jvp or by torch.autograd.forward_ad; any subset of q, k and v may have one. The
    result can be differentiated once in reverse, through the tangent too. Tangents must be those of the innermost
    transform: vmap of jvp, grad of jvp and jacrev of jacfwd work; jvp of grad, of jvp or of vmap raises. Compile a
    function that calls torch.func.jvp: one that torch.func.jvp is called on runs uncompiled, and one inside a dual
    level loses the tangents of what it compiles (pytorch#187284), which attention can refuse only with fullgraph=True.

    Args:
        q: (B, H, M, d); k: (B, Hk, N, d); v: (B, Hk, N, dv), with H a multiple of Hk (grouped queries). float16,
            bfloat16, float32 or float64, in any strides with the last dimension contiguous: pass x.transpose(1, 2) of a
            (B, M, H, d) tensor as it is.
        scale: what multiplies q k^T; 1/sqrt(d) if not given.
        causal: True or "bottom_right": query i sees key j <= i + N - M, so that the last query sees all keys
            (FlashAttention's convention); "top_left": j <= i (scaled_dot_product_attention's). They agree when M == N.
        kv_lens: int32 (B,), how many of the N keys exist, each in [0, N].
        attn_bias: broadcastable to (B, H, M, N): added to the logits, or, if bool, True where a query sees a key.
        softcap: bound on the absolute value of the scaled products: softcap tanh(x / softcap); 0 for none.
        tangent_grad: whether a gradient flows through the tangent. False detaches it, and saves what that takes.
        backend: "chunked" runs anywhere; "triton" is fused, for CUDA (on a CPU it runs in Triton's interpreter,
            for tests only); "split" is PyTorch's own forward followed by a pass for the tangent alone; "auto" takes
            "triton" on CUDA (but "chunked" in float64, for which there is no kernel), and "chunked" elsewhere.
            Without any tangent "auto" takes PyTorch's own attention where that can express what is asked.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit.
        NotImplementedError: a bias with a gradient or a tangent; backward while a forward-mode level is open; a second
            derivative in reverse; tangents of a transform that is not the innermost one; torch.func.grad inside
            torch.compile.

    A query that sees no key gives 0 and tangent 0.

    Source: FlashAttention-2 (Dao 2023) for the primal; kernels/flash_jvp/README.md derives the tangent.
    """
    q, k, v = _under_autocast(q, k, v)
    logits = _checked(q, k, v, scale, causal, kv_lens, attn_bias, softcap)
    tangents: tuple[Tensor | None, ...] = (None, None, None)
    if levels.tangents_are_visible():
        (q, k, v), tangents = zip(*(forward_ad.unpack_dual(x, level=levels.LEVEL) for x in (q, k, v)), strict=True)
    if all(t is None for t in tangents):
        return _primal(q, k, v, logits, backend)
    path = _path(backend, q)
    o, to, _ = _with_tangent(q, k, v, *tangents, logits, tangent_grad, path)
    return forward_ad.make_dual(o, to, level=levels.LEVEL)


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None = None,
    tk: Tensor | None = None,
    tv: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: Causal = False,
    kv_lens: Tensor | None = None,
    attn_bias: Tensor | None = None,
    softcap: float = 0.0,
    tangent_grad: bool = True,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, to, lse): attention, its tangent, both (B, H, M, dv), and log-sum-exp (B, H, M), with tangents passed openly.

    Args:
        tq, tk, tv: the tangents of q, k and v, in their shapes and dtypes; None for zero, which costs nothing.
        The others are those of `attention`.

    o and to can be differentiated in reverse; lse is for information and carries no gradient.

    Raises:
        ValueError, NotImplementedError: as `attention`; also an input that carries a tangent of its own.
    """
    primals = (q, k, v)
    if any(x is not None and _carries_tangent(x) for x in (*primals, tq, tk, tv)):
        raise ValueError(
            "attention_jvp takes tangents as arguments, but an input carries one of its own, which would be dropped; "
            "call attention, or unpack the inputs first"
        )
    q, k, v, *tangents = _under_autocast(*primals, tq, tk, tv)
    for name, x, t in zip("qkv", (q, k, v), tangents, strict=True):
        if t is not None and (t.shape, t.dtype, t.device) != (x.shape, x.dtype, x.device):
            raise ValueError(
                f"t{name} must have the shape, dtype and device of {name}, got {tuple(t.shape)} of {t.dtype} on "
                f"{t.device} for {tuple(x.shape)} of {x.dtype} on {x.device}"
            )
    logits = _checked(q, k, v, scale, causal, kv_lens, attn_bias, softcap)
    return _with_tangent(q, k, v, *tangents, logits, tangent_grad, _path(backend, q))


def _carries_tangent(x: Tensor) -> bool:
    return levels.tangents_are_visible() and forward_ad.unpack_dual(x, level=levels.LEVEL).tangent is not None


def _settings(logits: Logits, path: str) -> tuple:
    return logits.bias, logits.kv_lens, logits.scale, logits.softcap, logits.diagonal, path


def _with_tangent(q, k, v, tq, tk, tv, logits: Logits, tangent_grad: bool, path: str) -> tuple[Tensor, Tensor, Tensor]:
    tensors = tuple(None if x is None else _rows_contiguous(x) for x in (q, k, v, tq, tk, tv))
    if not levels.run_compiled():
        o, to, lse, _ = ops.AttentionTangent.apply(tangent_grad, *tensors, *_settings(logits, path))
    elif tangent_grad:
        o, to, lse, _ = ops.forward_tangent(*tensors, *_settings(logits, path))
    else:
        o, to, lse, _ = ops.forward_tangent_detached(*tensors, *_settings(logits, path))
        to = to.detach()
    # inside torch.compile nothing else says that it carries no gradient
    return o, to, lse.detach()


def _primal(q: Tensor, k: Tensor, v: Tensor, logits: Logits, backend: Backend) -> Tensor:
    ours = backend != "auto" or logits.softcap or logits.kv_lens is not None or logits.bias is not None
    ours = ours or levels.tangents_may_hide()  # it says so where they do, and what to do instead
    if not ours and (logits.diagonal is None or logits.diagonal == 0):
        grouped = q.shape[1] != k.shape[1]
        return functional.scaled_dot_product_attention(
            q, k, v, is_causal=logits.diagonal is not None, scale=logits.scale, enable_gqa=grouped
        )
    tensors = tuple(_rows_contiguous(x) for x in (q, k, v))
    run = ops.forward if levels.run_compiled() else ops.Attention.apply
    return run(*tensors, *_settings(logits, _path(backend, q)))[0]


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _path(backend: Backend, q: Tensor) -> str:
    """The path that runs: the same on every rank, for it depends on nothing but the device and the dtype."""
    if backend == "auto":
        backend = "triton" if q.is_cuda and q.dtype != torch.float64 else "chunked"
    elif backend not in ops.STEPS:
        raise ValueError(f"backend must be one of auto, {', '.join(ops.STEPS)}, got {backend!r}")
    if backend != "chunked":
        if q.dtype == torch.float64:
            raise ValueError(f"backend={backend!r} has no float64; use backend='chunked'")
        if importlib.util.find_spec("triton") is None:
            raise ValueError(f"the path {backend!r} needs triton, which is not installed; or use backend='chunked'")
    return backend


def _under_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in autocast's dtype where it is enabled, as scaled_dot_product_attention has them."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or tensors[0].dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if x is None else x.to(dtype) for x in tensors)


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    causal: Causal,
    kv_lens: Tensor | None,
    attn_bias: Tensor | None,
    softcap: float,
) -> Logits:
    for name, x in zip("qkv", (q, k, v), strict=True):
        if x.ndim != 4:
            raise ValueError(f"{name} must be (batch, heads, length, head size), got shape {tuple(x.shape)}")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"q, k and v must share dtype and device, got {name} of {x.dtype} on {x.device} and q of {q.dtype} on "
                f"{q.device}"
            )
    batch, heads, num_queries, size = q.shape
    key_heads, num_keys = k.shape[1:3]
    if k.shape[0] != batch or k.shape[3] != size or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"k must be (B, Hk, N, d) and v (B, Hk, N, dv) for q (B, H, M, d), got q {tuple(q.shape)}, "
            f"k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if not heads:
        raise ValueError(f"q has no heads, got shape {tuple(q.shape)}")
    if not key_heads or heads % key_heads:
        raise ValueError(f"the heads of q must be a multiple of those of k, got {heads} and {key_heads}")
    if not size:
        raise ValueError("q and k have head size 0, so there are no products to take; give at least one feature")
    if not num_keys:
        raise ValueError("k has no keys (N = 0), so there is nothing to attend to; give at least one, or skip the call")
    for name, number in (("scale", 0.0 if scale is None else scale), ("softcap", softcap)):
        if isinstance(number, Tensor):
            raise ValueError(
                f"{name} must be a number, got a tensor, whose gradient and tangent would be lost; multiply q by it"
            )
        if not math.isfinite(number):
            raise ValueError(f"{name} must be finite, got {number}")
    if softcap < 0:
        raise ValueError(f"softcap must be positive, or 0 for none, got {softcap}")
    diagonals = {False: None, True: num_keys - num_queries, "bottom_right": num_keys - num_queries, "top_left": 0}
    if causal not in diagonals:
        raise ValueError(f"causal must be True, False, 'bottom_right' or 'top_left', got {causal!r}")
    return Logits(
        scale=size**-0.5 if scale is None else float(scale),
        softcap=float(softcap),
        diagonal=diagonals[causal],
        bias=None if attn_bias is None else _checked_bias(attn_bias, (batch, heads, num_queries, num_keys), q),
        kv_lens=None if kv_lens is None else _checked_lens(kv_lens, batch, q),
    )


def _checked_bias(bias: Tensor, shape: tuple[int, ...], q: Tensor) -> Tensor:
    if bias.dtype != torch.bool and not bias.is_floating_point():
        raise ValueError(f"attn_bias must be bool (True: sees) or floating point (added), got {bias.dtype}")
    if bias.device != q.device:
        raise ValueError(f"attn_bias must be on the device of q, got {bias.device} and {q.device}")
    if bias.ndim > 4 or any(b not in (1, s) for b, s in zip(bias.shape[::-1], shape[::-1], strict=False)):
        raise ValueError(f"attn_bias must broadcast to (B, H, M, N) = {shape}, got {tuple(bias.shape)}")
    if bias.requires_grad and torch.is_grad_enabled() or _carries_tangent(bias):
        raise NotImplementedError(ops.NO_BIAS_GRADIENT)
    if not torch.is_grad_enabled():
        bias = bias.detach()
    return bias.expand(shape)


def _checked_lens(lens: Tensor, batch: int, q: Tensor) -> Tensor:
    # their values stay unread: reading them would wait for the device
    if lens.shape != (batch,) or lens.dtype not in (torch.int32, torch.int64) or lens.device != q.device:
        raise ValueError(
            f"kv_lens must be int32 of shape ({batch},) on {q.device}, got {lens.dtype} of shape {tuple(lens.shape)} "
            f"on {lens.device}"
        )
    return lens.to(torch.int32)
