"""PyTorch's own flash attention with its log-sum-exp, and its backward: the primal half of the split route.

The CPU's operators were run; CUDA's are called by the schemas of torch 2.11 to 2.13 and have not been run yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_jvp.logits import Logits

aten = torch.ops.aten


def unsupported(q: Tensor, k: Tensor, v: Tensor, logits: Logits) -> str | None:
    """Why PyTorch's flash attention cannot compute this, or None where it can."""
    if not q.numel():
        return f"it needs at least one query, got q of shape {tuple(q.shape)}"  # its CPU operator divides by zero
    if logits.softcap:
        return "it has no softcap"
    if logits.kv_lens is not None:
        return "it has no kv_lens"
    if logits.bias is not None:
        return "it has no attn_bias"
    if q.shape[-1] != v.shape[-1]:
        return f"q and v must have one head size, got {q.shape[-1]} and {v.shape[-1]}"
    if logits.diagonal not in (None, 0):
        return f"its only causal mask is j <= i, got j <= i + {logits.diagonal}"
    if q.device.type == "cpu":
        return None
    if q.device.type != "cuda":
        return f"it has no flash attention for {q.device.type}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"on CUDA it takes float16 and bfloat16, got {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"on CUDA it takes head sizes that 8 divides, up to 256, got {q.shape[-1]}"
    if q.shape[1] != k.shape[1]:
        return "on CUDA this call takes as many key heads as query heads"
    if logits.diagonal == 0 and q.shape[2] != k.shape[2]:
        return "on CUDA its causal mask needs as many queries as keys"
    return None


def require_supported(q: Tensor, k: Tensor, v: Tensor, logits: Logits) -> None:
    """Raise NotImplementedError, with the reason and the alternative, for what PyTorch's flash attention cannot do."""
    reason = unsupported(q, k, v, logits)
    if reason is not None:
        raise NotImplementedError(
            f'backend="split" runs PyTorch\'s flash attention, and {reason}; use backend="triton" or "chunked"'
        )


def forward(q: Tensor, k: Tensor, v: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
    """O (B, H, M, d) in q's dtype and log-sum-exp (B, H, M), natural, float32 (float64 for float64).

    Raises:
        NotImplementedError: what `unsupported` names.
    """
    require_supported(q, k, v, logits)
    causal, scale = logits.diagonal is not None, logits.scale
    if q.device.type == "cpu":
        o, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    else:
        o, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return o, lse.contiguous()


def backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, logits: Logits
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from the cotangent do of O.

    Raises:
        NotImplementedError: what `unsupported` names.
    """
    require_supported(q, k, v, logits)
    causal, scale = logits.diagonal is not None, logits.scale
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(do, q, k, v, o, lse, 0.0, causal, scale=scale)
    unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # random state: there is no dropout
    return aten._scaled_dot_product_flash_attention_backward(
        *(do, q, k, v, o, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, unused, unused[:0]), scale=scale
    )
