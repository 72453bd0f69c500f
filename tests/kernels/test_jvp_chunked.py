"""The row-chunked path of flash_jvp against float64: outputs, tangents, all gradients, and memory."""

import itertools
import random
import weakref
from dataclasses import replace

import pytest
import torch
from problems import DEVICES, FORWARD_TOLERANCE, GRADIENT_TOLERANCE, MASKS, Problem, Tensors, make
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flash_jvp import chunked, reference
from flash_jvp.logits import statistics_dtype

FORWARD = FORWARD_TOLERANCE | {torch.float64: 1e-12}
GRADIENT = GRADIENT_TOLERANCE | {torch.float64: 1e-12}
LENGTHS = [(64, 64), (33, 70), (70, 33), (1, 77), (257, 257)]


def matrix() -> list[Problem]:
    """Every dtype with every mask at every pair of lengths; the other axes drawn, from a fixed seed."""
    rng = random.Random(0)
    problems = []
    for dtype, mask, lengths in itertools.product(FORWARD, [*MASKS, "empty", "empty boolean"], LENGTHS):
        heads, key_heads = rng.choice([(2, 2), (4, 2), (4, 1)])
        problem = Problem(
            lengths=lengths,
            size=rng.choice([16, 64, 72, 128]),
            value_size=rng.choice([0, 0, 24]),
            heads=heads,
            key_heads=key_heads,
            dtype=dtype,
            mask=mask,
            tangents=rng.choice(["qkv", "qkv", "q", "k", "v", "qk", ""]),
            layout=rng.choice(["BHND", "BSHD", "holes"]),
            device=rng.choice(DEVICES),
            seed=len(problems),
        )
        problems.append(problem)
    return problems


def cotangents(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Of O and tO, in their dtype; of O, laid out as a network would: heads last."""
    generator = torch.Generator().manual_seed(1)
    shape = (*tensors.q.shape[:3], tensors.v.shape[-1])
    do, dto = (torch.randn(shape, generator=generator).to(tensors.q) for _ in range(2))
    return do.transpose(1, 2).contiguous().transpose(1, 2), dto


def by_autograd(tensors: Tensors, dtype: torch.dtype, do: Tensor | None, dto: Tensor | None):
    """O, tO and the gradients of q, k, v, tq, tk, tv (None where the tangent is None), by autograd of the reference."""
    inputs = [
        None if x is None else x.to(dtype).detach().requires_grad_() for x in (*tensors.primals, *tensors.tangents)
    ]
    o, to, _ = reference.attention_jvp(*inputs, tensors.logits)
    loss = sum((x * c.to(dtype)).sum() for x, c in ((o, do), (to, dto)) if c is not None)
    present = [x for x in inputs if x is not None]
    found = iter(torch.autograd.grad(loss, present, materialize_grads=True))
    return o.detach(), to.detach(), [None if x is None else next(found) for x in inputs]


def by_chunks(tensors: Tensors, do: Tensor | None, dto: Tensor | None):
    o, to, lse, mu = chunked.forward_tangent(*tensors.primals, *tensors.tangents, tensors.logits)
    if dto is None:
        return o, to, [*chunked.backward(*tensors.primals, o, lse, do, tensors.logits), None, None, None]
    saved = (o, to, lse, mu)
    gradients = chunked.backward_tangent(*tensors.primals, *tensors.tangents, *saved, do, dto, tensors.logits)
    return o, to, list(gradients)


def error(ours: Tensor, true: Tensor, scale: Tensor) -> float:
    """Relative L2 error; where the truth all but cancels, relative to a tenth of the scale of its terms."""
    assert ours.shape == true.shape
    if not true.any():
        return torch.linalg.vector_norm(ours).item()
    floor = 0.1 * torch.linalg.vector_norm(scale.double()) * (true.numel() / scale.numel()) ** 0.5
    size = torch.maximum(torch.linalg.vector_norm(true.double()), floor)
    return (torch.linalg.vector_norm(ours.double() - true.double()) / size).item()


def check(tensors: Tensors, do: Tensor | None, dto: Tensor | None, unavoidable: float = 0.0) -> None:
    """Within the tolerance of the dtype, and no worse than autograd of ordinary attention in the same dtype."""
    dtype = tensors.q.dtype
    plain = dtype != torch.float64
    o, to, gradients = by_chunks(tensors, do, dto)
    true_o, true_to, true_gradients = by_autograd(tensors, torch.float64, do, dto)
    plain_o, plain_to, plain_gradients = by_autograd(tensors, dtype, do, dto) if plain else (None, None, [None] * 6)
    scale = max((x for x in true_gradients if x is not None), key=lambda x: x.square().mean())
    cases = [("o", o, true_o, plain_o, true_o), ("to", to, true_to, plain_to, true_o)]
    for name, ours, true, autograds in zip(
        "q k v tq tk tv".split(), gradients, true_gradients, plain_gradients, strict=True
    ):
        assert (ours is None) == (true is None or (dto is None and name.startswith("t")))
        if ours is not None:
            cases.append((f"d{name}", ours, true, autograds, scale))
    for name, ours, true, autograds, size in cases:
        assert ours.dtype == dtype
        found = error(ours, true, size)
        bound = (GRADIENT if name.startswith("d") else FORWARD)[dtype] + unavoidable
        assert found <= bound, f"{name} is off by {found:.2e}, more than {bound:.1e}"
        if plain:
            # in float32 the two differ by the order of sums alone, and luck decides whose rounding is less
            usual, luck = error(autograds, true, size), 2 if dtype == torch.float32 else 1.25
            assert found <= luck * usual + torch.finfo(dtype).eps / 4, f"{name}: {found:.2e}, autograd {usual:.2e}"


@pytest.mark.parametrize("problem", matrix(), ids=str)
def test_outputs_tangents_and_gradients_match_float64_and_are_no_worse_than_autograd(problem):
    tensors = make(problem)
    do, dto = cotangents(tensors)
    check(tensors, do, dto)


@pytest.mark.parametrize("problem", matrix()[::7], ids=str)
def test_a_cotangent_may_be_absent(problem):
    tensors = make(problem)
    do, dto = cotangents(tensors)
    check(tensors, do, None)
    check(tensors, None, dto)


@pytest.mark.parametrize("mask", ["full", "bias", "before"])
@pytest.mark.parametrize("dtype", FORWARD, ids=str)
def test_logits_of_several_hundred_neither_overflow_nor_lose_accuracy(dtype, mask):
    tensors = make(Problem(size=64, dtype=dtype, mask=mask, gain=40.0, tangent_gain=40.0))
    # a logit of 170 rounded to float32 is off by up to 8e-6, and its exponential by as much of itself
    largest = tensors.logits.scale * (tensors.q.double() @ tensors.k.double().mT).abs().max().item()
    assert largest > 150
    check(tensors, *cotangents(tensors), unavoidable=largest * torch.finfo(statistics_dtype(dtype)).eps / 2)


@pytest.mark.parametrize("values", [False, True], ids=["keys", "keys and values"])
@pytest.mark.parametrize("dtype", FORWARD, ids=str)
def test_what_keys_or_values_have_in_common_costs_no_accuracy(dtype, values):
    """10 sigma in common: the logits of a row are alike, of several hundred, and O is ten times its own variation."""
    tensors = make(Problem(lengths=(64, 128), size=64, dtype=dtype, offset=10.0))
    if values:
        common = 10 * torch.randn(2, 1, 1, 1, 64, generator=torch.Generator().manual_seed(2))
        tensors = replace(tensors, v=(tensors.v + common[0]).to(dtype), tv=(tensors.tv + common[1]).to(dtype))
    check(tensors, *cotangents(tensors))


@pytest.mark.parametrize("dtype", FORWARD, ids=str)
def test_nothing_beyond_the_last_key_is_read(dtype):
    tensors = make(Problem(dtype=dtype, mask="kv_lens", heads=4))
    do, dto = cotangents(tensors)
    o, to, gradients = by_chunks(tensors, do, dto)
    unseen = ~tensors.logits.sees_by_length(tensors.k.shape[2], tensors.k.device)[..., None]
    names = ("k", "v", "tk", "tv")
    spoiled = replace(tensors, **{name: getattr(tensors, name).masked_fill(unseen, torch.nan) for name in names})
    same = by_chunks(spoiled, do, dto)
    torch.testing.assert_close((o, to, gradients), (same[0], same[1], same[2]), rtol=0, atol=0)
    for gradient in (gradients[1], gradients[2], gradients[4], gradients[5]):
        assert (gradient.masked_select(unseen) == 0).all()


@pytest.mark.parametrize("mask", ["before", "empty"])
def test_a_query_that_sees_no_key_gives_zero_whatever_lies_in_its_row(mask):
    tensors = make(Problem(mask=mask, dtype=torch.float64))
    do, dto = cotangents(tensors)
    o, to, lse, mu = chunked.forward_tangent(*tensors.primals, *tensors.tangents, tensors.logits)
    blind = lse == -torch.inf
    assert blind.any() and not blind.all()
    assert (o[blind] == 0).all() and (to[blind] == 0).all() and (mu[blind] == 0).all()
    gradients = by_chunks(tensors, do, dto)[2]
    assert (gradients[0][blind] == 0).all() and (gradients[3][blind] == 0).all()
    other = by_chunks(tensors, do.masked_fill(blind[..., None], 7.0), dto.masked_fill(blind[..., None], -9.0))[2]
    torch.testing.assert_close(gradients, other, rtol=0, atol=0)


@pytest.mark.parametrize("mask", ["full", "softcap bias", "before", "causal kv_lens", "boolean"])
def test_the_statistics_are_the_log_sum_exp_and_its_tangent(mask):
    tensors = make(Problem(mask=mask, dtype=torch.float64, heads=4, offset=10.0))
    _, _, lse, mu = chunked.forward_tangent(*tensors.primals, *tensors.tangents, tensors.logits)
    expected = torch.func.jvp(lambda *x: reference.attention(*x, tensors.logits)[1], tensors.primals, tensors.tangents)
    torch.testing.assert_close((lse, mu), expected, rtol=1e-12, atol=1e-11)
    _, alone = chunked.forward(*tensors.primals, tensors.logits)
    torch.testing.assert_close(alone, lse, rtol=0, atol=0)


@pytest.mark.parametrize("mask", [*MASKS, "empty"])
def test_the_size_of_a_block_changes_nothing(mask, monkeypatch):
    tensors = make(Problem(mask=mask, dtype=torch.float64, heads=4, batch=3, lengths=(37, 41)))
    do, dto = cotangents(tensors)
    whole = by_chunks(tensors, do, dto)
    for scores in (1, 4 * 41 * 20, 4 * 41 * 37 * 2):  # 16 rows at a time, 20 rows, two batch elements
        monkeypatch.setattr(chunked, "BLOCK_SCORES", (scores, scores))
        torch.testing.assert_close(by_chunks(tensors, do, dto), whole, rtol=1e-12, atol=1e-13)


def test_the_output_keeps_the_memory_order_of_the_queries():
    for layout, rows_outside_heads in (("BHND", False), ("BSHD", True)):
        tensors = make(Problem(layout=layout, heads=4))
        o, to, _, _ = chunked.forward_tangent(*tensors.primals, *tensors.tangents, tensors.logits)
        alone, _ = chunked.forward(*tensors.primals, tensors.logits)
        for x in (o, to, alone):
            assert (x.stride(1) < x.stride(2)) == rows_outside_heads
            assert (x.transpose(1, 2) if rows_outside_heads else x).is_contiguous()


def test_queries_keys_and_values_may_be_slices_of_one_projection():
    fused, tangents = torch.randn(2, 2, 19, 3, 4, 16, dtype=torch.float64).unbind(0)
    sliced = [x.transpose(1, 2) for x in (*fused.unbind(2), *tangents.unbind(2))]
    logits = make(Problem()).logits
    do, dto = torch.randn(2, 2, 4, 19, 16, dtype=torch.float64).unbind(0)
    ours = by_chunks(Tensors(*sliced, logits=logits), do, dto)
    apart = by_chunks(Tensors(*(x.contiguous() for x in sliced), logits=logits), do, dto)
    torch.testing.assert_close(ours, apart, rtol=1e-13, atol=1e-13)


class Peak(TorchDispatchMode):
    """The most bytes that storages created under it held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.most, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self._follow(x.untyped_storage())
        return result

    def _follow(self, storage) -> None:
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self.known or not size:
            return
        self.known.add(key)
        self.live += size
        self.most = max(self.most, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


@pytest.mark.parametrize("mask", ["full", "softcap", "causal kv_lens"])
@pytest.mark.parametrize("step", ["forward", "backward"])
def test_memory_is_linear_in_the_length(step, mask, monkeypatch):
    monkeypatch.setattr(chunked, "BLOCK_SCORES", (1 << 12, 1 << 12))

    def peak(length: int) -> int:
        tensors = make(Problem(lengths=(length, length), mask=mask, batch=1))
        do, dto = cotangents(tensors)
        with Peak() as mode:
            if step == "forward":
                chunked.forward_tangent(*tensors.primals, *tensors.tangents, tensors.logits)
            else:
                by_chunks(tensors, do, dto)
        return mode.most

    short, long = peak(512), peak(1024)
    assert 1.5 * short < long < 2.1 * short  # one matrix of all queries by all keys would make it 4
    assert long < 1024 * 1024 * 4  # less than one such matrix, of the 2 heads
