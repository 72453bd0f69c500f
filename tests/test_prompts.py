"""Prompts: any pipeline's calls are heard, told to its network again, and solved as the stock pipeline samples."""

import copy

import pytest
import torch

from diffdistill import networks, prompting
from diffdistill.backbones.pipeline import PipelineBackbone
from diffdistill.config import DenoiserConfig
from diffdistill.denoiser import Backbone, Denoiser
from diffdistill.prediction import Prediction, convert
from diffdistill.preparing.certify import Certificate, probe
from diffdistill.preparing.files import read_index, read_prompts, write_index
from diffdistill.preparing.hearing import Listener
from diffdistill.preparing.opening import network_of, open_pipeline, times_of
from diffdistill.preparing.prepare import prepare
from diffdistill.process import VP
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
    if scale != 1 and "Qwen" in type(listener.pipeline).__name__:  # which scales what is guided to the norm of c
        assert (ours - theirs).abs().max() > 1e-4 * theirs.abs().max()
        return
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    other = teacher.solve(tape.steps[0].before, times, {"label": torch.tensor([1, 1])}, solver=solver)
    assert (other - theirs).abs().max() > 1e-4 * theirs.abs().max()  # the prompt reaches the network


def test_a_pipeline_certifies_and_a_wrong_reading_does_not(tmp_path):
    seeded(PIPELINES["stable diffusion 1"].make).save_pretrained(tmp_path / "stock")
    prompting.prepare(tmp_path / "stock", tmp_path / "prompts", prompts=["a dog", "moon"])
    found = prompting.check_teacher(tmp_path / "stock", tmp_path / "prompts")
    assert found.holds and found.differences.keys() == {1.0, 3.0} and "certified" in str(found)
    assert "(or untrained)" in found.warning  # which it is
    said = read_index(tmp_path / "prompts")
    said["call"]["sign"] = -1
    write_index(tmp_path / "prompts", said)
    read_prompts.cache_clear()
    changed = prompting.check_teacher(tmp_path / "stock", tmp_path / "prompts")
    assert not changed.holds and "NOT the pipeline's own sampling" in str(changed)


@pytest.mark.parametrize("said", [Prediction.EPS, Prediction.V, Prediction.X0])
@pytest.mark.parametrize("truly", [Prediction.EPS, Prediction.V, Prediction.X0])
def test_the_probe_finds_what_a_network_predicts(truly, said):
    """The exact denoiser of a Gaussian, which gives `truly` and is said to give `said`."""

    class Exact(Backbone):
        sample_shape, condition_names, num_classes = (64,), (), 0

        def forward(self, x, time, cond):
            t = (time + 1).double()
            alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
            x0 = alpha / (alpha**2 + sigma**2) * x
            return convert(x0, x, t, process, source=Prediction.X0, to=truly)

        def null(self, cond):
            raise ValueError("it has none")

        def blocks(self):
            return []

    process = VP.scaled_linear()
    model = Denoiser(Exact(), process, said, clock="steps")
    noise = torch.randn(16, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    readings = probe(model, {}, noise)
    found = Certificate({1.0: 0.0, 3.0: 0.0}, 0.0, readings, said)
    assert min(readings, key=readings.get) is truly
    assert (found.warning == "") == (truly is said)
    if truly is not said:
        assert f"look like {truly.value}" in found.warning
