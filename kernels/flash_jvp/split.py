"""PyTorch's own attention forward, then a pass for the tangent alone: two kernels, the first the fastest there is.

One product more than the fused kernel (7 against 6), but the primal is what a forward without tangents gives.
"""

from torch import Tensor

from flash_jvp import library, tangent
from flash_jvp.logits import Logits


def forward_tangent(
    q: Tensor, k: Tensor, v: Tensor, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, logits: Logits
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """O and tO, both (B, H, M, dv) in q's dtype, log-sum-exp and mu, both (B, H, M). A tangent of None is zero."""
    o, lse = library.forward(q, k, v, logits)
    to, mu = tangent.tangent(q, k, v, tq, tk, tv, o, lse, logits)
    return o, to, lse, mu
