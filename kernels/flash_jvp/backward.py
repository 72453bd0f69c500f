"""The gradients of q, k and v by Triton, from O and log-sum-exp of any forward: two launches of `gradient_kernels`."""

from typing import Any

import torch
import triton
from torch import Tensor

from flash_jvp.gradient_kernels import gradient_of_keys, gradient_of_queries
from flash_jvp.launch import Launch
from flash_jvp.logits import Logits
from flash_jvp.operands import (
    common_arguments,
    common_constants,
    features,
    key_means,
    require_supported,
    row_constants,
    stride_unit,
    strides,
)
from flash_jvp.tiles import Tile, architecture, tile_for


def backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, logits: Logits
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, in the shapes and dtypes of q, k and v, for the cotangent dO of O.

    Args:
        q: (B, H, M, d); k: (B, Hk, N, d); v: (B, Hk, N, dv): float32, float16 or bfloat16, last dimension contiguous.
        o: (B, H, M, dv) and lse: float32 (B, H, M), natural log, -inf where no key is seen, of any forward.
        do: (B, H, M, dv) in any strides, broadcast ones too.
    Raises:
        NotImplementedError: float64, a head size above 256, a GPU older than sm_80.
    Source: Dao 2023, FlashAttention-2, algorithm 2.
    """
    require_supported(q, k, v)
    o, do = (x if x.stride(-1) == 1 else x.contiguous() for x in (o, do))
    dq, dk, dv = (_unwritten_like(x) for x in (q, k, v))
    for launch in launches(q, k, v, o, lse.contiguous(), do, dq, dk, dv, logits, architecture(q.device)):
        launch.run()
    return dq, dk, dv


def _unwritten_like(x: Tensor) -> Tensor:
    empty = torch.empty_like(x)
    return empty if empty.stride(-1) == 1 else x.new_empty(x.shape)


def launches(
    q, k, v, o, lse, do, dq, dk, dv, logits: Logits, arch: int, *, tiles: tuple[Tile, Tile] | None = None
) -> tuple[Launch, Launch]:
    """The launches that write dq, and then dk and dv, with the tiles of an architecture or with those given."""
    if tiles is None:
        sizes = q.shape[-1], v.shape[-1]
        tiles = tuple(
            tile_for(kernel, arch, q.dtype, *sizes, features=features(q, k, logits)) for kernel in ("queries", "keys")
        )
    unit = stride_unit(q, k, v, o, do, dq, dk, dv)
    constants = {**common_constants(q, v, logits), "UNIT": unit}
    arguments: dict[str, Any] = common_arguments(q, k, v, None, None, None, logits, unit)
    for name in ("tq", "tk", "tv"):
        del arguments[name], arguments[f"stride_{name}"]
    arguments |= {"lse": lse, "do": do, "stride_do": strides(do, unit), "delta": torch.empty_like(lse)}
    arguments["inverse"] = torch.empty_like(lse) if q.dtype == torch.float32 else None
    # the mean of the keys, as a tangent of q would need it
    mean_k, _ = key_means(k, q, None, logits)
    of_queries = {"o": o, "stride_o": strides(o, unit), "dq": dq, "stride_dq": strides(dq, unit), "mean_k": mean_k}
    of_keys = {"dk": dk, "stride_dk": strides(dk, unit), "dv": dv, "stride_dv": strides(dv, unit)}
    return tuple(
        Launch(
            kernel,
            triton.cdiv(rows.shape[2], block) * rows.shape[0] * rows.shape[1],
            {**arguments, **own},
            {
                **constants,
                "PIPELINED": tile.pipelined_remainder,
                **row_constants(*looped, bias=arguments["bias"], arch=arch),
            },
            tile,
        )
        for kernel, rows, block, own, tile, looped in (
            (gradient_of_queries, q, tiles[0].block_m, of_queries, tiles[0], (k, v)),
            (gradient_of_keys, k, tiles[1].block_n, of_keys, tiles[1], (q, do)),
        )
    )
