"""Triton kernels of the backward: gradients of queries, and then of keys and values, from O and log-sum-exp.

The first pass goes over tiles of queries and gives dq and delta_i = sum_j P_ij dP_ij; the second goes over tiles of
keys and gives dk and dv. What differs from FlashAttention-2, whose products these are (S and dP in both passes, seven
of 2 M N d FLOP in all):

- No pass of its own for delta. As dO . O it suffers from the rounding of O, that is of what all values have in common.
  Since sum_j dS_ij = 0, the sum that the first pass takes over a row is that very error; the second pass reads delta
  without it.
- The same sum, times the mean key, is taken off dq: it is what the error of delta and the rounding of dS make of what
  all keys have in common. (In bfloat16, with keys of mean 10 sigma and values of mean 3, dq is off by 40 % in PyTorch's
  flash backward on the CPU and by 0.7 % here.)
- In float32 the first pass also measures the sum of P, for a log-sum-exp of 100 is rounded by 4e-6; P is divided by it.
  The second pass must then round S as the first did: both multiply q by k^T, for k q^T may be summed in another order.
- The second pass adds up the query heads of a group itself: no atomics, so every run gives the same bits.
- Capped, biased and bounded logits, as everywhere here (`tile_logits`).

What it has been run on: Triton 3.6's and 3.7's interpreter and their compiler for sm_80, sm_90, sm_100 and sm_120. Not
yet on a GPU.
"""

import triton
import triton.language as tl

from flash_jvp.operands import LENGTHS
from flash_jvp.tile_logits import (
    LOG2E,
    as_operand,
    bias_pointers,
    keys_of_rows,
    load_tile,
    offsets,
    program_of_rows,
    tile_logits,
    tile_product,
)


@triton.jit
def _base(row_lse):
    """Log-sum-exp in base 2; inf for a query that sees no key, whose P is then 0."""
    return tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2E)


@triton.jit(do_not_specialize=LENGTHS)
def gradient_of_queries(
    q,
    k,
    v,
    o,
    do,
    dq,
    lse,
    delta,
    inverse,
    mean_k,
    bias,
    kv_lens,
    stride_q,
    stride_k,
    stride_v,
    stride_o,
    stride_do,
    stride_dq,
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
    UNIT: tl.constexpr,
    LONG: tl.constexpr,
    ONE_STRIDE: tl.constexpr,
    PIPELINED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    PAD_D: tl.constexpr = BLOCK_D != SIZE
    PAD_DV: tl.constexpr = BLOCK_DV != VALUE_SIZE

    first_row, batch_head, b, h = program_of_rows(num_rows, num_heads, diagonal, BLOCK_M)
    key_head = h // group
    rows_of_tile = tl.arange(0, BLOCK_M)
    rows = first_row + rows_of_tile
    columns = tl.arange(0, BLOCK_D)
    value_columns = tl.arange(0, BLOCK_DV)
    row_inside = (rows < num_rows)[:, None]
    column_inside = (columns < SIZE)[None, :]
    value_column_inside = (value_columns < VALUE_SIZE)[None, :]
    long_rows = rows.to(tl.int64)[:, None]
    keys_of_tile = tl.arange(0, BLOCK_N)
    tile_rows = rows_of_tile
    tile_keys = keys_of_tile
    if LONG:
        tile_rows = rows_of_tile.to(tl.int64)
        tile_keys = keys_of_tile.to(tl.int64)

    q_offsets = offsets(stride_q, b, h, long_rows, columns[None, :], UNIT)
    q_tile = load_tile(q + q_offsets, row_inside, column_inside, True, PAD_D, UPCAST)
    do_offsets = offsets(stride_do, b, h, long_rows, value_columns[None, :], UNIT)
    do_tile = load_tile(do + do_offsets, row_inside, value_column_inside, True, PAD_DV, UPCAST)
    o_offsets = offsets(stride_o, b, h, long_rows, value_columns[None, :], UNIT)
    o_tile = load_tile(o + o_offsets, row_inside, value_column_inside, True, PAD_DV, UPCAST)
    row_delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    row_offsets = batch_head.to(tl.int64) * num_rows + rows
    base = _base(tl.load(lse + row_offsets, mask=rows < num_rows, other=float("-inf")))

    k += offsets(stride_k, b, key_head, 0, 0, UNIT)
    v += offsets(stride_v, b, key_head, 0, 0, UNIT)
    step_k = stride_k[2] * UNIT
    step_v = step_k if ONE_STRIDE else stride_v[2] * UNIT
    k_offsets = tile_keys[:, None] * step_k + columns[None, :]
    v_offsets = tile_keys[:, None] * step_v + value_columns[None, :]
    if bias is not None:
        bias += b * stride_bias[0] + h * stride_bias[1]
    if kv_lens is not None:
        num_keys = tl.minimum(tl.load(kv_lens + b), num_keys)
    full, end = keys_of_rows(first_row, num_rows, num_keys, diagonal, BLOCK_M, BLOCK_N)

    sum_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    error = tl.zeros([BLOCK_M], tl.float32)  # of delta: the sum of dS over a row, which would be 0
    excess = tl.zeros([BLOCK_M], tl.float32)  # that rounding adds to the sum of slope dS, if there is a cap
    weight = tl.zeros([BLOCK_M], tl.float32)  # the mean slope of a row, if there is a cap
    total = tl.zeros([BLOCK_M], tl.float32)  # of P, if `inverse` is asked for
    for MASKED in tl.static_range(2):
        first_key, last_key = (full, end) if MASKED else (0, full)
        for start in tl.range(first_key, last_key, BLOCK_N, num_stages=1 if MASKED and not PIPELINED else None):
            keys = start + keys_of_tile
            key_inside = (keys < num_keys)[:, None]
            first = tl.cast(start, tl.int64)
            k_tile = load_tile(
                k + first * stride_k[2] * UNIT + k_offsets, key_inside, column_inside, MASKED, PAD_D, UPCAST
            )
            bias_rows, bias_keys = tile_rows[:, None], keys_of_tile[None, :]
            bias_tile = bias_pointers(
                bias, stride_bias[2], first_row, bias_rows, num_rows, start, bias_keys, BIAS_PER_ROW, BIAS_PER_KEY
            )
            s, slope = tile_logits(
                tile_product(q_tile, tl.trans(k_tile), None, PRECISION),
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
            p = tl.exp2(s - base[:, None])
            v_tile = load_tile(
                v + first * stride_v[2] * UNIT + v_offsets, key_inside, value_column_inside, MASKED, PAD_DV, UPCAST
            )
            dp = tile_product(do_tile, tl.trans(v_tile), None, PRECISION)
            if inverse is not None:
                total += tl.sum(p, 1)
            ds = p * (dp - row_delta[:, None])
            operand = as_operand(ds * slope, k.dtype.element_ty, UPCAST)
            if softcap is not None:
                error += tl.sum(ds, 1)
                weight += tl.sum(p * slope, 1)
                excess += tl.sum(operand.to(tl.float32) - ds * slope, 1)
            else:  # the same at a third of the cost: the slope is 1, and rounding adds little to the error of delta
                error += tl.sum(operand.to(tl.float32), 1)
            sum_dq = tile_product(operand, k_tile, sum_dq, PRECISION)

    if inverse is not None:
        row_inverse = 1.0 / tl.where(total > 0.0, total, 1.0)
        error *= row_inverse
        weight *= row_inverse
        excess *= row_inverse
        sum_dq *= row_inverse[:, None]
        tl.store(inverse + row_offsets, row_inverse, mask=rows < num_rows)
    tl.store(delta + row_offsets, row_delta + error, mask=rows < num_rows)
    if softcap is not None:
        excess += error * weight
    else:
        excess = error
    mean_offset = (b * (num_heads // group) + key_head) * SIZE
    mean_key = tl.load(mean_k + mean_offset + columns, mask=columns < SIZE, other=0.0)
    sum_dq = (sum_dq - excess[:, None] * mean_key[None, :]) * scale
    dq_offsets = offsets(stride_dq, b, h, long_rows, columns[None, :], UNIT)
    tl.store(dq + dq_offsets, as_operand(sum_dq, dq.dtype.element_ty, UPCAST), mask=row_inside & column_inside)


@triton.jit
def _rows_of_keys(first_key, num_rows, num_keys, diagonal, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(begin, full, full_end) for the keys first_key .. first_key + BLOCK_N, all multiples of BLOCK_M: no query before
    `begin` sees any of them, all from `full` to `full_end` see all that exist, and no whole tile lies after that.
    """
    full_end = (num_rows // BLOCK_M) * BLOCK_M
    begin = 0
    full = 0
    if diagonal is not None:
        last_key = tl.minimum(first_key + BLOCK_N, num_keys) - 1
        begin = tl.minimum(tl.maximum(first_key - diagonal, 0) // BLOCK_M * BLOCK_M, full_end)
        full = tl.minimum(tl.cdiv(tl.maximum(last_key - diagonal, 0), BLOCK_M) * BLOCK_M, full_end)
    return begin, full, full_end


@triton.jit(do_not_specialize=LENGTHS)
def gradient_of_keys(
    q,
    k,
    v,
    do,
    dk,
    dv,
    lse,
    delta,
    inverse,
    bias,
    kv_lens,
    stride_q,
    stride_k,
    stride_v,
    stride_do,
    stride_dk,
    stride_dv,
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
    UNIT: tl.constexpr,
    LONG: tl.constexpr,
    ONE_STRIDE: tl.constexpr,
    PIPELINED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    PAD_D: tl.constexpr = BLOCK_D != SIZE
    PAD_DV: tl.constexpr = BLOCK_DV != VALUE_SIZE

    num_tiles = tl.cdiv(num_keys, BLOCK_N)
    program = tl.program_id(0)
    first_key = (program % num_tiles) * BLOCK_N
    batch_head = program // num_tiles
    num_key_heads = num_heads // group
    b = (batch_head // num_key_heads).to(tl.int64)
    key_head = (batch_head % num_key_heads).to(tl.int64)
    existing = num_keys
    if kv_lens is not None:
        existing = tl.minimum(tl.load(kv_lens + b), num_keys)

    keys_of_tile = tl.arange(0, BLOCK_N)
    keys = first_key + keys_of_tile
    columns = tl.arange(0, BLOCK_D)
    value_columns = tl.arange(0, BLOCK_DV)
    key_exists = (keys < existing)[:, None]
    column_inside = (columns < SIZE)[None, :]
    value_column_inside = (value_columns < VALUE_SIZE)[None, :]
    long_keys = keys.to(tl.int64)[:, None]
    rows_of_tile = tl.arange(0, BLOCK_M)
    tile_rows = rows_of_tile
    if LONG:
        tile_rows = rows_of_tile.to(tl.int64)

    # Keys that do not exist are left unmasked below: each key has its own rows of P^T, dk and dv, set to 0 at the end.
    k_offsets = offsets(stride_k, b, key_head, long_keys, columns[None, :], UNIT)
    k_tile = load_tile(k + k_offsets, key_exists, column_inside, True, PAD_D, UPCAST)
    v_offsets = offsets(stride_v, b, key_head, long_keys, value_columns[None, :], UNIT)
    v_tile = load_tile(v + v_offsets, key_exists, value_column_inside, True, PAD_DV, UPCAST)
    step_q = stride_q[2] * UNIT
    step_do = step_q if ONE_STRIDE else stride_do[2] * UNIT
    q_offsets = tile_rows[:, None] * step_q + columns[None, :]
    do_offsets = tile_rows[:, None] * step_do + value_columns[None, :]

    begin, full, full_end = _rows_of_keys(first_key, num_rows, existing, diagonal, BLOCK_M, BLOCK_N)
    num_full = (full_end - full) // BLOCK_M
    num_before = (full - begin) // BLOCK_M
    num_masked = num_before + tl.cdiv(num_rows - full_end, BLOCK_M)
    if first_key >= existing:
        num_full = 0
        num_masked = 0

    sum_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    sum_dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in range(group):
        h = key_head * group + member
        q_head = q + offsets(stride_q, b, h, 0, 0, UNIT)
        do_head = do + offsets(stride_do, b, h, 0, 0, UNIT)
        row_head = (b * num_heads + h) * num_rows
        bias_head = None
        if bias is not None:
            bias_head = bias + b * stride_bias[0] + h * stride_bias[1]
        # First the tiles of queries that see all keys of this one; then those that the diagonal or the end cuts.
        for MASKED in tl.static_range(2):
            num_looped = num_masked if MASKED else num_full
            for index in tl.range(0, num_looped, 1, num_stages=1 if MASKED and not PIPELINED else None):
                start = full + index * BLOCK_M
                if MASKED:
                    start = tl.where(index < num_before, begin + index * BLOCK_M, full_end)
                rows = start + rows_of_tile
                row_inside = rows < num_rows
                first = tl.cast(start, tl.int64)
                q_pointers = q_head + first * stride_q[2] * UNIT + q_offsets
                q_tile = load_tile(q_pointers, row_inside[:, None], column_inside, MASKED, PAD_D, UPCAST)
                row_pointers = row_head + start + rows_of_tile
                if MASKED:
                    row_lse = tl.load(lse + row_pointers, mask=row_inside, other=float("-inf"))
                    row_delta = tl.load(delta + row_pointers, mask=row_inside, other=0.0)
                else:
                    row_lse = tl.load(lse + row_pointers)
                    row_delta = tl.load(delta + row_pointers)
                bias_rows, bias_keys = tile_rows[None, :], keys_of_tile[:, None]
                bias_tile = bias_pointers(
                    bias_head,
                    stride_bias[2],
                    start,
                    bias_rows,
                    num_rows,
                    first_key,
                    bias_keys,
                    BIAS_PER_ROW,
                    BIAS_PER_KEY,
                )
                if inverse is not None:
                    product = tl.trans(tile_product(q_tile, tl.trans(k_tile), None, PRECISION))
                else:
                    product = tile_product(k_tile, tl.trans(q_tile), None, PRECISION)
                s, slope = tile_logits(
                    product,
                    rows[None, :],
                    keys[:, None],
                    existing,
                    scale,
                    softcap,
                    diagonal,
                    bias_tile,
                    BOOLEAN,
                    BIAS_PER_KEY,
                    MASKED,
                )
                p = tl.exp2(s - _base(row_lse)[None, :])
                if inverse is not None:
                    p *= tl.load(inverse + row_pointers, mask=row_inside, other=1.0)[None, :]
                do_pointers = do_head + first * stride_do[2] * UNIT + do_offsets
                do_tile = load_tile(do_pointers, row_inside[:, None], value_column_inside, MASKED, PAD_DV, UPCAST)
                sum_dv = tile_product(as_operand(p, do.dtype.element_ty, UPCAST), do_tile, sum_dv, PRECISION)
                dp = tile_product(v_tile, tl.trans(do_tile), None, PRECISION)
                ds = p * (dp - row_delta[None, :]) * slope
                sum_dk = tile_product(as_operand(ds, q.dtype.element_ty, UPCAST), q_tile, sum_dk, PRECISION)

    sum_dk = tl.where(key_exists, sum_dk * scale, 0.0)
    sum_dv = tl.where(key_exists, sum_dv, 0.0)
    written = (keys < num_keys)[:, None]
    dk_offsets = offsets(stride_dk, b, key_head, long_keys, columns[None, :], UNIT)
    tl.store(dk + dk_offsets, as_operand(sum_dk, dk.dtype.element_ty, UPCAST), mask=written & column_inside)
    dv_offsets = offsets(stride_dv, b, key_head, long_keys, value_columns[None, :], UNIT)
    tl.store(dv + dv_offsets, as_operand(sum_dv, dv.dtype.element_ty, UPCAST), mask=written & value_column_inside)
