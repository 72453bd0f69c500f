"""Attention, its tangent and the derivatives of both on any device: exact, in memory linear in M and N.

The queries are taken a block of rows at a time against all keys, so every softmax is an ordinary one and no running
maximum is needed; on a CPU that beats tiles over the keys (kernels/flash_jvp/README.md has the measurement). Heads that
share a key are folded into the rows of one product.

With P the softmax of the logits S, tS the tangent of S, mu_i = sum_j P_ij tS_ij and Z = tS - mu,

    O = P V          tO = P tV + (P o Z) V = P tV + (P o tS) V - mu o O

and with cotangents dO of O and dT of tO, e_i = dT_i.O_i and delta_i = dO_i.O_i + dT_i.tO_i,

    dtS = P o (dT V^T - e)                   dS = P o (dO V^T + dT tV^T - delta) + Z o dtS
    dV = P^T dO + (P o Z)^T dT               dtV = P^T dT

where e and delta are taken as sums over the keys: e = rowsum(P o dT V^T), and with dP = dO V^T + dT tV^T,
delta = rowsum(P o dP) + rowsum(Z o dtS), so that a row of dtS and of dS sums to zero to rounding.

Softmax, tO and the gradients of the queries do not change when a constant is added to a row of S or of tS. So the mean
key, and the mean of the keys' tangents, are subtracted first: what rounds is then as large as what is wanted, not as
large as what the keys have in common. (A softcap is not shift-invariant; with one, nothing is subtracted.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_jvp.logits import Logits, like_queries, slices, statistics_dtype

# Scores held at once, over the batch elements, heads and rows of a block: those of 64 rows, but 4 MiB of float32 at the
# least and 16 at the most, where a CPU was fastest at 256 to 16,384 keys.
BLOCK_SCORES = (1 << 20, 1 << 22)
GOOD_ROWS, LEAST_ROWS = 64, 16


@dataclass(frozen=True)
class _Keys:
    """Keys and values in the dtype of the computation, their heads (B, Hk, N, d), the mean key apart."""

    k: Tensor
    mean: Tensor | None
    tk: Tensor | None
    tangent_mean: Tensor | None
    v: Tensor
    tv: Tensor | None

    @classmethod
    def of(cls, k: Tensor, v: Tensor, tk: Tensor | None, tv: Tensor | None, logits: Logits) -> _Keys:
        dtype = statistics_dtype(k.dtype)
        k, v, tk, tv = (None if x is None else x.to(dtype) for x in (k, v, tk, tv))
        exists = logits.existing_keys(k.shape[2], k.device)
        if exists is not None:
            # what nobody sees may be anything, NaN included, and 0 NaN is NaN
            k, v, tk, tv = (None if x is None else x.masked_fill(~exists[..., None], 0.0) for x in (k, v, tk, tv))
        mean = tangent_mean = None
        if not logits.softcap:
            mean = logits.mean_over_keys(k)
        if mean is not None:
            k = k - mean
            if tk is not None:
                tangent_mean = logits.mean_over_keys(tk)
                tk = tk - tangent_mean
        return cls(k=k, mean=mean, tk=tk, tangent_mean=tangent_mean, v=v, tv=tv)

    def batch(self, rows: slice) -> _Keys:
        return _Keys(**{name: None if x is None else x[rows] for name, x in vars(self).items()})


class _Block:
    """A block of query rows: which it is, and tensors of queries folded onto the heads of the keys."""

    def __init__(self, batch: slice, rows: slice, keys: _Keys, logits: Logits, group: int) -> None:
        self.index = (batch, slice(None), rows)
        self.first, self.num_rows, self.group = rows.start, rows.stop - rows.start, group
        self.keys, self.logits = keys, logits

    def take(self, x: Tensor | None) -> Tensor | None:
        """(B, H, M, ...) to this block's (b, Hk, G m, ...) in the dtype of the computation."""
        if x is None:
            return None
        x = x[self.index].unflatten(1, (-1, self.group))
        return x.flatten(2, 3).to(self.keys.k.dtype)

    def put(self, whole: Tensor, x: Tensor) -> None:
        """This block's (b, Hk, G m, ...) into (B, H, M, ...)."""
        whole[self.index] = x.unflatten(2, (self.group, self.num_rows)).flatten(1, 2)

    def scores(self, q: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits (b, Hk, G m, N) of scaled queries, less what centring takes off, and tanh of the capped products."""
        s, logits = q @ self.keys.k.mT, self.logits
        bend = None
        if logits.softcap:
            bend = s.div_(logits.softcap).tanh_()
            s = bend * logits.softcap
        by_head = s.unflatten(2, (self.group, self.num_rows))
        if logits.bias is not None:
            bias = logits.bias[:, :, self.first : self.first + self.num_rows].unflatten(1, (-1, self.group))
            if bias.dtype == torch.bool:
                by_head.masked_fill_(~bias, -torch.inf)
            else:
                by_head.add_(bias)
        seen = logits.sees(self.num_rows, s.shape[-1], s.device, first=self.first)
        if seen is not None:
            by_head.masked_fill_(~seen[:, None], -torch.inf)
        return s, bend

    def tangent_scores(self, q: Tensor, tq: Tensor | None, bend: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Tangent logits (b, Hk, G m, N) less what centring takes off; and before the softcap bent them, if it did."""
        ts = None if tq is None else tq @ self.keys.k.mT
        if self.keys.tk is not None and ts is None:
            ts = q @ self.keys.tk.mT
        elif self.keys.tk is not None:
            # added as it is made: the product by itself would be one more matrix of scores
            ts.flatten(0, 1).baddbmm_(q.flatten(0, 1), self.keys.tk.mT.flatten(0, 1))
        if ts is None or bend is None:
            return ts, None
        return ts * (1 - bend.square()), ts

    def shift(self, q: Tensor) -> Tensor | float:
        """What centring took off the logits of each row, (b, Hk, G m, 1)."""
        return 0.0 if self.keys.mean is None else q @ self.keys.mean.mT

    def tangent_shift(self, q: Tensor, tq: Tensor | None) -> Tensor | float:
        """What centring took off the tangent logits of each row, (b, Hk, G m, 1)."""
        shift = 0.0
        if tq is not None and self.keys.mean is not None:
            shift = tq @ self.keys.mean.mT
        if self.keys.tangent_mean is not None:
            shift = shift + q @ self.keys.tangent_mean.mT
        return shift


def _blocks(q: Tensor, keys: _Keys, logits: Logits) -> Iterator[_Block]:
    batch, heads, num_queries, _ = q.shape
    scores_per_row = heads * max(keys.k.shape[2], 1)
    least, most = BLOCK_SCORES
    scores = min(max(GOOD_ROWS * scores_per_row, least), most)
    num_rows = min(max(scores // scores_per_row, LEAST_ROWS), max(num_queries, 1))
    elements = max(scores // (scores_per_row * num_rows), 1)
    for of_batch in slices(batch, elements):
        of_keys, of_logits = keys.batch(of_batch), logits.batch(of_batch)
        for rows in slices(num_queries, num_rows):
            yield _Block(of_batch, rows, of_keys, of_logits, heads // keys.k.shape[1])


def _softmax(s: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax and log-sum-exp (..., 1) of logits, which are overwritten; both 0 and -inf in rows that see nothing."""
    top = s.amax(-1, keepdim=True)
    p = s.sub_(top.masked_fill(top == -torch.inf, 0.0)).exp_()
    total = p.sum(-1, keepdim=True)
    return p.div_(total.masked_fill(total == 0, 1.0)), top + total.log()


def _row_product(x: Tensor, y: Tensor) -> Tensor:
    """Sum over the keys of x o y, (..., 1)."""
    return torch.linalg.vecdot(x, y).unsqueeze(-1)


def forward(q: Tensor, k: Tensor, v: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
    """O (B, H, M, dv) in q's dtype and log-sum-exp (B, H, M), natural.

    Args:
        q: (B, H, M, d); k: (B, Hk, N, d); v: (B, Hk, N, dv), with H a multiple of Hk.
    """
    keys = _Keys.of(k, v, None, None, logits)
    o, lse = like_queries(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=keys.k.dtype)
    for block in _blocks(q, keys, logits):
        scaled = block.take(q) * logits.scale
        p, log_total = _softmax(block.scores(scaled)[0])
        block.put(o, p @ block.keys.v)
        block.put(lse, (log_total + block.shift(scaled))[..., 0])
    return o, lse


def forward_tangent(
    q: Tensor, k: Tensor, v: Tensor, tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, logits: Logits
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """O and tO, both (B, H, M, dv) in q's dtype, log-sum-exp and mu, both (B, H, M). A tangent of None is zero."""
    keys = _Keys.of(k, v, tk, tv, logits)
    o, to = like_queries(q, v.shape[-1]), like_queries(q, v.shape[-1])
    lse, mu = (q.new_empty(q.shape[:3], dtype=keys.k.dtype) for _ in range(2))
    for block in _blocks(q, keys, logits):
        scaled = block.take(q) * logits.scale
        tangent = None if tq is None else block.take(tq) * logits.scale
        s, bend = block.scores(scaled)
        ts, _ = block.tangent_scores(scaled, tangent, bend)
        p, log_total = _softmax(s)
        change = torch.zeros_like(block.take(o)) if block.keys.tv is None else p @ block.keys.tv
        mean = torch.zeros_like(log_total)
        if ts is not None:
            mean = _row_product(p, ts)
            change += ts.sub_(mean).mul_(p) @ block.keys.v
            mean = mean + block.tangent_shift(scaled, tangent) * (log_total > -torch.inf)
        block.put(o, p @ block.keys.v)
        block.put(to, change)
        block.put(lse, (log_total + block.shift(scaled))[..., 0])
        block.put(mu, mean[..., 0])
    return o, to, lse, mu


def backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, logits: Logits
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from the cotangent do (B, H, M, dv) of O.

    The softmax and its sums are taken anew, from rows that are whole here: o and lse (unused) are as coarse as their
    dtypes, which for large logits or values is much coarser than the gradients.
    """
    keys = _Keys.of(k, v, None, None, logits)
    dq = torch.empty_like(q)
    dk, dv = torch.zeros_like(keys.k), torch.zeros_like(keys.v)
    for block in _blocks(q, keys, logits):
        scaled, cotangent = block.take(q) * logits.scale, block.take(do)
        s, bend = block.scores(scaled)
        p, _ = _softmax(s)
        dv[block.index[0]] += p.mT @ cotangent
        dp = cotangent @ block.keys.v.mT
        ds = dp.sub_(_row_product(p, dp)).mul_(p)
        if bend is not None:
            ds *= 1 - bend.square()
        block.put(dq, ds @ block.keys.k * logits.scale)
        dk[block.index[0]] += ds.mT @ scaled
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def backward_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor | None,
    tk: Tensor | None,
    tv: Tensor | None,
    o: Tensor,
    to: Tensor,
    lse: Tensor,
    mu: Tensor,
    do: Tensor | None,
    dto: Tensor,
    logits: Logits,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, tq, tk and tv from the cotangents of O (None for zero) and of tO, both (B, H, M, dv).

    The gradient of a tangent that is None is None. As in `backward`, o, to, lse and mu are taken anew.
    """
    keys = _Keys.of(k, v, tk, tv, logits)
    dq, dtq = torch.empty_like(q), None if tq is None else torch.empty_like(tq)
    dk, dv = torch.zeros_like(keys.k), torch.zeros_like(keys.v)
    dtk, dtv = (None if x is None else torch.zeros_like(x) for x in (keys.tk, keys.tv))
    for block in _blocks(q, keys, logits):
        elements = block.index[0]
        scaled, cotangent, tangent_cotangent = block.take(q) * logits.scale, block.take(do), block.take(dto)
        tangent = None if tq is None else block.take(tq) * logits.scale
        s, bend = block.scores(scaled)
        slope = None if bend is None else 1 - bend.square()
        ts, straight = block.tangent_scores(scaled, tangent, bend)
        p, _ = _softmax(s)

        dts = tangent_cotangent @ block.keys.v.mT
        dts.sub_(_row_product(p, dts)).mul_(p)
        dp = torch.zeros_like(p)
        if cotangent is not None:
            dp += cotangent @ block.keys.v.mT
            dv[elements] += p.mT @ cotangent
        if dtv is not None:
            dp += tangent_cotangent @ block.keys.tv.mT
            dtv[elements] += p.mT @ tangent_cotangent
        delta = _row_product(p, dp)
        if ts is not None:
            z = ts.sub_(_row_product(p, ts))
            delta += _row_product(z, dts)
        ds = dp.sub_(delta).mul_(p)
        if ts is not None:
            ds.addcmul_(z, dts)
            dv[elements] += z.mul_(p).mT @ tangent_cotangent
        if slope is not None:
            ds *= slope
            if straight is not None:
                # the slope 1 - tanh^2 itself depends on the logits: its derivative is -2 tanh slope / cap
                ds.addcmul_(dts, straight.mul_(bend).mul_(slope), value=-2 / logits.softcap)
            dts *= slope

        change = ds @ block.keys.k
        dk[elements] += ds.mT @ scaled
        if tangent is not None:
            block.put(dtq, dts @ block.keys.k * logits.scale)
            dk[elements] += dts.mT @ tangent
        if dtk is not None:
            change += dts @ block.keys.tk
            dtk[elements] += dts.mT @ scaled
        block.put(dq, change * logits.scale)
    cast = (None if x is None else x.to(like.dtype) for x, like in ((dtk, k), (dtv, v)))
    return dq, dk.to(k.dtype), dv.to(v.dtype), dtq, *cast
