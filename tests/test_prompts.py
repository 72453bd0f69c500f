"""Prompts: any pipeline's calls are heard, told to its network again, and solved as the stock pipeline samples."""

import copy

import pytest
import torch

from diffdistill import networks
from diffdistill.backbones.pipeline import PipelineBackbone
from diffdistill.config import DenoiserConfig
from diffdistill.preparing.files import read_prompts
from diffdistill.preparing.hearing import Listener
from diffdistill.preparing.opening import network_of, open_pipeline, times_of
from diffdistill.preparing.prepare import prepare
from diffdistill.recipe import typed
from diffdistill.teacher import Teacher
from tests.pipelines import PIPELINES, seeded

TEXTS = ["a dog", "the sea", "a dog", "moon"]


def process_of(said):
    return networks.process(typed(DenoiserConfig, said, "meaning").process)


@pytest.fixture(scope="module", params=PIPELINES)
def prepared(request, tmp_path_factory):
    """A stock pipeline on disk, opened, and the folder of its prompts."""
    tiny, folder = PIPELINES[request.param], tmp_path_factory.mktemp("pipeline")
    seeded(tiny.make).save_pretrained(folder / "stock")
    listener = Listener(open_pipeline(folder / "stock"), tiny.options, "blurred")
    prepare(listener, TEXTS, folder / "prompts", process_of=process_of)
    return listener, folder / "prompts"


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_our_solver_takes_the_steps_of_the_stock_pipeline(prepared, scale):
    listener, folder = prepared
    prompts = read_prompts(folder)
    assert list(prompts.texts) == ["a dog", "the sea", "moon"]
    meaning = typed(DenoiserConfig, dict(prompts.meaning), "meaning")
    backbone = PipelineBackbone(copy.deepcopy(network_of(listener.pipeline)), prompts)
    teacher = Teacher(networks.denoiser(backbone, meaning), guidance=scale)
    asked = {"steps": 4, "first_step_only": False}  # divides 1000: DDIMScheduler steps by 1000 // 4
    texts = ["moon", "a dog"]
    tape = listener.unguided(texts, **asked) if scale == 1 else listener.guided(texts, scale, **asked)
    times = (*times_of(listener.pipeline, prompts.meaning), 0.0)
    solver = "euler" if meaning.prediction.value == "velocity" else "ddim"
    with torch.no_grad():
        ours = teacher.solve(tape.steps[0].before, times, {"label": torch.tensor([2, 0])}, solver=solver)
    theirs = tape.steps[-1].after
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    other = teacher.solve(tape.steps[0].before, times, {"label": torch.tensor([1, 1])}, solver=solver)
    assert (other - theirs).abs().max() > 1e-4 * theirs.abs().max()  # the prompt reaches the network
