"""The tangent of attention where O and log-sum-exp are known already: the kernel of `fused` with one accumulator.

With log-sum-exp given, P is normalised from the start: no running maximum, no rescaling, and one accumulator, which
holds P tV + (P o tS) V. Five products of 2 M N d FLOP with all tangents, three with only tq. float16 keeps a running
reference all the same: among 32 thousand keys a normalised P is subnormal in it. Run where `fused` has been run.
"""

import torch
from torch import Tensor

from flash_jvp.fused import launch
from flash_jvp.logits import Logits, like_queries
from flash_jvp.operands import require_supported
from flash_jvp.tiles import architecture


def tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    o: Tensor,
    lse: Tensor,
    logits: Logits,
) -> tuple[Tensor, Tensor]:
    """tO (B, H, M, dv) in q's dtype and mu = sum_j P_ij tS_ij (B, H, M) in float32; a tangent of None is zero.

    Args:
        o: (B, H, M, dv), last dimension contiguous; lse: float32 (B, H, M), natural log, -inf where no key is seen.
        The others are those of `fused.forward_tangent`.
    Raises:
        NotImplementedError: as `fused.forward`.
    """
    require_supported(q, k, v)
    to, mu = like_queries(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)
    if tq is None and tk is None and tv is None:
        return to.zero_(), mu.zero_()
    arch = architecture(q.device)
    launch(q, k, v, tq, tk, tv, o, to, lse.contiguous(), mu, logits, arch, known=True).run()
    return to, mu
