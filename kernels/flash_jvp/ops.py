"""The operators torch sees, and their derivatives.

Two ways lead to the same operators. Outside torch.compile an autograd.Function calls them, because it takes part in
torch.func. Inside torch.compile the operators are called themselves, with a registered derivative, because a compiled
autograd.Function under forward-mode loses its backward. Neither has a `jvp` rule of its own: with one, torch.compile
around torch.func.jvp returns a wrong tangent (pytorch#192985), so the caller unpacks dual tensors and passes tangents
as ordinary arguments. The `jvp` methods below only refuse the tangents that this does not reach.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from flash_jvp.logits import Logits, like_queries, statistics_dtype

# Which module holds each step of a backend.
STEPS = {
    "chunked": {"forward": "chunked", "forward_tangent": "chunked", "backward": "chunked"},
    "triton": {"forward": "fused", "forward_tangent": "fused", "backward": "backward"},
    "split": {"forward": "library", "forward_tangent": "split", "backward": "library"},
}
_LOGITS = "Tensor? bias, Tensor? kv_lens, float scale, float softcap, SymInt? diagonal, str backend"
_LIBRARY = torch.library.Library("flash_jvp", "DEF")


def _module(backend: str, step: str) -> ModuleType:
    return importlib.import_module(f"flash_jvp.{STEPS[backend][step]}")


def _logits(bias: Tensor | None, kv_lens: Tensor | None, scale: float, softcap: float, diagonal: int | None) -> Logits:
    return Logits(scale=scale, softcap=softcap, diagonal=diagonal, bias=bias, kv_lens=kv_lens)


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    """x with the strides of torch.empty_like(like): those that a compiled graph was promised."""
    promised = torch.empty_like(like)
    return x if x.stride() == promised.stride() else promised.copy_(x)


def _forward(q, k, v, bias, kv_lens, scale, softcap, diagonal, backend):
    logits = _logits(bias, kv_lens, scale, softcap, diagonal)
    return _module(backend, "forward").forward(q, k, v, logits)


def _forward_tangent(q, k, v, tq, tk, tv, bias, kv_lens, scale, softcap, diagonal, backend):
    logits = _logits(bias, kv_lens, scale, softcap, diagonal)
    return _module(backend, "forward_tangent").forward_tangent(q, k, v, tq, tk, tv, logits)


def _backward(q, k, v, o, lse, do, bias, kv_lens, scale, softcap, diagonal, backend):
    logits = _logits(bias, kv_lens, scale, softcap, diagonal)
    gradients = _module(backend, "backward").backward(q, k, v, o, lse, do, logits)
    return tuple(_laid_out(x, like) for x, like in zip(gradients, (q, k, v), strict=True))


def _backward_tangent(q, k, v, tq, tk, tv, o, to, lse, mu, do, dto, bias, kv_lens, scale, softcap, diagonal, backend):
    from flash_jvp import chunked

    logits = _logits(bias, kv_lens, scale, softcap, diagonal)
    gradients = chunked.backward_tangent(q, k, v, tq, tk, tv, o, to, lse, mu, do, dto, logits)
    present = zip(gradients, (q, k, v, tq, tk, tv), strict=True)
    return tuple(q.new_empty(0) if like is None else _laid_out(x, like) for x, like in present)


def _like(x: Tensor | None, q: Tensor) -> Tensor:
    return q.new_empty(0) if x is None else torch.empty_like(x)


def _forward_shapes(q, k, v, *_):
    return like_queries(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=statistics_dtype(q.dtype))


def _forward_tangent_shapes(q, k, v, *_):
    outputs = (like_queries(q, v.shape[-1]) for _ in range(2))
    return *outputs, *(q.new_empty(q.shape[:3], dtype=statistics_dtype(q.dtype)) for _ in range(2))


def _backward_shapes(q, k, v, *_):
    return tuple(torch.empty_like(x) for x in (q, k, v))


def _backward_tangent_shapes(q, k, v, tq, tk, tv, *_):
    return tuple(_like(x, q) for x in (q, k, v, tq, tk, tv))


HESSIAN_PRODUCT = (
    "for a Hessian-vector product take the gradient of the tangent (torch.func.grad of torch.func.jvp, or backward of "
    "a tangent)"
)


def _over_batch(op: Callable) -> Callable:
    """A rule for torch.func.vmap: the mapped dimension becomes a part of the batch, so that one call does all."""

    def rule(info, in_dims, *args):
        def folded(x, dim):
            if not isinstance(x, Tensor):
                return x
            x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            # a bias repeated over heads or queries must not be written out before it is folded
            once = x[tuple(slice(1) if d > 1 and x.stride(d) == 0 else slice(None) for d in range(x.ndim))]
            return once.flatten(0, 1).expand(-1, *x.shape[2:])

        outputs = op(*(folded(x, dim) for x, dim in zip(args, in_dims, strict=True)))
        unfolded = tuple(x.unflatten(0, (info.batch_size, -1)) if x.ndim > 1 else x for x in outputs)
        return unfolded, tuple(0 if x.ndim > 1 else None for x in outputs)

    return rule


def _without_autocast(run: Callable) -> Callable:
    """The same, its products in the dtypes that it chose itself."""

    def kernel(q, *rest):
        with torch.autocast(q.device.type, enabled=False):
            return run(q, *rest)

    return kernel


def _define(name: str, arguments: str, returns: int, run: Callable, shapes: Callable):
    schema = f"{name}({arguments}, {_LOGITS}) -> ({', '.join(['Tensor'] * returns)})"
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, _without_autocast(run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"flash_jvp::{name}", shapes, lib=_LIBRARY)
    op = getattr(torch.ops.flash_jvp, name)
    torch.library.register_vmap(f"flash_jvp::{name}", _over_batch(op), lib=_LIBRARY)
    return op


_PRIMALS = "Tensor q, Tensor k, Tensor v"
_TANGENTS = "Tensor? tq, Tensor? tk, Tensor? tv"
forward = _define("forward", _PRIMALS, 2, _forward, _forward_shapes)
forward_tangent = _define("forward_tangent", f"{_PRIMALS}, {_TANGENTS}", 4, _forward_tangent, _forward_tangent_shapes)
# The same with a tangent that carries no gradient, so that its backward need not be computed.
forward_tangent_detached = _define(
    "forward_tangent_detached", f"{_PRIMALS}, {_TANGENTS}", 4, _forward_tangent, _forward_tangent_shapes
)
backward = _define("backward", f"{_PRIMALS}, Tensor o, Tensor lse, Tensor do", 3, _backward, _backward_shapes)
backward_tangent = _define(
    "backward_tangent",
    f"{_PRIMALS}, {_TANGENTS}, Tensor o, Tensor to, Tensor lse, Tensor mu, Tensor? do, Tensor dto",
    6,
    _backward_tangent,
    _backward_tangent_shapes,
)


NO_BIAS_GRADIENT = (
    "attn_bias has a gradient or a tangent, which this attention does not propagate; pass attn_bias.detach() if none "
    "is wanted, or write the attention out with matmul and softmax if it is"
)


def _refuse_bias_gradient(needed: bool) -> None:
    """Where the public function could not see it: under vmap a bias does not tell that it requires a gradient."""
    if needed:
        raise NotImplementedError(NO_BIAS_GRADIENT)


def _refuse_open_level() -> None:
    if forward_ad._current_level >= 0:
        raise NotImplementedError(
            "the backward of flash_jvp attention was called while a forward-mode level is open, and it has no "
            f"forward-mode derivative: call backward after torch.func.jvp or dual_level has ended; {HESSIAN_PRODUCT}"
        )


def _refuse_second_derivative(*_):
    raise NotImplementedError(
        f"the backward of flash_jvp attention cannot be differentiated: {HESSIAN_PRODUCT}; for a gradient penalty "
        "write the attention out with matmul and softmax"
    )


def _refuse_tangents(*_):
    raise NotImplementedError(
        "flash_jvp attention takes the tangents of the innermost transform that it is called under, and was given some "
        f"of another (jvp of grad, of jvp, or of vmap): call vmap on jvp; {HESSIAN_PRODUCT}"
    )


class Gradients(torch.autograd.Function):
    """What `backward` or `backward_tangent` gives, refusing to be differentiated again where it would be wrong."""

    vmap = staticmethod(_over_batch(lambda *args: Gradients.apply(*args)))
    backward = staticmethod(_refuse_second_derivative)
    jvp = staticmethod(_refuse_tangents)

    @staticmethod
    def forward(op, *args):
        return op(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


def _save_primal(ctx, inputs, output) -> None:
    q, k, v, bias, kv_lens, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output, bias, kv_lens)
    ctx.set_materialize_grads(False)


def _save_detached(ctx, inputs, output) -> None:
    q, k, v, _, _, _, *rest = inputs
    o, _, lse, _ = output
    _save_primal(ctx, (q, k, v, *rest), (o, lse))


def _save_both(ctx, inputs, output) -> None:
    q, k, v, tq, tk, tv, bias, kv_lens, *ctx.settings = inputs
    o, to, lse, mu = output
    ctx.save_for_backward(q, k, v, o, lse, bias, kv_lens, tq, tk, tv, to, mu)
    ctx.set_materialize_grads(False)


def _gradients(call: Callable, ctx, do: Tensor | None, dto: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of q, k, v, of tq, tk, tv, and of the arguments that have none."""
    _refuse_open_level()
    q, k, v, o, lse, bias, kv_lens, *of_tangent = ctx.saved_tensors
    rest = (bias, kv_lens, *ctx.settings)
    primals = tangents = (None, None, None)
    if dto is not None:
        tq, tk, tv, to, mu = of_tangent
        gradients = call(backward_tangent, q, k, v, tq, tk, tv, o, to, lse, mu, do, dto, *rest)
        primals = gradients[:3]
        tangents = tuple(None if t is None else x for x, t in zip(gradients[3:], (tq, tk, tv), strict=True))
    elif do is not None:
        primals = call(backward, q, k, v, o, lse, do, *rest)
    return *primals, *tangents, *[None] * len(rest)


class Attention(torch.autograd.Function):
    """(o, lse) of attention; lse carries no gradient."""

    vmap = staticmethod(_over_batch(lambda *args: Attention.apply(*args)))
    jvp = staticmethod(_refuse_tangents)

    @staticmethod
    def forward(*args):
        return forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _refuse_bias_gradient(ctx.needs_input_grad[3])
        _save_primal(ctx, inputs, output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, do, _):
        gradients = _gradients(Gradients.apply, ctx, do, None)
        return gradients[:3] + gradients[6:]


class AttentionTangent(torch.autograd.Function):
    """(o, to, lse, mu) of attention and its tangent; lse and mu carry no gradient, nor does to unless tangent_grad."""

    vmap = staticmethod(_over_batch(lambda *args: AttentionTangent.apply(*args)))
    jvp = staticmethod(_refuse_tangents)

    @staticmethod
    def forward(tangent_grad, *args):
        return forward_tangent(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        tangent_grad, *inputs = inputs
        _refuse_bias_gradient(ctx.needs_input_grad[7])
        save = _save_both if tangent_grad else _save_detached
        save(ctx, inputs, output)
        ctx.mark_non_differentiable(*(output[2:] if tangent_grad else output[1:]))

    @staticmethod
    def backward(ctx, do, dto, *_):
        return None, *_gradients(Gradients.apply, ctx, do, dto)


# For torch.compile: the same derivatives, registered on the operators.


def _call(op: Callable, *args):
    return op(*args)


def _differentiate(ctx, do, _):
    gradients = _gradients(_call, ctx, do, None)
    return gradients[:3] + gradients[6:]


def _differentiate_both(ctx, do, dto, *_):
    return _gradients(_call, ctx, do, dto)


def _differentiate_detached(ctx, do, *_):
    return _gradients(_call, ctx, do, None)


for _name, _derivative, _save in (
    ("forward", _differentiate, _save_primal),
    ("forward_tangent", _differentiate_both, _save_both),
    ("forward_tangent_detached", _differentiate_detached, _save_detached),
    ("backward", _refuse_second_derivative, None),
    ("backward_tangent", _refuse_second_derivative, None),
):
    torch.library.register_autograd(f"flash_jvp::{_name}", _derivative, setup_context=_save, lib=_LIBRARY)
