"""Networks of other libraries, as they are: with their attention replaced in forward mode they equal math attention."""

import inspect

import diffusers
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import transformers
from diffusers.models import attention_dispatch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from flash_jvp import modes
from flash_jvp.blocks import jvp_block
from flash_jvp.diffusers_backend import diffusers_backend
from flash_jvp.modes import carries_tangent, dual_attention

sdpa = functional.scaled_dot_product_attention


def dit():
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, norm_num_groups=4
    )
    return network, {"hidden_states": (2, 4, 8, 8)}, {"class_labels": torch.tensor([1, 2])}


def sd3():
    network = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    shapes = {"encoder_hidden_states": (2, 7, 16), "pooled_projections": (2, 16)}
    return network, {"hidden_states": (2, 4, 8, 8)}, {name: torch.randn(shape) for name, shape in shapes.items()}


def flux():
    network = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 4),
    )
    constants = {"encoder_hidden_states": torch.randn(2, 7, 16), "pooled_projections": torch.randn(2, 16)}
    constants |= {"img_ids": torch.rand(9, 3), "txt_ids": torch.zeros(7, 3)}
    return network, {"hidden_states": (2, 9, 4)}, constants


def wan():
    network = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
    )
    return network, {"hidden_states": (2, 4, 2, 8, 8)}, {"encoder_hidden_states": torch.randn(2, 7, 16)}


def vit():
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=2, attn_implementation="sdpa")
    return transformers.ViTModel(config, add_pooling_layer=False), {"pixel_values": (2, 3, 8, 8)}, {}


def llama():
    """Grouped queries, causal, and padding: a boolean mask."""
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config = transformers.LlamaConfig(**sizes, intermediate_size=32, vocab_size=8, attn_implementation="sdpa")
    padding = torch.ones(2, 9, dtype=torch.long)
    padding[1, 5:] = 0
    return transformers.LlamaModel(config), {"inputs_embeds": (2, 9, 32)}, {"attention_mask": padding}


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2), {"src": (2, 9, 16)}, {}


DENOISERS = {"dit": dit, "sd3": sd3, "flux": flux, "wan": wan}
NETWORKS = {**DENOISERS, "vit": vit, "llama": llama, "encoder": encoder}


class Double(TorchFunctionMode):
    """float64 throughout: networks compute a norm or an embedding in float32 whatever their own dtype."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def widened(x):
            return torch.float64 if x is torch.float32 else x

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*(widened(x) for x in args), **{name: widened(x) for name, x in (kwargs or {}).items()})


class Doubled(nn.Module):
    """A block in float64, in the recomputation as well: torch switches modes off within backward."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, **arguments):
        with Double():
            return self.block(**arguments)


class Network:
    """A network in evaluation mode as a function of what carries a tangent: its input and, if it denoises, the time."""

    def __init__(self, name, dtype=torch.float64):
        torch.manual_seed(0)
        self.module, shapes, constants = NETWORKS[name]()
        for parameter in self.module.parameters():  # some are zero at first, which would hide what they multiply
            nn.init.normal_(parameter, std=0.2)
        x, tx = ({name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(2))
        if name in DENOISERS:
            unit = 1e-3 if name == "flux" else 1.0  # Flux takes times up to 1, the others up to 1000
            x["timestep"], tx["timestep"] = torch.tensor([500.0, 20.0]) * unit, torch.tensor([1.0, 2.0]) * unit
        self.names = tuple(x)
        self.x, self.tx = (tuple(value.to(dtype) for value in values.values()) for values in (x, tx))
        self.constants = {
            name: value.to(dtype) if value.is_floating_point() else value for name, value in constants.items()
        }
        self.module.eval().to(dtype)

    def __call__(self, *x):
        result = self.module(**dict(zip(self.names, x, strict=True)), **self.constants)
        return result if isinstance(result, torch.Tensor) else result[0]

    def jvp(self):
        return torch.func.jvp(self, self.x, self.tx)


def math_attention():
    return sdpa_kernel(SDPBackend.MATH)


def relative(ours, truth):
    return ((ours.double() - truth).norm() / truth.norm()).item()


@pytest.fixture
def counted(monkeypatch):
    """How often our attention was called from within a network."""
    calls, attention = [], modes.attention

    def counting(*args, **options):
        calls.append(options)
        return attention(*args, **options)

    monkeypatch.setattr(modes, "attention", counting)
    return calls


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_equals_itself_with_math_attention(name, counted):
    network = Network(name)
    with Double(), math_attention():
        truth = network.jvp()
    with Double(), dual_attention():
        ours = network.jvp()
    assert len(counted) >= 2
    assert max(relative(x, y) for x, y in zip(ours, truth, strict=True)) < 1e-10
    with dual_attention():
        single = Network(name, torch.float32).jvp()
    assert max(relative(x, y) for x, y in zip(single, truth, strict=True)) < 1e-5


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_through_the_network_and_its_tangent_equal_math_attention(name):
    network = Network(name)

    def gradients(context):
        with Double(), context:
            o, to = network.jvp()
            wanted = [p for p in network.module.parameters() if p.requires_grad]
            return torch.autograd.grad((o * to).sum() + o.sin().sum(), wanted, allow_unused=True)

    ours, truth = gradients(dual_attention()), gradients(math_attention())
    scale = torch.stack([x.norm() for x in truth if x is not None]).max()
    for x, y in zip(ours, truth, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10 * scale.item())


@pytest.mark.parametrize("name", DENOISERS)
def test_without_the_context_a_network_raises(name):
    with pytest.raises(NotImplementedError, match="forward AD"):
        Network(name).jvp()


def blocks_of(module):
    lists = ("transformer_blocks", "single_transformer_blocks", "blocks")
    return [block for child, blocks in module.named_children() if child in lists for block in blocks]


def recorded(network):
    """For every block of a denoiser: its arguments by name and its outputs, each with a tangent, by math attention."""
    records = []

    def unpacked(value):
        if isinstance(value, (tuple, list)):
            return tuple(unpacked(x) for x in value)
        return tuple(forward_ad.unpack_dual(value)) if isinstance(value, torch.Tensor) else value

    def record(block, args, kwargs, output):
        arguments = inspect.signature(block.forward).bind(*args, **kwargs).arguments
        outputs = output if isinstance(output, tuple) else (output,)
        records.append((block, {name: unpacked(x) for name, x in arguments.items()}, unpacked(outputs)))

    hooks = [block.register_forward_hook(record, with_kwargs=True) for block in blocks_of(network.module)]
    with torch.no_grad(), forward_ad.dual_level(), math_attention():
        network(*(forward_ad.make_dual(x, tx) for x, tx in zip(network.x, network.tx, strict=True)))
    for hook in hooks:
        hook.remove()
    return records


@pytest.mark.parametrize("name", DENOISERS)
def test_the_blocks_of_a_network_one_by_one(name, counted):
    network = Network(name)
    with Double():
        records = recorded(network)
    assert len(records) >= 2
    for block, arguments, expected in records:
        check_block(Doubled(block), arguments, expected)
    assert len(counted) >= len(records)


def check_block(block, arguments, expected):
    def primal(value):
        if isinstance(value, tuple) and len(value) == 2 and value[1] is None:
            return value[0]
        return tuple(primal(x) for x in value) if isinstance(value, tuple) else value

    moving = {name: value for name, value in arguments.items() if carried(value)}
    constants = {name: primal(value) for name, value in arguments.items() if name not in moving}
    x = {name: value[0].clone().requires_grad_() for name, value in moving.items()}
    tx = {name: value[1] for name, value in moving.items()}
    with dual_attention():
        o, to = jvp_block(block, x, tx, **constants)
    o, to = ((y,) if isinstance(y, torch.Tensor) else y for y in (o, to))
    present = [index for index, value in enumerate(expected) if value is not None]
    for index in present:
        assert max(relative(o[index], expected[index][0]), relative(to[index], expected[index][1])) < 1e-10
    wanted = [*x.values(), *block.parameters()]
    ours = torch.autograd.grad(sum(o[index].sin().sum() for index in present), wanted, allow_unused=True)
    with math_attention():
        plain = block(**x, **constants)
        plain = (plain,) if isinstance(plain, torch.Tensor) else plain
        truth = torch.autograd.grad(sum(plain[index].sin().sum() for index in present), wanted, allow_unused=True)
    scale = max(y.norm().item() for y in truth if y is not None)
    for ours_of, truth_of in zip(ours, truth, strict=True):
        assert (ours_of is None) == (truth_of is None)
        if ours_of is not None:
            torch.testing.assert_close(ours_of, truth_of, rtol=1e-10, atol=1e-10 * scale)


def carried(value):
    """Whether a recorded argument is a tensor with a tangent."""
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(x, torch.Tensor) for x in value)


def double(*shape):
    return torch.randn(shape, dtype=torch.float64)


SHAPES = {
    "2-D": ((5, 8), (7, 8), (7, 4)),
    "3-D": ((3, 5, 8), (3, 7, 8), (3, 7, 4)),
    "4-D": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)),
    "5-D": ((2, 4, 3, 5, 8), (2, 4, 3, 7, 8), (2, 4, 3, 7, 4)),
    "shared keys": ((2, 3, 5, 8), (1, 1, 7, 8), (1, 1, 7, 4)),
}
MASKS = {
    "2-D": [(5, 7), (1, 7)],
    "3-D": [(5, 7), (3, 5, 7), (3, 1, 7), (1, 5, 1)],
    "4-D": [(5, 7), (3, 5, 7), (2, 1, 1, 7), (2, 1, 5, 7), (1, 3, 5, 7), (1, 1, 5, 7), (2, 3, 5, 7)],
    "5-D": [(5, 7), (3, 5, 7), (4, 3, 5, 7), (4, 1, 1, 7), (2, 1, 1, 1, 7), (1, 4, 3, 5, 7), (1, 1, 1, 5, 7)],
    "shared keys": [(2, 1, 1, 7), (3, 5, 7)],
}
CALLS = [(kind, mask, {}) for kind in SHAPES for mask in [None, *MASKS[kind]]]
CALLS += [(kind, None, {"is_causal": True}) for kind in SHAPES] + [("4-D", None, {"scale": 0.3})]


@pytest.mark.parametrize("boolean", [False, True], ids=["added", "boolean"])
@pytest.mark.parametrize(("kind", "mask", "options"), CALLS)
def test_the_whole_signature_is_that_of_torch(kind, mask, options, boolean, counted):
    x, tx = ([double(*shape) for shape in SHAPES[kind]] for _ in range(2))
    if mask is not None:
        options = {"attn_mask": double(*mask) > -0.7 if boolean else double(*mask), **options}

    def run(*x):
        return functional.scaled_dot_product_attention(*x, **options)

    with dual_attention():
        ours = torch.func.jvp(run, tuple(x), tuple(tx))
    with math_attention():
        truth = torch.func.jvp(run, tuple(x), tuple(tx))
    assert len(counted) == 1
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_grouped_queries(lead, counted):
    shapes = ((*lead, 4, 5, 8), (*lead, 2, 7, 8), (*lead, 2, 7, 8))
    x, tx = (tuple(double(*shape) for shape in shapes) for _ in range(2))

    def run(*x):
        return functional.scaled_dot_product_attention(*x, enable_gqa=True)

    with dual_attention():
        ours = torch.func.jvp(run, x, tx)
    repeated = [y if y.shape[-3] == 4 else y.repeat_interleave(2, -3) for y in (*x, *tx)]
    with math_attention():
        truth = torch.func.jvp(sdpa, tuple(repeated[:3]), tuple(repeated[3:]))
    assert len(counted) == 1
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


def small():
    q, k, v = (double(1, 2, 5, 8) for _ in range(3))
    return q, k, v, double(1, 2, 5, 8)


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("way", ["func", "dual_level"])
def test_one_tangent_is_enough(way, which, counted):
    *x, tangent = small()

    def run(moved):
        return functional.scaled_dot_product_attention(*x[:which], moved, *x[which + 1 :])

    with math_attention():
        truth = torch.func.jvp(run, (x[which],), (tangent,))
    with dual_attention():
        if way == "func":
            ours = torch.func.jvp(run, (x[which],), (tangent,))
        else:
            with forward_ad.dual_level():
                ours = tuple(forward_ad.unpack_dual(run(forward_ad.make_dual(x[which], tangent))))
    assert len(counted) == 1
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


def test_a_call_without_tangent_is_left_alone(counted):
    q, k, v, tangent = small()
    mask = double(5, 5).requires_grad_()
    with dual_attention():
        o = functional.scaled_dot_product_attention(q, k, v, mask, 0.0)
        functional.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
        torch.func.grad(lambda q: functional.scaled_dot_product_attention(q, k, v).sum())(q)
        torch.func.jvp(lambda x: x * functional.scaled_dot_product_attention(q, k, v), (q,), (tangent,))
    assert not counted
    torch.autograd.grad(o.sum(), mask)  # as ever
    functional.scaled_dot_product_attention(q, k, v)
    with pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(lambda q: functional.scaled_dot_product_attention(q, k, v), (q,), (tangent,))


def test_a_tangent_is_seen_at_every_level():
    x, tangent = double(3), double(3)
    seen = {}

    def look(name, x):
        seen[name] = carries_tangent(x)
        return x

    def jvp(function):
        return torch.func.jvp(function, (x,), (tangent,))[0]

    look("plain", x)
    torch.func.grad(lambda x: look("grad", x).sum())(x)
    torch.func.vmap(lambda x: look("vmap", x))(x)
    jvp(lambda x: look("jvp", x))
    jvp(lambda _: look("constant in jvp", x.clone()))
    jvp(lambda outer: jvp(lambda inner: look("outer of two", outer) + look("inner of two", inner)))
    jvp(lambda outer: jvp(lambda inner: look("derived from both", outer * inner)))
    jvp(lambda x: torch.func.vmap(lambda row: look("vmap in jvp", row))(x))
    torch.func.vmap(lambda row: torch.func.jvp(lambda x: look("jvp in vmap", x), (row,), (row,))[1])(x)
    jvp(lambda x: torch.func.grad(lambda x: look("grad in jvp", x).sum())(x))
    jvp(lambda outer: torch.func.grad(lambda x: (look("closed over by grad", outer) * x).sum())(x))
    torch.func.grad(lambda y: jvp(lambda x: x * look("closed over by jvp", y)).sum())(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        look("dual", dual)
        look("constant in dual level", x)
        torch.func.grad(lambda y: (look("dual in grad", dual) * y).sum())(x)
        torch.func.grad(lambda y: look("of dual in grad", y).sum())(dual)
    assert {name for name, found in seen.items() if not found} == {
        "plain",
        "grad",
        "vmap",
        "constant in jvp",
        "closed over by jvp",
        "constant in dual level",
    }


def refused(match, run, *x, error=NotImplementedError):
    with dual_attention(), pytest.raises(error, match=match):
        torch.func.jvp(run, x, tuple(torch.ones_like(y) for y in x))


def test_what_cannot_be_done_is_refused():
    q, k, v, _ = small()
    attend = functional.scaled_dot_product_attention
    refused("no dropout, got dropout_p=0.5", lambda q: attend(q, k, v, None, 0.5), q)
    learned = double(5, 5).requires_grad_()
    refused("a gradient or a tangent", lambda q: attend(q, k, v, learned), q)
    refused(
        "a gradient or a tangent", lambda mask: functional.scaled_dot_product_attention(q, k, v, mask), double(5, 5)
    )
    refused(
        "flash_jvp attention", lambda mask: torch.func.jvp(lambda q: attend(q, k, v, mask), (q,), (q,))[1], double(5, 5)
    )
    mask = learned.detach()
    refused("exclude each other", lambda q: attend(q, k, v, mask, is_causal=True), q, error=ValueError)
    refused("innermost transform", lambda q: torch.func.vmap(lambda q: attend(q, k[0], v[0]))(q), q)
    refused("innermost transform", lambda q: torch.func.grad(lambda k: attend(q, k, v).sum())(k), q)
    refused("innermost transform", lambda q: torch.func.jvp(lambda k: k * attend(q, v, v), (k,), (k,))[0], q)
    refused("innermost transform", lambda q: torch.func.jvp(lambda k: attend(q, k, v), (k,), (k,))[0], q)


def test_every_call_under_vmap_of_jvp_is_routed(counted):
    q, k, v, _ = small()
    q, k, v = (x.expand(3, *x.shape).contiguous() for x in (q, k, v))

    def run(q, k, v):
        return torch.func.jvp(functional.scaled_dot_product_attention, (q, k, v), (v, q, k))

    with dual_attention():
        ours = torch.func.vmap(run)(q, k, v)
    with math_attention():
        truth = run(q, k, v)
    assert len(counted) == 1
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


def test_the_dispatch_of_diffusers_for_every_backend(counted):
    """Cross-attention and all masks that its native backend knows, through the model's own choice of a backend."""
    registry = attention_dispatch._AttentionBackendRegistry
    before = dict(registry._backends)
    q, k, v = double(2, 5, 3, 8), double(2, 7, 3, 8), double(2, 7, 3, 8)  # BSHD
    tangents = (double(2, 5, 3, 8), double(2, 7, 3, 8), double(2, 7, 3, 8))
    for mask in (None, double(2, 7) > -1, double(2, 1, 5, 7), double(2, 1, 1, 7)):
        for backend in ("native", "flash", "sage"):

            def run(*x, mask=mask, backend=backend):
                return attention_dispatch.dispatch_attention_fn(*x, attn_mask=mask, backend=backend)

            with diffusers_backend():
                if backend != "native" and mask is not None:
                    continue  # diffusers hands them no masks
                ours = torch.func.jvp(run, (q, k, v), tangents)
                native = attention_dispatch.dispatch_attention_fn(q, k, v, attn_mask=mask)
            with math_attention():
                truth = torch.func.jvp(lambda *x, run=run: run(*x, backend="native"), (q, k, v), tangents)
            torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(native, truth[0], rtol=1e-12, atol=1e-12)
    assert len(counted) == 6
    assert registry._backends == before
    with pytest.raises(ZeroDivisionError), diffusers_backend():
        raise ZeroDivisionError
    assert registry._backends == before


def test_the_dispatch_of_diffusers_refuses_what_drops_tangents():
    q = double(2, 5, 3, 8)
    attend = attention_dispatch.dispatch_attention_fn
    with diffusers_backend():
        with pytest.raises(NotImplementedError, match="context parallelism of diffusers drops tangents"):
            torch.func.jvp(lambda q: attend(q, q, q, parallel_config=object()), (q,), (q,))
        with pytest.raises(NotImplementedError, match="call flash_jvp.attention_jvp"):
            torch.func.jvp(lambda q: attend(q, q, q, attention_kwargs={"return_lse": True}), (q,), (q,))
        with pytest.raises(NotImplementedError, match="no dropout"):
            torch.func.jvp(lambda q: attend(q, q, q, dropout_p=0.1), (q,), (q,))


def test_wan_through_the_dispatch_of_diffusers_alone(counted):
    network = Network("wan")
    with Double(), math_attention():
        truth = network.jvp()
    with Double(), diffusers_backend():
        ours = network.jvp()
    assert len(counted) == 4
    assert max(relative(x, y) for x, y in zip(ours, truth, strict=True)) < 1e-10


class Written(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48, dtype=torch.float64)

    def forward(self, x):
        q, k, v = self.qkv(x).view(2, 7, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        return x + functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_a_compiled_network_is_routed_in_one_graph():
    torch.manual_seed(0)
    network, x, tx = Written(), double(2, 7, 16), double(2, 7, 16)

    def run(x, tx):
        return torch.func.jvp(network, (x,), (tx,))

    def with_gradient(run):
        o, to = run(x, tx)
        return o, to, *torch.autograd.grad((o * to).sum(), network.parameters())

    with dual_attention():
        ours = with_gradient(torch.compile(run, backend="aot_eager", fullgraph=True))
    with math_attention():
        truth = with_gradient(run)
    torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-11)
