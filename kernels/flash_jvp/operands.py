"""What the launches of the Triton kernels share: checks, pointers and strides by name, constants, means of keys."""

from typing import Any

import torch
from torch import Tensor

from flash_jvp.logits import Logits
from flash_jvp.tiles import INTERPRETER, size_class

LARGEST_SIZE = 256
LONG_STRIDE = 2**23  # from here on 256 rows, more than any tile has, can lie 2^31 elements apart
# what Triton is not to compile apart when it is 1 or a multiple of 16
LENGTHS = ("num_rows", "num_keys", "diagonal")


def require_supported(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise NotImplementedError for what no Triton kernel here does."""
    if q.dtype == torch.float64:
        raise NotImplementedError('the Triton kernels do not compute in float64; use backend="chunked"')
    if max(q.shape[-1], v.shape[-1]) > LARGEST_SIZE:
        raise NotImplementedError(
            f"the Triton kernels take head sizes up to {LARGEST_SIZE}, got {q.shape[-1]} for q and k and "
            f'{v.shape[-1]} for v; use backend="chunked"'
        )
    if q.device.type not in ("cuda", "cpu"):
        raise NotImplementedError(f'the Triton kernels run on CUDA, not on {q.device.type}; use backend="chunked"')


def stride_unit(*tensors: Tensor | None) -> int:
    """The unit in which a kernel is passed strides: 8 elements if 8 divides all of them but 16 does not, else 1.

    Triton knows of an argument only whether 16 divides it. Rows of a head size of 72 it would read element by element,
    although 8 elements of 16 bits are the 16 bytes of one load (199 spill stores instead of none on sm_90).
    """
    all_strides = [stride for x in tensors if x is not None for stride in x.stride()[:3]]
    return 8 if all(s % 8 == 0 for s in all_strides) and any(s % 16 for s in all_strides) else 1


def strides(x: Tensor | None, unit: int) -> tuple[int, ...]:
    """The strides of the batch, head and row axes in units of `unit` elements; zeros for an absent tensor."""
    return (0, 0, 0) if x is None else tuple(stride // unit for stride in x.stride()[:3])


def features(q: Tensor, k: Tensor, logits: Logits) -> tuple[str, ...]:
    """What tiles depend on besides architecture, dtype, sizes and tangents, as `tiles.tile_for` takes it."""
    has = {
        "biased": logits.bias_is_matrix,
        "capped": logits.softcap > 0,
        "grouped": q.shape[1] != k.shape[1],
        "causal": logits.diagonal is not None,
    }
    return tuple(name for name, present in has.items() if present)


def aligned_bias(bias: Tensor) -> Tensor:
    """The bias with rows of a multiple of 16 elements, which a kernel can read 16 at once up to the end of a row.

    A copy, padded, where it is not so; its strides of 0 stay 0. (Read element by element, a boolean bias costs 787
    spill stores at d = 128 on sm_90.)
    """
    *outer, last = bias.stride()
    if last == 0 or (last == 1 and bias.shape[3] % 16 == 0 and all(stride % 16 == 0 for stride in outer)):
        return bias
    own = bias[tuple(slice(None) if stride else slice(1) for stride in bias.stride())]
    padded = own.new_zeros(*own.shape[:3], -(-own.shape[3] // 16) * 16)
    padded[..., : own.shape[3]] = own
    return padded.expand(*bias.shape[:3], -1)


def row_constants(*looped: Tensor | None, bias: Tensor | None, arch: int) -> dict[str, bool]:
    """What a kernel has to know of the rows of the matrices it goes over: LONG offsets, and ONE_STRIDE for all.

    One set of offsets saves up to 45 spill stores with wgmma and tcgen05, and 31 above a head size of 128. With the
    older mma.sync and smaller heads it costs up to 8.
    """
    present = [x for x in looped if x is not None]
    steps = {x.stride(2) for x in present}
    saves = arch in (INTERPRETER, 90, 100) or max(x.shape[3] for x in present) > 128
    return {
        "LONG": max(steps | ({bias.stride(2)} if bias is not None else set())) >= LONG_STRIDE,
        "ONE_STRIDE": saves and len(steps) == 1,
    }


def common_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    logits: Logits,
    unit: int,
) -> dict[str, Any]:
    """Inputs, their strides (in `unit`), sizes and logits, by the names that kernels give them. Absent: None."""
    inputs = {"q": q, "k": k, "v": v, "tq": tq, "tk": tk, "tv": tv}
    bias = None if logits.bias is None else aligned_bias(logits.bias)
    return {
        **inputs,
        **{f"stride_{name}": strides(x, unit) for name, x in inputs.items()},
        "bias": bias,
        "stride_bias": (0, 0, 0) if bias is None else bias.stride()[:3],
        "kv_lens": logits.kv_lens,
        "num_heads": q.shape[1],
        "group": q.shape[1] // k.shape[1],
        "num_rows": q.shape[2],
        "num_keys": k.shape[2],
        "scale": float(logits.scale),
        "softcap": float(logits.softcap) if logits.softcap else None,
        "diagonal": logits.diagonal,
    }


def common_constants(q: Tensor, v: Tensor, logits: Logits) -> dict[str, Any]:
    """The constants that the kernels share, without those of the tile."""
    return {
        "SIZE": q.shape[-1],
        "VALUE_SIZE": v.shape[-1],
        "BLOCK_D": size_class(q.shape[-1]),
        "BLOCK_DV": size_class(v.shape[-1]),
        "BOOLEAN": logits.bias is not None and logits.bias.dtype == torch.bool,
        "BIAS_PER_ROW": logits.bias is not None and logits.bias.stride(2) != 0,
        "BIAS_PER_KEY": logits.bias is not None and logits.bias.stride(3) != 0,
        # without it float32 products are made in TF32, with 10 bits of mantissa
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "UPCAST": q.device.type == "cpu" and q.dtype == torch.bfloat16,
    }


def key_means(k: Tensor, tq: Tensor | None, tk: Tensor | None, logits: Logits) -> tuple[Tensor | None, Tensor | None]:
    """Means over the existing keys of k and of tk, float32 (B, Hk, d) contiguous; None for what no centre needs."""
    needs_k = tq is not None or (tk is not None and logits.softcap)
    return _mean(k, logits) if needs_k else None, None if tk is None else _mean(tk, logits)


def _mean(x: Tensor, logits: Logits) -> Tensor:
    mean = logits.mean_over_keys(x)
    if mean is None:
        return torch.zeros(x.shape[0], x.shape[1], x.shape[3], dtype=torch.float32, device=x.device)
    return mean[:, :, 0].contiguous()
