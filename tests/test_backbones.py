"""Backbones: what diffusers networks and schedulers mean, what is read and written, and what every mistake is told."""

import json

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from safetensors.torch import load_file, save_file
from small_networks import DIT, UNET, lively

from diffdistill.backbones.diffusers import FAMILIES, DiffusersBackbone
from diffdistill.backbones.folder import make_backbone, read_backbone, read_diffusers, write_backbone
from diffdistill.backbones.mlp import MLP
from diffdistill.backbones.scheduler import meaning
from diffdistill.config import DenoiserConfig
from diffdistill.networks import denoiser
from diffdistill.prediction import Prediction
from diffdistill.recipe import typed
from diffdistill.solvers import at


def unet(**options):
    torch.manual_seed(0)
    return lively(UNet2DModel(**UNET, **options)).eval()


def dit(**options):
    torch.manual_seed(0)
    return lively(DiTTransformer2DModel(**{**DIT, **options})).eval()


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def normal_x0(model, x, t):
    with torch.no_grad():
        return model(x, at(t, x), to=Prediction.X0)


# ---------------------------------------------------------------- what a scheduler says


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_a_pipeline_read_back_gives_the_x0_of_its_own_scheduler(prediction, schedule, tmp_path):
    network = unet()
    options = dict(beta_schedule=schedule, prediction_type=prediction, clip_sample=False)
    DDPMPipeline(unet=network, scheduler=DDPMScheduler(**options)).save_pretrained(tmp_path)
    backbone, said = read_diffusers(tmp_path)
    model = denoiser(backbone, typed(DenoiserConfig, said, "teacher.denoiser"))
    scheduler = DDIMScheduler(**options)
    scheduler.set_timesteps(1000)
    x = noise(2, 3, 8, 8)
    for step in (0, 1, 137, 500, 900):
        with torch.no_grad():
            theirs = scheduler.step(network(x, step).sample, step, x).pred_original_sample
        ours = normal_x0(model, x, step + 1.0)
        # theirs rounds the table to float32 (1e-6 of alpha, and up to 1e-4 of sigma at step 0), and divides by alpha
        scale = 1 / scheduler.alphas_cumprod[step].sqrt()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(scale))


def test_trained_betas_and_zero_snr_are_told_apart_from_the_named_tables():
    betas = [0.1, 0.2, 0.4]
    said = meaning({"_class_name": "DDIMScheduler", "trained_betas": betas, "num_train_timesteps": 3})
    assert said["process"] == {"name": "vp", "betas": betas}
    config = {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    assert meaning(config)["process"]["zero_snr"] is True
    with pytest.raises(ValueError, match="ends at pure noise"):
        meaning({**config, "prediction_type": "epsilon"})


@pytest.mark.parametrize(
    "table", [{"trained_betas": torch.linspace(0.01, 0.3, 50).tolist(), "num_train_timesteps": 50}, {"zero": True}]
)
def test_explicit_betas_and_zero_snr_give_the_x0_of_their_scheduler(table):
    options = dict(prediction_type="v_prediction", clip_sample=False, rescale_betas_zero_snr="zero" in table)
    scheduler = DDIMScheduler(**options, **{key: value for key, value in table.items() if key != "zero"})
    steps = scheduler.config.num_train_timesteps
    scheduler.set_timesteps(steps)
    said = meaning({"_class_name": "DDIMScheduler", **scheduler.config})
    network = unet()
    model = denoiser(DiffusersBackbone(network), typed(DenoiserConfig, said, ""))
    x = noise(2, 3, 8, 8)
    for step in (1, steps // 2, steps - 1):
        with torch.no_grad():
            theirs = scheduler.step(network(x, step).sample, step, x).pred_original_sample
        # float32 tables of theirs: sigma at step 1 comes from 1 - alphas_cumprod, of which 1e-4 remains
        torch.testing.assert_close(normal_x0(model, x, step + 1.0), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["CM", "EDM"])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edm_preconditioning_is_that_of_the_edm_schedulers(kind, sigma_data):
    network = unet()
    if kind == "CM":
        # its boundary condition at sigma_min is EDM's preconditioning at sigma_min = 0
        scheduler = CMStochasticIterativeScheduler(sigma_min=0.0, sigma_data=sigma_data, clip_denoised=False)
        scheduler.set_timesteps(timesteps=[30, 10, 0])
    else:
        scheduler = EDMEulerScheduler(sigma_data=sigma_data)
        scheduler.set_timesteps(3)
    said = meaning({"_class_name": type(scheduler).__name__, **scheduler.config})
    model = denoiser(DiffusersBackbone(network), typed(DenoiserConfig, said, ""))
    for index, time in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[index].item()
        x = sigma * noise(2, 3, 8, 8)
        scaled = scheduler.scale_model_input(x, time)
        with torch.no_grad():
            output = network(scaled, time).sample
        if kind == "CM":
            c_skip, c_out = scheduler.get_scalings_for_boundary_condition(scheduler.sigmas[index])
            theirs = c_skip * x + c_out * output
            scheduler.step(output, time, x, generator=torch.Generator())
        else:
            theirs = scheduler.step(output, time, x).pred_original_sample
        # float32 through a network, whose time of up to 1100 is rounded to 6e-5
        torch.testing.assert_close(normal_x0(model, x, sigma), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_scheduler_is_read_as_the_rectified_flow_and_its_grid(shift):
    network = unet()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    said = meaning({"_class_name": "FlowMatchEulerDiscreteScheduler", **scheduler.config})
    model = denoiser(DiffusersBackbone(network), typed(DenoiserConfig, said, ""))
    assert model.process.shift == shift
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(scheduler.sigmas[:-1].double(), torch.tensor(model.process.grid(4), dtype=torch.float64))
    x = noise(2, 3, 8, 8)
    for index, time in enumerate(scheduler.timesteps):
        t, r = scheduler.sigmas[index].item(), scheduler.sigmas[index + 1].item()
        with torch.no_grad():
            theirs = scheduler.step(network(x, time).sample, time, x).prev_sample
            ours = x + (r - t) * model(x, at(t, x), to=Prediction.VELOCITY)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)  # one float32 rounding of t, in the network too


NOT_MEANT = {
    "unknown": ({"_class_name": "MyScheduler"}, "'MyScheduler' is not one of diffusers"),
    "nameless": ({}, "scheduler None is not one of diffusers"),
    "trigflow": ({"_class_name": "SCMScheduler"}, "no reading is known for SCMScheduler"),
    "inverted": ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas"),
    "another clock": ({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 10}, "times 1000"),
    "sign": ({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}, "sign changed"),
    "table": ({"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid"}, "beta_schedule='sigmoid'"),
    "continuous": ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type"),
}


@pytest.mark.parametrize("name", NOT_MEANT)
def test_a_scheduler_that_cannot_be_read_says_what_to_do(name):
    config, reason = NOT_MEANT[name]
    with pytest.raises(ValueError, match=reason) as caught:
        meaning(config)
    assert "teacher.denoiser" in str(caught.value)


# ---------------------------------------------------------------- the adapter


def test_class_labels_and_the_null_label_reach_a_unet():
    plain = DiffusersBackbone(unet(num_class_embeds=10))
    assert (plain.num_classes, plain.condition_names) == (10, ("label",))
    with pytest.raises(ValueError, match="without an unconditional label"):
        plain.null({"label": torch.tensor([1])})
    network = unet(num_class_embeds=11)
    guided = DiffusersBackbone(network, null_label=10)
    assert guided.num_classes == 10
    label = {"label": torch.tensor([3, 4])}
    assert guided.null(label)["label"].tolist() == [10, 10]
    x, t = noise(2, 3, 8, 8), torch.tensor([10.0, 20.0])
    with torch.no_grad():
        assert guided(x, t, label).equal(network(x, t, class_labels=label["label"]).sample)
        assert not guided(x, t, label).equal(guided(x, t, guided.null(label)))
    with pytest.raises(ValueError, match="must be the last of 11 labels"):
        DiffusersBackbone(network, null_label=3)
    assert DiffusersBackbone(unet()).condition_names == ()


def test_a_transformer_gives_its_mean_only_and_drops_no_labels_itself():
    network = dit(out_channels=8)
    backbone = DiffusersBackbone(network).train()
    x, t, label = noise(8, 4, 8, 8), torch.linspace(1, 900, 8), {"label": torch.arange(8)}
    outputs = [backbone(x, t, label) for _ in range(2)]
    assert outputs[0].shape == x.shape
    assert outputs[0].equal(outputs[1])  # with diffusers' own dropout of 0.1 this fails in 57 % of runs
    assert all(block.norm1.emb.class_embedder.dropout_prob == 0 for block in network.transformer_blocks)
    with torch.no_grad():
        assert outputs[0].equal(network.eval()(x, timestep=t, class_labels=label["label"]).sample[:, :4])
    assert backbone.null(label)["label"].tolist() == [10] * 8
    assert not outputs[0].equal(backbone(x, t, backbone.null(label)))


def networks():
    return {"UNet2DModel": unet(num_class_embeds=10), "DiTTransformer2DModel": dit()}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_blocks_and_a_backbone_that_runs(name):
    backbone = DiffusersBackbone(networks()[name])
    blocks = backbone.blocks()
    assert len(blocks) > 0 and len({id(block) for block in blocks}) == len(blocks)
    share = sum(p.numel() for block in blocks for p in block.parameters()) / sum(
        p.numel() for p in backbone.parameters()
    )
    assert share > 0.5  # sharding by blocks shards most of the network
    x = noise(2, *backbone.sample_shape)
    assert backbone(x, torch.tensor([1.0, 2.0]), {"label": torch.tensor([0, 1])}).shape == x.shape


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_gives_equal_gradients(name):
    gradients = []
    for checkpointing in (False, True):
        backbone = DiffusersBackbone(networks()[name], gradient_checkpointing=checkpointing).train()
        assert backbone.network.is_gradient_checkpointing is checkpointing
        x = noise(2, *backbone.sample_shape)
        backbone(x, torch.tensor([5.0, 700.0]), {"label": torch.tensor([0, 1])}).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in backbone.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        other = gradients[1][key]
        assert (gradient is None) == (other is None)
        assert gradient is None or gradient.equal(other)  # the same operations in the same order


def test_a_class_without_a_family_is_refused_with_the_way_to_add_one():
    with pytest.raises(ValueError, match="no family for Linear; known are .*; add a row to FAMILIES"):
        DiffusersBackbone(torch.nn.Linear(1, 1))


# ---------------------------------------------------------------- folders


def backbones():
    return {
        "UNet2DModel": DiffusersBackbone(unet(num_class_embeds=11), null_label=10),
        "DiTTransformer2DModel": DiffusersBackbone(dit()),
        "MLP": MLP(num_classes=3, width=16),
    }


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("name", ["UNet2DModel", "DiTTransformer2DModel", "MLP"])
def test_what_is_written_is_read_back_exactly_and_in_float32(name, half, tmp_path):
    backbone = backbones()[name]
    state = torch.get_rng_state()
    write_backbone(backbone, tmp_path / "network", half=half)
    assert torch.get_rng_state().equal(state)
    again = read_backbone(tmp_path / "network", null_label=10 if name == "UNet2DModel" else None, checkpointing=False)
    assert again.num_classes == backbone.num_classes
    expected = backbone.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for key, tensor in again.state_dict().items():
        assert tensor.dtype == torch.float32
        assert tensor.equal(expected[key].half().float() if half else expected[key])


def test_a_folder_read_back_computes_the_same_bits_and_diffusers_reads_it_too(tmp_path):
    backbone = DiffusersBackbone(unet())
    write_backbone(backbone, tmp_path, half=False)
    again = read_backbone(tmp_path, null_label=None, checkpointing=False)
    x, t = noise(1, 3, 8, 8), torch.tensor([7.0])
    with torch.no_grad():
        assert again(x, t, {}).equal(backbone(x, t, {}))
        theirs = UNet2DModel.from_pretrained(tmp_path)(x, 7).sample
        # weights mapped from a file are not aligned in memory, and take other kernels: float32 rounding
        torch.testing.assert_close(theirs, backbone(x, t, {}), rtol=0, atol=1e-5)


def test_weights_beyond_fp16_are_refused_when_halved(tmp_path):
    backbone = MLP()
    with torch.no_grad():
        backbone.enter.weight.fill_(1e5)
    with pytest.raises(ValueError, match="enter.weight has values beyond fp16's range"):
        write_backbone(backbone, tmp_path, half=True)


def test_a_network_folder_is_read_without_a_meaning_and_an_fp16_pipeline_in_float32(tmp_path):
    network = unet()
    network.save_pretrained(tmp_path / "network")
    backbone, said = read_diffusers(tmp_path / "network")
    assert said is None
    assert backbone.state_dict()["network.conv_in.weight"].equal(network.conv_in.weight)
    DDIMPipeline(unet=network.half(), scheduler=DDIMScheduler()).save_pretrained(tmp_path / "half", variant="fp16")
    backbone, said = read_diffusers(str(tmp_path / "half"), null_label=None)
    assert said["prediction"] == "eps" and said["null_label"] == -1
    assert {tensor.dtype for tensor in backbone.state_dict().values()} == {torch.float32}
    assert backbone.state_dict()["network.conv_in.weight"].equal(network.conv_in.weight.float())


def weights_of(folder):
    return next(folder.glob("*.safetensors"))


def _no_config(folder):
    (folder / "config.json").unlink()


def _torn_config(folder):
    (folder / "config.json").write_text('{"_class_name": ')


def _unknown_class(folder):
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet9DModel"}))


def _no_weights(folder):
    weights_of(folder).unlink()


def _pickled(folder):
    weights_of(folder).rename(folder / "diffusion_pytorch_model.bin")


def _torn_weights(folder):
    data = weights_of(folder).read_bytes()
    weights_of(folder).write_bytes(data[: len(data) // 2])


def _edit(folder, change):
    state = load_file(weights_of(folder))
    key = sorted(state)[0]
    change(state, key)
    save_file(state, weights_of(folder), metadata={"format": "pt"})


def _missing_weight(folder):
    _edit(folder, lambda state, key: state.pop(key))


def _extra_weight(folder):
    _edit(folder, lambda state, key: state.update(another=torch.zeros(1)))


def _wrong_shape(folder):
    _edit(folder, lambda state, key: state.update({key: torch.zeros(1, 2, 3)}))


BROKEN = {
    _no_config: "there is no .*config.json",
    _torn_config: "config.json is damaged",
    _unknown_class: "config.json='UNet9DModel' is not a known network; known are MLP, UNet2DModel",
    _no_weights: r"no safetensors weights|No such file",
    _pickled: r"pickled ones|No such file",
    _torn_weights: "could not be read",
    _missing_weight: "(?i)missing",
    _extra_weight: "(?i)unexpected",
    _wrong_shape: "(?i)mismatch",
}


@pytest.mark.parametrize("name", ["UNet2DModel", "MLP"])
@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_a_damaged_folder_gives_one_clear_line(name, damage, tmp_path):
    write_backbone(backbones()[name], tmp_path, half=False)
    damage(tmp_path)
    with pytest.raises(ValueError, match=BROKEN[damage]) as caught:
        read_backbone(tmp_path, null_label=None, checkpointing=False)
    message = str(caught.value)
    assert str(tmp_path) in message and "\n" not in message
    assert any(word in message for word in ("give", "restore", "known are", "write them again"))


def test_a_name_that_is_no_folder_and_no_pipeline_is_an_error():
    with pytest.raises(ValueError, match="neither a folder nor a pipeline"):
        read_diffusers("no/such/folder")  # two slashes: the hub is not even asked


def test_pipelines_without_network_or_scheduler_are_refused(tmp_path):
    DDPMPipeline(unet=unet(), scheduler=DDPMScheduler()).save_pretrained(tmp_path)
    (tmp_path / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(ValueError, match="scheduler_config.json; give a pipeline that was saved whole"):
        read_diffusers(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "X", "vae": ["diffusers", "AutoencoderKL"]}))
    with pytest.raises(ValueError, match="names no unet or transformer"):
        read_diffusers(tmp_path)


def test_networks_made_anew_check_their_name_and_options():
    assert make_backbone("UNet2DModel", UNET, null_label=None, checkpointing=False).sample_shape == (3, 8, 8)
    with pytest.raises(ValueError, match="network.name='UNet' is not a known network"):
        make_backbone("UNet", {}, null_label=None, checkpointing=False)
    for name, options in {"MLP": {"widht": 3}, "UNet2DModel": {"widht": 3}}.items():
        with pytest.raises(ValueError, match=f"network.options do not make a {name}: .*widht"):
            make_backbone(name, options, null_label=None, checkpointing=False)
