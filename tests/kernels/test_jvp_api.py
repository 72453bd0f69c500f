"""The public functions of flash_jvp: what they accept, refuse and promise."""

import subprocess
import sys

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn import functional

import flash_jvp
from flash_jvp import attention, attention_jvp, ops, reference
from flash_jvp.logits import Logits


def draw(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def problem(num_queries: int = 5, num_keys: int = 7, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v, tq, tk, tv with 4 heads of queries and 2 of keys, sizes 8 and 6."""
    shapes = [(2, 4, num_queries, 8), (2, 2, num_keys, 8), (2, 2, num_keys, 6)]
    return draw(*shapes, *shapes, dtype=dtype)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device="meta")


Q, KV = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 7, 8)
WRONG = {
    "q of three dimensions": (dict(q=Q[0]), "q must be .batch, heads, length, head size., got shape .4, 5, 8."),
    "v of five dimensions": (dict(v=KV[None]), "v must be .batch, heads, length"),
    "integers": (dict(q=Q.long()), "q must be float16, bfloat16, float32 or float64, got torch.int64"),
    "dtypes": (
        dict(k=KV.double()),
        "must share dtype and device, got k of torch.float64 on cpu and q of torch.float32",
    ),
    "devices": (dict(v=meta(2, 2, 7, 8)), "must share dtype and device, got v of torch.float32 on meta"),
    "batch": (dict(k=KV[:1]), r"k must be .B, Hk, N, d. .* got q \(2, 4, 5, 8\), k \(1, 2, 7, 8\)"),
    "head size": (dict(k=KV[..., :4]), "k must be .B, Hk, N, d."),
    "lengths of k and v": (dict(v=KV[:, :, :3]), "k must be .B, Hk, N, d."),
    "heads of k and v": (dict(v=KV[:, :1]), "k must be .B, Hk, N, d."),
    "groups": (dict(q=Q[:, :3]), "heads of q must be a multiple of those of k, got 3 and 2"),
    "no heads": (dict(k=KV[:, :0], v=KV[:, :0]), "heads of q must be a multiple of those of k, got 4 and 0"),
    "no features": (dict(q=Q[..., :0], k=KV[..., :0]), "head size 0"),
    "no keys": (dict(k=KV[:, :, :0], v=KV[:, :, :0]), "k has no keys .* give at least one"),
    "softcap": (dict(softcap=-1.0), "softcap must be positive, or 0 for none, got -1.0"),
    "causal": (dict(causal="left"), "causal must be True, False, 'bottom_right' or 'top_left', got 'left'"),
    "backend": (dict(backend="flash"), "backend must be one of auto, chunked, triton, split, got 'flash'"),
    "float64 triton": (dict(q=Q.double(), k=KV.double(), v=KV.double(), backend="triton"), "has no float64; use"),
    "bias dtype": (dict(attn_bias=torch.zeros(5, 7, dtype=torch.int32)), "attn_bias must be bool .* got torch.int32"),
    "bias device": (dict(attn_bias=meta(5, 7)), "attn_bias must be on the device of q, got meta and cpu"),
    "bias shape": (dict(attn_bias=torch.zeros(5, 6)), r"broadcast to \(B, H, M, N\) = \(2, 4, 5, 7\), got \(5, 6\)"),
    "bias heads": (dict(attn_bias=torch.zeros(2, 2, 5, 7)), "attn_bias must broadcast"),
    "bias dimensions": (dict(attn_bias=torch.zeros(1, 2, 4, 5, 7)), "attn_bias must broadcast"),
    "lengths": (dict(kv_lens=torch.tensor([3], dtype=torch.int32)), r"kv_lens must be int32 of shape \(2,\) on cpu"),
    "float lengths": (dict(kv_lens=torch.ones(2)), "kv_lens must be int32 .* got torch.float32"),
    "lengths elsewhere": (dict(kv_lens=meta(2, dtype=torch.int32)), "kv_lens must be int32 .* on meta"),
}


@pytest.mark.parametrize("function", [attention, attention_jvp])
@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_with_what_was_given(name, function):
    given, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        function(**{"q": Q, "k": KV, "v": KV} | given)


@pytest.mark.parametrize("name", "qkv")
def test_tangents_must_be_like_their_primals(name):
    primals = {"q": Q, "k": KV, "v": KV}
    for wrong in (primals[name][:1], primals[name].double(), primals[name].to("meta")):
        with pytest.raises(ValueError, match=f"t{name} must have the shape, dtype and device of {name}"):
            attention_jvp(**primals, **{f"t{name}": wrong})


@pytest.mark.parametrize("position", range(6))
def test_open_tangents_and_carried_tangents_do_not_mix(position):
    inputs = problem()
    with forward_ad.dual_level():
        inputs[position] = forward_ad.make_dual(inputs[position], torch.ones_like(inputs[position]))
        with pytest.raises(ValueError, match="would be dropped; call attention, or unpack"):
            attention_jvp(*inputs)


def test_a_bias_that_learns_is_refused_and_a_detached_one_is_not():
    q, k, v, *_ = problem()
    bias = torch.zeros(5, 7, dtype=torch.float64, requires_grad=True)
    for function in (attention, attention_jvp):
        with pytest.raises(
            NotImplementedError, match="attn_bias.detach.. if none is wanted, or write the attention out"
        ):
            function(q, k, v, attn_bias=bias)
        function(q, k, v, attn_bias=bias.detach())
        with torch.no_grad():
            function(q, k, v, attn_bias=bias)


def causal_mask(num_queries: int, num_keys: int, convention: str) -> Tensor:
    """True where query i sees key j: j <= i, or counted from the last of both."""
    rows, columns = torch.arange(num_queries)[:, None], torch.arange(num_keys)
    if convention == "top_left":
        return columns <= rows
    return num_keys - 1 - columns >= num_queries - 1 - rows


@pytest.mark.parametrize("lengths", [(5, 7), (7, 5), (6, 6), (1, 7), (7, 1)], ids=str)
@pytest.mark.parametrize("causal", [False, True, "top_left", "bottom_right"])
@pytest.mark.parametrize("backend", ["auto", "chunked"])
def test_causal_is_the_mask_of_its_convention(backend, causal, lengths):
    inputs = problem(*lengths)
    convention = "bottom_right" if causal is True else causal
    mask = causal_mask(*lengths, convention) if causal else torch.ones(lengths, dtype=torch.bool)
    logits = Logits(scale=8**-0.5, bias=mask.expand(2, 4, *lengths))
    o, to, lse = reference.attention_jvp(*inputs, logits)
    exact = {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(attention(*inputs[:3], causal=causal, backend=backend), o, **exact)
    torch.testing.assert_close(attention_jvp(*inputs, causal=causal, backend=backend), (o, to, lse), **exact)
    dual = torch.func.jvp(
        lambda *x: attention(*x, causal=causal, backend=backend), tuple(inputs[:3]), tuple(inputs[3:])
    )
    torch.testing.assert_close(dual, (o, to), **exact)


OPTIONS = {
    "scale": (dict(scale=0.7), dict(scale=0.7)),
    "softcap": (dict(softcap=1.5), dict(softcap=1.5)),
    "lengths": (dict(kv_lens=torch.tensor([3, 0])), dict(kv_lens=torch.tensor([3, 0], dtype=torch.int32))),
    "bias of keys": (dict(attn_bias=torch.arange(7.0)), dict(bias=torch.arange(7.0).expand(2, 4, 5, 7))),
    "bias of heads": (
        dict(attn_bias=torch.arange(4.0).view(4, 1, 1) * torch.eye(5, 7)),
        dict(bias=(torch.arange(4.0).view(4, 1, 1) * torch.eye(5, 7)).expand(2, 4, 5, 7)),
    ),
    "boolean of batch": (
        dict(attn_bias=torch.eye(2, 7, dtype=torch.bool).view(2, 1, 1, 7)),
        dict(bias=torch.eye(2, 7, dtype=torch.bool).view(2, 1, 1, 7).expand(2, 4, 5, 7)),
    ),
    "all": (
        dict(scale=0.3, softcap=2.0, causal="top_left", kv_lens=torch.tensor([6, 4]), attn_bias=torch.eye(5, 7)),
        dict(
            scale=0.3,
            softcap=2.0,
            diagonal=0,
            kv_lens=torch.tensor([6, 4], dtype=torch.int32),
            bias=torch.eye(5, 7).expand(2, 4, 5, 7),
        ),
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_mean_what_the_reference_says(name):
    inputs = problem()
    options, fields = OPTIONS[name]
    o, to, lse = reference.attention_jvp(*inputs, Logits(**{"scale": 8**-0.5} | fields))
    exact = {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(attention(*inputs[:3], **options), o, **exact)
    torch.testing.assert_close(attention_jvp(*inputs, **options), (o, to, lse), **exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_outputs_have_the_dtype_of_the_inputs_and_statistics_at_least_float32(dtype):
    o, to, lse = attention_jvp(*problem(dtype=dtype))
    assert o.dtype == to.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert o.shape == to.shape == (2, 4, 5, 6) and lse.shape == (2, 4, 5)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_output_has_the_memory_order_of_the_queries(compiled):
    def run(x, t):
        q, k, v = (y.transpose(1, 2) for y in x.unbind(2))
        tq, tk, tv = (y.transpose(1, 2) for y in t.unbind(2))
        o, to = torch.func.jvp(lambda *y: attention(*y, backend="chunked"), (q, k, v), (tq, tk, tv))
        return o, to, attention(q, k, v, backend="chunked")

    x, t = draw((2, 9, 3, 4, 8), (2, 9, 3, 4, 8))
    for y in (torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run)(x, t):
        assert y.shape == (2, 4, 9, 8)
        assert y.transpose(1, 2).is_contiguous()  # so that merging the heads afterwards copies nothing
    q, k, v = (y.contiguous() for y in draw((2, 4, 9, 8), (2, 4, 9, 8), (2, 4, 9, 8)))
    assert attention(q, k, v, backend="chunked").is_contiguous()


@pytest.mark.parametrize("options", [{}, {"causal": "top_left"}, {"scale": 0.2}], ids=str)
def test_without_tangents_auto_is_the_attention_of_torch(options):
    q, k, v, *_ = problem(dtype=torch.float32)
    causal, scale = "causal" in options, options.get("scale")
    expected = functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
    torch.testing.assert_close(attention(q, k, v, **options), expected, rtol=0, atol=0)
    ours = attention(q, k, v, backend="chunked", **options)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_no_queries_and_no_batch_give_empty_results():
    q, k, v, tq, tk, tv = problem()
    for rows, batch in ((slice(0), slice(None)), (slice(None), slice(0))):
        inputs = (q[batch, :, rows], k[batch], v[batch], tq[batch, :, rows], tk[batch], tv[batch])
        learnt = [x.clone().requires_grad_() for x in inputs]
        o, to, lse = attention_jvp(*learnt, backend="chunked")
        assert o.shape == to.shape == (*inputs[0].shape[:3], 6) and lse.shape == inputs[0].shape[:3]
        assert all((x == 0).all() for x in torch.autograd.grad(o.sum() + to.sum(), learnt))


def test_the_path_depends_on_device_and_dtype_alone():
    from flash_jvp.api import _path

    assert _path("auto", torch.empty(1)) == "chunked"
    for path in ops.STEPS:
        assert _path(path, torch.empty(1)) == path


def test_importing_it_loads_torch_and_neither_triton_nor_diffusers():
    loaded = "import sys, torch; before = set(sys.modules); import flash_jvp; print(*(set(sys.modules) - before))"
    code = f"import sys; sys.path.insert(0, {str(flash_jvp.__path__[0] + '/..')!r}); {loaded}"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "flash_jvp.api" in found
    assert not {name.split(".")[0] for name in found} & {"triton", "diffusers", "transformers", "diffdistill"}
    assert "flash_jvp.fused" not in found
