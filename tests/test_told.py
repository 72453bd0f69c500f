"""Networks that are told a span or a scale: at first as they were, then by each, on disk, and folded."""

import copy

import pytest
import torch
from diffusers import DiffusionPipeline
from small_networks import lively
from test_backbones import unet
from test_export import dit, vae
from test_tangents import in_full_precision
from torch import nn

from diffdistill.backbones.diffusers import DiffusersBackbone
from diffdistill.backbones.folder import TOLD, read_backbone, write_backbone
from diffdistill.backbones.mlp import MLP
from diffdistill.denoiser import Backbone, Denoiser
from diffdistill.exporting import TOLERANCE, Refusal, write_pipeline
from diffdistill.generator import Generator
from diffdistill.prediction import Prediction
from diffdistill.process import VE, Rectified
from diffdistill.rng import Rng
from diffdistill.tangents import directional

MAKERS = {
    "UNet without classes": lambda: DiffusersBackbone(unet()),
    "UNet with classes": lambda: DiffusersBackbone(unet(num_class_embeds=5)),
    "UNet with a null label": lambda: DiffusersBackbone(unet(num_class_embeds=5), null_label=4),
    "DiT": lambda: DiffusersBackbone(dit()),
    "MLP": lambda: lively(MLP(num_classes=3)),
}
every_network = pytest.mark.parametrize("name", MAKERS)
OF_DIFFUSERS = [name for name in MAKERS if name != "MLP"]


def told(name: str) -> Backbone:
    """A network to which spans and scales matter."""
    backbone = MAKERS[name]()
    for each in ("span", "scale"):
        backbone.tell(each)
        nn.init.normal_(backbone.told[each].leave.weight, std=0.3)
    return backbone


def inputs(backbone: Backbone, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor, dict, dict]:
    """x, time, condition and what is told."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((3, *backbone.sample_shape), generator=generator, dtype=dtype)
    cond = {name: torch.tensor([0, 2, 1]) for name in backbone.condition_names}
    return (
        x,
        torch.tensor([5.0, 120.0, 700.0], dtype=dtype),
        cond,
        {
            "span": torch.tensor([0.0, 0.3, 0.9], dtype=dtype),
            "scale": torch.tensor([1.0, 2.5, 7.0], dtype=dtype),
        },
    )


@every_network
def test_at_first_they_make_no_difference_and_its_weights_keep_their_names(name):
    before = MAKERS[name]()
    after = copy.deepcopy(before)
    after.tell("scale")
    after.tell("span")
    x, time, cond, told_ = inputs(before)
    assert torch.equal(after(x, time, {**cond, **told_}), before(x, time, cond))
    kept = {key: value for key, value in after.state_dict().items() if not key.startswith("told.")}
    assert kept.keys() == before.state_dict().keys()
    assert all(torch.equal(value, before.state_dict()[key]) for key, value in kept.items())


@every_network
def test_afterwards_each_sample_has_its_own_and_none_is_zero(name):
    backbone = told(name)
    x, time, cond, said = inputs(backbone)
    whole = backbone(x, time, {**cond, **said})
    for place in range(3):
        one = {key: value[place : place + 1] for key, value in {**cond, **said}.items()}
        alone = backbone(x[place : place + 1], time[place : place + 1], one)
        torch.testing.assert_close(alone, whole[place : place + 1], rtol=1e-4, atol=1e-5)
    none = backbone(x, time, cond)
    torch.testing.assert_close(none[0], whole[0], rtol=1e-4, atol=1e-5)
    assert (none - whole)[1:].abs().amax(dim=tuple(range(1, x.ndim))).min() > 1e-2


@every_network
def test_the_derivative_along_state_and_both_times_is_exact(name):
    """Against a difference of fourth order, through group norms, attention, and the embeddings."""
    backbone = told(name).double()
    in_full_precision(backbone)
    x, time, cond, said = inputs(backbone, torch.float64)
    time, span = time / 100, said["span"].clamp(min=0.1)
    dx = torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    h = 1e-4

    def field(x, s):
        return backbone(x, time + s, {**cond, **said, "span": span + s})

    def ahead(k: int) -> torch.Tensor:
        return field(x + k * h * dx, torch.full((3,), k * h, dtype=torch.float64))

    zero = torch.zeros(3, dtype=torch.float64)
    found = directional(field, x, zero, dx, torch.ones(3, dtype=torch.float64))[1]
    with torch.no_grad():
        slope = (8 * (ahead(1) - ahead(-1)) - ahead(2) + ahead(-2)) / (12 * h)
    assert (found - slope).norm() < 1e-5 * slope.norm()


@pytest.mark.parametrize("name", ["UNet with classes", "DiT"])
def test_recomputed_activations_give_the_same_gradients(name):
    backbone = told(name).train()
    x, time, cond, said = inputs(backbone)
    cond = {**cond, **said}
    backbone(x, time, cond).square().sum().backward()
    plain = {key: value.grad.clone() for key, value in backbone.named_parameters()}
    backbone.zero_grad()
    backbone.network.enable_gradient_checkpointing()
    backbone(x, time, cond).square().sum().backward()
    for key, value in backbone.named_parameters():
        torch.testing.assert_close(value.grad, plain[key], rtol=1e-4, atol=1e-5)
    assert plain["told.span.leave.weight"].abs().max() > 1e-3


@every_network
@pytest.mark.parametrize("half", [False, True])
def test_it_is_read_as_it_was_written(name, half, tmp_path):
    backbone = told(name).eval()
    write_backbone(backbone, tmp_path, half=half)
    null = 4 if name == "UNet with a null label" else None
    again = read_backbone(tmp_path, null_label=null, checkpointing=False).eval()
    x, time, cond, said = inputs(backbone)
    cond = {**cond, **said}
    expected, found = backbone(x, time, cond), again(x, time, cond)
    if half:
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-2 * expected.abs().max().item())
    else:
        assert torch.equal(found, expected)
    planned = read_backbone(tmp_path, null_label=null, checkpointing=False, device="meta")
    assert {key: value.shape for key, value in planned.state_dict().items()} == {
        key: value.shape for key, value in backbone.state_dict().items()
    }


def test_damaged_weights_of_what_is_told_are_named(tmp_path):
    write_backbone(told("UNet with classes"), tmp_path, half=False)
    (tmp_path / TOLD).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=f"{TOLD} could not be read.*restore the folder"):
        read_backbone(tmp_path, null_label=None, checkpointing=False)


@pytest.mark.parametrize("name", OF_DIFFUSERS)
def test_one_span_and_scale_fold_into_the_weights_of_a_stock_network(name):
    backbone = told(name).eval()
    x, time, cond, _ = inputs(backbone)
    folded = backbone.folded(span=0.7, scale=4.0)
    expected = backbone(x, time, {**cond, "span": torch.full((3,), 0.7), "scale": torch.full((3,), 4.0)})
    torch.testing.assert_close(folded(x, time, cond), expected, rtol=1e-4, atol=1e-5)
    assert not folded.told and type(folded.network) is type(backbone.network)
    assert folded.num_classes == backbone.num_classes
    if backbone.condition_names and name != "UNet with classes":
        assert torch.equal(folded.null(cond)["label"], backbone.null(cond)["label"])


@pytest.mark.parametrize("name", OF_DIFFUSERS)
def test_one_step_of_a_flow_map_is_exported_as_a_stock_pipeline(name, tmp_path):
    """Reopened by diffusers it gives what the network that is told two times gives."""
    backbone = told(name)
    if name == "DiT":
        model, first = Denoiser(backbone, Rectified(), Prediction.VELOCITY, clock="thousand"), 1.0
    else:
        model, first = Denoiser(backbone, VE(), Prediction.F, clock="edm", scale_input=True), 80.0
    generator = Generator(model, (first,), step_rule="flow_map", guidance=3.5)
    decoder = vae() if name == "DiT" else None
    assert write_pipeline(generator, tmp_path / "out", vae=decoder).difference < TOLERANCE

    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    network = pipeline.components["transformer" if name == "DiT" else "unet"].eval()
    x, _, cond, _ = inputs(backbone)
    stock = Denoiser(
        DiffusersBackbone(network), model.native, model.source, clock=model.clock, scale_input=model.scale_input
    )
    t = torch.full((3,), first, dtype=torch.float64)
    with torch.no_grad():
        under = {**cond, "scale": torch.full((3,), 3.5)}
        expected = model.eval()(first * x, t, under, toward=torch.zeros_like(t))
        torch.testing.assert_close(stock(first * x, t, cond), expected, rtol=1e-4, atol=1e-4)


def test_several_steps_of_a_flow_map_are_refused_and_those_of_its_ode_are_not(tmp_path):
    model = Denoiser(told("UNet without classes"), VE(), Prediction.F, clock="edm", scale_input=True)
    with pytest.raises(Refusal, match="told where each of its 2 steps leads.*grid of one time"):
        write_pipeline(Generator(model, (80.0, 1.0), step_rule="flow_map", guidance=2.0), tmp_path / "out")
    assert write_pipeline(Generator(model, (80.0, 1.0), guidance=2.0), tmp_path / "out").difference < TOLERANCE


def test_networks_that_cannot_be_told_say_so():
    class Plain(Backbone):
        sample_shape, condition_names = (2,), ()

        def forward(self, x, time, cond):
            return x

        def null(self, cond):
            return cond

        def blocks(self):
            return []

    with pytest.raises(ValueError, match="a Plain cannot be told its span"):
        Plain().tell("span")
    with pytest.raises(ValueError, match="a Plain that is told span cannot be made one that is not"):
        Plain().folded(span=0.5)
    with pytest.raises(ValueError, match="can be told span, scale, not weather"):
        MLP().tell("weather")


def test_a_generator_of_a_network_that_is_told_its_scale_needs_one_and_another_takes_none():
    model = Denoiser(told("MLP"), VE(), Prediction.F, clock="log_ratio", scale_input=True)
    with pytest.raises(ValueError, match="generator.guidance=None .* told one; give it"):
        Generator(model, (80.0,))
    with pytest.raises(ValueError, match="generator.guidance=2.0 .* told none; leave it out"):
        plain = Denoiser(MLP(), VE(), Prediction.F, clock="log_ratio", scale_input=True)
        Generator(plain, (80.0,), guidance=2.0)


@pytest.mark.parametrize("rule", ["renoise", "euler", "heun", "flow_map"])
def test_every_step_of_a_generator_is_told_its_scale(rule):
    model = Denoiser(told("MLP"), VE(), Prediction.F, clock="log_ratio", scale_input=True)
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]["scale"]))
    generator, rng = Generator(model, (80.0, 1.0), step_rule=rule, guidance=4.5), Rng(("told",), range(3))
    generator.sample(generator.prior(rng), {"label": torch.tensor([0, 1, 2])}, rng)
    assert len(seen) >= 2 and all(torch.equal(scale, torch.full((3,), 4.5)) for scale in seen)
