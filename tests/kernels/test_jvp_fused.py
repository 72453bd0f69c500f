"""The fused Triton kernel against float64: natively on a GPU, and on a CPU by Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
import triton.language as tl
from problems import (
    BIAS_SHAPES,
    DEVICES,
    DTYPES,
    FORWARD_TOLERANCE,
    MASKS,
    Problem,
    covering,
    has_one_key,
    make,
    plain,
    relative_error,
    solvable,
    truth,
    with_bias,
)
from triton.runtime.jit import JITFunction

from flash_jvp import fused
from flash_jvp.launch import require_interpreter
from flash_jvp.tiles import Tile, architecture

STATISTICS_TOLERANCE = (
    2e-6  # log-sum-exp and mu are sums in float32 of exact products, whatever the dtype of the inputs
)
FLOAT32_ROUNDING = 3e-7  # by so much two correct orders of summation differ; nothing beside the rounding of 16 bits
MATRIX = solvable(
    covering(
        Problem(heads=4),
        dtype=DTYPES,
        size=[16, 64, 72, 80, 128],
        value_size=[0, 32, 24],
        lengths=[(64, 64), (33, 70), (70, 33), (1, 77), (77, 1)],
        mask=MASKS,
        key_heads=[4, 2, 1],
        tangents=["qkv", "q", "k", "v", "qk", "qv"],
        layout=["BHND", "BSHD", "holes"],
    )
)
SPECIAL = [
    Problem(lengths=(257, 257), heads=1, key_heads=1, batch=1, size=64, mask="causal", dtype=torch.bfloat16),
    Problem(lengths=(257, 257), heads=1, key_heads=1, batch=1, size=64),
    Problem(size=256, dtype=torch.bfloat16, heads=1, key_heads=1),
    Problem(size=160, dtype=torch.float16, heads=1, key_heads=1),
    *[Problem(size=64, offset=10.0, dtype=dtype) for dtype in DTYPES],
    Problem(size=64, offset=10.0, dtype=torch.bfloat16, mask="causal kv_lens"),
    Problem(size=64, offset=10.0, dtype=torch.bfloat16, mask="softcap"),
]


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    """What a kernel allocates and does not write is seen: torch fills fresh memory with nan in this mode."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.ones(1).new_empty(2, 3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def check(ours, tensors, tolerance, compare=True):
    """o, to, lse and mu agree with float64, o and to (if `compare`) no worse than plain attention in the same dtype."""
    true, ordinary = truth(tensors), plain(tensors)
    for name in ("o", "to"):
        error = relative_error(getattr(ours, name), getattr(true, name))
        assert error <= tolerance, f"{name} is off by {error:.1e}"
        worst = relative_error(getattr(ordinary, name), getattr(true, name)) + FLOAT32_ROUNDING
        assert not compare or not error > worst, (
            f"{name} is off by {error:.1e}, plain attention by {worst:.1e}"
        )  # which may be nan
    blind = true.lse == -torch.inf
    assert torch.equal(ours.lse == -torch.inf, blind)
    assert not ours.mu[blind].any()
    assert relative_error(ours.lse[~blind], true.lse[~blind]) <= STATISTICS_TOLERANCE
    assert relative_error(ours.mu, true.mu) <= STATISTICS_TOLERANCE


def run(tensors):
    return type(truth(tensors))(*fused.forward_tangent(*tensors.primals, *tensors.tangents, tensors.logits))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("problem", MATRIX + SPECIAL, ids=str)
def test_output_and_tangent_agree_with_float64(problem, device):
    tensors = make(replace(problem, device=device))
    # with one key P is 1, and plain attention is exact by luck: P tS and P mu round alike
    check(run(tensors), tensors, FORWARD_TOLERANCE[problem.dtype], compare=not has_one_key(problem))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mask", MASKS)
def test_without_tangents_it_is_a_plain_forward(mask, device):
    tensors = make(Problem(mask=mask, tangents="", dtype=torch.bfloat16, size=64, device=device))
    o, lse = fused.forward(*tensors.primals, tensors.logits)
    true = truth(tensors)
    assert relative_error(o, true.o) <= FORWARD_TOLERANCE[torch.bfloat16]
    assert torch.equal(lse == -torch.inf, true.lse == -torch.inf)
    sees = true.lse > -torch.inf
    assert relative_error(lse[sees], true.lse[sees]) <= STATISTICS_TOLERANCE
    assert all(not x.any() for x in fused.forward_tangent(*tensors.primals, None, None, None, tensors.logits)[1::2])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["before", "empty", "empty softcap", "empty bias"])
def test_a_query_that_sees_no_key_gives_zeros(mask, dtype, device):
    tensors = make(Problem(mask=mask, dtype=dtype, device=device))
    o, to, lse, mu = fused.forward_tangent(*tensors.primals, *tensors.tangents, tensors.logits)
    blind = truth(tensors).lse == -torch.inf
    assert blind.any() and not blind.all()
    assert not o[blind].any() and not to[blind].any() and not mu[blind].any()
    assert (lse[blind] == -torch.inf).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_lies_beyond_the_last_key_does_not_matter(dtype, device):
    tensors = make(Problem(mask="kv_lens", dtype=dtype, device=device))
    expected = run(tensors)
    for x in (tensors.k, tensors.v, tensors.tk, tensors.tv):
        for b, length in enumerate(tensors.logits.kv_lens.tolist()):
            x[b, :, length:] = torch.nan
    ours = run(tensors)
    for name in ("o", "to", "lse", "mu"):
        assert torch.equal(getattr(ours, name), getattr(expected, name))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits_are_no_worse_than_plain_attention(dtype, device):
    # float32 logits of 160 have steps of 1.5e-5, so that nobody's error is 2e-6; two ways to round differ by a quarter
    tensors = make(Problem(gain=40.0, size=64, dtype=dtype, device=device))
    ours, true, ordinary = run(tensors), truth(tensors), plain(tensors)
    for name in ("o", "to"):
        error, worst = (relative_error(getattr(x, name), getattr(true, name)) for x in (ours, ordinary))
        assert error <= max(1.25 * worst, FORWARD_TOLERANCE[dtype]), f"{name}: {error:.1e}, plain {worst:.1e}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tangents", ["qkv", "q"])
def test_tangent_logits_beyond_the_range_of_float16_are_exact(tangents, device):
    problem = Problem(dtype=torch.float16, tangent_gain=2e4, tangents=tangents, size=64, device=device)
    tensors = make(problem)
    tensors.tangents[0].clamp_(-6e4, 6e4)
    tensors.q.div_(8), tensors.k.mul_(8)
    tensors.v.mul_(0.01)  # the tangent itself must be a float16
    true = truth(tensors)
    assert true.mu.abs().max() > 2**16 > true.to.abs().max()
    check(run(tensors), tensors, FORWARD_TOLERANCE[torch.float16])


@pytest.mark.parametrize("device", DEVICES)
def test_tangents_may_be_broadcast(device):
    tensors = make(Problem(size=32, device=device))
    batched = replace(
        tensors, tq=tensors.tq[:1, :1].expand_as(tensors.tq), tv=tensors.tv[:, :, :1].expand_as(tensors.tv)
    )
    check(run(batched), batched, FORWARD_TOLERANCE[torch.float32])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize("shape", BIAS_SHAPES)
def test_a_bias_may_broadcast_and_lie_anywhere(shape, boolean, device):
    tensors = with_bias(Problem(lengths=(37, 43), mask="kv_lens", device=device), shape, boolean)
    check(run(tensors), tensors, FORWARD_TOLERANCE[torch.float32])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tile", [Tile(16, 64, 4, 1), Tile(64, 16, 4, 1)], ids=str)
@pytest.mark.parametrize("mask", ["full", "causal", "bottom_right", "before kv_lens"])
def test_tiles_of_any_shape_give_the_same(mask, tile, device):
    tensors = make(Problem(lengths=(70, 90), mask=mask, device=device))
    true = truth(tensors)
    ours = type(true)(*(x.to(torch.float32) * torch.nan for x in (true.o, true.to, true.lse, true.mu)))
    outputs = (ours.o, ours.to, ours.lse, ours.mu)
    arch = architecture(tensors.q.device)
    fused.launch(*tensors.primals, *tensors.tangents, *outputs, tensors.logits, arch, tile=tile).run()
    check(ours, tensors, FORWARD_TOLERANCE[torch.float32])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lengths", [(0, 5), (5, 0)])
def test_no_queries_or_no_keys(lengths, device):
    q, k = (torch.randn(1, 2, n, 16, device=device) for n in lengths)
    logits = make(Problem()).logits
    o, to, lse, mu = fused.forward_tangent(q, k, k, q, k, k, logits)
    assert o.shape == q.shape and not o.any() and not to.any() and not mu.any() and (lse == -torch.inf).all()


def test_the_memory_order_of_the_output_is_that_of_the_queries():
    tensors = make(Problem(layout="BSHD"))
    o, to, *_ = fused.forward_tangent(*tensors.primals, *tensors.tangents, tensors.logits)
    assert o.transpose(1, 2).is_contiguous() and to.transpose(1, 2).is_contiguous()


def test_what_the_kernel_cannot_do_raises_with_the_alternative():
    tensors = make(Problem())
    with pytest.raises(NotImplementedError, match=r'float64; use backend="chunked"'):
        fused.forward(*(x.double() for x in tensors.primals), tensors.logits)
    with pytest.raises(NotImplementedError, match=r'up to 256, got 264.*backend="chunked"'):
        fused.forward(*(x.new_zeros(1, 1, 2, 264) for x in tensors.primals), tensors.logits)
    with pytest.raises(NotImplementedError, match=r'not on meta; use backend="chunked"'):
        fused.forward(*(x.to("meta") for x in tensors.primals), tensors.logits)
    with pytest.raises(NotImplementedError, match="numpy<2.4"):
        require_interpreter("3.6.0", "2.4.6")
    require_interpreter("3.6.0", "2.3.5")
    require_interpreter("3.7.1", "2.4.6")


def test_the_interpreter_leaves_compiled_functions_behind():
    tensors = make(Problem())
    before = tl.sum, tl.dot, tl.core.dot, tl.standard.max, tl.range
    fused.forward(*tensors.primals, tensors.logits)
    assert before == (tl.sum, tl.dot, tl.core.dot, tl.standard.max, tl.range)
    assert isinstance(tl.sum, JITFunction)
