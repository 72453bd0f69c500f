"""The Triton backward against float64: natively on a GPU, and on a CPU by Triton's interpreter."""

from dataclasses import dataclass, replace

import pytest
import torch
from problems import (
    BIAS_SHAPES,
    DEVICES,
    DTYPES,
    GRADIENT_TOLERANCE,
    MASKS,
    Problem,
    covering,
    has_one_key,
    make,
    relative_error,
    with_bias,
)
from torch import Tensor

from flash_jvp import fused, reference
from flash_jvp.backward import backward, launches
from flash_jvp.logits import Logits
from flash_jvp.tiles import Tile, architecture

FLOAT32_ROUNDING = 3e-7  # by so much two correct orders of summation differ; nothing beside the rounding of 16 bits
MATRIX = covering(
    Problem(heads=4),
    dtype=DTYPES,
    size=[16, 64, 72, 80, 128],
    value_size=[0, 24],
    lengths=[(64, 64), (33, 70), (70, 33), (1, 77), (77, 1)],
    mask=MASKS,
    key_heads=[4, 2, 1],
    layout=["BHND", "BSHD", "holes"],
)
SPECIAL = [
    Problem(lengths=(257, 257), heads=1, key_heads=1, batch=1, size=64, mask="causal", dtype=torch.bfloat16),
    Problem(size=256, dtype=torch.bfloat16, heads=1, key_heads=1),
    *[Problem(size=64, offset=10.0, dtype=dtype) for dtype in DTYPES],
    Problem(size=64, offset=10.0, dtype=torch.bfloat16, mask="causal kv_lens"),
    Problem(size=64, offset=10.0, dtype=torch.bfloat16, mask="softcap"),
]


@dataclass(frozen=True)
class Gradients:
    """O, log-sum-exp and the gradients of q, k and v by the reference in one dtype, and the cotangent of O.

    `of_weights` is the part of dq and dk that delta takes away, whose size is what rounding leaves where both are 0.
    """

    do: Tensor
    o: Tensor
    lse: Tensor
    gradients: tuple[Tensor, Tensor, Tensor]
    of_weights: tuple[Tensor, Tensor]


def by_autograd(tensors, dtype, do=None) -> Gradients:
    if do is None:
        shape = (*tensors.q.shape[:3], tensors.v.shape[-1])
        do = torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(tensors.q.device, tensors.q.dtype)
    primals = [x.to(dtype).detach().requires_grad_() for x in tensors.primals]
    o, lse = reference.attention(*primals, tensors.logits)
    gradients = torch.autograd.grad(o, primals, do.to(dtype), retain_graph=True)
    delta = (o.detach() * do.to(dtype)).sum(-1)
    seen = lse > -torch.inf
    of_weights = torch.autograd.grad((lse[seen] * delta[seen]).sum(), primals[:2])
    return Gradients(do, o.detach(), lse.detach(), gradients, of_weights)


def run(tensors, true: Gradients):
    """Ours, from O and log-sum-exp as a forward in the dtype of the inputs gives them."""
    return backward(*tensors.primals, true.o.to(tensors.q.dtype), true.lse.float(), true.do, tensors.logits)


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    """What a kernel allocates and does not write is seen: torch fills fresh memory with nan in this mode."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.ones(1).new_empty(2, 3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("problem", MATRIX + SPECIAL, ids=str)
def test_gradients_agree_with_float64_and_are_no_worse_than_plain_autograd(problem, device):
    tensors = make(replace(problem, device=device))
    true, plain = by_autograd(tensors, torch.float64), by_autograd(tensors, problem.dtype)
    ours = run(tensors, true)
    for name, x, exact, usual in zip("qkv", ours, true.gradients, plain.gradients, strict=True):
        assert x.shape == exact.shape and x.dtype == problem.dtype
        if name != "v" and has_one_key(problem):
            # P is 1 and dS = P (dP - delta) is 0, of which float32 leaves its rounding
            scale = torch.linalg.vector_norm(true.of_weights["qk".index(name)]).item()
            assert torch.linalg.vector_norm(x.double()) <= GRADIENT_TOLERANCE[torch.float32] * scale
            continue
        error, worst = relative_error(x, exact), relative_error(usual, exact)
        assert error <= GRADIENT_TOLERANCE[problem.dtype], f"d{name} is off by {error:.1e}"
        assert not error > worst + FLOAT32_ROUNDING, f"d{name} is off by {error:.1e}, plain by {worst:.1e}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize("shape", BIAS_SHAPES)
def test_a_bias_may_broadcast_and_lie_anywhere(shape, boolean, device):
    tensors = with_bias(Problem(lengths=(37, 43), mask="kv_lens", device=device), shape, boolean)
    true = by_autograd(tensors, torch.float64)
    for x, exact in zip(run(tensors, true), true.gradients, strict=True):
        assert relative_error(x, exact) <= GRADIENT_TOLERANCE[torch.float32]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mask", ["full", "causal", "softcap"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_what_values_share_is_not_lost_in_the_rounding_of_the_output(offset, dtype, mask, device):
    problem = Problem(size=64, offset=offset, dtype=dtype, mask=mask, lengths=(64, 96), device=device)
    tensors = make(problem)
    mean = 3 * torch.randn(64, generator=torch.Generator().manual_seed(1))
    tensors.v.add_(mean.to(tensors.v))
    true, plain = by_autograd(tensors, torch.float64), by_autograd(tensors, dtype)
    unshifted = by_autograd(make(problem), torch.float64)
    (dq, dk, dv), same = run(tensors, true), run(make(problem), unshifted)
    # as exact as without the mean of the values: the second pass has a delta free of the rounding of O
    assert relative_error(dk, true.gradients[1]) <= 1.2 * relative_error(same[1], unshifted.gradients[1])
    assert relative_error(dv, true.gradients[2]) <= 1.2 * relative_error(same[2], unshifted.gradients[2])
    # the first pass has not yet; it keeps what differs between the keys that a query sees and the mean key
    error = relative_error(dq, true.gradients[0])
    assert error <= GRADIENT_TOLERANCE[dtype] and error <= relative_error(plain.gradients[0], true.gradients[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits_cost_no_more_than_their_own_rounding(dtype, device):
    tensors = make(Problem(gain=40.0, size=64, dtype=dtype, device=device))
    true, plain = by_autograd(tensors, torch.float64), by_autograd(tensors, dtype)
    # float32 logits are rounded by up to half a unit in the last place, and so is their reference: P moves by a unit
    conditioning = torch.finfo(torch.float32).eps * true.lse.abs().max().item()
    for x, exact, usual in zip(run(tensors, true), true.gradients, plain.gradients, strict=True):
        assert relative_error(x, exact) <= GRADIENT_TOLERANCE[dtype] + conditioning
        if dtype != torch.float32:
            assert relative_error(x, exact) <= 0.2 * relative_error(usual, exact)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lengths", [(33, 70), (64, 64)])
def test_large_logits_in_float32_are_no_worse_than_plain_autograd(lengths, device):
    tensors = make(Problem(gain=40.0, size=64, lengths=lengths, device=device))
    true, plain = by_autograd(tensors, torch.float64), by_autograd(tensors, torch.float32)
    # O that went through the same rounding of the logits, as it has in use: delta then belongs to this P
    o, lse = fused.forward(*tensors.primals, tensors.logits)
    ours = backward(*tensors.primals, o, lse, true.do, tensors.logits)
    for x, exact, usual in zip(ours, true.gradients, plain.gradients, strict=True):
        # logits of 160 have steps of 1.5e-5, so that nobody's error is 5e-6; two ways to round differ by a quarter
        assert relative_error(x, exact) <= 1.25 * relative_error(usual, exact)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mask", ["full", "before", "softcap"])
def test_float32_gradients_do_not_depend_on_the_rounding_of_log_sum_exp(mask, device):
    tensors = make(Problem(mask=mask, offset=3.0, device=device))
    true = by_autograd(tensors, torch.float64)
    noise = 1e-4 * torch.randn(true.lse.shape, generator=torch.Generator().manual_seed(4)).to(true.lse)
    for x, exact in zip(run(tensors, replace(true, lse=true.lse + noise)), true.gradients, strict=True):
        assert relative_error(x, exact) <= GRADIENT_TOLERANCE[torch.float32]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["before", "empty", "empty softcap", "empty bias"])
def test_a_query_that_sees_no_key_gives_and_takes_nothing(mask, dtype, device):
    tensors = make(Problem(mask=mask, dtype=dtype, device=device))
    true = by_autograd(tensors, torch.float64)
    blind = true.lse == -torch.inf
    assert blind.any() and not blind.all()
    loud = replace(true, do=true.do.masked_fill(blind[..., None], 1e4))
    ours, expected = run(tensors, loud), run(tensors, true)
    assert not ours[0][blind].any()
    for x, same, exact in zip(ours, expected, true.gradients, strict=True):
        assert torch.equal(x, same)
        assert relative_error(x, exact) <= GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_beyond_the_last_do_not_matter_and_have_no_gradient(dtype, device):
    tensors = make(Problem(mask="kv_lens", dtype=dtype, device=device))
    true = by_autograd(tensors, torch.float64)
    expected = run(tensors, true)
    for b, length in enumerate(tensors.logits.kv_lens.tolist()):
        tensors.k[b, :, length:] = tensors.v[b, :, length:] = torch.nan
    ours = run(tensors, true)
    for x, same in zip(ours, expected, strict=True):
        assert torch.equal(x, same)
    for b, length in enumerate(tensors.logits.kv_lens.tolist()):
        assert not ours[1][b, :, length:].any() and not ours[2][b, :, length:].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tile", [Tile(16, 64, 4, 1), Tile(64, 16, 4, 1)], ids=str)
@pytest.mark.parametrize("mask", ["full", "causal", "bottom_right", "before kv_lens"])
def test_tiles_of_any_shape_give_the_same(mask, tile, device):
    tensors = make(Problem(lengths=(70, 90), mask=mask, device=device))
    true = by_autograd(tensors, torch.float64)
    outputs = [torch.full_like(x, torch.nan) for x in tensors.primals]
    inputs = (*tensors.primals, true.o.float(), true.lse.float(), true.do)
    arch = architecture(tensors.q.device)
    for launch in launches(*inputs, *outputs, tensors.logits, arch, tiles=(tile, tile)):
        launch.run()
    for x, exact in zip(outputs, true.gradients, strict=True):
        assert relative_error(x, exact) <= GRADIENT_TOLERANCE[torch.float32]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(), (1, 1, 1, 16), (2, 2, 33, 1)], ids=str)
def test_cotangents_may_be_broadcast(shape, device):
    tensors = make(Problem(device=device))
    do = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(device).expand(2, 2, 33, 16)
    true = by_autograd(tensors, torch.float64, do)
    for x, exact in zip(run(tensors, true), true.gradients, strict=True):
        assert relative_error(x, exact) <= GRADIENT_TOLERANCE[torch.float32]


@pytest.mark.parametrize("device", DEVICES)
def test_output_cotangent_and_log_sum_exp_may_lie_in_any_memory_order(device):
    tensors = make(Problem(dtype=torch.bfloat16, layout="BSHD", device=device))
    true = by_autograd(tensors, torch.float64)
    expected = run(tensors, true)

    def moved(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    ours = run(tensors, replace(true, do=moved(true.do), o=moved(true.o), lse=moved(true.lse)))
    assert all(torch.equal(x, same) for x, same in zip(ours, expected, strict=True))
    assert all(x.stride() == like.stride() for x, like in zip(ours, tensors.primals, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_two_runs_give_the_same_bits(device):
    tensors = make(Problem(heads=4, key_heads=1, dtype=torch.bfloat16, device=device))
    true = by_autograd(tensors, torch.float64)
    assert all(torch.equal(x, again) for x, again in zip(run(tensors, true), run(tensors, true), strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_after_the_forward_of_the_package_it_is_as_exact(dtype, device):
    tensors = make(Problem(heads=4, size=64, dtype=dtype, mask="bottom_right kv_lens", device=device))
    true = by_autograd(tensors, torch.float64)
    o, lse = fused.forward(*tensors.primals, tensors.logits)
    for x, exact in zip(backward(*tensors.primals, o, lse, true.do, tensors.logits), true.gradients, strict=True):
        assert relative_error(x, exact) <= GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("device", DEVICES)
def test_probabilities_below_the_normal_range_of_float16_keep_their_bits(device):
    # among 32768 keys P is about 2^-15, subnormal in float16 with steps of 2^-24; gradients are kept in its range
    tensors = make(
        Problem(lengths=(2, 32768), batch=1, heads=1, key_heads=1, gain=0.1, dtype=torch.float16, device=device)
    )
    do = 64 * torch.randn(1, 1, 2, 16, generator=torch.Generator().manual_seed(3)).to(device, torch.float16)
    true = by_autograd(tensors, torch.float64, do)
    outputs = [torch.full_like(x, torch.nan) for x in tensors.primals]
    inputs = (*tensors.primals, true.o.half(), true.lse.float(), do)
    tile = Tile(16, 256, 4, 1)
    for launch in launches(*inputs, *outputs, tensors.logits, architecture(tensors.q.device), tiles=(tile, tile)):
        launch.run()
    for x, exact in zip(outputs, true.gradients, strict=True):
        assert relative_error(x, exact) <= GRADIENT_TOLERANCE[torch.float16]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lengths", [(0, 5), (5, 0)])
def test_no_queries_or_no_keys(lengths, device):
    q, k = (torch.randn(1, 2, n, 16, device=device) for n in lengths)
    lse = torch.full((1, 2, lengths[0]), -torch.inf, device=device)
    for x, like in zip(backward(q, k, k, q, lse, q, Logits(scale=1.0)), (q, k, k), strict=True):
        assert x.shape == like.shape and not x.any()


def test_what_the_kernels_cannot_do_raises_with_the_alternative():
    logits = Logits(scale=1.0)
    x, lse = torch.zeros(1, 1, 2, 16), torch.zeros(1, 1, 2)
    with pytest.raises(NotImplementedError, match=r'float64; use backend="chunked"'):
        backward(*[x.double()] * 4, lse.double(), x.double(), logits)
    wide = x.new_zeros(1, 1, 2, 264)
    with pytest.raises(NotImplementedError, match=r'up to 256, got 264.*backend="chunked"'):
        backward(*[wide] * 4, lse, wide, logits)
    with pytest.raises(NotImplementedError, match=r'not on meta; use backend="chunked"'):
        backward(*[x.to("meta")] * 4, lse.to("meta"), x.to("meta"), logits)
