"""The float64 truth of flash_jvp against attention written independently, and against torch's own."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from problems import MASKS, Problem, make
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_jvp import reference
from flash_jvp.logits import Logits

EXACT = {"rtol": 1e-12, "atol": 1e-13}
FLOAT64 = Problem(lengths=(7, 9), size=6, value_size=5, heads=4, key_heads=2, dtype=torch.float64)


def written_out(q: Tensor, k: Tensor, v: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
    """O and log-sum-exp, one batch element, head and query at a time, over the list of keys that the query sees."""
    o, lse = [], []
    for b, h, i in itertools.product(*(range(n) for n in q.shape[:3])):
        key_head = h // (q.shape[1] // k.shape[1])
        keys = []
        for j in range(k.shape[2]):
            seen = logits.kv_lens is None or j < logits.kv_lens[b]
            seen = seen and (logits.diagonal is None or j <= i + logits.diagonal)
            if logits.bias is not None and logits.bias.dtype == torch.bool:
                seen = seen and bool(logits.bias[b, h, i, j])
            if seen:
                keys.append(j)
        if not keys:
            o.append(0.0 * v[b, key_head, 0])
            lse.append(q.new_tensor(-math.inf))
            continue
        s = torch.stack([logits.scale * torch.dot(q[b, h, i], k[b, key_head, j]) for j in keys])
        if logits.softcap:
            s = logits.softcap * torch.tanh(s / logits.softcap)
        if logits.bias is not None and logits.bias.dtype != torch.bool:
            s = s + logits.bias[b, h, i, keys]
        o.append(torch.softmax(s, 0) @ v[b, key_head, keys])
        lse.append(torch.logsumexp(s, 0))
    return torch.stack(o).view(*q.shape[:3], -1), torch.stack(lse).view(q.shape[:3])


@pytest.mark.parametrize("lengths", [(7, 9), (9, 7), (1, 5)], ids=str)
@pytest.mark.parametrize("mask", [*MASKS, "empty"])
def test_the_reference_is_a_softmax_over_the_keys_that_a_query_sees(mask, lengths):
    tensors = make(replace(FLOAT64, mask=mask, lengths=lengths))
    assert_same = torch.testing.assert_close
    expected, (o, lse) = (
        written_out(*tensors.primals, tensors.logits),
        reference.attention(*tensors.primals, tensors.logits),
    )
    assert_same(o, expected[0], **EXACT)
    assert_same(lse, expected[1], **EXACT)


@pytest.mark.parametrize("mask", [*MASKS, "empty"])
def test_the_tangent_and_its_gradients_are_those_of_the_softmax(mask):
    tensors = make(replace(FLOAT64, lengths=(4, 6), batch=2, heads=2, key_heads=1, mask=mask))
    inputs = tuple(x.requires_grad_() for x in (*tensors.primals, *tensors.tangents))
    weights = torch.linspace(-1, 1, 2 * 2 * 4 * 5, dtype=torch.float64).view(2, 2, 4, 5)

    def outcome(attention):
        o, to = torch.func.jvp(lambda *x: attention(*x, tensors.logits)[0], inputs[:3], inputs[3:])
        gradients = torch.autograd.grad((o * weights).sum() + (to.square() * weights).sum(), inputs)
        return o, to, *gradients

    for ours, expected in zip(outcome(reference.attention), outcome(written_out), strict=True):
        torch.testing.assert_close(ours, expected, **EXACT)
    o, to, _ = reference.attention_jvp(*inputs, tensors.logits)
    torch.testing.assert_close((o, to), outcome(written_out)[:2], **EXACT)


@pytest.mark.parametrize("mask", ["full", "causal", "bias", "boolean"])
def test_the_reference_agrees_with_the_math_attention_of_torch_under_jvp(mask):
    tensors = make(replace(FLOAT64, value_size=6, mask=mask))
    logits = tensors.logits

    def attention(q, k, v):
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask=logits.bias, is_causal=mask == "causal", scale=logits.scale, enable_gqa=True
        )

    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.func.jvp(attention, tensors.primals, tensors.tangents)
    torch.testing.assert_close(
        reference.attention_jvp(*tensors.primals, *tensors.tangents, logits)[:2], expected, **EXACT
    )


def test_an_absent_tangent_is_a_zero_tangent():
    tensors = make(FLOAT64)
    for present in itertools.product((False, True), repeat=3):
        some = [t if p else None for t, p in zip(tensors.tangents, present, strict=True)]
        zeros = [t if p else torch.zeros_like(t) for t, p in zip(tensors.tangents, present, strict=True)]
        ours = reference.attention_jvp(*tensors.primals, *some, tensors.logits)
        torch.testing.assert_close(
            ours, reference.attention_jvp(*tensors.primals, *zeros, tensors.logits), rtol=0, atol=0
        )


@pytest.mark.parametrize("mask", ["full", "causal", "kv_lens", "bias"])
def test_what_all_keys_have_in_common_changes_neither_output_nor_tangent(mask):
    """S changes by q.c and tS by tq.c + q.t, one number for each row."""
    tensors = make(replace(FLOAT64, mask=mask))
    common, of_tangents = torch.randn(2, 2, 2, 1, 6, dtype=torch.float64).unbind(0)
    k, tk = tensors.k + 3 * common, tensors.tk + 5 * of_tangents
    ours = reference.attention_jvp(tensors.q, k, tensors.v, tensors.tq, tk, tensors.tv, tensors.logits)
    expected = reference.attention_jvp(*tensors.primals, *tensors.tangents, tensors.logits)
    torch.testing.assert_close(ours[:2], expected[:2], rtol=1e-12, atol=1e-12)


def test_a_query_that_sees_no_key_gives_zero_and_gets_no_gradient():
    tensors = make(replace(FLOAT64, mask="before"))
    inputs = tuple(x.requires_grad_() for x in (*tensors.primals, *tensors.tangents))
    o, to, lse = reference.attention_jvp(*inputs, tensors.logits)
    assert (o[:, :, :3] == 0).all() and (to[:, :, :3] == 0).all() and (lse[:, :, :3] == -math.inf).all()
    gradients = torch.autograd.grad(o.sum() + to.square().sum(), inputs)
    assert all(torch.isfinite(x).all() for x in gradients)
    assert (gradients[0][:, :, :3] == 0).all() and (gradients[3][:, :, :3] == 0).all()
    assert (gradients[0][:, :, 3:] != 0).any()
