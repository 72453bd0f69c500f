"""jvp_block is torch.func.jvp of a block with its tangent held constant, at the memory of the block's inputs."""

import functools
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flash_jvp import attention
from flash_jvp.blocks import jvp_block
from flash_jvp.modes import dual_attention

EXACT = dict(rtol=1e-11, atol=1e-11)  # float64: only the order of sums differs


class Block(nn.Module):
    """A DiT block: hidden states and an embedding of the time carry tangents, a context does not."""

    def __init__(self, dim=16, heads=2, dropout=0.0, attend=attention):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.modulate, self.dropout, self.heads, self.attend = (
            nn.Linear(dim, 2 * dim),
            nn.Dropout(dropout),
            heads,
            attend,
        )
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, time=None, context=None):
        hidden = self.norm(x)
        if time is not None:
            shift, scale = self.modulate(time)[:, None].chunk(2, -1)
            hidden = hidden * (1 + scale) + shift
        q, k, v = self.qkv(hidden).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.dropout(self.out(self.attend(q, k, v).transpose(1, 2).flatten(2)))
        return x + self.mlp(x if context is None else x * context)


def written_out(q, k, v):
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


class TwoStreams(nn.Module):
    """An SD3 block: two streams go in and come out, the last one without the second."""

    def __init__(self, dim=16, last=False):
        super().__init__()
        self.of_hidden, self.of_context, self.last = Block(dim), nn.Linear(dim, dim), last

    def forward(self, hidden, context, time):
        joined = self.of_hidden(torch.cat([hidden, self.of_context(context)], 1), time)
        hidden, context = joined.split([hidden.shape[1], context.shape[1]], 1)
        return None if self.last else context, hidden


@pytest.fixture(autouse=True)
def double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def draw(*shapes, grad=True):
    return [torch.randn(shape).requires_grad_(grad) for shape in shapes]


def loss(o, to):
    return ((o - to.detach()) ** 2).mean() + o.sin().sum()


def gradients_of(network, leaves, run):
    """What run() returns, detached, and the gradients of its loss with respect to leaves and parameters."""
    o, to = run()
    wanted = [*leaves, *network.parameters()]
    return (o.detach(), to.detach()), torch.autograd.grad(loss(o, to), wanted, allow_unused=True)


def assert_same(ours, truth, **tolerance):
    torch.testing.assert_close(tree_leaves(ours), tree_leaves(truth), **(tolerance or EXACT))


@pytest.mark.parametrize("way", ["backward", "grad"])
@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_chain_of_blocks_equals_the_jvp_of_all(checkpoint, way):
    blocks = nn.ModuleList(Block() for _ in range(3))
    x, time, context = leaves = draw((2, 7, 16), (2, 16), (7, 16))
    tx, ttime = draw((2, 7, 16), (2, 16), grad=False)

    def whole(x, time):
        for block in blocks:
            x = block(x, time, context)
        return x

    def chain():
        o, to = x, tx
        for block in blocks:
            o, to = jvp_block(block, (o, time), (to, ttime), context=context, checkpoint=checkpoint)
        return o, to

    expected = gradients_of(blocks, leaves, lambda: torch.func.jvp(whole, (x, time), (tx, ttime)))
    if way == "grad":
        assert_same(gradients_of(blocks, leaves, chain), expected)
        return
    o, to = chain()
    assert not to.requires_grad
    loss(o, to).backward()
    assert_same((o, to), expected[0])
    assert_same([leaf.grad for leaf in (*leaves, *blocks.parameters())], expected[1])


def test_an_input_without_tangent_has_none():
    block = Block()
    x, time = leaves = draw((2, 7, 16), (2, 16))
    (tx,) = draw((2, 7, 16), grad=False)
    ours = gradients_of(block, leaves, lambda: jvp_block(block, (x, time), (tx, None)))
    truth = gradients_of(block, leaves, lambda: torch.func.jvp(lambda x: block(x, time), (x,), (tx,)))
    assert_same(ours, truth)


@pytest.mark.parametrize("last", [False, True])
def test_two_streams_come_out_as_they_went_in(last):
    block = TwoStreams(last=last)
    hidden, context, time = leaves = draw((2, 7, 16), (2, 3, 16), (2, 16))
    tangents = draw((2, 7, 16), (2, 3, 16), (2, 16), grad=False)
    names = ("hidden", "context", "time")

    def ours():
        x, tx = dict(zip(names, leaves, strict=True)), dict(zip(names, tangents, strict=True))
        (context_out, o), (tcontext_out, to) = jvp_block(block, x, tx)
        if last:
            assert context_out is None and tcontext_out is None
            return o, to
        return torch.cat([context_out, o], 1), torch.cat([tcontext_out, to], 1)

    def truth():
        def tensors(*x):
            return tuple(o for o in block(*x) if o is not None)

        o, to = torch.func.jvp(tensors, tuple(leaves), tuple(tangents))
        return torch.cat(o, 1), torch.cat(to, 1)

    assert_same(gradients_of(block, leaves, ours), gradients_of(block, leaves, truth))


def test_an_input_may_come_out_as_it_is():
    (x, other), (tx,) = draw((2, 7, 16), (2, 16)), draw((2, 7, 16), grad=False)
    block = Block()
    (o, same), (to, tsame) = jvp_block(
        lambda x, other: (block(x), other), (x, other), (tx, None), parameters=block.parameters()
    )
    torch.testing.assert_close(tsame, torch.zeros_like(other))
    (o.sum() + 3 * same.sum()).backward()
    torch.testing.assert_close(other.grad, torch.full_like(other, 3))


@pytest.mark.parametrize("checkpoint", [True, False])
def test_with_tangent_grad_gradients_flow_through_the_tangent(checkpoint):
    block = Block()
    x, time, tx, context = leaves = draw((2, 7, 16), (2, 16), (2, 7, 16), (7, 16))

    def through(run):
        o, to = run()
        wanted = [*leaves, *block.parameters()]
        return (o, to), torch.autograd.grad((o * to).sin().sum() + to.square().sum(), wanted)

    def ours():
        return jvp_block(block, (x, time), (tx, None), context=context, checkpoint=checkpoint, tangent_grad=True)

    truth = through(lambda: torch.func.jvp(lambda x: block(x, time, context), (x,), (tx,)))
    assert_same(through(ours), truth)


def test_the_recomputed_tangent_is_routed_as_in_the_forward():
    """Backward is called outside of dual_attention, and torch's own attention has no forward mode."""
    block = Block(attend=functional.scaled_dot_product_attention)
    (x, tx) = leaves = draw((2, 7, 16), (2, 7, 16))
    with dual_attention():
        o, to = jvp_block(block, x, tx, tangent_grad=True)
    ours = torch.autograd.grad((o * to).sum(), leaves)
    block.attend = attention
    o, to = torch.func.jvp(block, (x,), (tx,))
    assert_same(ours, torch.autograd.grad((o * to).sum(), leaves))


def test_a_callable_names_its_parameters():
    block, weight = Block(), torch.randn(16, requires_grad=True)
    (x,), (tx,) = draw((2, 7, 16)), draw((2, 7, 16), grad=False)
    leaves, parameters = (x, weight), (weight, *block.parameters())

    def call(x):
        return block(x) * weight

    ours = gradients_of(block, leaves, lambda: jvp_block(call, x, tx, parameters=parameters))
    assert_same(ours, gradients_of(block, leaves, lambda: torch.func.jvp(call, (x,), (tx,))))


class Reads(nn.Module):
    def __init__(self, outer):
        super().__init__()
        self.linear, self.outer = nn.Linear(16, 16), [outer]

    def forward(self, x):
        return self.linear(x) * self.outer[0]


@pytest.mark.parametrize("derived", [False, True], ids=["leaf", "derived"])
@pytest.mark.parametrize("kind", ["module", "callable", "callable-alone"])
def test_a_leaf_that_is_not_declared_is_refused_in_backward(kind, derived):
    weight = torch.randn(16, requires_grad=True)
    block = Reads(weight.exp() if derived else weight)
    (x,), (tx,) = draw((2, 7, 16), grad=kind != "callable-alone"), draw((2, 7, 16), grad=False)
    if kind == "module":
        o, _ = jvp_block(block, x, tx)
    elif kind == "callable":
        o, _ = jvp_block(block.forward, x, tx, parameters=block.parameters())
    else:
        o, _ = jvp_block(lambda x: x * block.outer[0], x, tx, parameters=())
    with pytest.raises(RuntimeError, match=r"shape \(16,\) that requires a gradient.*name it in parameters="):
        o.sum().backward()


def test_a_callable_without_names_is_refused():
    x, tx = draw((2, 7, 16), (2, 7, 16), grad=False)
    with pytest.raises(ValueError, match="is not a module: give parameters="):
        jvp_block(Block().forward, x, tx)
    block = Block()
    with pytest.raises(ValueError, match="parameters are for callables"):
        jvp_block(block, x, tx, parameters=block.parameters())
    with pytest.raises(ValueError, match="must be leaf tensors.*Exp"):
        jvp_block(torch.sin, x, tx, parameters=[x.clone().requires_grad_().exp()])
    block.out.weight.register_hook(lambda gradient: 2 * gradient)
    with pytest.raises(ValueError, match="a gradient hook, which would run twice"):
        jvp_block(block.forward, x, tx, parameters=block.parameters())


def test_hooks_on_the_parameters_of_a_module_run_once():
    block = Block()
    (x,), (tx,) = draw((2, 7, 16)), draw((2, 7, 16), grad=False)
    _, plain = gradients_of(block, [x], lambda: jvp_block(block, x, tx))
    block.out.weight.register_hook(lambda gradient: 2 * gradient)
    loss(*jvp_block(block, x, tx)).backward()
    names = [name for name, _ in block.named_parameters()]
    torch.testing.assert_close(block.out.weight.grad, 2 * plain[1 + names.index("out.weight")], **EXACT)


def test_frozen_and_tied_parameters_are_as_in_autograd():
    block = Block()
    block.mlp[3].bias, block.norm.weight = block.out.bias, block.mlp[0].weight
    block.qkv.weight.requires_grad_(False)
    (x,), (tx,) = draw((2, 7, 16)), draw((2, 7, 16), grad=False)
    trained = [x, *(p for p in block.parameters() if p.requires_grad)]
    expected = torch.autograd.grad(loss(*torch.func.jvp(block, (x,), (tx,))), trained, allow_unused=True)
    value = loss(*jvp_block(block, x, tx))
    block.requires_grad_(True)  # too late: what requires a gradient is settled in the forward
    value.backward()
    assert block.qkv.weight.grad is None
    assert_same([leaf.grad for leaf in trained], list(expected))


def test_the_recomputation_sees_the_masks_of_the_forward_and_leaves_no_trace():
    block = Block(dropout=0.5)
    (x,), (tx,) = draw((2, 7, 16)), draw((2, 7, 16), grad=False)

    def seeded(run):
        torch.manual_seed(7)
        made = gradients_of(block, [x], run)
        return made, torch.rand(3)

    def ours():
        o, to = jvp_block(block, x, tx)
        torch.rand(5)  # the state that backward finds is not the state of the forward
        return o, to

    def truth():
        o, to = torch.func.jvp(block, (x,), (tx,))
        torch.rand(5)
        return o, to

    assert_same(seeded(ours), seeded(truth))


def test_autocast_is_that_of_the_forward():
    block = Block(attend=written_out).float()  # the same operations with a tangent and without
    (x,), (tx,) = draw((2, 7, 16)), draw((2, 7, 16), grad=False)
    x, tx = x.detach().float().requires_grad_(), tx.float()

    def under_autocast(run):
        with torch.autocast("cpu", torch.bfloat16):
            o, to = run()
        wanted = [x, *(p for name, p in block.named_parameters() if not name.startswith("modulate"))]
        return (o, to.detach()), torch.autograd.grad(loss(o.double(), to.double()), wanted)

    ours = under_autocast(lambda: jvp_block(block, x, tx))
    truth = under_autocast(lambda: torch.func.jvp(block, (x,), (tx,)))
    # a recomputation in float32 would differ by some 1e-2
    assert_same(ours, truth, rtol=1e-5, atol=1e-6)


def test_a_weight_that_is_cast_in_a_block_still_has_its_gradient_outside():
    """Autocast caches casts of weights; one made without a graph would cut the graph of whoever meets it."""
    linear = nn.Linear(16, 16).float()
    x, tx = (torch.randn(2, 16, dtype=torch.float32) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        jvp_block(linear, x, tx)
        outside = linear(x)
    outside.float().sum().backward()
    assert linear.weight.grad is not None


@pytest.mark.parametrize("function", [torch.sin, torch.clone], ids=["cotangents with a graph", "without one"])
def test_a_second_derivative_is_refused(function):
    block = Block()
    (x,), (tx,) = draw((2, 7, 16)), draw((2, 7, 16), grad=False)
    (gradient,) = torch.autograd.grad(function(jvp_block(block, x, tx)[0]).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; pass checkpoint=False"):
        (gradient.square().sum() + x.sum()).backward()


@pytest.mark.parametrize("transform", ["grad", "jvp", "dual_level"])
def test_another_derivative_around_it_is_refused(transform):
    block = Block()
    x, tx = draw((2, 7, 16), (2, 7, 16), grad=False)
    if transform == "grad":
        with pytest.raises(RuntimeError, match="setup_context"):
            torch.func.grad(lambda x: jvp_block(block, x, tx)[0].sum())(x)
    elif transform == "jvp":
        with pytest.raises(ValueError, match="carries a tangent of its own"):
            torch.func.jvp(lambda x: jvp_block(block, x, tx)[0], (x,), (tx,))
    else:
        with torch.autograd.forward_ad.dual_level(), pytest.raises(ValueError, match="carries a tangent of its own"):
            jvp_block(block, torch.autograd.forward_ad.make_dual(x, tx), tx)


def test_what_changed_since_the_forward_is_refused():
    block = Block()
    (x,), (tx,) = draw((2, 7, 16)), draw((2, 7, 16), grad=False)
    value = loss(*jvp_block(block, x, tx))
    with torch.no_grad():
        block.out.weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
    value = loss(*jvp_block(block, x, tx))
    block.dropout.eval()
    with pytest.raises(RuntimeError, match="between its forward and its backward"):
        value.backward()


def test_an_input_changed_by_the_block_is_refused():
    x, tx = draw((2, 7, 16), (2, 7, 16), grad=False)
    with pytest.raises(RuntimeError, match="would mutate a captured Tensor"):
        jvp_block(lambda x, constant: x * constant.add_(1), x, tx, torch.ones(16), parameters=())
    with pytest.raises(ValueError, match="changed an input in place"):
        jvp_block(lambda x: x.add_(1).sin(), x, tx, parameters=())


def test_structures_that_do_not_fit_are_refused():
    x, tx = draw((2, 7, 16), (2, 7, 16), grad=False)
    run = functools.partial(jvp_block, Block())
    with pytest.raises(ValueError, match="same structure, got tuple and Tensor"):
        run((x,), tx)
    with pytest.raises(ValueError, match="same structure"):
        run({"x": x}, {"y": tx})
    with pytest.raises(ValueError, match="zip"):
        run((x, x), (tx,))
    with pytest.raises(ValueError, match="shape and dtype of its primal"):
        run(x, tx[:1])
    with pytest.raises(ValueError, match="shape and dtype of its primal"):
        run(x, tx.float())
    with pytest.raises(ValueError, match="no tangent; call the block itself"):
        run((x,), (None,))
    with pytest.raises(ValueError, match="must be a tensor, a tuple or a dict"):
        run([x], [tx])
    with pytest.raises(ValueError, match="x must hold tensors, got a float"):
        run((x, 1.0), (tx, None))
    with pytest.raises(ValueError, match="tensors and None only, got a str"):
        jvp_block(lambda x: (x, "text"), x, tx, parameters=())


def test_without_grad_there_is_no_graph_and_the_same_tangent():
    block = Block()
    x, tx = draw((2, 7, 16), (2, 7, 16), grad=False)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            o, to = jvp_block(block, x, tx)
            assert not o.requires_grad
            assert_same((o.clone(), to.clone()), torch.func.jvp(block, (x,), (tx,)))


class Living(TorchDispatchMode):
    """The bytes of all storages that were made within and are still alive."""

    def __init__(self, before):
        super().__init__()
        self.storages, self.before = {}, {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.storages and storage._cdata not in self.before:
                    self.storages[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.storages.pop, storage._cdata, None)
        return result

    @property
    def held(self):
        return sum(self.storages.values())


def test_blocks_hold_their_inputs_and_nothing_else():
    blocks = nn.Sequential(*(Block(64, 4) for _ in range(4))).float()
    x, tx = torch.randn(2, 1, 256, 64, dtype=torch.float32).unbind(0)
    of_one = x.nbytes

    def chain(**options):
        o, to = x, tx
        for block in blocks:
            o, to = jvp_block(block, o, to, **options)
        return o, to

    held = {}
    runs = {
        "ours": chain,
        "both": lambda: chain(tangent_grad=True),
        "plain": lambda: blocks(x),
        "jvp": lambda: torch.func.jvp(blocks, (x,), (tx,)),
    }
    for name, run in runs.items():
        with Living([x, *blocks.parameters()]) as living:
            made = run()
            held[name] = living.held
        del made
    # an input of each block but the first, o and to of the last, and 5 KiB of random state a block
    assert held["ours"] <= (len(blocks) + 1) * of_one + len(blocks) * 6000
    assert held["both"] <= 2 * len(blocks) * of_one + len(blocks) * 6000  # the tangents as well
    assert held["plain"] > 8 * held["ours"]
    assert held["jvp"] > 16 * held["ours"]
