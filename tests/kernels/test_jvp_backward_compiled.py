"""The backward compiles, without a GPU, to what each architecture can launch and to few spills.

The budgets are what Triton 3.6.0 and 3.7.1 give; see test_jvp_compiled.
"""

import pytest
import torch

from flash_jvp.backward import launches
from flash_jvp.compiled import SHARED_KIB, inspect
from flash_jvp.logits import Logits
from flash_jvp.tiles import ARCHITECTURES

# spill stores allowed by (pass, size), where it is not none
BUDGETS = {
    ("queries", 72): {120: 13},
    ("keys", 64): {80: 2, 120: 5},  # on sm_80 1 with Triton 3.7.1
    ("keys", 128): {90: 7},
}
FLOAT32_BUDGETS = {"queries": {64: 2, 128: 0, 256: 491}, "keys": {64: 0, 128: 0, 256: 2}}


def example(name: str, size: int, arch: int, dtype=torch.bfloat16, group: int = 1, logits: Logits | None = None):
    """The launch over "queries" or "keys" for BSHD tensors of a usual shape, without data."""
    q = torch.empty(2, 4096, 24, size, dtype=dtype, device="meta").transpose(1, 2)
    k = torch.empty(2, 4096, 24 // group, size, dtype=dtype, device="meta").transpose(1, 2)
    row = torch.empty(2, 24, 4096, device="meta")
    both = launches(q, k, k, q, row, q, q, k, k, logits or Logits(scale=size**-0.5), arch)
    return both[("queries", "keys").index(name)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("size", [64, 72, 128, 256])
@pytest.mark.parametrize("name", ["queries", "keys"])
def test_every_configuration_fits_its_architecture(name, size, arch):
    report = inspect(example(name, size, arch), arch)
    assert report.matrix_instructions > 0
    assert report.shared_kib <= SHARED_KIB[arch]
    assert report.spill_stores <= BUDGETS.get((name, size), {}).get(arch, 0)
    assert len(report.loop_instructions) >= 2, "a loop without masks and one with them"


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", ["queries", "keys"])
def test_masks_caps_biases_groups_and_float16_fit_too(name, arch):
    bias = torch.empty(2, 1, 4096, 4096, dtype=torch.float32, device="meta").expand(2, 24, 4096, 4096)
    lens = torch.empty(2, dtype=torch.int32, device="meta")
    logits = Logits(scale=0.1, softcap=30.0, diagonal=5, bias=bias, kv_lens=lens)
    for size in (64, 128):
        report = inspect(example(name, size, arch, torch.float16, 3, logits), arch)
        assert report.matrix_instructions > 0
        assert report.shared_kib <= SHARED_KIB[arch]


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("name", ["queries", "keys"])
def test_float32_is_multiplied_exactly(name, size):
    report = inspect(example(name, size, 90, torch.float32), 90)
    assert report.matrix_instructions == 0  # TF32 would be one
    assert report.shared_kib <= SHARED_KIB[120]  # the same tiles everywhere
    assert report.spill_stores <= FLOAT32_BUDGETS[name][size]


def test_rows_far_apart_are_addressed_with_64_bits():
    near = torch.empty(1, 2, 512, 64, dtype=torch.bfloat16, device="meta")
    far = near.as_strided(near.shape, (64, 64, 2**26, 1))
    row = torch.empty(1, 2, 512, device="meta")
    for q, k, expected in ((near, near, [False, False]), (far, near, [False, True]), (near, far, [True, False])):
        both = launches(q, k, k, near, row, near, near, near, near, Logits(scale=1.0), 90)
        assert [launch.constants["LONG"] for launch in both] == expected
        assert all(inspect(launch, 90).matrix_instructions > 0 for launch in both)
