"""What every Triton kernel of the package needs of one tile of logits: loads, the tile's keys, logits and masks.

What differs from FlashAttention-2: logits can be capped, biased and bounded by a diagonal of any offset and by a
number of keys per batch element, all in one place; they come in base 2 (multiplied by log2 e), and with the slope that
carries a tangent or a gradient through the cap. Run in Triton's interpreter and compiler only so far, not on a GPU.

Under the interpreter UPCAST must be set for bfloat16: its products of bfloat16 tiles are wrong without an error.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_tile(pointers, first, second, CHECK_FIRST: tl.constexpr, CHECK_SECOND: tl.constexpr, UPCAST: tl.constexpr):
    """A tile of a matrix, zero outside; float32 if UPCAST.

    `first` and `second` say where each axis is inside, shaped to broadcast ([:, None] and [None, :], or the reverse);
    only those that the constants ask for cost anything.
    """
    if CHECK_FIRST and CHECK_SECOND:
        tile = tl.load(pointers, mask=first & second, other=0.0)
    elif CHECK_FIRST:
        tile = tl.load(pointers, mask=first, other=0.0)
    elif CHECK_SECOND:
        tile = tl.load(pointers, mask=second, other=0.0)
    else:
        tile = tl.load(pointers)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def as_operand(tile, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """A float32 tile rounded to the dtype of the matrices it is multiplied with, or of the output it is stored in.

    If UPCAST, rounded to bfloat16 but still float32: the interpreter's own conversion cuts bits off, not rounds.
    """
    if UPCAST:
        bits = tile.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    else:
        rounded = tile.to(dtype)
    return rounded


@triton.jit
def program_of_rows(num_rows, num_heads, diagonal, BLOCK_M: tl.constexpr):
    """(first_row, batch_head, b, h) of a program that takes a tile of queries; b and h are int64."""
    num_tiles = tl.cdiv(num_rows, BLOCK_M)
    program = tl.program_id(0)
    row_tile = program % num_tiles
    if diagonal is not None:  # the rows with most keys first: the short ones fill the gaps at the end
        row_tile = num_tiles - 1 - row_tile
    batch_head = program // num_tiles
    return row_tile * BLOCK_M, batch_head, (batch_head // num_heads).to(tl.int64), (batch_head % num_heads).to(tl.int64)


@triton.jit
def offsets(strides, b, h, rows, columns, UNIT: tl.constexpr):
    """Where rows and columns of batch element b and head h lie; `strides` are those of batch, head and row in UNIT."""
    return (b * strides[0] + h * strides[1] + rows * strides[2]) * UNIT + columns


@triton.jit
def bias_pointers(
    bias, stride_m, first_row, rows, num_rows, first_key, keys, PER_ROW: tl.constexpr, PER_KEY: tl.constexpr
):
    """Pointers to a tile of the bias, broadcastable to the tile; None for no bias.

    Args:
        bias: pointer to the bias of this batch element and head, or None.
        first_row, first_key: of the tile; rows, keys: counted from them, shaped as in `tile_logits`.
        PER_ROW, PER_KEY: whether it differs between queries and between keys.
    """
    pointers = bias
    if bias is not None:
        if PER_ROW:
            # rows beyond the last read the last: a mask of both axes costs an address and a predicate per element
            local = tl.minimum(rows, num_rows - 1 - first_row)
            pointers = pointers + tl.cast(first_row, tl.int64) * stride_m + local * stride_m
        if PER_KEY:
            pointers = pointers + tl.cast(first_key, tl.int64) + keys
    return pointers


@triton.jit
def keys_of_rows(first_row, num_rows, num_keys, diagonal, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(full, end) for the queries first_row .. first_row + BLOCK_M: all see every key before `full`, a multiple of
    BLOCK_N, and none sees a key from `end` on. `diagonal` is None for none; `num_keys` is that of this batch element.
    """
    end = num_keys
    seen_by_all = num_keys
    if diagonal is not None:
        last_row = tl.minimum(first_row + BLOCK_M, num_rows) - 1
        end = tl.maximum(0, tl.minimum(num_keys, last_row + diagonal + 1))
        seen_by_all = tl.maximum(0, tl.minimum(num_keys, first_row + diagonal + 1))
    return (seen_by_all // BLOCK_N) * BLOCK_N, end


@triton.jit
def tanh(x):
    """tanh to a few ulp of float32, which no instruction gives: our own fit near 0, an exponential beyond."""
    square = x * x
    tail = 0.02173288 + square * (-0.00826319 + square * 0.00222742)
    near = x + x * square * (-0.33333332 + square * (0.13333246 + square * (-0.05395219 + square * tail)))
    decay = tl.exp2(-2.8853900817779268 * tl.abs(x))  # exp(-2 |x|)
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.6, near, tl.where(x < 0, -far, far))


@triton.jit
def tile_logits(
    product,
    rows,
    keys,
    num_keys,
    scale,
    softcap,
    diagonal,
    bias,
    BOOLEAN: tl.constexpr,
    CHECK_BIAS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(logits, slope) of one tile: logits in base 2, -inf where a query does not see a key; slope = d logit / d (scale
    q.k) in base e, which is 1 without a cap (then the float 1.0, so that multiplying by it is free).

    Works for a tile [queries, keys] and for its transpose: `rows` and `keys` are the indices of the tile's axes, shaped
    to broadcast to `product` (rows[:, None] and keys[None, :], or rows[None, :] and keys[:, None]).

    Args:
        product: float32, q.k.
        num_keys: the number of keys of this batch element.
        scale, softcap: as in Logits; softcap is None for none.
        diagonal: as in Logits, None for none.
        bias: pointers to the bias of the tile (see bias_pointers), None for none; BOOLEAN if it says what is seen.
        CHECK_BIAS: whether the pointers may reach beyond num_keys.
        MASKED: whether the tile may reach beyond num_keys or the diagonal. A bias is always applied.
    """
    slope = 1.0
    if softcap is not None:
        bend = tanh(product * (scale / softcap))
        slope = 1.0 - bend * bend
        logits = bend * (softcap * LOG2E)
    else:
        logits = product * (scale * LOG2E)
    if bias is not None:
        # rows of a bias are of 16 elements (operands.aligned_bias), so that whole loads can be made up to the end
        inside = keys < tl.cdiv(num_keys, 16) * 16
        added = load_tile(bias, inside, None, CHECK_BIAS, False, False)
        if BOOLEAN:
            logits = tl.where(added != 0, logits, float("-inf"))
        else:
            # the least float32 stands for "hardly", and would become -inf, "never", in base 2
            added = added.to(tl.float32)
            logits += tl.where(added == float("-inf"), added, tl.maximum(added, -2.3e38) * LOG2E)
    if MASKED:
        seen = keys < num_keys
        if diagonal is not None:
            seen = seen & (keys <= rows + diagonal)
        logits = tl.where(seen, logits, float("-inf"))
    return logits, slope


@triton.jit
def tile_product(first, second, total, PRECISION: tl.constexpr):
    """first @ second in float32, added to `total` unless that is None."""
    if total is None:
        product = tl.dot(first, second, input_precision=PRECISION)
    else:
        product = tl.dot(first, second, total, input_precision=PRECISION)
    return product


@triton.jit
def tangent_product(q, k, tq, tk, PRECISION: tl.constexpr):
    """The tangent of q.k of one tile, float32 [queries, keys]; tq and tk are tiles, None where zero, not both None."""
    product = None
    if tq is not None:
        product = tile_product(tq, k, None, PRECISION)
    if tk is not None:
        product = tile_product(q, tk, product, PRECISION)
    return product


@triton.jit
def tangent_centre(q, tq, mean_k, mean_tk, offset, columns, size, scale, softcap):
    """c_i, the tangent logit of the mean key, float32 [queries]: scale (tq_i . mean k + q_i . mean tk), times the slope
    of the cap at scale q_i . mean k if there is a cap.

    tO does not change when a number is subtracted from all tangent logits of a query. Taking off what all keys share
    keeps the rounding of P o tS relative to what matters: keys with a mean of 10 sigma cost bfloat16 a factor of 10.

    Args:
        mean_k, mean_tk: pointers to means over keys, float32, at `offset` for this batch element and head; None where
            not needed (see operands.key_means).
    """
    inside = columns < size
    centre = tl.zeros([q.shape[0]], tl.float32)
    if mean_k is not None:
        mean_key = tl.load(mean_k + offset + columns, mask=inside, other=0.0)[None, :]
    if tq is not None:
        centre += tl.sum(tq.to(tl.float32) * mean_key, 1)
    if mean_tk is not None:
        mean_tangent = tl.load(mean_tk + offset + columns, mask=inside, other=0.0)[None, :]
        centre += tl.sum(q.to(tl.float32) * mean_tangent, 1)
    centre *= scale
    if softcap is not None:
        bend = tanh(tl.sum(q.to(tl.float32) * mean_key, 1) * (scale / softcap))
        centre *= 1.0 - bend * bend
    return centre


@triton.jit
def softmax_reference(reference, logits, tangent, GUARD: tl.constexpr):
    """The new reference of P = 2^(logits - reference), per query: its largest logit so far, -inf before any.

    GUARD (float16 with tangents): so much more that P |tS| stays below 2^14 too, where float16 would overflow at 2^16.
    Any reference is exact, since P is divided by its own sum.
    """
    top = tl.max(logits, 1)
    if GUARD:
        top += tl.log2(tl.maximum(tl.max(tl.abs(tangent), 1), 16384.0)) - 14.0
    return tl.maximum(reference, top)
