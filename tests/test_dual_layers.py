"""Rules of layers in forward mode: the very tangents of PyTorch's own, and where those are left to it."""

import pytest
import torch
from torch import nn

from diffdistill import dual_layers
from diffdistill.dual_layers import DualLayers

float64 = torch.float64
LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (3, 5, 6)),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), (3, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, padding=1), (3, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2), (3, 6, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(6, 4, 2, bias=False), (3, 6, 4, 5, 3)),
    "group_norm": (lambda: nn.GroupNorm(3, 6, eps=1e-3), (3, 6, 5, 4)),
    "group_norm of rows": (lambda: nn.GroupNorm(2, 6), (3, 6)),
    "group_norm without weights": (lambda: nn.GroupNorm(2, 6, affine=False), (3, 6, 7)),
}


def made(name: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    new, shape = LAYERS[name]
    layer = new().double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x, tx = torch.randn(2, *shape, dtype=float64)
    return layer, 3 * x + 1, tx


@pytest.mark.parametrize("name", LAYERS)
def test_the_tangent_is_pytorchs(name, monkeypatch):
    layer, x, tx = made(name)
    theirs = torch.func.jvp(layer, (x,), (tx,))
    asked = []
    for func, rule in dual_layers.RULES.items():
        monkeypatch.setitem(
            dual_layers.RULES, func, lambda *args, rule=rule, **kw: asked.append(1) or rule(*args, **kw)
        )
    with DualLayers():
        ours = torch.func.jvp(layer, (x,), (tx,))
    assert asked == [1]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["linear", "conv2d", "group_norm"])
def test_tangents_of_weights_are_left_to_pytorch(name):
    layer, x, tx = made(name)
    weights = {key: value.detach() for key, value in layer.named_parameters()}

    def call(x, weights):
        return torch.func.functional_call(layer, weights, (x,))

    primals, tangents = (x, weights), (tx, {key: torch.randn_like(value) for key, value in weights.items()})
    theirs = torch.func.jvp(call, primals, tangents)
    with DualLayers():
        torch.testing.assert_close(torch.func.jvp(call, primals, tangents), theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["linear", "conv2d", "group_norm"])
def test_without_a_tangent_nothing_changes_nor_does_the_backward_pass(name):
    layer, x, _ = made(name)
    with DualLayers():
        value = layer(x)
    assert torch.equal(value, layer(x))
    (ours,) = torch.autograd.grad(value.square().sum(), [layer.weight])
    (theirs,) = torch.autograd.grad(layer(x).square().sum(), [layer.weight])
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["linear", "conv2d", "group_norm"])
def test_under_autocast_the_precision_is_pytorchs(name):
    layer, x, tx = made(name)
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        plain = layer(x.bfloat16())
        with DualLayers():
            value, along = torch.func.jvp(layer, (x.bfloat16(),), (tx.bfloat16(),))
    assert value.dtype == along.dtype == plain.dtype
    torch.testing.assert_close(value, plain, rtol=0, atol=0)
    exact = torch.func.jvp(layer.double(), (x.bfloat16().double(),), (tx.bfloat16().double(),))[1]
    assert (along.double() - exact).norm() < 0.01 * exact.norm()


def test_inputs_in_any_memory_order_have_a_tangent():
    """PyTorch's own rule fails where x is channels-last, as attention leaves it, in torch 2.13 and before."""
    layer, x, tx = made("group_norm")
    last = [y.contiguous(memory_format=torch.channels_last) for y in (x, tx)]
    with DualLayers():
        expected = torch.func.jvp(layer, (x,), (tx,))
        odd = x.transpose(2, 3).contiguous().transpose(2, 3)
        for primal, tangent in ((last[0], tx), last, (x, last[1]), (odd, tx)):
            torch.testing.assert_close(torch.func.jvp(layer, (primal,), (tangent,)), expected, rtol=1e-12, atol=1e-12)


def test_a_tangent_of_a_group_without_spread_is_finite():
    layer, x, tx = made("group_norm")
    with DualLayers():
        _, along = torch.func.jvp(layer, (torch.ones_like(x),), (tx,))
    assert along.isfinite().all() and along.abs().max() > 0
