"""Which transforms of torch.func attention is called under, and where a tangent could be missed there.

A tangent is taken off q, k and v by unpack_dual, which sees those of the innermost transform. Outside torch.compile,
whatever it does not see reaches an autograd.Function of ops.py, which refuses tangents. Inside torch.compile nothing
would refuse them, so what could hide one is refused here, while it is traced.
"""

import torch
import torch.autograd.forward_ad as forward_ad
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

from flash_jvp.ops import HESSIAN_PRODUCT

JVP, VMAP, GRAD = TransformType.Jvp, TransformType.Vmap, TransformType.Grad


# torch has one forward-mode level at a time
LEVEL = 0


def _level() -> int:
    return forward_ad._current_level


def _transforms() -> list[TransformType]:
    """The transforms that are being applied, the outermost first."""
    return [interpreter.key() for interpreter in retrieve_all_functorch_interpreters()]


# To torch.compile the answer is a constant of each call that it traces: the transforms inside the compiled function are
# part of its code, and one that is called under a transform is not compiled. Traced as Python, the level would be what
# it was when it was first read, in whichever call that was. torch.compiler.assume_constant_result sets this attribute
# too, but imports the compiler for it.
_level._dynamo_marked_constant = _transforms._dynamo_marked_constant = True


def level_is_open() -> bool:
    """Whether a torch.func.jvp or a dual level is going on."""
    # the second makes torch.compile guard the level outside, so that a call in a dual level is compiled anew
    return _level() >= LEVEL or forward_ad._current_level >= LEVEL


def tangents_are_visible() -> bool:
    """Whether unpack_dual would show the tangents of q, k and v.

    Raises:
        NotImplementedError: torch.compile is tracing, and they would be lost.
    """
    if not level_is_open():
        return False
    transforms = _transforms()
    if torch.compiler.is_compiling() and JVP not in transforms:
        raise NotImplementedError(
            "a function compiled inside torch.autograd.forward_ad.dual_level loses its tangents (pytorch#187284); "
            "compile a function that itself calls torch.func.jvp, or do not compile"
        )
    return transforms[-1:] != [VMAP]  # which has no rule for unpack_dual


def tangents_may_hide() -> bool:
    """Whether q, k and v could carry tangents that unpack_dual does not show."""
    if not level_is_open():
        return False
    transforms = _transforms()
    return transforms.count(JVP) > 1 or transforms[-1:] not in ([], [JVP])


def run_compiled() -> bool:
    """Whether torch.compile is tracing, so that the operators are called themselves.

    Raises:
        NotImplementedError: it is, and a derivative would be lost.
    """
    if not torch.compiler.is_compiling():
        return False
    if tangents_may_hide():
        raise NotImplementedError(
            "inside torch.compile attention must be called under one torch.func.jvp, with no transform between them, "
            f"got {' of '.join(t.name for t in _transforms())}: call torch.func.vmap on torch.func.jvp; "
            f"{HESSIAN_PRODUCT}"
        )
    if GRAD in _transforms():
        raise NotImplementedError(
            "torch.func.grad inside torch.compile has no path through flash_jvp attention; call torch.autograd.grad or "
            "backward on the result of the compiled function, or do not compile"
        )
    return True
