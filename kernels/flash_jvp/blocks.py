"""One transformer block at a time, with its tangent, keeping only its inputs.

torch.func.jvp of a whole network in training keeps the activations of the tangent as well as those of the primal, does
not allow activation checkpointing within, and with FSDP2 needs torch 2.13. Block by block none of this is so: the
tangent is computed without a graph, and backward recomputes the primal of one block.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from flash_jvp.calls import Call, Structure, Tensors, bound
from flash_jvp.modes import dual_attention, dual_attention_is_on
from flash_jvp.surroundings import Surroundings


def jvp_block(
    block: Callable,
    x: Tensors,
    tx: Tensors,
    *args: Any,
    checkpoint: bool = True,
    tangent_grad: bool = False,
    parameters: Iterable[Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """(o, to): what block(x, *args, **kwargs) returns, and its derivative along tx in the same structure.

    Gradients flow to x, to the parameters and to every tensor in args and kwargs. By default nothing but those is kept,
    and backward recomputes the primal alone, with the parameters, random numbers and autocast of the forward.

    Args:
        block: a module, or any callable with its `parameters` given.
        x: what the block is called with: a tensor, a tuple of positional or a dict of keyword tensors.
        tx: their tangents, in the same structure; None for an element without one.
        args, kwargs: the further arguments of the block, constant along the tangent.
        checkpoint: False keeps activations instead of recomputing them.
        tangent_grad: whether gradients flow through `to` as well, and to tx; then the tangent is recomputed too. False
            detaches both: a loss may use `to` as a constant only.
        parameters: for a callable that is not a module, the leaf tensors it reads by itself; () if there are none.

    A block may return a tensor, or a tuple or dict of tensors and None; an output that does not depend on x has a
    tangent of zeros. With DDP and FSDP2 wrap or shard a module whose forward calls jvp_block, so that their hooks stay
    outside of it.

    Raises:
        ValueError: structures, shapes or outputs that do not fit; an input that carries a tangent of its own; a block
            with FSDP2's hooks inside; an input that the block changes in place.
        RuntimeError, in backward: a leaf that requires a gradient and was not declared; a parameter, an input or the
            training mode changed since the forward; a second derivative.
    """
    call, values, tangents = bound(block, x, tx, args, kwargs)
    declared = _declared(block, parameters)
    if not checkpoint or tangent_grad:
        return _differentiable(call, values, tangents, checkpoint, tangent_grad)
    # a callable may read a leaf that it does not declare: with a witness, backward always comes here and finds out
    witness = None if isinstance(block, nn.Module) else torch.zeros((), requires_grad=True)
    structures: list[Structure] = []
    recipe = _Recipe(call, tuple(declared), len(values), _training_modes(block), Surroundings.now(values))
    flat = _Block.apply(recipe, structures, tangents, witness, *values, *declared.values())
    return structures[0].halves(flat)


def _declared(block: Callable, parameters: Iterable[Tensor] | None) -> dict[str, Tensor]:
    """The parameters by name; for a callable the names are numbers."""
    if isinstance(block, nn.Module):
        if parameters is not None:
            raise ValueError("parameters are for callables; those of a module are known, so leave them out")
        _refuse_sharded(block)
        return dict(block.named_parameters())
    if parameters is None:
        raise ValueError(
            f"{block!r} is not a module: give parameters=, the leaf tensors it reads by itself, or () if there are none"
        )
    declared = {str(index): parameter for index, parameter in enumerate(parameters)}
    for parameter in declared.values():
        if not parameter.is_leaf:
            raise ValueError(
                f"parameters must be leaf tensors, got one of shape {tuple(parameter.shape)} from "
                f"{parameter.grad_fn.name()}; pass it to the block as an argument"
            )
        if parameter._backward_hooks:
            raise ValueError(
                "a parameter of a callable has a gradient hook, which would run twice; give jvp_block a module instead"
            )
    return declared


def _refuse_sharded(block: nn.Module) -> None:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to import, and where nobody did nothing is sharded
    if fsdp is None:
        return
    for name, module in block.named_modules():
        if isinstance(module, fsdp.FSDPModule):
            raise ValueError(
                f"{name or 'the block'} is sharded by fully_shard, whose hooks would run inside the derivative; shard "
                "a module that holds the block and calls jvp_block in its forward"
            )


def _training_modes(block: Callable) -> tuple[bool, ...]:
    return tuple(module.training for module in block.modules()) if isinstance(block, nn.Module) else ()


def _differentiable(call: Call, values: list, tangents: list, checkpoint: bool, tangent_grad: bool) -> tuple[Any, Any]:
    """The same by torch.func.jvp in the graph, or recomputed as a whole by torch's checkpoint."""
    routed, structures = dual_attention_is_on(), []

    def run(*tensors: Tensor | None) -> tuple[Tensor, ...]:
        with dual_attention() if routed else contextlib.nullcontext():  # backward may run outside of the context
            o, to, structure = call.jvp(tensors[: len(values)], tensors[len(values) :])
        structures.append(structure)
        return *o, *to

    if not tangent_grad:
        tangents = [None if tangent is None else tangent.detach() for tangent in tangents]
    flat = torch_checkpoint(run, *values, *tangents, use_reentrant=False) if checkpoint else run(*values, *tangents)
    if not tangent_grad:
        half = len(flat) // 2
        flat = *flat[:half], *(to.detach() for to in flat[half:])
    return structures[0].halves(flat)


@dataclass(frozen=True)
class _Recipe:
    """All that backward needs except tensors."""

    call: Call
    names: tuple[str, ...]
    num_values: int
    training_modes: tuple[bool, ...]
    surroundings: Surroundings


class _Block(torch.autograd.Function):
    """The tensors that a block returns, followed by their tangents, which are constants.

    The parameters are inputs although forward reads them in the block, so that hooks on them (DDP) and around the block
    (FSDP2, whose unsharded parameters are the same tensors in forward and backward) see an ordinary operation.
    """

    @staticmethod
    def forward(ctx, recipe: _Recipe, structures: list, tangents: list, witness: Tensor | None, *tensors: Tensor):
        values = tensors[: recipe.num_values]
        versions = [None if value.is_inference() else value._version for value in values]
        detached = [None if tangent is None else tangent.detach() for tangent in tangents]
        o, to, structure = recipe.call.jvp(values, detached)
        if versions != [None if value.is_inference() else value._version for value in values]:
            raise ValueError("the block changed an input in place, so it cannot be recomputed; let it work on a copy")
        structures.append(structure)
        ctx.recipe = recipe
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*to, *(output for output in o if not output.is_floating_point()))
        ctx.set_materialize_grads(False)
        return *o, *to

    @staticmethod
    def backward(ctx, *cotangents: Tensor | None):
        recipe: _Recipe = ctx.recipe
        block = recipe.call.block
        if _training_modes(block) != recipe.training_modes:
            raise RuntimeError("train() or eval() was called on a block between its forward and its backward")
        needed = ctx.needs_input_grad[4:]
        is_module = isinstance(block, nn.Module)
        leaves = [
            x.detach().requires_grad_(need) if is_module or index < recipe.num_values else x
            for index, (x, need) in enumerate(zip(ctx.saved_tensors, needed, strict=True))
        ]
        values, parameters = leaves[: recipe.num_values], leaves[recipe.num_values :]
        call = recipe.call
        if is_module:
            named = dict(zip(recipe.names, parameters, strict=True))
            call = replace(call, block=lambda *args, **kwargs: torch.func.functional_call(block, named, args, kwargs))
        with torch.enable_grad(), recipe.surroundings.again():
            outputs, _ = call(values)
        detached = [None if cotangent is None else cotangent.detach() for cotangent in cotangents]
        pairs = [
            (output, cotangent)
            for output, cotangent in zip(outputs, detached[: len(outputs)], strict=True)
            if cotangent is not None and output.requires_grad
        ]
        outputs, weights = [output for output, _ in pairs], [cotangent for _, cotangent in pairs]
        wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
        _refuse_undeclared(outputs, wanted)
        found: tuple[Tensor | None, ...] = (None,) * len(wanted)
        if outputs and wanted:
            found = torch.autograd.grad(outputs, wanted, weights, allow_unused=True)
        if torch.is_grad_enabled():  # create_graph=True
            found = _Final.apply(len(found), *found, *ctx.saved_tensors, *cotangents)
        gradients = iter(found)
        return None, None, None, None, *(next(gradients) if need else None for need in needed)


class _Final(torch.autograd.Function):
    """Gradients as they are, tied to all that they depend on, so that a second derivative raises and is not zero."""

    @staticmethod
    def forward(ctx, count: int, *tensors: Tensor | None):
        return tuple(None if x is None else x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "jvp_block recomputes its block for one backward pass and has no second derivative; pass checkpoint=False"
        )


def _refuse_undeclared(outputs: list[Tensor], declared: list[Tensor]) -> None:
    """Raise if the graph of the outputs reaches a leaf that is not declared: its gradient would be lost."""
    known = {id(leaf) for leaf in declared}
    pending = [output.grad_fn for output in outputs if output.grad_fn is not None]
    visited = set(pending)
    while pending:
        node = pending.pop()
        if node.name() == "torch::autograd::AccumulateGrad" and id(node.variable) not in known:
            raise RuntimeError(
                f"the block read a tensor of shape {tuple(node.variable.shape)} that requires a gradient, which would "
                "be lost, for it is neither an argument nor a parameter of the block: pass it as an argument, or name "
                "it in parameters= if the block is a callable"
            )
        for following, _ in node.next_functions:
            if following is not None and following not in visited:
                visited.add(following)
                pending.append(following)
