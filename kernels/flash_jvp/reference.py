"""The truth: attention and its tangent written down in full, with (M, N) matrices, for float64.

Every other path is tested against these; torch differentiates them in every mode.
"""

import torch
from torch import Tensor

from flash_jvp.logits import Logits


def _logits(q: Tensor, k: Tensor, logits: Logits) -> Tensor:
    """The logits (B, H, M, N); -inf where a query does not see a key."""
    s = logits.scale * q @ k.mT
    if logits.softcap:
        s = logits.softcap * torch.tanh(s / logits.softcap)
    if logits.bias is not None:
        s = s.masked_fill(~logits.bias, -torch.inf) if logits.bias.dtype == torch.bool else s + logits.bias.to(s.dtype)
    seen = logits.sees(q.shape[2], k.shape[2], q.device)
    return s if seen is None else s.masked_fill(~seen, -torch.inf)


def attention(q: Tensor, k: Tensor, v: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
    """O (B, H, M, dv) and log-sum-exp (B, H, M), by operations that torch can differentiate in every mode.

    Args:
        q: (B, H, M, d); k: (B, Hk, N, d); v: (B, Hk, N, dv), with H a multiple of Hk.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = _logits(q, k, logits)
    top = s.amax(-1, keepdim=True).detach()
    weights = torch.exp(s - torch.where(top == -torch.inf, 0.0, top))
    total = weights.sum(-1, keepdim=True)
    sighted = total > 0
    lse = torch.where(sighted, torch.log(torch.where(sighted, total, 1.0)) + top, -torch.inf)
    return (weights / torch.where(sighted, total, 1.0)) @ v, lse[..., 0]


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    logits: Logits,
) -> tuple[Tensor, Tensor, Tensor]:
    """O, its tangent tO, both (B, H, M, dv), and log-sum-exp (B, H, M); a tangent that is None is zero."""
    primals = (q, k, v)
    tangents = tuple(torch.zeros_like(x) if t is None else t for x, t in zip(primals, (tq, tk, tv), strict=True))
    (o, lse), (to, _) = torch.func.jvp(lambda *x: attention(*x, logits), primals, tangents)
    return o, to, lse
