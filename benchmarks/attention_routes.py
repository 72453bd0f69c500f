"""The attentions that are compared, on one set of inputs, and how far each is from float64."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import flash_jvp
from flash_jvp import reference
from flash_jvp.logits import Logits

Outputs = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Shape:
    """The sizes of one attention; `tangents` says which of q, k and v have one."""

    name: str
    batch: int
    heads: int
    queries: int
    keys: int
    size: int
    tangents: str = "qkv"
    layout: str = "BHND"

    @property
    def products(self) -> int:
        """Products of 2 B H M N d operations in primal and tangent: 6 with all tangents, 4 with only that of q."""
        return 2 + len(self.tangents) + ("q" in self.tangents or "k" in self.tangents)

    def flop(self, products: int) -> float:
        return 2.0 * products * self.batch * self.heads * self.queries * self.keys * self.size

    def minimal_bytes(self, element: int) -> float:
        """Every input read once; o, to, log-sum-exp and mu written once."""
        rows = 1 + ("q" in self.tangents) + 2
        keys = 2 + ("k" in self.tangents) + ("v" in self.tangents)
        per_head = (rows * self.queries + keys * self.keys) * self.size * element + 8 * self.queries
        return float(self.batch * self.heads * per_head)


@dataclass(frozen=True)
class Inputs:
    """q, k, v and their tangents, None where zero."""

    shape: Shape
    primals: tuple[Tensor, Tensor, Tensor]
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None]

    @classmethod
    def draw(cls, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        """Standard normal values."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(rows: int) -> Tensor:
            if shape.layout == "BSHD":
                return normal_of(shape.batch, rows, shape.heads, shape.size).transpose(1, 2)
            return normal_of(shape.batch, shape.heads, rows, shape.size)

        def normal_of(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator, dtype=dtype, device=device)

        rows = {"q": shape.queries, "k": shape.keys, "v": shape.keys}
        primals = tuple(normal(rows[name]) for name in "qkv")
        tangents = tuple(normal(rows[name]) if name in shape.tangents else None for name in "qkv")
        return cls(shape, primals, tangents)

    @property
    def logits(self) -> Logits:
        return Logits(scale=self.shape.size**-0.5)

    def all_tangents(self) -> tuple[Tensor, ...]:
        """The tangents, with zeros where there are none, for those who ask for all."""
        pairs = zip(self.primals, self.tangents, strict=True)
        return tuple(torch.zeros_like(x) if t is None else t for x, t in pairs)


def ours(inputs: Inputs, backend: str) -> Outputs:
    o, to, _ = flash_jvp.attention_jvp(*inputs.primals, *inputs.tangents, backend=backend)
    return o, to


def plain_forward(inputs: Inputs, backend: SDPBackend) -> Outputs:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(*inputs.primals), None


def our_forward(inputs: Inputs) -> Outputs:
    return flash_jvp.attention(*inputs.primals, backend="triton"), None


def differentiated(function: Callable[..., Tensor], inputs: Inputs) -> Outputs:
    """Under torch.func.jvp, in the tangents that are not zero."""
    moving = [index for index, tangent in enumerate(inputs.tangents) if tangent is not None]

    def moved(*tensors: Tensor) -> Tensor:
        at = list(inputs.primals)
        for index, tensor in zip(moving, tensors, strict=True):
            at[index] = tensor
        return function(*at)

    return torch.func.jvp(moved, tuple(inputs.primals[i] for i in moving), tuple(inputs.tangents[i] for i in moving))


def math_jvp(inputs: Inputs) -> Outputs:
    with sdpa_kernel(SDPBackend.MATH):
        return differentiated(scaled_dot_product_attention, inputs)


def naive_jvp(inputs: Inputs) -> Outputs:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * inputs.logits.scale).softmax(-1) @ v

    return differentiated(attention, inputs)


def foreign_jvp(inputs: Inputs) -> Outputs:
    """jvp_flash_attention of PyPI (MIT), which wants all tangents, contiguous tensors and lengths that 32 divides."""
    from jvp_flash_attention.jvp_attention import JVPAttn

    return torch.func.jvp(JVPAttn.fwd_dual, inputs.primals, inputs.all_tangents())


def foreign_is_there() -> bool:
    return importlib.util.find_spec("jvp_flash_attention") is not None


ROUTES: dict[str, Callable[[Inputs], Outputs]] = {
    "chunked": partial(ours, backend="chunked"),
    "triton": partial(ours, backend="triton"),
    "split": partial(ours, backend="split"),
    "math func.jvp": math_jvp,
    "naive func.jvp": naive_jvp,
    "jvp_flash_attention": foreign_jvp,
    "flash forward": partial(plain_forward, backend=SDPBackend.FLASH_ATTENTION),
    "cudnn forward": partial(plain_forward, backend=SDPBackend.CUDNN_ATTENTION),
    "triton forward": our_forward,
}
OURS = ("chunked", "triton", "split", "triton forward")


@contextlib.contextmanager
def fresh_memory_is_nan() -> Iterator[None]:
    """torch fills what it allocates with nan, so that what a kernel leaves unwritten is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def relative_error(found: Tensor, true: Tensor) -> float:
    return (torch.linalg.vector_norm(found.double() - true) / torch.linalg.vector_norm(true)).item()


def errors(inputs: Inputs, outputs: Outputs, num_rows: int = 16, seed: int = 0) -> dict[str, float]:
    """Relative L2 errors of o and to against float64, in a sample of rows of the first and the last head.

    nan, wherever in the outputs, makes an error nan.
    """
    shape = inputs.shape
    others = torch.randint(shape.queries, (num_rows,), generator=torch.Generator().manual_seed(seed))
    rows = torch.cat([torch.tensor([0, shape.queries - 1]), others]).to(inputs.primals[0].device)

    def sample(x: Tensor | None, of_rows: bool) -> Tensor | None:
        if x is None:
            return None
        ends = x[[0, -1]][:, [0, -1]]
        return (ends[:, :, rows] if of_rows else ends).double()

    tensors = (sample(x, index % 3 == 0) for index, x in enumerate((*inputs.primals, *inputs.tangents)))
    o, to, _ = reference.attention_jvp(*tensors, inputs.logits)
    found = {}
    for name, output, true in (("o", outputs[0], o), ("to", outputs[1], to)):
        if output is not None:
            finite = bool(output.isfinite().all())
            found[name] = relative_error(sample(output, True), true) if finite else float("nan")
    return found


# what the tests ask of ours (tests/kernels/problems.py), of outputs and of gradients
TOLERANCE = {torch.float32: 2e-6, torch.float16: 7e-4, torch.bfloat16: 5e-3}
GRADIENT_TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def accurate(found: dict[str, float], limit: float) -> bool:
    """Whether every error is within the limit; nan is not."""
    return all(error <= limit for error in found.values())
