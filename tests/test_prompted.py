"""From a stock pipeline with prompts to a few-step one: prepared, distilled, exported, opened by stock diffusers."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from diffdistill import api, prompting
from diffdistill.exporting.prompted import Replay
from diffdistill.preparing.captions import read_pictures
from diffdistill.preparing.files import read_latents, read_prompts
from diffdistill.preparing.hearing import Listener
from diffdistill.preparing.pictures import Encoder, _given
from tests.pipelines import PIPELINES, seeded

TEXTS = ["a dog", "the sea"]
RATES = {"generator": {"learning_rate": 1e-4}, "critic": {"learning_rate": 1e-4}}
GRIDS = {"vp": [1000.0, 750.0, 500.0, 250.0], "rectified": [1.0, 0.9375, 0.8333333333333334, 0.625]}


@pytest.fixture(scope="module", params=PIPELINES)
def made(request, tmp_path_factory):
    """A folder with a stock pipeline and its prompts, and the name of its process."""
    tiny, folder = PIPELINES[request.param], tmp_path_factory.mktemp("family")
    seeded(tiny.make).save_pretrained(folder / "stock")
    prompting.prepare(folder / "stock", folder / "prompts", prompts=TEXTS, options=tiny.options)
    said = json.loads((folder / "prompts" / "prompts.json").read_text())
    return folder, said["meaning"]["process"]["name"]


def recipe(folder, output, grid, **changes):
    return {
        "output": str(output),
        "teacher": {"path": str(folder / "stock"), "prompts": str(folder / "prompts"), "guidance": 2.0},
        "method": {"name": "dmd2", "ratio": 1},
        "generator": {"grid": grid},
        "players": RATES,
        "train": {"steps": 3, "batch": 2, "device": "cpu"},
    } | changes


def reopened(folder, **call):
    """Latents of the stock pipeline in a folder, called as its verify.json says."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder)
    said = json.loads((folder / "verify.json").read_text())
    with torch.random.fork_rng(devices=[]):
        return pipeline(
            list(TEXTS), **said["call"], **call, generator=torch.manual_seed(3), output_type="latent", return_dict=False
        )[0]


def test_any_family_is_distilled_and_opened_by_stock_diffusers(made, tmp_path):
    folder, process = made
    run = api.distill(recipe(folder, tmp_path / "run", GRIDS[process]), say=lambda line: None)
    samples, labels = api.sample(run, 2)
    assert labels.tolist() == [0, 1] and samples.isfinite().all()
    report = api.export(run, tmp_path / "out")
    assert report.difference < 1e-5 and report.call["num_inference_steps"] == 4
    assert report.call.keys() & {"timesteps", "sigmas"} == set()
    latents = reopened(tmp_path / "out")
    generator = api.load(run)
    first = torch.randn(samples.shape, generator=torch.Generator().manual_seed(3))
    if first.shape == latents.shape and process == "vp":  # others pack their noise first
        with torch.no_grad():
            ours = generator.sample(first, {"label": torch.tensor([0, 1])}, Replay(3, first))
        assert (latents - ours).abs().max() < 1e-5 * ours.abs().max().clamp_min(1)


@pytest.fixture(scope="module")
def pictured(tmp_path_factory):
    """A tiny Stable Diffusion on disk, with pictures and their captions prepared."""
    folder = tmp_path_factory.mktemp("pictured")
    seeded(PIPELINES["stable diffusion 2"].make).save_pretrained(folder / "stock")
    write_pictures(folder / "pictures", 5)
    prompting.prepare(folder / "stock", folder / "prompts", images=folder / "pictures", batch=2, shard=2)
    return folder


def write_pictures(folder, count, size=16):
    folder.mkdir()
    draws = np.random.default_rng(0)
    for number in range(count):
        pixels = draws.integers(0, 255, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {'abc'[number % 3]}\n")


def test_latents_of_pictures_are_those_of_the_autoencoder(pictured):
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(pictured / "stock")
    x0, labels = read_latents(pictured / "prompts")
    assert list(read_prompts(pictured / "prompts").texts) == ["picture a", "picture b", "picture c"]
    assert labels.tolist() == [0, 1, 2, 0, 1] and x0.shape == (5, 4, 8, 8)
    pixels = read_pictures([pictured / "pictures" / f"{number}.png" for number in range(5)], (16, 16))
    with torch.no_grad():
        wanted = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
    torch.testing.assert_close(x0, wanted, rtol=1e-4, atol=1e-5)  # the scale is found in float32


@pytest.mark.parametrize("name", [name for name in PIPELINES if name != "ltx"])
def test_pictures_are_encoded_as_the_pipeline_decodes(name):
    tiny = PIPELINES[name]
    listener = Listener(seeded(tiny.make), tiny.options)
    listener.pipeline.set_progress_bar_config(disable=True)
    shape = tuple(listener.unguided(["a"], steps=2, first_step_only=False).steps[0].before.shape[1:])
    encoder = Encoder.of(listener, shape)
    sample = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    latent = _given(listener, sample)
    back = ((latent - encoder.shift) / encoder.scale).flatten()[encoder.place].reshape(shape)
    torch.testing.assert_close(back, sample, rtol=1e-5, atol=1e-5)


METHODS = {
    "dmd2": {"name": "dmd2", "ratio": 1},
    "sim": {"name": "sim"},
    "scm": {"name": "scm"},
    "rcm": {"name": "rcm"},
}


@pytest.mark.parametrize("name", METHODS)
def test_any_method_distills_a_stable_diffusion(pictured, tmp_path, name):
    said = recipe(pictured, tmp_path / "run", [1000.0], method=METHODS[name])
    said["data"] = {"name": "prepared", "path": str(pictured / "prompts")}
    if name == "scm":
        said["players"] = {"generator": RATES["generator"]}
    run = api.distill(said, say=lambda line: None)
    assert api.export(run, tmp_path / "out").difference < 1e-5


def test_mistakes_with_pictures_and_prompts_are_told(pictured, tmp_path):
    write_pictures(tmp_path / "large", 2, size=24)
    with pytest.raises(ValueError, match="has 24 x 24 pixels .* the pipeline takes 16 x 16; resize it"):
        prompting.prepare(pictured / "stock", tmp_path / "out", images=tmp_path / "large")
    (tmp_path / "large" / "0.txt").unlink()
    with pytest.raises(ValueError, match="0.png has no caption; write it into 0.txt"):
        prompting.prepare(pictured / "stock", tmp_path / "out", images=tmp_path / "large")
    (tmp_path / "prompts.txt").write_text("a dog\n\nmoon\n")
    with pytest.raises(ValueError, match="prompts.txt, line 2 is empty"):
        prompting.prepare(pictured / "stock", tmp_path / "none", prompts=tmp_path / "prompts.txt")
    with pytest.raises(ValueError, match="prompt 1 has 42 tokens, and the text encoder reads 24"):
        prompting.prepare(pictured / "stock", tmp_path / "none", prompts=["x" * 40])
    with pytest.raises(ValueError, match="holds other prompts, or those of another pipeline"):
        prompting.prepare(pictured / "stock", pictured / "prompts", prompts=["moon"])
    with pytest.raises(ValueError, match="a UNet2DConditionModel is told prompts; make some by: diffdistill prepare"):
        said = recipe(pictured, tmp_path / "run", [1000.0])
        said["teacher"]["prompts"] = ""
        api.distill(said)
    run = recipe(pictured, tmp_path / "run", [1000.0])
    with pytest.raises(ValueError, match="there is no prompts.json in .*nowhere; give a folder that diffdistill prep"):
        api.distill(run | {"teacher": run["teacher"] | {"prompts": str(tmp_path / "nowhere")}})


def test_a_truncated_shard_is_told_and_made_again(pictured, tmp_path):
    shutil.copytree(pictured / "prompts", tmp_path / "prompts")
    file = tmp_path / "prompts" / "rows-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="rows-00001.safetensors is truncated or changed since; delete it"):
        read_prompts(tmp_path / "prompts")
    file.unlink()
    options = {"images": pictured / "pictures", "batch": 2, "shard": 2}
    prompting.prepare(pictured / "stock", tmp_path / "prompts", **options)
    again, before = read_prompts(tmp_path / "prompts"), read_prompts(pictured / "prompts")
    for name, rows in before.rows.items():
        assert torch.equal(again.rows[name], rows)
