"""Attention problems for the tests of every path of flash_jvp, with their answers in float64.

A problem is data: shapes, dtype, mask, tangents and layout. `make` gives the rounded tensors, `truth` what float64 says
of these rounded tensors, and `plain` what differentiating ordinary attention in the same dtype gives.
"""

import itertools
import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flash_jvp import reference
from flash_jvp.logits import Logits

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# kernels/README section 4.6: relative L2 error of outputs, and of gradients
FORWARD_TOLERANCE = {torch.float32: 2e-6, torch.float16: 7e-4, torch.bfloat16: 5e-3}
GRADIENT_TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
MASKS = [
    "full",
    "causal",
    "bottom_right",
    "before",
    "kv_lens",
    "bias",
    "boolean",
    "softcap",
    "causal kv_lens",
    "softcap bias",
]


@dataclass(frozen=True)
class Problem:
    """One attention problem.

    Fields:
        lengths: M and N.
        size, value_size: d, and dv if it differs from d (0: it does not).
        heads, key_heads: H and Hk.
        mask: words of "full", "causal" (diagonal 0), "bottom_right" (N - M), "before" (diagonal -3: the first queries
            see nothing), "kv_lens", "bias", "boolean", "softcap", "empty" (kv_lens of 0 in batch element 0).
        tangents: which of "q", "k", "v" carry one.
        layout: memory order; "BHND", "BSHD", or "holes" (a slice of a larger tensor, tangents in another order).
        gain: what multiplies q; offset: mean of the keys and their tangents along one direction, in sigmas.
        tangent_gain: what multiplies tq.
    """

    lengths: tuple[int, int] = (33, 70)
    size: int = 16
    value_size: int = 0
    heads: int = 2
    key_heads: int = 2
    batch: int = 2
    dtype: torch.dtype = torch.float32
    mask: str = "full"
    tangents: str = "qkv"
    layout: str = "BHND"
    gain: float = 1.0
    tangent_gain: float = 1.0
    offset: float = 0.0
    device: str = "cpu"
    seed: int = 0

    def __str__(self) -> str:
        default = Problem()
        changed = [f for f in self.__dataclass_fields__ if getattr(self, f) != getattr(default, f)]
        return ",".join(f"{name}={getattr(self, name)}".replace("torch.", "").replace(" ", "") for name in changed)


@dataclass(frozen=True)
class Tensors:
    """q, k, v, their tangents (None where zero), and the logits."""

    q: Tensor
    k: Tensor
    v: Tensor
    tq: Tensor | None
    tk: Tensor | None
    tv: Tensor | None
    logits: Logits

    @property
    def primals(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @property
    def tangents(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.tq, self.tk, self.tv


@dataclass(frozen=True)
class Answer:
    """O, its tangent, log-sum-exp and mu (the tangent of log-sum-exp)."""

    o: Tensor
    to: Tensor
    lse: Tensor
    mu: Tensor


def _lay_out(x: Tensor, layout: str) -> Tensor:
    if layout == "BHND":
        return x.contiguous()
    if layout == "BSHD":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    larger = x.new_full((x.shape[2] + 2, x.shape[0] + 1, x.shape[1] + 1, x.shape[3] + 8), torch.nan)
    inner = larger[1:-1, 1:, 1:, : x.shape[3]].permute(1, 2, 0, 3)
    return inner.copy_(x)


def make(problem: Problem) -> Tensors:
    """The tensors of a problem: values drawn in float32 on the CPU by its seed, rounded, laid out, on its device."""
    generator = torch.Generator().manual_seed(problem.seed)
    (num_queries, num_keys), heads, key_heads = problem.lengths, problem.heads, problem.key_heads
    value_size = problem.value_size or problem.size
    shapes = [
        (heads, num_queries, problem.size),
        (key_heads, num_keys, problem.size),
        (key_heads, num_keys, value_size),
    ]

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, k, v = (draw(problem.batch, *shape) for shape in shapes)
    tq, tk, tv = (draw(problem.batch, *shape) for shape in shapes)
    q, tq = q * problem.gain, tq * problem.tangent_gain
    k, tk = k + problem.offset * draw(problem.size), tk + problem.offset * draw(problem.size)
    primals = [_lay_out(x.to(problem.device, problem.dtype), problem.layout) for x in (q, k, v)]
    other = {"BHND": "BHND", "BSHD": "BSHD", "holes": "BSHD"}[problem.layout]
    tangents = [
        _lay_out(x.to(problem.device, problem.dtype), other) if name in problem.tangents else None
        for name, x in zip("qkv", (tq, tk, tv), strict=True)
    ]
    return Tensors(*primals, *tangents, logits=_logits(problem, generator))


def _logits(problem: Problem, generator: torch.Generator) -> Logits:
    words = set(problem.mask.split())
    (num_queries, num_keys), batch, heads = problem.lengths, problem.batch, problem.heads
    diagonals = {"causal": 0, "bottom_right": num_keys - num_queries, "before": -3}
    bias = kv_lens = None
    if "bias" in words:  # one for all heads: a stride of 0, in the dtype of the inputs
        bias = torch.randn(batch, 1, num_queries, num_keys, generator=generator).to(problem.device, problem.dtype)
    if "boolean" in words:  # as keys that a batch element lacks: strides of 0 for heads and queries
        bias = (torch.rand(batch, 1, 1, num_keys, generator=generator) < 0.7).to(problem.device)
        bias[..., num_keys // 2] = True
    if "kv_lens" in words or "empty" in words:
        lens = [
            0 if "empty" in words else max(1, num_keys - 10),
            *[max(1, num_keys // 4 + i) for i in range(batch - 1)],
        ]
        kv_lens = torch.tensor(lens, dtype=torch.int32, device=problem.device).clamp(max=num_keys)
    return Logits(
        scale=problem.size**-0.5,
        softcap=3.0 if "softcap" in words else 0.0,
        diagonal=next((diagonals[word] for word in diagonals if word in words), None),
        bias=None if bias is None else bias.expand(batch, heads, num_queries, num_keys),
        kv_lens=kv_lens,
    )


# shapes of a bias as M, N and whether it is of another row length in memory: what broadcasts, and what is read how
BIAS_SHAPES = [("rows", "keys"), ("rows", "one"), ("one", "keys"), ("one", "one"), ("rows", "slice")]


def with_bias(problem: Problem, shape: tuple[str, str], boolean: bool) -> Tensors:
    """The tensors of a problem with a bias per head of one of BIAS_SHAPES; if boolean, some query may see nothing."""
    tensors, (num_queries, num_keys) = make(problem), problem.lengths
    sizes = {"rows": num_queries, "keys": num_keys, "one": 1, "slice": num_keys + 5}
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(problem.batch, problem.heads, *(sizes[name] for name in shape), generator=generator)
    bias = (drawn > -0.7 if boolean else drawn.to(problem.dtype)).to(problem.device)
    if shape[1] == "slice":
        bias = bias[..., 3 : 3 + num_keys]
    bias = bias.expand(problem.batch, problem.heads, num_queries, num_keys)
    return replace(tensors, logits=replace(tensors.logits, bias=bias))


def _answer(tensors: Tensors, dtype: torch.dtype) -> Answer:
    primals = tuple(x.to(dtype) for x in tensors.primals)
    tangents = tuple(
        torch.zeros_like(x) if t is None else t.to(dtype) for x, t in zip(primals, tensors.tangents, strict=True)
    )
    (o, lse), (to, mu) = torch.func.jvp(lambda *x: reference.attention(*x, tensors.logits), primals, tangents)
    return Answer(o, to, lse, mu)


def truth(tensors: Tensors) -> Answer:
    """The answer in float64 for exactly these (rounded) tensors."""
    return _answer(tensors, torch.float64)


def plain(tensors: Tensors) -> Answer:
    """What ordinary attention gives under torch.func.jvp in the dtype of the inputs."""
    return _answer(tensors, tensors.q.dtype)


def relative_error(ours: Tensor, true: Tensor) -> float:
    """The L2 norm of the difference over that of the truth (the norm itself where the truth is zero); nan stays nan."""
    difference = torch.linalg.vector_norm(ours.double() - true)
    norm = torch.linalg.vector_norm(true)
    return (difference / norm if norm > 0 else difference).item()


def covering(base: Problem, **axes: list) -> list[Problem]:
    """Problems in which every pair of values of any two axes occurs, found greedily from a fixed seed."""
    names, rng = list(axes), random.Random(0)
    missing = {
        (one, other, x, y)
        for one, other in itertools.combinations(range(len(names)), 2)
        for x in range(len(axes[names[one]]))
        for y in range(len(axes[names[other]]))
    }
    problems = []
    while missing:
        seed = rng.choice(sorted(missing))
        best, best_covered = None, set()
        for _ in range(60):
            row = [rng.randrange(len(axes[name])) for name in names]
            row[seed[0]], row[seed[1]] = seed[2], seed[3]
            covered = {(i, j, row[i], row[j]) for i, j in itertools.combinations(range(len(names)), 2)} & missing
            if len(covered) > len(best_covered):
                best, best_covered = row, covered
        missing -= best_covered
        values = {name: axes[name][index] for name, index in zip(names, best, strict=True)}
        problems.append(replace(base, **values, seed=len(problems)))
    return problems


def has_one_key(problem: Problem) -> bool:
    """Whether no query sees more than one key. Then P does not move, and the tangent of O is that of v alone."""
    num_queries, num_keys = problem.lengths
    return num_keys == 1 or (num_queries == 1 and bool({"causal", "before"} & set(problem.mask.split())))


def solvable(problems: list[Problem]) -> list[Problem]:
    """The problems whose tangent is not zero; where it is zero there is no relative error (see has_one_key)."""
    return [p if "v" in p.tangents or not has_one_key(p) else replace(p, tangents=p.tangents + "v") for p in problems]
