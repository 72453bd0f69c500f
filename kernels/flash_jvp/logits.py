"""What turns products of queries and keys into the logits of a softmax, and which keys a query sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

UNDERFLOW = -104.0  # exp of less is 0 in float32


@dataclass(frozen=True)
class Logits:
    """S = cap(scale q.k) + bias, with cap(x) = softcap tanh(x / softcap), over the keys that a query sees.

    Query i sees key j when j < kv_lens[b] and, with a diagonal, j <= i + diagonal. A boolean bias adds nothing: it is
    True where the query sees the key. A query that sees no key has output 0, tangent 0 and a log-sum-exp of -inf.

    Fields:
        scale: what multiplies q.k.
        softcap: a bound on the absolute value of the scaled products; 0 for none.
        diagonal: the last key that query 0 sees; None where every query sees all keys.
        bias: (B, H, M, N), float or bool; strides of 0 are welcome.
        kv_lens: int32 (B,), the number of keys of each batch element, each in [0, N].
    """

    scale: float
    softcap: float = 0.0
    diagonal: int | None = None
    bias: Tensor | None = None
    kv_lens: Tensor | None = None

    def sees(self, num_queries: int, num_keys: int, device: torch.device, first: int = 0) -> Tensor | None:
        """Where queries first .. first + num_queries see a key, bool, broadcastable to (B, H, M, N); None: everywhere.

        A boolean bias is not part of it: `bias` says so itself.
        """
        seen = None
        if self.diagonal is not None:
            queries = torch.arange(first, first + num_queries, device=device)
            seen = (torch.arange(num_keys, device=device) <= queries[:, None] + self.diagonal)[None, None]
        if self.kv_lens is not None:
            short = self.sees_by_length(num_keys, device)[:, :, None]
            seen = short if seen is None else seen & short
        return seen

    def sees_by_length(self, num_keys: int, device: torch.device) -> Tensor:
        """Which keys exist by kv_lens, bool (B, 1, N)."""
        return torch.arange(num_keys, device=device) < self.kv_lens[:, None, None]

    @property
    def bias_is_by_key(self) -> bool:
        """Whether a bias is one for all heads and queries, as masks of padding are."""
        return self.bias is not None and all(self.bias.shape[d] == 1 or self.bias.stride(d) == 0 for d in (1, 2))

    @property
    def bias_is_matrix(self) -> bool:
        """Whether a bias differs both between queries and between keys."""
        return self.bias is not None and self.bias.stride(2) != 0 and self.bias.stride(3) != 0

    def existing_keys(self, num_keys: int, device: torch.device) -> Tensor | None:
        """Which keys a batch element has, by kv_lens and by a boolean bias by key: bool (B, 1, N); None: all."""
        exists = None if self.kv_lens is None else self.sees_by_length(num_keys, device)
        if self.bias_is_by_key and self.bias.dtype == torch.bool:
            by_key = self.bias[:, :1, 0]
            exists = by_key if exists is None else exists & by_key
        return exists

    def mean_over_keys(self, x: Tensor) -> Tensor | None:
        """The mean of x (B, Hk, N, d) over the keys that weigh something, (B, Hk, 1, d) in statistics_dtype.

        Any number may be taken off all tangent logits of a query, so that the mean need only be near the keys it sees.
        None where nothing is known to be: under a bias that differs between heads or queries.
        """
        if self.bias is not None and not self.bias_is_by_key:
            return None
        dtype, num_keys = statistics_dtype(x.dtype), x.shape[2]
        weighs = self.existing_keys(num_keys, x.device)
        if self.bias is not None and self.bias.dtype != torch.bool:
            above = self.bias[:, :1, 0] > UNDERFLOW
            weighs = above if weighs is None else weighs & above
        if weighs is None:
            return x.sum(2, keepdim=True, dtype=dtype) / max(num_keys, 1)
        # masked, not multiplied: what nobody sees may be anything, NaN too
        total = x.masked_fill(~weighs[..., None], 0.0).sum(2, keepdim=True, dtype=dtype)
        return total / weighs.sum(-1).clamp(min=1)[..., None, None]

    def batch(self, rows: slice) -> Logits:
        """The same for some elements of the batch."""
        return Logits(
            scale=self.scale,
            softcap=self.softcap,
            diagonal=self.diagonal,
            bias=None if self.bias is None else self.bias[rows],
            kv_lens=None if self.kv_lens is None else self.kv_lens[rows],
        )


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, log-sum-exp and tangent means: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def like_queries(q: Tensor, size: int) -> Tensor:
    """An unwritten tensor (B, H, M, size) in the memory order of q, so that a BSHD view gives a BSHD view back."""
    batch, heads, rows, _ = q.shape
    if q.stride(1) < q.stride(2):
        return q.new_empty(batch, rows, heads, size).transpose(1, 2)
    return q.new_empty(batch, heads, rows, size)


def slices(length: int, step: int) -> Iterator[slice]:
    """0..length in pieces of at most `step`."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
