"""Two gloo processes compute what one does, tangents and gradients included. One spawn runs all cases."""

import itertools
import multiprocessing

import pytest
import torch
import torch.distributed as dist
from torch import nn

from flash_jvp import attention
from flash_jvp.blocks import jvp_block
from flash_jvp.ulysses import ulysses_attention

RANKS = 2
EXACT = dict(rtol=1e-12, atol=1e-12)  # float64: only the order of sums differs


class Block(nn.Module):
    def __init__(self, dim=16):
        super().__init__()
        self.norm, self.qkv, self.out, self.modulate = (
            nn.LayerNorm(dim),
            nn.Linear(dim, 3 * dim),
            nn.Linear(dim, dim),
            nn.Linear(dim, dim),
        )

    def forward(self, x, time):
        hidden = self.norm(x) * self.modulate(time)[:, None]
        q, k, v = self.qkv(hidden).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return x + self.out(attention(q, k, v).transpose(1, 2).flatten(2)).tanh()


class WithTangent(nn.Module):
    """A block and how it is called: what is sharded, so that FSDP2's hooks run outside of jvp_block."""

    def __init__(self, options):
        super().__init__()
        self.block, self.options = Block(), options

    def forward(self, x, tx, time, ttime):
        return jvp_block(self.block, (x, time), (tx, ttime), **self.options)


class Network(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.time, self.blocks = nn.Linear(16, 16), nn.ModuleList(WithTangent(options) for _ in range(3))

    def forward(self, x, tx, time, ttime):
        time, ttime = jvp_block(self.time, time, ttime)
        for block in self.blocks:
            x, tx = block(x, tx, time, ttime)
        return x, tx


WAYS = {
    "recomputed": {},
    "kept": {"checkpoint": False},
    "through the tangent": {"tangent_grad": True},
    "through the kept tangent": {"tangent_grad": True, "checkpoint": False},
}


def train(network, share=slice(None)):
    """Two steps of gradient descent; the output, the tangent, the gradients of both steps and the parameters."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((4, 6, 16), (4, 6, 16), (4, 16), (4, 16))
    optimizer, made = torch.optim.SGD(network.parameters(), lr=0.1), []
    for _ in range(2):
        x, tx, time, ttime = (torch.randn(shape, generator=generator, dtype=torch.float64)[share] for shape in shapes)
        o, to = network(x, tx, time, ttime)
        (o.sin().mean() + (o - to).square().mean()).backward()
        made += [o.detach(), to.detach(), *(whole(p.grad) for p in network.parameters())]
        optimizer.step()
        optimizer.zero_grad()
    return made + [whole(p.detach()) for p in network.parameters()]


def whole(x):
    return x.full_tensor() if isinstance(x, dist.tensor.DTensor) else x.clone()


def options(name):
    generator = torch.Generator().manual_seed(2)
    given = {
        "plain": {},
        "causal": {"causal": True},
        "top_left": {"causal": "top_left"},
        "kv_lens": {"kv_lens": torch.tensor([9, 14], dtype=torch.int32)},
        "bias of heads": {"attn_bias": torch.randn(4, 10, 14, generator=generator, dtype=torch.float64)},
        "bias": {"attn_bias": torch.randn(2, 1, 1, 14, generator=generator, dtype=torch.float64)},
        "boolean": {"attn_bias": torch.randn(2, 4, 10, 14, generator=generator, dtype=torch.float64) > -1},
        "softcap and scale": {"softcap": 2.0, "scale": 0.7},
    }
    return given[name]


OPTIONS = ["plain", "causal", "top_left", "kv_lens", "bias of heads", "bias", "boolean", "softcap and scale"]
CASES = {
    f"{name}, {key_heads} key heads, t{tangents}, {way}": (name, key_heads, tangents, way)
    for name, key_heads, tangents, way in [
        *itertools.product(OPTIONS, [4], ["qkv"], ["both"]),
        *itertools.product(["plain", "kv_lens"], [2], ["qkv", "q", "v", "k"], ["both", "detached"]),
        *itertools.product(["plain", "bias of heads"], [2], [""], ["both"]),
        *itertools.product(["plain"], [4], ["qkv", "q"], ["first rank", "dual_level"]),
    ]
}


def attend(run, name, key_heads, tangents, way, rank=0, ranks=1):
    """Output, tangent and gradients of this rank's stretch: queries of length 10, keys of length 14 in all."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"q": (2, 4, 10, 8), "k": (2, key_heads, 14, 8), "v": (2, key_heads, 14, 6)}

    def stretch(shape):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return x.chunk(ranks, 2)[rank].clone().requires_grad_()

    x = {key: stretch(shape) for key, shape in shapes.items()}
    tx = {key: stretch(shapes[key]) for key in tangents}
    cotangents = [stretch((2, 4, 10, 6)).detach() for _ in range(2)]
    given = options(name) | {"tangent_grad": way != "detached"}

    def function(**moved):
        return run(**(x | moved), **given)

    if not tx:
        o = function()
        gradients = torch.autograd.grad((o * cotangents[0]).sum(), x.values())
        return [o.detach(), *gradients]
    if way == "dual_level":
        dual = torch.autograd.forward_ad
        with dual.dual_level():
            o, to = dual.unpack_dual(function(**{key: dual.make_dual(x[key], tx[key]) for key in tx}))
    else:
        o, to = torch.func.jvp(
            lambda *y: function(**dict(zip(tx, y, strict=True))), tuple(x[key] for key in tx), tuple(tx.values())
        )
    assert to.requires_grad == (way != "detached")
    loss = (o * cotangents[0]).sum() + (to * cotangents[1]).sum()
    if way == "first rank":  # the ranks must still agree on what they send back
        first = [c.chunk(RANKS // ranks, 2)[0] * (rank == 0) for c in (o * cotangents[0], to * cotangents[1])]
        loss = first[0].sum() + first[1].sum()
    wanted = [*x.values(), *(tx.values() if way != "detached" else ())]
    return [o.detach(), to.detach(), *torch.autograd.grad(loss, wanted)]


def message_of(error, run):
    with pytest.raises(error) as raised:
        run()
    return str(raised.value)


def refusals():
    """What ulysses_attention and jvp_block say to what they refuse."""
    q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 1, 3, 8)
    sharded = fully_shard(Block().double())
    x, time = torch.randn(2, 3, 16), torch.randn(2, 16)
    compiled = torch.compile(lambda q: ulysses_attention(q, q, q), backend="eager", fullgraph=True)
    return {
        "heads": message_of(ValueError, lambda: ulysses_attention(q[:, :3], q, q)),
        "key heads": message_of(ValueError, lambda: ulysses_attention(q, k, k)),
        "bias": message_of(ValueError, lambda: ulysses_attention(q, q, q, attn_bias=torch.zeros(2, 6, 6))),
        "dimensions": message_of(ValueError, lambda: ulysses_attention(q[0], q, q)),
        "compile": message_of(Exception, lambda: compiled(q)),
        "sharded": message_of(ValueError, lambda: jvp_block(sharded, (x, time), (x, None))),
    }


def sent_numbers():
    """How many numbers each all-to-all carries when only the queries have a tangent and only the values a gradient."""
    counts, exchange = [], dist.all_to_all_single

    def counting(received, sent, **options):
        counts.append(sent.numel())
        return exchange(received, sent, **options)

    dist.all_to_all_single = counting
    q, k, v = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 6)
    v.requires_grad_()
    o, to = torch.func.jvp(lambda q: ulysses_attention(q, k, v, tangent_grad=False), (q,), (q,))
    o.sum().backward()
    dist.all_to_all_single = exchange
    return counts


def fully_shard(module):
    from torch.distributed.fsdp import fully_shard as shard

    return shard(module, mesh=dist.device_mesh.init_device_mesh("cpu", (RANKS,)))


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    made = {name: attend(ulysses_attention, *case, rank, RANKS) for name, case in CASES.items()}
    low = torch.randn(3, 1, 2, 4, 8, generator=torch.Generator().manual_seed(0)).bfloat16().chunk(RANKS, 3)[rank]
    made["bfloat16"] = [*torch.func.jvp(ulysses_attention, tuple(low), tuple(low.flip(0)))]
    share = slice(rank * 4 // RANKS, (rank + 1) * 4 // RANKS)
    for name, way in WAYS.items():
        made[f"ddp {name}"] = train(nn.parallel.DistributedDataParallel(Network(**way).double()), share)
        network = Network(**way).double()
        for block in network.blocks:
            fully_shard(block)
        made[f"fsdp2 {name}"] = train(fully_shard(network), share)
    made["refusals"], made["sent"] = refusals(), sent_numbers()
    torch.save(made, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    processes = [context.Process(target=worker, args=(rank, folder)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * RANKS
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("name", CASES)
def test_attention_over_a_shared_sequence_equals_that_of_one_process(name, two):
    truth = attend(attention, *CASES[name])
    ours = [torch.cat(stretches, 2) for stretches in zip(*(made[name] for made in two), strict=True)]
    torch.testing.assert_close(ours, truth, **EXACT)


def test_a_shared_sequence_in_bfloat16(two):
    x = torch.randn(3, 1, 2, 4, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    truth = torch.func.jvp(attention, tuple(x), tuple(x.flip(0)))
    ours = [torch.cat(stretches, 2) for stretches in zip(*(made["bfloat16"] for made in two), strict=True)]
    torch.testing.assert_close(ours, list(truth), rtol=0, atol=0)  # the same heads, computed alike


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_training_by_blocks_on_two_processes_equals_one(kind, name, two):
    truth = train(Network(**WAYS[name]).double())
    count = len(list(Network().parameters()))
    for step in range(2):
        first = step * (count + 2)
        for index in (first, first + 1):  # the output and the tangent, of half the batch each
            torch.testing.assert_close(
                torch.cat([made[f"{kind} {name}"][index] for made in two]), truth[index], **EXACT
            )
    for made in two:
        for step in range(2):
            gradients = slice(step * (count + 2) + 2, (step + 1) * (count + 2))
            torch.testing.assert_close(made[f"{kind} {name}"][gradients], truth[gradients], **EXACT)
        torch.testing.assert_close(made[f"{kind} {name}"][-count:], truth[-count:], **EXACT)


def test_nothing_is_sent_that_is_known_to_be_zero(two):
    query, key, value, output = 4 * 3 * 8, 2 * 5 * 8, 2 * 5 * 6, 4 * 3 * 6
    for made in two:
        assert made["sent"] == [2 * query + key + value, 2 * output, output, value]


def test_what_ranks_cannot_share_is_refused(two):
    for made in two:
        said = made["refusals"]
        assert "q has 3 heads, which 2 ranks cannot share" in said["heads"]
        assert "k.repeat_interleave(4 // 1, dim=1)" in said["key heads"]
        assert "1 or 4 heads, those of all ranks, got 2" in said["bias"]
        assert "length of this rank" in said["dimensions"]
        assert "keep it out of the compiled function" in said["compile"]
        assert "is sharded by fully_shard" in said["sharded"]


def test_without_processes_there_is_nothing_to_share():
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match="call init_process_group, or attention on one rank"):
        ulysses_attention(q, q, q)
