"""Randomness by slots: draws depend on key and slot and on nothing else."""

import copy

import pytest
import torch
from torch import nn

from diffdistill.rng import Rng, SlotDropout, drawn_from, replace_dropout

DRAWS = {
    "normal": lambda rng: rng.normal((5,)),
    "normal of an odd size": lambda rng: rng.normal((3, 7, 11)),
    "uniform": lambda rng: rng.uniform(),
    "integers": lambda rng: rng.integers(1000),
    "keep": lambda rng: rng.keep("layer", (40,), 0.5),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_draw_does_not_depend_on_which_slots_are_drawn_together(draw):
    whole = draw(Rng((1, 2), range(8)))
    parts = torch.cat([draw(Rng((1, 2), slots)) for slots in (range(0, 3), range(3, 4), [4, 5, 6, 7])])
    assert torch.equal(whole, parts)
    assert len(torch.unique(whole, dim=0)) == 8  # and no two slots share it


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_draw_depends_on_every_part_of_the_key(draw):
    reference = draw(Rng((1, 2), range(8)))
    for key in ((1, 3), (2, 2), (1, 2, 0), (12,), (1, "2")):
        assert not torch.equal(draw(Rng(key, range(8))), reference), key
    assert not torch.equal(draw(Rng((1, 2), range(8)).fork("name")), reference)


def test_successive_draws_differ_and_masks_do_not_move_them():
    rng, other = Rng((0,), range(4)), Rng((0,), range(4))
    first, second = rng.normal((6,)), rng.normal((6,))
    assert not torch.equal(first, second)
    other.keep("layer", (6,), 0.5)
    assert torch.equal(other.normal((6,)), first)


def test_global_random_state_is_neither_read_nor_changed():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = Rng((0,), range(4)).normal((6,))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(Rng((0,), range(4)).normal((6,)), first)


def test_shared_draws_are_those_of_every_slot():
    numbers = [Rng((0, 1), slots).shared for slots in (range(0, 2), range(2, 4))]
    assert len({(shared.integer(10**9), shared.uniform()) for shared in numbers}) == 1


def test_normal_and_uniform_have_their_moments():
    x = Rng((0,), range(200)).normal((500,))
    assert abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02  # 5 standard errors of 1e5 numbers
    u = torch.stack([Rng((0, i), range(100)).uniform() for i in range(100)])
    assert u.dtype == torch.float64 and 0 < u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.015
    assert Rng((0,), range(100_000 // 50)).keep("a", (50,), 0.9).float().mean().sub(0.9).abs() < 0.005


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 64), nn.Sequential(nn.Dropout(0.25)))


def test_dropout_by_slot_splits_over_micro_batches():
    net, x = network(), torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    dropouts = replace_dropout(net)
    assert [dropout.probability for dropout in dropouts] == [0.5, 0.25]
    with drawn_from(dropouts, Rng((0,), range(6))):
        whole = net(x)
    parts = []
    for slots in (range(0, 2), range(2, 6)):
        with drawn_from(dropouts, Rng((0,), slots)):
            parts.append(net(x[list(slots)]))
    # masks are equal; a matrix product may round differently for another number of rows
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-5, atol=1e-6)
    assert torch.equal(whole == 0, torch.cat(parts) == 0)
    assert 0.15 < (whole == 0).float().mean() < 0.35
    assert not torch.equal(whole[0] == 0, whole[1] == 0)


def test_dropout_by_slot_keeps_the_mean_and_gives_copies_of_a_batch_one_mask():
    dropout = SlotDropout(0.25, "layer")
    x = torch.ones(200, 300)
    with drawn_from([dropout], Rng((0,), range(200))):
        y = dropout(x)
        both = dropout(torch.cat([x, x]))
        with pytest.raises(ValueError, match="layer got 3 rows for 200 slots"):
            dropout(x[:3])
    assert abs(y.mean() - 1) < 0.01
    assert torch.equal(both, torch.cat([y, y]))


def test_dropout_is_off_outside_its_block_also_after_an_error():
    dropout, x = SlotDropout(0.5, "layer").train(), torch.ones(2, 8)
    assert torch.equal(dropout(x), x)
    with pytest.raises(KeyError), drawn_from([dropout], Rng((0,), range(2))):
        raise KeyError
    assert torch.equal(dropout(x), x)


def test_a_dropout_that_slots_cannot_control_is_refused():
    with pytest.raises(ValueError, match="1 is a Dropout2d"):
        replace_dropout(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Dropout2d(0.1)))
    assert replace_dropout(nn.Sequential(nn.Dropout2d(0.0))) == []


def test_recomputing_activations_gives_the_same_masks():
    from torch.utils.checkpoint import checkpoint

    net, x = network(), torch.randn(6, 4)
    twin = copy.deepcopy(net)
    with drawn_from(replace_dropout(net), Rng((0,), range(6))):
        net(x).square().sum().backward()
    with drawn_from(replace_dropout(twin), Rng((0,), range(6))):
        checkpoint(twin, x, use_reentrant=False).square().sum().backward()
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
