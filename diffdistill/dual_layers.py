"""Layers in forward mode at the cost that their mathematics has: two passes of the layer, and two of its outputs.

PyTorch puts their tangents together from small operations, which hold several times that memory, multiply by the zero
tangent of the weights too, and for group normalisation fail on channels-last inputs, which is what attention leaves in
the UNets of diffusers (torch 2.13).
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class DualLayers(TorchFunctionMode):
    """Under it, convolutions, linear layers and group normalisations of a dual input take the rules here.

    Those whose weights have tangents as well are left to PyTorch.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        rule = RULES.get(func)
        if rule is None or not _is_dual(args[0]) or any(_is_dual(x) for x in (*args[1:], *kwargs.values())):
            return func(*args, **kwargs)
        return rule(func, *args, **kwargs)


def _is_dual(x: object) -> bool:
    return isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None


def _affine(layer, x: Tensor, weight: Tensor, bias: Tensor | None = None, *args, **kwargs) -> Tensor:
    def apply(x: Tensor, bias: Tensor | None) -> Tensor:
        return layer(x, weight, bias, *args, **kwargs)

    return _Affine.apply(x, bias, apply)


class _Affine(torch.autograd.Function):
    """apply(x, bias), whose derivative along tx is apply(tx, None)."""

    @staticmethod
    def forward(x, bias, apply):
        return apply(x, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.apply = inputs[2]

    @staticmethod
    def jvp(ctx, tx, _bias, _apply):
        return ctx.apply(tx, None)


def _group_norm(layer, x: Tensor, num_groups: int, weight=None, bias=None, eps: float = 1e-5) -> Tensor:
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        x = x.float()  # as autocast does there, and nowhere else
    return _GroupNorm.apply(x.contiguous(), num_groups, weight, bias, eps)[0]


class _GroupNorm(torch.autograd.Function):
    """Group normalisation of a contiguous x, (N, C, ...)."""

    @staticmethod
    def forward(x, num_groups, weight, bias, eps):
        return torch.native_group_norm(x, weight, bias, *x.shape[:2], x[0, 0].numel(), num_groups, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, _, weight, *_ = inputs
        _, mean, inverse = output  # (N, groups) each: of a group, and 1 / its deviation
        ctx.mark_non_differentiable(mean, inverse)
        ctx.save_for_forward(x, weight, mean, inverse)

    @staticmethod
    def jvp(ctx, tx, *_):
        x, weight, mean, inverse = ctx.saved_tensors
        mean, inverse = mean[..., None].to(x.dtype), inverse[..., None].to(x.dtype)
        grouped = (*mean.shape[:2], -1)
        unit, tx = (x.reshape(grouped) - mean).mul_(inverse), tx.reshape(grouped)
        slope = (unit * tx).mean(2, keepdim=True)
        out = (tx - tx.mean(2, keepdim=True)).addcmul_(unit, slope, value=-1).mul_(inverse).reshape(x.shape)
        if weight is not None:
            out = out.mul_(weight.reshape(1, -1, *[1] * (x.ndim - 2)))
        return out, None, None


RULES = {
    functional.linear: _affine,
    functional.conv1d: _affine,
    functional.conv2d: _affine,
    functional.conv3d: _affine,
    functional.group_norm: _group_norm,
}
