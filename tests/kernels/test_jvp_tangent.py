"""The Triton pass for the tangent alone, given O and log-sum-exp, against float64."""

from dataclasses import replace

import pytest
import torch
from problems import (
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
)

from flash_jvp import fused
from flash_jvp.tangent import tangent
from flash_jvp.tiles import Tile, architecture

MATRIX = solvable(
    covering(
        Problem(heads=4),
        dtype=DTYPES,
        size=[16, 64, 72, 128],
        value_size=[0, 24],
        lengths=[(64, 64), (33, 70), (70, 33), (1, 77)],
        mask=MASKS,
        key_heads=[4, 2],
        tangents=["qkv", "q", "k", "v", "qk"],
        layout=["BHND", "BSHD", "holes"],
    )
)
SPECIAL = [
    Problem(size=256, dtype=torch.bfloat16, heads=1, key_heads=1),
    *[Problem(size=64, offset=10.0, dtype=dtype) for dtype in DTYPES],
    Problem(mask="empty"),
]
# a rounded log-sum-exp moves all P of a row by as much as half a unit in its last place, 2.4e-7 where it is 4 to 8
FLOAT32_ROUNDING = 5e-7


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    """What a kernel allocates and does not write is seen: torch fills fresh memory with nan in this mode."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("problem", MATRIX + SPECIAL, ids=str)
def test_tangent_agrees_with_float64(problem, device):
    tensors = make(replace(problem, device=device))
    true, ordinary = truth(tensors), plain(tensors)
    to, mu = tangent(*tensors.primals, *tensors.tangents, true.o.to(problem.dtype), true.lse.float(), tensors.logits)
    error = relative_error(to, true.to)
    assert error <= FORWARD_TOLERANCE[problem.dtype]
    worst = relative_error(ordinary.to, true.to) + FLOAT32_ROUNDING
    # with one key P is 1, and plain attention is exact by luck: P tS and P mu round alike
    assert has_one_key(problem) or not error > worst, f"off by {error:.1e}, plain attention by {worst:.1e}"
    assert relative_error(mu, true.mu) <= 2e-6
    assert not mu[true.lse == -torch.inf].any() and not to[true.lse == -torch.inf].any()


@pytest.mark.parametrize("device", DEVICES)
def test_output_and_log_sum_exp_may_lie_in_any_memory_order(device):
    tensors = make(Problem(dtype=torch.bfloat16, layout="BSHD", device=device))
    true = truth(tensors)
    o = true.o.to(torch.bfloat16).contiguous()  # BHND, while q and the result are BSHD
    lse = true.lse.float().transpose(1, 2).contiguous().transpose(1, 2)
    to, _ = tangent(*tensors.primals, *tensors.tangents, o, lse, tensors.logits)
    assert to.transpose(1, 2).is_contiguous()
    assert relative_error(to, true.to) <= FORWARD_TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("device", DEVICES)
def test_no_tangent_gives_zeros(device):
    tensors = make(Problem(tangents="", device=device))
    true = truth(tensors)
    to, mu = tangent(*tensors.primals, None, None, None, true.o.float(), true.lse.float(), tensors.logits)
    assert to.shape == true.o.shape and not to.any() and not mu.any()


@pytest.mark.parametrize("device", DEVICES)
def test_tangent_logits_beyond_the_range_of_float16_are_exact(device):
    tensors = make(Problem(dtype=torch.float16, tangent_gain=2e4, size=64, device=device))
    tensors.tq.clamp_(-6e4, 6e4)
    tensors.q.div_(8), tensors.k.mul_(8)
    tensors.v.mul_(0.01)
    true = truth(tensors)
    assert true.mu.abs().max() > 2**16 > true.to.abs().max()
    to, _ = tangent(*tensors.primals, *tensors.tangents, true.o.half(), true.lse.float(), tensors.logits)
    assert relative_error(to, true.to) <= FORWARD_TOLERANCE[torch.float16]


@pytest.mark.parametrize("device", DEVICES)
def test_probabilities_below_the_normal_range_of_float16_keep_their_bits(device):
    # 32768 equal keys: P = 2^-15 is subnormal, with steps of 2^-24, and P tS smaller still
    tensors = make(
        Problem(lengths=(2, 32768), batch=1, heads=1, key_heads=1, gain=0.1, dtype=torch.float16, device=device)
    )
    true = truth(tensors)
    to, mu = torch.full_like(tensors.q, torch.nan), torch.full(tensors.q.shape[:3], torch.nan, device=device)
    arguments = (*tensors.primals, *tensors.tangents, true.o.half(), to, true.lse.float(), mu, tensors.logits)
    fused.launch(*arguments, architecture(tensors.q.device), known=True, tile=Tile(16, 256, 4, 1)).run()
    assert relative_error(to, true.to) <= FORWARD_TOLERANCE[torch.float16]
