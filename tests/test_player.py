"""A player's step: clipping, learning rate, averages, and that a step which is not finite changes nothing."""

import math

import pytest
import torch
from cases import make_player
from torch import nn

from diffdistill.method import PlayerSpec
from diffdistill.player import ConstantDecay, HalfLifeDecay, LearningRate, PowerDecay, buckets, only

ONE = torch.ones(())


def player(**options):
    torch.manual_seed(0)
    return make_player(
        PlayerSpec.of(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.1), nn.Linear(4, 2)).double()), **options
    )


def fill_gradients(made, value: float = 1.0) -> None:
    for number, parameter in enumerate(made.parameters):
        parameter.grad = torch.full_like(parameter, value * (number + 1))


def state(made) -> list[torch.Tensor]:
    moments = [value for entry in made.optimizer.state.values() for value in entry.values()]
    copies = [copy for average in made.averages.values() for copy in average.copies]
    return [tensor.detach().clone() for tensor in (*made.parameters, *moments, *copies)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_step_that_is_not_finite_changes_nothing(value, steps_before):
    made = player()
    made.average("a", ConstantDecay(0.5))
    made.make_optimizer_state()
    for step in range(steps_before):
        fill_gradients(made)
        made.apply(step, made.gradient_norm(), ONE)
    before = state(made)
    fill_gradients(made)
    made.parameters[1].grad[0] = value
    norm = made.gradient_norm()
    assert not norm.isfinite()
    made.apply(steps_before, norm, norm.isfinite().double())
    assert all(torch.equal(a, b) for a, b in zip(before, state(made), strict=True))
    assert all(parameter.grad is None for parameter in made.parameters)


def test_making_the_optimizers_state_changes_nothing_and_gives_a_steps_shapes():
    made, stepped = player(), player()
    before = [parameter.detach().clone() for parameter in made.parameters]
    made.make_optimizer_state()
    fill_gradients(stepped)
    stepped.apply(0, stepped.gradient_norm(), ONE)
    for ours, theirs in zip(made.optimizer.state.values(), stepped.optimizer.state.values(), strict=True):
        assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
        assert all(not value.any() for value in ours.values())
    assert all(torch.equal(a, b) for a, b in zip(before, made.parameters, strict=True))
    kept = state(stepped)
    stepped.make_optimizer_state()  # a second time does nothing
    assert all(torch.equal(a, b) for a, b in zip(kept, state(stepped), strict=True))


def test_a_step_is_adamw_on_the_clipped_gradient_at_the_steps_learning_rate():
    made, plain = player(max_norm=0.7), player()
    reference = torch.optim.AdamW(plain.parameters, lr=1.0, betas=(0.5, 0.9), weight_decay=0.1)
    for step in range(4):
        fill_gradients(made, 0.1 * (step + 1))
        fill_gradients(plain, 0.1 * (step + 1))
        norm = made.gradient_norm()
        expected = nn.utils.clip_grad_norm_(plain.parameters, 0.7)
        assert torch.equal(norm, expected)
        made.apply(step, norm, ONE)
        reference.param_groups[0]["lr"] = made.learning_rate(step)
        reference.step()
    for ours, theirs in zip(made.parameters, plain.parameters, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)  # one fused kernel, other order of roundings


def test_a_parameter_that_no_backward_reached_counts_as_zero_gradient():
    made = player()
    fill_gradients(made)
    made.parameters[0].grad = None
    made.apply(0, made.gradient_norm(), ONE)
    assert all(not value.any() for key, value in made.optimizer.state[made.parameters[0]].items() if key != "step")


def test_reduction_sums_every_gradient_once():
    calls = []

    def double(flat):
        calls.append(flat.numel())
        flat.mul_(2)

    made = player(reduce=double)
    fill_gradients(made)
    made.gradient_norm()
    assert sum(calls) == sum(parameter.numel() for parameter in made.parameters)
    for number, parameter in enumerate(made.parameters):
        assert torch.equal(parameter.grad, torch.full_like(parameter, 2.0 * (number + 1)))


def test_buckets_keep_order_and_bound():
    tensors = [torch.empty(n) for n in (0, 3, 4, 9, 1, 5, 2)]
    made = buckets(tensors, numbers=7)
    assert [[tensor.numel() for tensor in bucket] for bucket in made] == [[0, 3, 4], [9], [1, 5], [2]]


def test_only_one_player_trains_and_the_rest_pass_gradients_on():
    players = {"a": player(), "b": player()}
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    for name in ("b", "a", "b"):
        with only(name, players):
            for other, made in players.items():
                assert all(parameter.requires_grad == (other == name) for parameter in made.parameters)
            sum(made.spec.modules[0](x).sum() for made in players.values()).backward()
        assert all((p.grad is not None) == (o == name) for o, made in players.items() for p in made.parameters)
        assert x.grad is not None
        for made in players.values():
            made.optimizer.zero_grad(set_to_none=True)


def test_an_average_follows_its_decay():
    made = player()
    made.average("constant", ConstantDecay(0.9))
    made.average("power", PowerDecay(0.1))
    expected = {name: [copy.clone() for copy in average.copies] for name, average in made.averages.items()}
    for step in range(5):
        fill_gradients(made, step + 1.0)
        made.apply(step, made.gradient_norm(), ONE)
        for name, copies in expected.items():
            beta = made.averages[name].decay(step)
            expected[name] = [beta * c + (1 - beta) * p.detach() for c, p in zip(copies, made.parameters, strict=True)]
    for name, copies in expected.items():
        for ours, theirs in zip(made.averages[name].copies, copies, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-15)


def test_swapping_an_average_in_and_out_leaves_everything_as_it_was():
    made = player()
    made.average("a", ConstantDecay(0.9))
    fill_gradients(made)
    made.apply(0, made.gradient_norm(), ONE)
    before = state(made)
    with pytest.raises(KeyError), made.averages["a"].swapped_in():
        inside = state(made)
        raise KeyError
    count = len(made.parameters)
    assert all(torch.equal(a, b) for a, b in zip(inside[:count], before[-count:], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(state(made), before, strict=True))


def test_a_power_decay_is_the_power_function_average():
    """Its weights on the parameters of step i are proportional to i^gamma, with the width that was asked for."""
    decay, steps = PowerDecay(0.1), 4000
    gamma = decay.gamma
    assert math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3)) == pytest.approx(0.1, rel=1e-12)
    weights = torch.zeros(steps, dtype=torch.float64)
    for step in range(steps):
        weights *= decay(step)
        weights[step] += 1 - decay(step)
    position = (torch.arange(steps, dtype=torch.float64) + 1) / steps
    mean = (weights * position).sum()
    assert weights.sum() == pytest.approx(1, rel=1e-12)
    assert mean == pytest.approx((gamma + 1) / (gamma + 2), rel=1e-3)  # the integral's value, to order 1 / steps
    assert ((weights * position**2).sum() - mean**2).sqrt() == pytest.approx(0.1, rel=1e-2)


def test_half_of_a_half_life_average_lies_on_its_last_images():
    decay = HalfLifeDecay(images=640.0, batch=64)
    weight = math.prod(decay(step) for step in range(90, 100))
    assert weight == pytest.approx(0.5, rel=1e-12)
    ramped = HalfLifeDecay(images=1e9, batch=64, ramp_up=0.05)
    assert ramped(99) == pytest.approx(0.5 ** (1 / 5))  # 5 % of 100 batches


def test_learning_rates_are_pure_in_the_step():
    rate = LearningRate(2.0, warmup_steps=4, decay="cosine", steps=24, final=0.1)
    steps = [0, 3, 4, 14, 24, 99]
    expected = [0.5, 2.0, 2.0, 2.0 * (0.1 + 0.9 / 2), 0.2, 0.2]
    assert [rate(step) for step in steps] == pytest.approx(expected, rel=1e-12)
    assert [rate(step) for step in reversed(steps)] == pytest.approx(expected[::-1], rel=1e-12)
    assert LearningRate(2.0, decay="linear", steps=10)(5) == pytest.approx(1.0)
    assert LearningRate(2.0)(10**6) == 2.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LearningRate(1.0, decay="cosin"), "decay must be"),
        (lambda: ConstantDecay(1.0), r"beta must be in \[0, 1\)"),
        (lambda: PowerDecay(0.5), r"sigma_rel must be in \(0, 0.2887\]"),
        (lambda: make_unfused(), "fused=True"),
    ],
)
def test_a_wrong_value_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def make_unfused():
    from diffdistill.player import Player

    spec = PlayerSpec.of(nn.Linear(1, 1))
    return Player(spec, torch.optim.AdamW(spec.parameters.values()), LearningRate(1.0), max_norm=1.0, reduce=None)
