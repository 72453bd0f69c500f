"""Triton kernel: O, its tangent, log-sum-exp and mu in one pass over the keys; without tangents, a plain forward.

What differs from FlashAttention-2, whose tiling, online softmax and base-2 exponent these are: a second accumulator for
P tV + (P o tS) V, rescaled by the same factor, from which tO = (that - mu O) / sum P; tangent logits centred by the
means of keys and key tangents; products that belong to a zero tangent do not exist in the compiled code. Six products
of 2 M N d FLOP with all tangents, four with only tq, two with none.

What it has been run on: Triton 3.6's and 3.7's interpreter and their compiler for sm_80, sm_90, sm_100 and sm_120. Not
yet on a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_jvp.launch import Launch
from flash_jvp.logits import Logits, like_queries
from flash_jvp.operands import (
    LENGTHS,
    common_arguments,
    common_constants,
    features,
    key_means,
    require_supported,
    row_constants,
    stride_unit,
    strides,
)
from flash_jvp.tile_logits import (
    LN2,
    LOG2E,
    as_operand,
    bias_pointers,
    keys_of_rows,
    load_tile,
    offsets,
    program_of_rows,
    softmax_reference,
    tangent_centre,
    tangent_product,
    tile_logits,
    tile_product,
)
from flash_jvp.tiles import Tile, architecture, tile_for


def forward(q: Tensor, k: Tensor, v: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
    """O (B, H, M, dv) in q's dtype and log-sum-exp (B, H, M) in float32.

    Args:
        q: (B, H, M, d); k: (B, Hk, N, d); v: (B, Hk, N, dv): float32, float16 or bfloat16, last dimension contiguous.
    Raises:
        NotImplementedError: float64, a head size above 256, a GPU older than sm_80.
    """
    o, _, lse, _ = _run(q, k, v, None, None, None, logits)
    return o, lse


def forward_tangent(
    q: Tensor, k: Tensor, v: Tensor, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, logits: Logits
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """O and tO (B, H, M, dv) in q's dtype; log-sum-exp and mu = sum_j P_ij tS_ij (B, H, M) in float32.

    A tangent of None is zero and costs nothing. Arguments and errors are those of `forward`.
    """
    o, to, lse, mu = _run(q, k, v, tq, tk, tv, logits)
    if to is None:
        return o, torch.zeros_like(o), lse, torch.zeros_like(lse)
    return o, to, lse, mu


def _run(q, k, v, tq, tk, tv, logits):
    require_supported(q, k, v)
    o, lse = like_queries(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)
    to = mu = None
    if any(t is not None for t in (tq, tk, tv)):
        to, mu = like_queries(q, v.shape[-1]), torch.empty_like(lse)
    launch(q, k, v, tq, tk, tv, o, to, lse, mu, logits, architecture(q.device)).run()
    return o, to, lse, mu


def launch(
    q, k, v, tq, tk, tv, o, to, lse, mu, logits: Logits, arch: int, *, known: bool = False, tile: Tile | None = None
) -> Launch:
    """The launch that writes o, to, lse and mu (to and mu None without tangents) with the tile of an architecture.

    Args:
        known: o and lse are inputs; only to and mu are written.
        tile: another tile than that of the table.
    """
    if tile is None:
        kernel = "tangent" if known else "forward" if to is None else "fused"
        tangents = "".join(name for name, x in zip("qkv", (tq, tk, tv), strict=True) if x is not None)
        sizes = q.shape[-1], v.shape[-1]
        tile = tile_for(kernel, arch, q.dtype, *sizes, tangents=tangents, features=features(q, k, logits))
    unit = stride_unit(q, k, v, tq, tk, tv, o, to)
    mean_k, mean_tk = key_means(k, tq, tk, logits)
    arguments = {
        **common_arguments(q, k, v, tq, tk, tv, logits, unit),
        "o": o,
        "to": to,
        "stride_o": strides(o, unit),
        "stride_to": strides(to, unit),
        "lse": lse,
        "mu": mu,
        "mean_k": mean_k,
        "mean_tk": mean_tk,
    }
    constants = {
        **common_constants(q, v, logits),
        **row_constants(k, v, tk, tv, bias=arguments["bias"], arch=arch),
        "UNIT": unit,
        "PIPELINED": tile.pipelined_remainder,
        "KNOWN": known,
        "RUNNING": not known or q.dtype == torch.float16,
        "GUARD": q.dtype == torch.float16 and (tq is not None or tk is not None),
    }
    num_programs = triton.cdiv(q.shape[2], tile.block_m) * q.shape[0] * q.shape[1]
    return Launch(_fused, num_programs, arguments, constants, tile)


@triton.jit(do_not_specialize=LENGTHS)
def _fused(
    q,
    k,
    v,
    tq,
    tk,
    tv,
    o,
    to,
    lse,
    mu,
    mean_k,
    mean_tk,
    bias,
    kv_lens,
    stride_q,
    stride_k,
    stride_v,
    stride_tq,
    stride_tk,
    stride_tv,
    stride_o,
    stride_to,
    stride_bias,
    num_heads,
    group,
    num_rows,
    num_keys,
    scale,
    softcap,
    diagonal,
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BOOLEAN: tl.constexpr,
    BIAS_PER_ROW: tl.constexpr,
    BIAS_PER_KEY: tl.constexpr,
    KNOWN: tl.constexpr,
    RUNNING: tl.constexpr,
    GUARD: tl.constexpr,
    UNIT: tl.constexpr,
    LONG: tl.constexpr,
    ONE_STRIDE: tl.constexpr,
    PIPELINED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # KNOWN: o and lse are inputs, and only to and mu are computed. RUNNING: the softmax is relative to a running
    # reference rather than to a known lse; with KNOWN that is for float16, in which P itself would lose its last bits.
    # ONE_STRIDE: rows of k, v, tk and tv are equally far apart, so that one set of offsets serves all of them: 16 spill
    # stores fewer at d = 128 on sm_90.
    PAD_D: tl.constexpr = BLOCK_D != SIZE
    PAD_DV: tl.constexpr = BLOCK_DV != VALUE_SIZE
    HAS_TS: tl.constexpr = (tq is not None) or (tk is not None)
    HAS_TO: tl.constexpr = to is not None

    first_row, batch_head, b, h = program_of_rows(num_rows, num_heads, diagonal, BLOCK_M)
    key_head = h // group
    rows_of_tile = tl.arange(0, BLOCK_M)
    rows = first_row + rows_of_tile
    keys_of_tile = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    value_columns = tl.arange(0, BLOCK_DV)
    row_inside = (rows < num_rows)[:, None]
    column_inside = (columns < SIZE)[None, :]
    column_inside_k = (columns < SIZE)[:, None]
    value_column_inside = (value_columns < VALUE_SIZE)[None, :]
    long_rows = rows.to(tl.int64)[:, None]
    tile_rows = rows_of_tile
    tile_keys = keys_of_tile  # int32 within a tile: int64 costs 34 spill stores at d = 128 on sm_90
    if LONG:
        tile_rows = rows_of_tile.to(tl.int64)
        tile_keys = keys_of_tile.to(tl.int64)

    q_pointers = q + offsets(stride_q, b, h, long_rows, columns[None, :], UNIT)
    q_tile = load_tile(q_pointers, row_inside, column_inside, True, PAD_D, UPCAST)
    tq_tile = None
    if tq is not None:
        tq_pointers = tq + offsets(stride_tq, b, h, long_rows, columns[None, :], UNIT)
        tq_tile = load_tile(tq_pointers, row_inside, column_inside, True, PAD_D, UPCAST)
    if HAS_TS:
        mean_offset = (b * (num_heads // group) + key_head) * SIZE
        centre = tangent_centre(q_tile, tq_tile, mean_k, mean_tk, mean_offset, columns, SIZE, scale, softcap)

    k += offsets(stride_k, b, key_head, 0, 0, UNIT)
    v += offsets(stride_v, b, key_head, 0, 0, UNIT)
    step_k = stride_k[2] * UNIT
    step_v = step_k if ONE_STRIDE else stride_v[2] * UNIT
    k_offsets = tile_keys[None, :] * step_k + columns[:, None]
    v_offsets = tile_keys[:, None] * step_v + value_columns[None, :]
    if tk is not None:
        tk += offsets(stride_tk, b, key_head, 0, 0, UNIT)
        step_tk = step_k if ONE_STRIDE else stride_tk[2] * UNIT
        tk_offsets = tile_keys[None, :] * step_tk + columns[:, None]
    if tv is not None:
        tv += offsets(stride_tv, b, key_head, 0, 0, UNIT)
        step_tv = step_k if ONE_STRIDE else stride_tv[2] * UNIT
        tv_offsets = tile_keys[:, None] * step_tv + value_columns[None, :]
    if bias is not None:
        bias += b * stride_bias[0] + h * stride_bias[1]
    if kv_lens is not None:
        num_keys = tl.minimum(tl.load(kv_lens + b), num_keys)
    full, end = keys_of_rows(first_row, num_rows, num_keys, diagonal, BLOCK_M, BLOCK_N)

    reference = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_offsets = batch_head.to(tl.int64) * num_rows + rows
    if KNOWN:
        row_lse = tl.load(lse + row_offsets, mask=rows < num_rows, other=float("-inf"))
        sighted = row_lse > float("-inf")
        base = tl.where(sighted, row_lse * LOG2E, 0.0)
    else:
        total = tl.zeros([BLOCK_M], tl.float32)
        sum_o = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if HAS_TO:
        total_ts = tl.zeros([BLOCK_M], tl.float32)
        sum_to = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    # First the tiles that all queries see in full, without masks; then those that the diagonal or the end cuts. These
    # are few, so that it depends on the tile whether they have a pipeline of their own.
    for MASKED in tl.static_range(2):
        first_key, last_key = (full, end) if MASKED else (0, full)
        for start in tl.range(first_key, last_key, BLOCK_N, num_stages=1 if MASKED and not PIPELINED else None):
            keys = start + keys_of_tile
            key_inside = keys < num_keys
            first = tl.cast(start, tl.int64)
            k_tile = load_tile(
                k + first * stride_k[2] * UNIT + k_offsets, key_inside[None, :], column_inside_k, MASKED, PAD_D, UPCAST
            )
            bias_rows, bias_keys = tile_rows[:, None], keys_of_tile[None, :]
            bias_tile = bias_pointers(
                bias, stride_bias[2], first_row, bias_rows, num_rows, start, bias_keys, BIAS_PER_ROW, BIAS_PER_KEY
            )
            s, slope = tile_logits(
                tile_product(q_tile, k_tile, None, PRECISION),
                rows[:, None],
                keys[None, :],
                num_keys,
                scale,
                softcap,
                diagonal,
                bias_tile,
                BOOLEAN,
                MASKED and BIAS_PER_KEY,
                MASKED,
            )
            ts = None
            if HAS_TS:
                tk_tile = None
                if tk is not None:
                    tk_pointers = tk + first * stride_tk[2] * UNIT + tk_offsets
                    tk_tile = load_tile(tk_pointers, key_inside[None, :], column_inside_k, MASKED, PAD_D, UPCAST)
                ts = tangent_product(q_tile, k_tile, tq_tile, tk_tile, PRECISION) * (scale * slope) - centre[:, None]

            if RUNNING:
                new_reference = softmax_reference(reference, s, ts, GUARD)
                base = tl.where(new_reference == float("-inf"), 0.0, new_reference)
                decay = tl.exp2(reference - base)
                reference = new_reference
                if HAS_TO:
                    sum_to = sum_to * decay[:, None]
                    total_ts = total_ts * decay
            p = tl.exp2(s - base[:, None])
            v_pointers = v + first * stride_v[2] * UNIT + v_offsets
            v_tile = load_tile(v_pointers, key_inside[:, None], value_column_inside, MASKED, PAD_DV, UPCAST)
            p_operand = as_operand(p, v.dtype.element_ty, UPCAST)
            if not KNOWN:
                total = total * decay + tl.sum(p, 1)
                sum_o = tile_product(p_operand, v_tile, sum_o * decay[:, None], PRECISION)
            if HAS_TS:
                weighted = p * ts
                total_ts += tl.sum(weighted, 1)
                sum_to = tile_product(as_operand(weighted, v.dtype.element_ty, UPCAST), v_tile, sum_to, PRECISION)
            if tv is not None:
                tv_pointers = tv + first * stride_tv[2] * UNIT + tv_offsets
                tv_tile = load_tile(tv_pointers, key_inside[:, None], value_column_inside, MASKED, PAD_DV, UPCAST)
                sum_to = tile_product(p_operand, tv_tile, sum_to, PRECISION)

    o_offsets = offsets(stride_o, b, h, long_rows, value_columns[None, :], UNIT)
    written = row_inside & value_column_inside
    if KNOWN:
        o_tile = tl.load(o + o_offsets, mask=written, other=0.0).to(tl.float32)
        normaliser = tl.where(sighted, 1.0, 0.0)
        if RUNNING:
            normaliser *= tl.exp2(reference - tl.where(sighted, row_lse * LOG2E, 0.0))
    else:
        sighted = total > 0.0
        normaliser = tl.where(sighted, 1.0 / tl.where(sighted, total, 1.0), 0.0)
        o_tile = sum_o * normaliser[:, None]
        tl.store(o + o_offsets, as_operand(o_tile, o.dtype.element_ty, UPCAST), mask=written)
        row_lse = (reference + tl.log2(tl.where(sighted, total, 1.0))) * LN2
        tl.store(lse + row_offsets, tl.where(sighted, row_lse, float("-inf")), mask=rows < num_rows)
    if HAS_TO:
        to_tile = sum_to * normaliser[:, None]
        row_mu = tl.zeros([BLOCK_M], tl.float32)
        if HAS_TS:
            row_mu = total_ts * normaliser
            to_tile -= row_mu[:, None] * o_tile
            row_mu = tl.where(sighted, row_mu + centre, 0.0)
        to_offsets = offsets(stride_to, b, h, long_rows, value_columns[None, :], UNIT)
        tl.store(to + to_offsets, as_operand(to_tile, to.dtype.element_ty, UPCAST), mask=written)
        tl.store(mu + row_offsets, row_mu, mask=rows < num_rows)
