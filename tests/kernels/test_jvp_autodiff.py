"""flash_jvp attention in every mode of automatic differentiation: what works is exact, all else raises."""

import itertools
import warnings

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from flash_jvp import attention, attention_jvp

EXACT = {"rtol": 1e-12, "atol": 1e-12}
SHAPE = (2, 2, 10, 8)
BACKENDS = ["auto", "chunked"]


def draw(*shape: int, count: int = 6, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape or SHAPE, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Attention by operations that torch differentiates in every mode."""
    return ((q @ k.mT) * q.shape[-1] ** -0.5 + bias).softmax(-1) @ v


def ours(backend: str = "chunked", **options):
    return lambda q, k, v: attention(q, k, v, backend=backend, **options)


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, **EXACT)


def weigh(x: Tensor) -> Tensor:
    """A nonlinear number of x."""
    return (x.square() * torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x)).sum()


# What works


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("present", itertools.product((False, True), repeat=3), ids=str)
def test_any_subset_of_inputs_may_carry_a_tangent(present, backend):
    primals, tangents = draw()[:3], draw()[3:]
    varying = [x for x, p in zip(primals, present, strict=True) if p]
    directions = [t for t, p in zip(tangents, present, strict=True) if p]

    def of(run):
        def partial(*varied):
            varied = iter(varied)
            return run(*(next(varied) if p else x for x, p in zip(primals, present, strict=True)))

        return partial

    if not any(present):
        close(attention(*primals, backend=backend), plain(*primals))
        return
    expected = jvp(of(plain), tuple(varying), tuple(directions))
    close(jvp(of(ours(backend)), tuple(varying), tuple(directions)), expected)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(varying, directions, strict=True)]
        close(tuple(forward_ad.unpack_dual(of(ours(backend))(*duals))), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("through", ["output", "tangent", "both"])
def test_reverse_over_forward_is_exact(through, backend):
    def gradients(run):
        inputs = [x.requires_grad_() for x in draw()]
        o, to = jvp(run, tuple(inputs[:3]), tuple(inputs[3:]))
        loss = {"output": weigh(o), "tangent": weigh(to), "both": weigh(o) * weigh(to)}[through]
        return torch.autograd.grad(loss, inputs, materialize_grads=True)

    close(gradients(ours(backend)), gradients(plain))


@pytest.mark.parametrize("backend", BACKENDS)
def test_reverse_over_a_dual_level_is_exact_after_it_has_closed(backend):
    inputs = [x.requires_grad_() for x in draw()]
    with forward_ad.dual_level():
        duals = (forward_ad.make_dual(x, t) for x, t in zip(inputs[:3], inputs[3:], strict=True))
        o, to = forward_ad.unpack_dual(ours(backend)(*duals))
    expected = jvp(plain, tuple(inputs[:3]), tuple(inputs[3:]))
    close(
        torch.autograd.grad(weigh(o) + weigh(to), inputs),
        torch.autograd.grad(weigh(expected[0]) + weigh(expected[1]), inputs),
    )


def test_without_tangent_grad_the_tangent_is_a_constant_and_is_not_kept():
    inputs = [x.requires_grad_() for x in draw()]
    kept = []
    with saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        o, to = jvp(ours(tangent_grad=False), tuple(inputs[:3]), tuple(inputs[3:]))
    assert not to.requires_grad
    assert not {x.data_ptr() for x in (*inputs[3:], to)} & set(kept)
    expected = torch.autograd.grad(weigh(plain(*inputs[:3])), inputs[:3])
    close(torch.autograd.grad(weigh(o), inputs, materialize_grads=True)[:3], expected)


@pytest.mark.parametrize("learn", ["q", "k", "v", "tq", "tk", "tv"])
def test_a_gradient_may_be_asked_of_one_input_alone(learn):
    def gradient(run):
        inputs = draw()
        one = inputs["q k v tq tk tv".split().index(learn)].requires_grad_()
        o, to = jvp(run, tuple(inputs[:3]), tuple(inputs[3:]))
        return torch.autograd.grad(weigh(o) + weigh(to), one)

    close(gradient(ours()), gradient(plain))


def test_one_tensor_may_be_query_key_and_value():
    x, t = draw(count=2)
    close(jvp(lambda x: ours()(x, x, x), (x,), (t,)), jvp(lambda x: plain(x, x, x), (x,), (t,)))
    close(grad(lambda x: weigh(ours()(x, x, x)))(x), grad(lambda x: weigh(plain(x, x, x)))(x))


def test_strides_may_be_anything():
    strided = [x.permute(3, 0, 2, 1) for x in draw(2, 8, 10, 2)]  # (2, 2, 10, 8), the last dimension not contiguous
    assert strided[0].stride(-1) != 1
    close(jvp(ours(), tuple(strided[:3]), tuple(strided[3:])), jvp(plain, tuple(strided[:3]), tuple(strided[3:])))
    learnt = [x.clone().permute(3, 0, 2, 1).requires_grad_() for x in draw(2, 8, 10, 2, count=3)]
    gradients = torch.autograd.grad(weigh(ours()(*learnt)), learnt)
    close(gradients, torch.autograd.grad(weigh(plain(*learnt)), learnt))


TRANSFORMS = {
    "grad": lambda run, x: grad(lambda q: weigh(run(q, x[1], x[2])))(x[0]),
    "vjp": lambda run, x: vjp(run, *x[:3])[1](x[3]),
    "grad of a tangent": lambda run, x: grad(
        lambda q: weigh(jvp(lambda k: run(q, k, x[2]), (x[1],), (x[4],))[1])
    )(x[0]),
    "Hessian times vector": lambda run, x: grad(
        lambda q: jvp(lambda q: weigh(run(q, x[1], x[2])), (q,), (x[3],))[1]
    )(x[0]),
    "jacrev": lambda run, x: jacrev(run, argnums=(0, 1, 2))(*(y[:1, :1, :4] for y in x[:3])),
    "jacfwd": lambda run, x: jacfwd(run, argnums=(0, 1, 2))(*(y[:1, :1, :4] for y in x[:3])),
    "jacrev of jacfwd": lambda run, x: jacrev(jacfwd(lambda *y: weigh(run(*y))))(*(y[:1, :1, :4] for y in x[:3])),
    "linearize": lambda run, x: (lambda o, along: (o, along(*x[3:]), along(*x[:3])))(*linearize(run, *x[:3])),
    "vmap over tangents": lambda run, x: vmap(lambda t: jvp(lambda q: run(q, x[1], x[2]), (x[0],), (t,)))(
        torch.stack(x[3:])
    ),
    "vmap over inputs": lambda run, x: vmap(lambda q, t: jvp(lambda q: run(q, x[1], x[2]), (q,), (t,)), in_dims=(0, 2))(
        torch.stack(x[:3]), torch.stack(x[3:], dim=2)
    ),
    "vmap of grad of a tangent": lambda run, x: vmap(
        lambda q, t: grad(lambda q: weigh(jvp(lambda q: run(q, x[1], x[2]), (q,), (t,))[1]))(q)
    )(torch.stack(x[:3]), torch.stack(x[3:])),
    "grad of vmap": lambda run, x: grad(lambda k: weigh(vmap(run, in_dims=(0, None, 1))(
        torch.stack(x[:3]), k, torch.stack(x[3:], dim=1))))(x[1]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # torch.func.linearize's own
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_torch_func_are_exact(name):
    inputs = draw()
    close(TRANSFORMS[name](ours(), inputs), TRANSFORMS[name](plain, inputs))


class Calls(TorchDispatchMode):
    """How often an operator of flash_jvp ran."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func.namespace == "flash_jvp"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mapped", ["kv_lens", "bias"])
def test_vmap_is_one_call_of_the_operator(mapped):
    q, k, v, tq, *_ = draw()
    lens = torch.tensor([[3, 10], [10, 1], [5, 6]], dtype=torch.int32)
    bias = draw(3, 10, 10, count=1)[0]

    def run(q, option):
        options = {"kv_lens": option} if mapped == "kv_lens" else {"attn_bias": option}
        return jvp(lambda q: attention(q, k, v, backend="chunked", **options), (q,), (tq,))

    queries, option = torch.stack([q, k, v]), lens if mapped == "kv_lens" else bias
    with warnings.catch_warnings(), Calls() as calls:
        warnings.simplefilter("error", UserWarning)  # torch warns when it maps an operator by a loop
        together = vmap(run)(queries, option)
    assert calls.number == 1
    apart = [run(*one) for one in zip(queries, option, strict=True)]
    close(together, tuple(torch.stack(x) for x in zip(*apart, strict=True)))


def test_a_bias_repeated_over_heads_is_not_written_out_by_vmap():
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "flash_jvp":
                seen.extend(x.stride() for x in args if isinstance(x, Tensor) and x.dtype == torch.bool)
            return func(*args, **(kwargs or {}))

    q, k, v, *_ = draw()
    keys = torch.rand(2, 1, 1, 10) < 0.7
    keys[..., 0] = True
    with Watch():
        vmap(lambda q: attention(q, k, v, attn_bias=keys, backend="chunked"))(torch.stack([q, k]))
    assert [strides[1:3] for strides in seen] == [(0, 0)]


def test_gradients_may_be_batched_by_autograd():
    def gradients(run):
        q, k, v, *cotangents = draw()
        q.requires_grad_()
        return torch.autograd.grad(run(q, k, v), q, torch.stack(cotangents), is_grads_batched=True)

    close(gradients(ours()), gradients(plain))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", BACKENDS)
def test_tangents_need_no_grad_mode(backend, mode):
    inputs = draw()
    expected = jvp(plain, tuple(inputs[:3]), tuple(inputs[3:]))
    with mode():
        o, to = jvp(ours(backend), tuple(inputs[:3]), tuple(inputs[3:]))
    close((o.clone(), to.clone()), expected)


def test_autocast_rounds_the_inputs_and_nothing_else():
    inputs = draw(dtype=torch.float32)
    rounded = [x.bfloat16() for x in inputs]

    def outcome(tensors):
        learnt = [x.clone().requires_grad_() for x in tensors]
        o, to = jvp(ours(), tuple(learnt[:3]), tuple(learnt[3:]))
        return o, to, *(x.bfloat16() for x in torch.autograd.grad(o.sum() + to.sum(), learnt))

    expected = outcome(rounded)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(outcome(inputs), expected, rtol=0, atol=0)
        openly = attention_jvp(*inputs, backend="chunked")[:2]
        exact = jvp(ours(), tuple(x.double() for x in inputs[:3]), tuple(x.double() for x in inputs[3:]))
    torch.testing.assert_close(openly, expected[:2], rtol=0, atol=0)
    assert exact[0].dtype == torch.float64


@pytest.mark.parametrize("reentrant", [False, True])
def test_jvp_inside_a_checkpoint_is_exact(reentrant):
    def outcome(run, again):
        x, t, scale = draw(count=3)
        x.requires_grad_()

        def step(x):
            return jvp(lambda x: run(torch.tanh(x), x * scale, x), (x,), (t,))

        o, to = checkpoint(step, x, use_reentrant=reentrant) if again else step(x)
        (weigh(o) + weigh(to)).backward()
        return o, to, x.grad

    close(outcome(ours(), True), outcome(plain, False))


def test_log_sum_exp_carries_no_gradient():
    inputs = [x.requires_grad_() for x in draw()]
    assert not attention_jvp(*inputs, backend="chunked")[2].requires_grad
    compiled = torch.compile(lambda *x: attention_jvp(*x, backend="chunked"), backend="aot_eager")
    assert not compiled(*inputs)[2].requires_grad


# What raises

HESSIAN = "take the gradient of the tangent"
REFUSED = {
    "jvp of grad": lambda run, x: jvp(grad(lambda q: weigh(run(q, x[1], x[2]))), (x[0],), (x[3],)),
    "jvp of grad, linear": lambda run, x: jvp(grad(lambda q: run(q, x[1], x[2]).sum()), (x[0],), (x[3],)),
    "jvp of vjp, forward only": lambda run, x: jvp(lambda q: vjp(run, q, x[1], x[2])[0], (x[0],), (x[3],)),
    "jvp of jvp": lambda run, x: jvp(lambda q: jvp(lambda q: run(q, x[1], x[2]), (q,), (x[4],))[1], (x[0],), (x[3],)),
    "jvp of jvp, of two inputs": lambda run, x: jvp(
        lambda k: jvp(lambda q: run(q, k, x[2]), (x[0],), (x[3],))[1], (x[1],), (x[4],)
    ),
    "jvp of jvp, the inner one of something else": lambda run, x: jvp(
        lambda q: jvp(lambda y: y + run(q, x[1], x[2]), (x[1],), (x[4],))[0], (x[0],), (x[3],)
    ),
    "jvp of vmap": lambda run, x: jvp(
        lambda q: vmap(lambda q: run(q, x[1], x[2]))(q), (torch.stack(x[:2]),), (torch.stack(x[3:5]),)
    ),
    "hessian": lambda run, x: hessian(lambda q: weigh(run(q, x[1], x[2])))(x[0]),
    "jacfwd of jacfwd": lambda run, x: jacfwd(jacfwd(lambda q: weigh(run(q, x[1], x[2]))))(x[0]),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_tangents_of_another_transform_raise_and_say_what_to_do(name, backend):
    with pytest.raises(NotImplementedError, match=HESSIAN):
        REFUSED[name](ours(backend), draw())


@pytest.mark.parametrize("linear", [False, True])
def test_backward_inside_an_open_level_raises(linear):
    q, k, v, tq, *_ = draw()
    q.requires_grad_()
    with forward_ad.dual_level():
        o = attention(forward_ad.make_dual(q, tq), k, v)
        with pytest.raises(NotImplementedError, match="call backward after"):
            torch.autograd.grad(o.sum() if linear else weigh(o), q)


@pytest.mark.parametrize("tangents", [False, True])
@pytest.mark.parametrize("linear", [False, True])
def test_a_second_backward_raises(linear, tangents):
    """Also where the first gradient does not depend on the cotangent, and another term could hide what is missing."""
    q, k, v, tq, *_ = draw()
    q.requires_grad_()

    def run(q):
        return jvp(lambda q: ours()(q, k, v), (q,), (tq,))[1] if tangents else ours()(q, k, v)

    o = run(q)
    first = torch.autograd.grad(o.sum() if linear else weigh(o), q, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="gradient penalty"):
        (weigh(first) + q.sum()).backward()
    with pytest.raises(NotImplementedError, match="gradient penalty"):
        grad(lambda q: weigh(q) + grad(lambda q: run(q).sum())(q).sum())(q.detach())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_inside_jvp_raises_as_it_does_for_any_function(reentrant):
    x, t = draw(count=2)
    x.requires_grad_()
    for run in (plain, ours()):
        with pytest.raises(RuntimeError):
            o, _ = jvp(lambda x, run=run: checkpoint(lambda y: run(y, y, y), x, use_reentrant=reentrant), (x,), (t,))
            o.sum().backward()


BIAS = {
    "requires grad": lambda run, b: run(b.requires_grad_()),
    "grad": lambda run, b: grad(lambda b: run(b).sum())(b),
    "grad of vjp of another": lambda run, b: grad(lambda b: vjp(lambda b2: run(b) + b2.sum(), b)[0].sum())(b),
    "jvp": lambda run, b: jvp(run, (b,), (b,)),
    "jvp of vjp of another": lambda run, b: jvp(lambda b: vjp(lambda b2: run(b) + b2.sum(), b)[0], (b,), (b,)),
    "jvp of jvp of another": lambda run, b: jvp(lambda b: jvp(lambda b2: run(b) + b2.sum(), (b,), (b,))[0], (b,), (b,)),
}


@pytest.mark.parametrize("name", BIAS)
def test_a_bias_with_a_gradient_or_tangent_raises(name):
    q, k, v, *_ = draw()
    (bias,) = draw(10, 10, count=1)
    with pytest.raises(NotImplementedError):
        BIAS[name](lambda b: attention(q, k, v, attn_bias=b), bias)


# torch.compile


@pytest.fixture(autouse=True)
def forget_compiled_code():
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("options", [{}, {"tangent_grad": False}, {"causal": True, "softcap": 2.0}], ids=str)
def test_a_compiled_jvp_is_exact_in_training_too(options, backend):
    def outcome(compiler):
        inputs = [x.requires_grad_() for x in draw()]
        run = compiler(lambda *x: jvp(ours(**options), tuple(y * 1.5 for y in x[:3]), tuple(x[3:])))
        o, to = run(*inputs)
        loss = weigh(o) + (weigh(to) if to.requires_grad else 0.0)
        with torch.no_grad():
            evaluated = run(*inputs)
        return o, to, *evaluated, *torch.autograd.grad(loss, inputs, materialize_grads=True)

    close(outcome(lambda f: torch.compile(f, backend=backend, fullgraph=True)), outcome(lambda f: f))


@pytest.mark.parametrize("order", ["primal first", "tangent first"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_compiled_function_may_attend_with_and_without_tangents(backend, order):
    """Whether a level is open changes while it is traced, and must not be remembered from the first call."""

    def run(*x):
        tangent = x[3] if order == "primal first" else jvp(ours(backend), x[:3], x[3:])[1]
        o = ours(backend)(x[0], x[1], tangent)
        return o, *jvp(ours(backend), (x[0], x[1], o), x[3:])

    inputs = draw()
    close(torch.compile(run, backend="aot_eager", fullgraph=True)(*inputs), run(*inputs))


def test_inductor_compiles_one_graph_with_gradients_through_the_tangent_for_any_length():
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(
        lambda *x: jvp(ours(causal=True), tuple(y * 1.5 for y in x[:3]), tuple(x[3:])),
        backend=counter,
        fullgraph=True,
        dynamic=True,
    )
    for num_queries, num_keys in ((5, 9), (6, 11), (9, 10)):
        tensors = draw(2, 2, 12, 8)
        inputs = [
            (x[:, :, :num_queries] if i % 3 == 0 else x[:, :, :num_keys]).clone().requires_grad_()
            for i, x in enumerate(tensors)
        ]
        o, to = compiled(*inputs)
        expected = jvp(ours(causal=True), tuple(y * 1.5 for y in inputs[:3]), tuple(inputs[3:]))
        close((o, to), expected)
        close(
            torch.autograd.grad(weigh(o) + weigh(to), inputs),
            torch.autograd.grad(weigh(expected[0]) + weigh(expected[1]), inputs),
        )
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_attention_without_tangents_is_exact_forward_and_backward(backend):
    inputs = [x.requires_grad_() for x in draw(count=3)]
    compiled = torch.compile(lambda *x: ours(backend)(*x) * 2, backend="aot_eager", fullgraph=True)
    close(torch.autograd.grad(weigh(compiled(*inputs)), inputs), torch.autograd.grad(weigh(2 * plain(*inputs)), inputs))


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("warm", [False, True])
def test_a_dual_level_around_a_compiled_function_loses_no_tangent(warm, fullgraph):
    """torch.compile would (pytorch#187284); attention leaves the compiled code, or raises where it may not."""
    inputs = draw()
    expected = jvp(plain, tuple(inputs[:3]), tuple(inputs[3:]))
    compiled = torch.compile(ours(), backend="aot_eager", fullgraph=fullgraph)
    if warm:
        compiled(*inputs[:3])
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(inputs[:3], inputs[3:], strict=True)]
        if fullgraph:
            with pytest.raises(Exception, match="187284"):
                compiled(*duals)
        else:
            close(tuple(forward_ad.unpack_dual(compiled(*duals))), expected)


def test_jvp_of_a_compiled_function_is_exact():
    inputs = draw()
    compiled = torch.compile(ours(), backend="aot_eager")
    expected = jvp(plain, tuple(inputs[:3]), tuple(inputs[3:]))
    close(jvp(compiled, tuple(inputs[:3]), tuple(inputs[3:])), expected)
    compiled(*inputs[:3])
    close(jvp(compiled, tuple(inputs[:3]), tuple(inputs[3:])), expected)


@pytest.mark.parametrize("name", ["jvp of grad", "jvp of jvp", "jvp of vmap"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_what_raises_uncompiled_raises_compiled(name, backend):
    run = torch.compile(lambda *x: REFUSED[name](ours(), list(x)), backend=backend)
    with pytest.raises(NotImplementedError, match=HESSIAN):
        run(*draw())


def test_a_compiled_gradient_of_a_tangent_is_exact():
    inputs = draw()
    run = torch.compile(lambda *x: TRANSFORMS["grad of a tangent"](ours(), list(x)), backend="aot_eager")
    close(run(*inputs), TRANSFORMS["grad of a tangent"](plain, inputs))


def test_vmap_inside_compiled_code_is_one_call_of_the_operator():
    q, k, v, *tangents = draw()

    def run(t):
        return vmap(lambda t: jvp(lambda q: ours()(q, k, v), (q,), (t,)))(t)

    from torch._dynamo.backends.common import aot_autograd

    calls = []

    def keep(graph, _):
        calls.extend(node for node in graph.graph.nodes if "flash_jvp" in str(node.target))
        return graph.forward

    compiled = torch.compile(run, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    with torch.no_grad():
        close(compiled(torch.stack(tangents)), run(torch.stack(tangents)))
    assert len(calls) == 1


def test_a_compiled_backward_cannot_be_differentiated_again():
    inputs = [x.requires_grad_() for x in draw(count=3)]
    first = torch.autograd.grad(torch.compile(ours(), backend="eager")(*inputs).sum(), inputs[0], create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="gradient penalty"):
        (first.sum() + inputs[0].sum()).backward()


# The operators


def arguments(*, masked: bool) -> dict[str, tuple]:
    q, k, v, tq, tk, tv = (x[:1, :, :5].contiguous().requires_grad_() for x in draw())
    bias = torch.ones(1, 2, 5, 5, dtype=torch.bool).tril() if masked else None
    lens = torch.tensor([4], dtype=torch.int32) if masked else None
    rest = (bias, lens, 0.3, 0.0, None, "chunked")
    with torch.no_grad():
        o, to, lse, mu = torch.ops.flash_jvp.forward_tangent(q, k, v, tq, tk, tv, *rest)
    saved = [x.detach() for x in (q, k, v)]
    return {
        "forward": (q, k, v, *rest),
        "forward_tangent": (q, k, v, tq, None, tv, *rest),
        "forward_tangent_detached": (q, k, v, tq, tk, tv, *rest),
        "backward": (*saved, o, lse, tq.detach(), *rest),
        "backward_tangent": (*saved, tq.detach(), None, tv.detach(), o, to, lse, mu, None, o, *rest),
    }


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", arguments(masked=False))
def test_torch_accepts_the_operators(name, masked):
    """Their schemas, shapes without data, registered derivatives, and compiled code with any shape."""
    torch.library.opcheck(getattr(torch.ops.flash_jvp, name).default, arguments(masked=masked)[name])


def test_attention_without_tangents_is_that_of_torch():
    q, k, v, *_ = draw(dtype=torch.float32)
    expected = functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attention(q, k, v), expected, rtol=0, atol=0)
    with Calls() as calls:
        jvp(lambda x: x + attention(q, k, v), (q,), (k,))
        attention(q, k, v)
    assert calls.number == 0
