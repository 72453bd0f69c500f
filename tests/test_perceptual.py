"""LPIPS: its formula, the files that it is read from, and DMD runs whose regression it is."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from cases import PERCEPTUAL, all_tensors, make_trainer, small_lpips
from safetensors.torch import load_file, save_file
from test_contract import assert_same, log_lines
from tiny import refused, student_recipe, teacher_recipe, write_recipe, write_vgg16
from torch import nn

from diffdistill import api, checkpoint, trial
from diffdistill.config import ConfigError
from diffdistill.distances import Lpips, PseudoHuber
from diffdistill.perceptual import LpipsNetwork, read_lpips, vgg16
from diffdistill.recipe import parse, plain
from diffdistill.rng import Rng
from diffdistill.trainer import Schedule


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_vgg16(tmp_path_factory.mktemp("vgg16") / "vgg16.safetensors")


def pictures(count: int = 2, size: int = 16, *, channels: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(count, channels, size, size, generator=generator, dtype=torch.float64) - 1


def seen_by_hand(network: LpipsNetwork, pictures: torch.Tensor) -> list[torch.Tensor]:
    """The features of pictures (N, 3, height, width) at each tap."""
    shift, scale = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's mean and deviation, seen from [-1, 1]
    x = torch.stack([(pictures[:, c] - shift[c]) / scale[c] for c in range(3)], 1)
    found = []
    for place, layer in enumerate(network.features):
        x = layer(x)
        if place in network.taps:
            found.append(x)
    return found


def by_hand(network: LpipsNetwork, made: torch.Tensor, target: torch.Tensor) -> list[float]:
    """The distance of each pair of pictures, number by number."""
    totals = [0.0] * len(made)
    for head, *sides in zip(network.heads, seen_by_hand(network, made), seen_by_hand(network, target), strict=True):
        height, width = sides[0].shape[2:]
        for n, i, j in itertools.product(range(len(made)), range(height), range(width)):
            one, other = (
                [value / math.sqrt(side[n, :, i, j].square().sum() + 1e-8) for value in side[n, :, i, j].tolist()]
                for side in sides
            )
            weighted = [w * (p - q) ** 2 for w, p, q in zip(head.tolist(), one, other, strict=True)]
            totals[n] += sum(weighted) / (height * width)
    return totals


def test_it_is_the_weighted_square_of_unit_features_averaged_over_places():
    network, made, target = small_lpips(Lpips("small", size=0)).double(), pictures(), pictures(seed=1)
    # float64: another order of sums
    assert network(made, target).tolist() == pytest.approx(by_hand(network, made, target), rel=1e-12)


def test_it_is_zero_at_equal_pictures_and_symmetric(weights):
    network, made, target = read_lpips(weights, size=0).double(), pictures(), pictures(seed=1)
    assert network(made, made).tolist() == [0, 0]
    assert torch.equal(network(made, target), network(target, made)) and (network(made, target) > 0).all()


def test_it_agrees_with_torchmetrics(weights, monkeypatch):
    """Their module around our VGG16, whose own trunk needs torchvision; size 32, at which no pooling leaves a rest."""
    theirs = pytest.importorskip("torchmetrics.functional.image.lpips")
    ours = read_lpips(weights, size=0).double()
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda net, pretrained: ours.features)
    judge = theirs._LPIPS(net="vgg").double()
    judge.scaling_layer.shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64)[:, None, None]
    judge.scaling_layer.scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64)[:, None, None]
    made, target = pictures(size=32), pictures(size=32, seed=1)
    torch.testing.assert_close(ours(made, target), judge(made, target).flatten(), rtol=1e-12, atol=0)  # float64
    larger = read_lpips(weights, size=32).double()
    small = pictures(size=16), pictures(size=16, seed=1)
    enlarged = (F.interpolate(x, (32, 32), mode="bilinear", align_corners=False) for x in small)
    torch.testing.assert_close(larger(*small), judge(*enlarged).flatten(), rtol=1e-10, atol=0)  # it enlarges first


def test_grey_pictures_are_three_equal_channels():
    network, made, target = (
        small_lpips(Lpips("small", size=20)).double(),
        pictures(channels=1),
        pictures(channels=1, seed=1),
    )
    assert torch.equal(network(made, target), network(made.repeat(1, 3, 1, 1), target.repeat(1, 3, 1, 1)))


def test_its_gradient_is_the_slope_and_reaches_no_weight(weights):
    network, made, target = read_lpips(weights, size=20).double(), pictures(1), pictures(1, seed=1)
    assert not any(parameter.requires_grad for parameter in network.parameters()) and not network.training
    moving = made.clone().requires_grad_(True)
    network(moving, target).sum().backward()
    for place in ((0, 0, 0, 0), (0, 1, 7, 3), (0, 2, 15, 15)):
        step = torch.zeros_like(made)
        step[place] = 1e-5
        slope = (network(made + step, target) - network(made - step, target)).item() / 2e-5
        # central differences of a piecewise smooth function: second order, and 1e-16 / 1e-5 of rounding
        assert moving.grad[place].item() == pytest.approx(slope, rel=1e-5)


def test_black_features_have_a_gradient():
    """Where every feature is 0, so that its norm has no derivative."""
    network = small_lpips(Lpips("small", size=0)).double()
    for layer in network.features:
        if isinstance(layer, nn.Conv2d):
            layer.weight.zero_()
            layer.bias.fill_(-1)
    made = pictures().requires_grad_(True)
    network(made, pictures(seed=1)).sum().backward()
    assert made.grad.isfinite().all()


def test_under_bf16_only_the_layers_are_low(weights):
    """Unit features in bf16 would be wrong by 2^-9 each; they are made in float32 of what the layers give."""
    network = read_lpips(weights, size=0)
    made, target = (pictures(4, 32, seed=seed).float() for seed in (0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = network(made, target)
        sides = [seen_by_hand(network, x) for x in (made, target)]
    assert found.dtype == torch.float32 and all(features.dtype == torch.bfloat16 for side in sides for features in side)
    expected = torch.zeros(4)
    for head, *pair in zip(network.heads, *sides, strict=True):
        one, other = (F.normalize(features.float(), dim=1) for features in pair)
        expected += torch.einsum("c,ncij->n", head, (one - other) ** 2) / one[0, 0].numel()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)  # float32: another order of sums
    torch.testing.assert_close(found, network(made, target), rtol=0.02, atol=0)  # thirteen layers in bf16


CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # of torchvision's vgg16().features


def test_vgg16_has_the_names_and_size_of_torchvisions():
    features = vgg16()
    assert list(features.state_dict()) == [f"{i}.{kind}" for i in CONVOLUTIONS for kind in ("weight", "bias")]
    assert sum(parameter.numel() for parameter in features.parameters()) == 14_714_688
    assert all(features[i].weight.shape[2:] == (3, 3) for i in CONVOLUTIONS)


def test_the_learnt_weights_are_those_of_version_0_1(weights):
    """Their sums, read off the authors' file as another package carries it."""
    heads = read_lpips(weights, size=0).heads
    sums = [6.925992, 8.858335, 17.515005, 51.521324, 47.034851]
    assert [head.sum().item() for head in heads] == pytest.approx(sums, rel=1e-6)
    assert [len(head) for head in heads] == [64, 128, 256, 512, 512] and all((head >= 0).all() for head in heads)


@pytest.mark.parametrize("zipped", [True, False])
def test_torchvisions_own_file_is_read(zipped, weights, tmp_path):
    """It is an ordered mapping, of the format before zip archives, with the classifier behind the features."""
    state = {**load_file(weights), "classifier.0.weight": torch.zeros(3, 2), "classifier.6.bias": torch.zeros(3)}
    torch.save(state, tmp_path / "vgg16.pth", _use_new_zipfile_serialization=zipped)
    ours, theirs = read_lpips(tmp_path / "vgg16.pth", size=0), read_lpips(weights, size=0)
    assert_same(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda state: without(state, "features.28.bias"),
            "features.28.bias it has none of this name, and VGG16 shape",
        ),
        (
            lambda state: {**state, "features.30.weight": torch.zeros(2)},
            "features.30.weight it has shape .2,., and VGG16",
        ),
        (
            lambda state: {**state, "features.0.weight": torch.zeros(64, 1, 3, 3)},
            "has shape .64, 1, 3, 3., and VGG16 shape",
        ),
        (lambda state: {"conv1.weight": torch.zeros(2)}, "is no VGG16 of torchvision's: for conv1.weight"),
    ],
)
def test_other_networks_are_refused(change, said, weights, tmp_path):
    save_file(change(load_file(weights)), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=f"distance.weights=.*other.safetensors .*{said}.*give vgg16-397923af.pth"):
        read_lpips(tmp_path / "other.safetensors", size=0)


class Surprise:
    """Something that a file of weights has no business to hold."""


@pytest.mark.parametrize(
    ("name", "write", "said"),
    [
        ("none.pth", lambda file: None, "is no file; give torchvision's VGG16, which is at https://"),
        ("folder.pth", lambda file: file.mkdir(), "is no file"),
        ("empty.pth", lambda file: file.write_bytes(b""), "could not be read"),
        ("noise.pth", lambda file: file.write_bytes(bytes(range(256))), "could not be read"),
        ("noise.safetensors", lambda file: file.write_bytes(b"no"), "could not be read"),
        ("code.pth", lambda file: torch.save({"features.0.weight": Surprise()}, file), "could not be read"),
        ("list.pth", lambda file: torch.save([torch.zeros(2)], file), "holds no mapping of names to tensors"),
        ("nested.pth", lambda file: torch.save({"state": {}}, file), "holds no mapping of names to tensors"),
    ],
)
def test_what_is_no_file_of_weights_is_refused(name, write, said, tmp_path):
    write(tmp_path / name)
    with pytest.raises(ValueError, match=f"distance.weights=.*{name} {said}"):
        read_lpips(tmp_path / name, size=0)


def test_the_lack_of_the_learnt_weights_is_told(weights, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="torchmetrics, which is not installed; try: pip install"):
        read_lpips(weights, size=0)


@pytest.mark.parametrize(
    ("shape", "size", "said"),
    [
        ((2,), 224, "points or latents; take name: pseudo_huber"),
        ((4, 32, 32), 224, "the samples are .4, 32, 32.: points or latents"),
        ((3, 8, 8), 0, "distance.size=0 leaves samples of 8 x 8 pixels as they are, and VGG16 needs 16"),
        ((3, 256, 256), 224, "distance.size=224 would shrink samples of 256 x 256 pixels; give 0"),
        ((1, 28, 28), 224, ""),
        ((3, 256, 256), 0, ""),
        ((3, 224, 224), 224, ""),
    ],
)
def test_samples_that_it_cannot_see_are_refused(shape, size, said):
    if not said:
        return Lpips("file", size=size).refuse_unseen(shape)
    with pytest.raises(ValueError, match=said):
        Lpips("file", size=size).refuse_unseen(shape)


def settings(**method) -> dict:
    return {
        "output": "run",
        "method": {"name": "dmd", **method},
        "generator": {"grid": [80.0]},
        "players": {},
        "train": {"steps": 1, "batch": 1},
    }


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({}, PseudoHuber(5.4e-4)),
        ({"distance": {"name": "pseudo_huber", "huber": 0.1}}, PseudoHuber(0.1)),
        ({"distance": {"name": "lpips", "weights": "w.pth"}}, Lpips("w.pth", 224)),
    ],
)
def test_a_distance_is_read_from_a_recipe_and_written_to_it(given, meant):
    config = parse(settings(**given))
    assert config.method.distance == meant
    assert parse(plain(config)) == config


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"distance": {"name": "lpips"}}, "method.distance.weights is missing"),
        ({"distance": {"name": "lpisp"}}, "method.distance.name='lpisp' is unknown .did you mean lpips.*known are"),
        ({"distance": {"name": "lpips", "weights": ""}}, "method.distance.weights is empty; name the file"),
        ({"distance": {"name": "lpips", "weights": "w", "size": 8}}, "method.distance.size must be at least 16, got 8"),
        ({"distance": {"name": "pseudo_huber", "huber": 0.0}}, "method.distance.huber must be positive, got 0.0"),
        ({"distance": {"name": "squared"}, "huber": 0.1}, "unknown key method.huber"),
    ],
)
def test_wrong_settings_are_refused_by_name(given, said):
    with pytest.raises(ConfigError, match=said):
        parse(settings(**given))


@pytest.fixture(scope="module")
def coupled(tmp_path_factory):
    """A folder with a teacher of 8 x 8 pictures, its pairs, and a recipe of DMD that reads them."""
    folder = tmp_path_factory.mktemp("runs")
    teacher = api.export_denoiser(api.distill(teacher_recipe(folder), say=lambda line: None), folder / "exported")
    api.couple(teacher, folder / "pairs", count=12, steps=2)
    recipe = student_recipe(folder, teacher)
    del recipe["critic"]
    recipe["data"] = {"pairs": str(folder / "pairs")}
    recipe["train"] |= {"save_every": 1}
    return recipe


def with_lpips(recipe: dict, weights, output, **distance) -> dict:
    method = {"name": "dmd", "distance": {"name": "lpips", "weights": str(weights), "size": 16, **distance}}
    return {**recipe, "method": method, "output": str(output)}


def test_a_run_resumes_bit_for_bit_and_keeps_the_network_out_of_its_checkpoints(coupled, weights, tmp_path):
    whole = api.distill(with_lpips(coupled, weights, tmp_path / "whole"), say=lambda line: None)
    recipe = with_lpips(coupled, weights, tmp_path / "parts")
    parts = api.distill(recipe, say=lambda line: None, budget=api.Budget(steps=1))
    assert checkpoint.read_state(checkpoint.latest(parts))["step"] == 1
    api.distill(recipe, say=lambda line: None)
    ours, theirs = (checkpoint.read_state(checkpoint.latest(run)) for run in (parts, whole))
    assert ours["step"] == 2 and ours["files"] == theirs["files"]  # SHA-256 of every file
    lines = log_lines(whole)
    assert log_lines(parts)[-1] == lines[-1] and lines[-1]["generator/regress/distance"] > 0
    assert sum(file.stat().st_size for file in whole.rglob("*.safetensors")) < 4 * 14_714_688
    assert not any("features" in name or "lpips" in name for name in ours["files"])


def test_the_plan_of_memory_counts_it_once(coupled, weights, tmp_path):
    recipe = with_lpips(coupled, weights, tmp_path / "run")
    assert "lpips           14,716,160" in api.check(recipe)  # VGG16 and 1,472 channels
    two = {**recipe, "method": {"name": "multi_student", "students": 2, "inside": recipe["method"]}}
    (line,) = [line for line in api.check(two).splitlines() if "lpips" in line]
    assert "14,716,160" in line
    off = {**recipe, "method": {**recipe["method"], "regression_weight": 0.0}}
    assert "lpips" not in api.check(off)


def test_a_missing_file_ends_a_run_before_it_begins(coupled, tmp_path, capsys):
    recipe = with_lpips(coupled, tmp_path / "nowhere.pth", tmp_path / "run")
    path = write_recipe(tmp_path / "recipe.yaml", recipe)
    for command in ("check", "train"):
        said = refused(capsys, command, path)
        assert "distance.weights=" in said and "nowhere.pth is no file; give torchvision's VGG16" in said
    assert not (tmp_path / "run").exists()


def test_latents_are_refused_by_the_decoder_in_the_teachers_folder(coupled, weights, tmp_path):
    api.export(api.distill({**coupled, "method": {"name": "dmd"}, "output": str(tmp_path / "dmd")}), tmp_path / "stock")
    index = tmp_path / "stock" / "model_index.json"
    recipe = with_lpips(coupled, weights, tmp_path / "run")
    recipe["teacher"] = {"path": str(tmp_path / "stock")}
    recipe["generator"] = {"grid": [15.0]}
    assert "lpips" in [role.name for role in trial.plan_memory(parse(recipe))]
    index.write_text(index.read_text().replace('"unet"', '"vqvae": ["diffusers", "VQModel"],\n "unet"'))
    with pytest.raises(
        ConfigError, match="compares pictures in pixels, and teacher.path=.*stock makes latents for its vq"
    ):
        trial.plan_memory(parse(recipe))


def test_accumulated_small_batches_equal_one_big_one(tmp_path):
    schedule = Schedule(steps=2, batch=12, log_every=2, save_every=0)
    one, many = (
        make_trainer(PERCEPTUAL, tmp_path / str(parts), schedule=dataclasses.replace(schedule, accumulate=parts))
        for parts in (1, 3)
    )
    one.run()
    many.run()
    assert_same(all_tensors(one), all_tensors(many), rtol=1e-12, atol=1e-12)  # float64: only the order of sums differs


def test_its_gradient_reaches_the_generator_alone(tmp_path):
    trainer = make_trainer(PERCEPTUAL, tmp_path, schedule=Schedule(steps=1, batch=4))
    method = trainer.method
    (network,) = method.frozen().values()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    (regress,) = [term for term in method.plan(0)[0].terms if term.name == "regress"]
    rng = Rng((0,), range(4), dtype=torch.float64)
    regress.loss(trainer.data.draw(rng), rng).value.sum().backward()
    moved = {
        name: [parameter.grad is not None and bool(parameter.grad.any()) for parameter in spec.parameters.values()]
        for name, spec in method.players().items()
    }
    assert sum(moved["generator"]) > 0.9 * len(moved["generator"]) and not any(moved["critic"])
    assert all(parameter.grad is None for parameter in (*network.parameters(), *method.teacher.denoiser.parameters()))
    trainer.run()
    assert_same(network.state_dict(), before, rtol=0, atol=0)
