"""What compiles in the backward alone: groups of query heads, and rows far apart. The rest is in test_jvp_compiled."""

import pytest
import torch

from flash_jvp.backward import launches
from flash_jvp.compiled import example, inspect
from flash_jvp.logits import Logits

# spill stores on sm_90 where three query heads share a key
GROUPED = {64: 0, 128: 16}


@pytest.mark.parametrize("size", list(GROUPED))
def test_groups_of_query_heads_keep_the_budget(size):
    report = inspect(example("keys", 90, torch.bfloat16, size, group=3), 90)
    assert report.matrix_instructions > 0
    assert report.spill_stores <= GROUPED[size]


def test_rows_far_apart_are_addressed_with_64_bits():
    near = torch.empty(1, 2, 512, 64, dtype=torch.bfloat16, device="meta")
    far = near.as_strided(near.shape, (64, 64, 2**26, 1))
    row = torch.empty(1, 2, 512, device="meta")
    for q, k, expected in ((near, near, [False, False]), (far, near, [False, True]), (near, far, [True, False])):
        both = launches(q, k, k, near, row, near, near, near, near, Logits(scale=1.0), 90)
        assert [launch.constants["LONG"] for launch in both] == expected
        assert all(inspect(launch, 90).matrix_instructions > 0 for launch in both)
