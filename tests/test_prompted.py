"""From a stock pipeline with prompts to a few-step one: prepared, distilled, exported, opened by stock diffusers."""

import json

import pytest
import torch

from diffdistill import api, prompting
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
            TEXTS, **said["call"], **call, generator=torch.manual_seed(3), output_type="latent", return_dict=False
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
    from diffdistill.exporting.prompted import Replay

    generator = api.load(run)
    first = torch.randn(samples.shape, generator=torch.Generator().manual_seed(3))
    if first.shape == latents.shape and process == "vp":  # others pack their noise first
        with torch.no_grad():
            ours = generator.sample(first, {"label": torch.tensor([0, 1])}, Replay(3, first))
        assert (latents - ours).abs().max() < 1e-5 * ours.abs().max().clamp_min(1)
