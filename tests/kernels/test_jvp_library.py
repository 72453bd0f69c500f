"""PyTorch's own attention as the primal half of the split route, and the route from end to end."""

import pytest
import torch
from problems import DEVICES, FORWARD_TOLERANCE, GRADIENT_TOLERANCE, Problem, make, relative_error, truth

import flash_jvp
from flash_jvp import library, reference, split

# for 16 bits the CPU's kernel takes an exponential that is good to 20 units in the last place of float32 only
LSE_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-4, torch.bfloat16: 1e-4}
PROBLEMS = [
    Problem(size=16),
    Problem(size=64, lengths=(64, 64), mask="causal", layout="BSHD"),
    Problem(size=72, layout="holes", tangents="q"),
    Problem(lengths=(1, 77), size=32, dtype=torch.float16, tangents="kv"),
    Problem(lengths=(64, 64), size=64, dtype=torch.bfloat16, mask="causal"),
    Problem(size=64, dtype=torch.bfloat16, offset=10.0),
]


def on(device: str) -> list[Problem]:
    """The problems that PyTorch's flash attention takes on a device."""
    return [p for p in PROBLEMS if device == "cpu" or p.dtype != torch.float32]


CASES = [(device, problem) for device in DEVICES for problem in on(device)]


@pytest.mark.parametrize(("device", "problem"), CASES, ids=str)
def test_output_log_sum_exp_and_gradients_agree_with_float64(device, problem):
    tensors = make(problem)
    q, k, v = (x.to(device) for x in tensors.primals)
    o, lse = library.forward(q, k, v, tensors.logits)
    true = truth(tensors)
    assert relative_error(o.cpu(), true.o) < FORWARD_TOLERANCE[problem.dtype]
    assert (lse.cpu() - true.lse).abs().max() < LSE_TOLERANCE[problem.dtype]
    assert lse.is_contiguous()

    if problem.offset:
        return  # PyTorch's backward does not take off what keys share: dq is 2.7 % off here, ours 0.24 %
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o.dtype)
    exact = [x.double().requires_grad_() for x in tensors.primals]
    expected = torch.autograd.grad(reference.attention(*exact, tensors.logits)[0], exact, do.double())
    gradients = library.backward(q, k, v, o, lse, do.to(device), tensors.logits)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert relative_error(ours.cpu(), theirs) < GRADIENT_TOLERANCE[problem.dtype]


@pytest.mark.parametrize(("device", "problem"), CASES, ids=str)
def test_the_split_route_agrees_with_float64(device, problem):
    tensors = make(problem)
    primals = (x.to(device) for x in tensors.primals)
    tangents = (None if t is None else t.to(device) for t in tensors.tangents)
    o, to, lse, mu = split.forward_tangent(*primals, *tangents, tensors.logits)
    true = truth(tensors)
    assert relative_error(o.cpu(), true.o) < FORWARD_TOLERANCE[problem.dtype]
    assert relative_error(to.cpu(), true.to) < FORWARD_TOLERANCE[problem.dtype]
    assert (lse.cpu() - true.lse).abs().max() < LSE_TOLERANCE[problem.dtype]
    torch.testing.assert_close(mu.cpu(), true.mu.float(), rtol=1e-3, atol=5e-3)


def test_the_split_route_is_a_backend_with_gradients():
    """Through the public function: primal from PyTorch, tangent from the kernel, the gradient from PyTorch again."""
    tensors = make(Problem(size=16, lengths=(24, 24)))
    primals = [x.clone().requires_grad_() for x in tensors.primals]
    o, to, _ = flash_jvp.attention_jvp(*primals, *tensors.tangents, backend="split", tangent_grad=False)
    true = truth(tensors)
    assert relative_error(o.detach(), true.o) < 2e-6 and relative_error(to, true.to) < 2e-6
    exact = [x.double().detach().requires_grad_() for x in primals]
    expected = torch.autograd.grad(reference.attention(*exact, tensors.logits)[0].square().sum(), exact)
    for ours, theirs in zip(torch.autograd.grad(o.square().sum(), primals), expected, strict=True):
        assert relative_error(ours, theirs) < 5e-6


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (Problem(lengths=(0, 70)), "at least one query"),
        (Problem(mask="softcap"), "no softcap"),
        (Problem(mask="kv_lens"), "no kv_lens"),
        (Problem(mask="bias"), "no attn_bias"),
        (Problem(value_size=24), "one head size, got 16 and 24"),
        (Problem(mask="bottom_right"), r"j <= i \+ 37"),
    ],
    ids=str,
)
def test_what_pytorch_cannot_do_raises_with_the_reason_and_the_alternative(problem, reason):
    tensors = make(problem)
    with pytest.raises(NotImplementedError, match=reason + '.*use backend="triton" or "chunked"'):
        split.forward_tangent(*tensors.primals, *tensors.tangents, tensors.logits)
