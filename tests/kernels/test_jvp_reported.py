"""What a review found: wrong answers without a word, each with the answer that float64 gives or the refusal."""

import pytest
import torch
from problems import Problem, make, relative_error, truth

from flash_jvp import attention, attention_jvp, chunked, fused, reference
from flash_jvp.logits import Logits

PATHS = {"chunked": chunked.forward_tangent, "triton": fused.forward_tangent}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["boolean by key", "additive by key", "boolean", "additive"])
@pytest.mark.parametrize("offset", [1e2, 1e6])
def test_keys_that_no_query_sees_cost_no_accuracy(path, kind, offset):
    """The centre of the tangent logits must not be that of keys far away which nobody sees."""
    tensors = make(Problem(lengths=(16, 32)))
    seen = torch.arange(32) < 16
    bias = seen if kind.startswith("boolean") else torch.where(seen, 0.0, -torch.inf)
    bias = bias.expand(2, 2, 16, 32) if kind.endswith("key") else bias.expand(2, 2, 16, 32).clone()
    for x in (tensors.k, tensors.tk):
        x[:, :, 16:] += offset
    logits = Logits(scale=0.25, bias=bias)
    doubles = [x.double() for x in (*tensors.primals, *tensors.tangents)]
    o, to, _ = reference.attention_jvp(*doubles, logits)
    ours, tangent, _, _ = PATHS[path](*tensors.primals, *tensors.tangents, logits)
    assert relative_error(ours, o) < 2e-6 and relative_error(tangent, to) < 2e-6


def test_a_nan_in_a_key_that_a_mask_hides_reaches_nobody():
    """On the chunked path; the kernels, as scaled_dot_product_attention, want finite keys wherever kv_lens reaches."""
    path = "chunked"
    tensors = make(Problem(lengths=(8, 16)))
    mask = (torch.arange(16) != 7).expand(2, 2, 8, 16)
    logits = Logits(scale=0.25, bias=mask)
    expected = [x.clone() for x in PATHS[path](*tensors.primals, *tensors.tangents, logits)]
    for x in (tensors.k, tensors.tk):
        x[:, :, 7] = torch.nan
    for ours, clean in zip(PATHS[path](*tensors.primals, *tensors.tangents, logits), expected, strict=True):
        torch.testing.assert_close(ours, clean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("least", [torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min])
def test_a_row_of_the_least_number_sees_all_keys_alike(path, least):
    """As padding rows of transformers do: such a bias is not minus infinity."""
    tensors = make(Problem(lengths=(8, 16)))
    bias = torch.zeros(2, 2, 8, 16)
    bias[:, :, 3] = least
    ours = PATHS[path](*tensors.primals, *tensors.tangents, Logits(scale=0.25, bias=bias))
    torch.testing.assert_close(ours[0][:, :, 3], tensors.v.mean(2), rtol=1e-5, atol=1e-6)


def test_kv_lens_beyond_the_keys_read_nothing_beyond_them():
    tensors = make(Problem(lengths=(8, 16)))
    logits = Logits(scale=tensors.logits.scale, kv_lens=torch.tensor([99, 16], dtype=torch.int32))
    o, to, _, _ = fused.forward_tangent(*tensors.primals, *tensors.tangents, logits)
    true = truth(tensors)
    assert relative_error(o, true.o) < 2e-6 and relative_error(to, true.to) < 2e-6


def test_a_gradient_of_the_bias_under_vmap_raises():
    q, k, v = make(Problem(lengths=(5, 7))).primals
    bias = torch.zeros(3, 5, 7)

    def loss(biases):
        return torch.func.vmap(lambda b: attention(q, k, v, attn_bias=b))(biases).square().sum()

    with pytest.raises(NotImplementedError, match="attn_bias has a gradient"):
        torch.func.grad(loss)(bias)
    with pytest.raises(NotImplementedError, match="attn_bias has a gradient"):
        loss(bias.requires_grad_())


def test_a_constant_bias_may_be_mapped_inside_a_level():
    tensors = make(Problem(lengths=(5, 7)))
    q, k, v = tensors.primals
    bias = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))

    def mapped(scaling):
        return scaling * torch.func.vmap(lambda b: attention(q, k, v, attn_bias=b))(bias)

    o, to = torch.func.jvp(mapped, (torch.ones(()),), (torch.ones(()),))
    for index in range(3):
        torch.testing.assert_close(o[index], attention(q, k, v, attn_bias=bias[index]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(to, o)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": torch.tensor(0.5)}, "scale must be a number, got a tensor"),
        ({"softcap": torch.tensor(3.0)}, "softcap must be a number, got a tensor"),
        ({"softcap": float("inf")}, "softcap must be finite, got inf"),
        ({"scale": float("nan")}, "scale must be finite, got nan"),
    ],
    ids=str,
)
def test_numbers_that_would_lose_a_derivative_or_give_nan_raise(options, message):
    q, k, v = make(Problem(lengths=(5, 7))).primals
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, **options)
    with pytest.raises(ValueError, match=message):
        attention_jvp(q, k, v, q, **options)


def test_no_heads_raise():
    q, k, v = (torch.zeros(2, heads, 5, 8) for heads in (0, 1, 1))
    with pytest.raises(ValueError, match="q has no heads"):
        attention(q, k, v, backend="chunked")
