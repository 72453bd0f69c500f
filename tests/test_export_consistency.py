"""Export of what consistency methods and reflow train: a recipe, a few steps of the very method, a stock pipeline."""

from pathlib import Path

import pytest
import torch
from tiny import NUM_CLASSES, student_recipe, teacher_recipe

from diffdistill import api
from diffdistill.cli import main
from diffdistill.config import ConfigError
from diffdistill.exporting import Refusal
from diffdistill.generator import Generator

VE = {"process": {"name": "ve", "sigma_max": 20.0}, "prediction": "f", "clock": "edm", "scale_input": True}
VP = {"process": {"name": "vp", "beta_start": 1e-4, "beta_end": 0.005}, "clock": "steps"}  # alpha ends at 0.29
MEANINGS = {
    "ve": VE,
    "vp v": VP | {"prediction": "v"},
    "vp v, a null label": VP | {"prediction": "v", "null_label": NUM_CLASSES},
    "vp eps": VP | {"prediction": "eps"},
    "rectified": {"process": {"name": "rectified"}, "prediction": "velocity", "clock": "thousand"},
}
UNIFORM = {"name": "uniform", "levels": {"name": "fixed", "count": 6}}
CD = {"name": "consistency", "pairs": UNIFORM}
LCM = {"name": "consistency", "pairs": UNIFORM, "solver": "ddim"}
BOUNDARY = 0.002  # sigma_min of the process, where the pairs' grid ends
SCM = {"name": "scm", "warmup_steps": 1}
RCM = {"name": "rcm", "warmup_steps": 1, "ratio": 1, "drawn_steps": 2}
EULER = {"step_rule": "euler"}
FLOW_MAP = {"step_rule": "flow_map"}
CM = "ConsistencyModelPipeline", "CMStochasticIterativeScheduler"
LATENT = "ConsistencyModelPipeline", "LCMScheduler"
FLOW = "ConsistencyModelPipeline", "DPMSolverMultistepScheduler"

# name: (teacher, classes, method, generator, pipeline and scheduler)
EXPRESSED = {
    "cd, one step": ("ve", True, CD, {"grid": [20.0], "boundary": BOUNDARY}, CM),
    "cd, two steps": ("ve", True, CD, {"grid": [20.0, 0.821], "boundary": BOUNDARY}, CM),
    "cd without a boundary": ("ve", True, CD, {"grid": [20.0, 0.821]}, CM),
    "ect, two steps": ("ve", True, {"name": "consistency_training"}, {"grid": [20.0, 0.821]}, CM),
    "lcm v, four steps": ("vp v", True, LCM, {"grid": [1000.0, 759.0, 499.0, 259.0]}, LATENT),
    "lcm eps, two steps": ("vp eps", True, LCM, {"grid": [1000.0, 500.0]}, LATENT),
    "lcm that is told its scale": (
        "vp v, a null label",
        True,
        LCM | {"guidance_range": [1.0, 4.0]},
        {"grid": [1000.0, 500.0], "guidance": 3.0},
        LATENT,
    ),
    "mean_flow, one step": ("ve", True, {"name": "mean_flow", "far": 0.5}, {"grid": [20.0]} | FLOW_MAP, CM),
    "mean_flow_training without classes": (
        "ve",
        False,
        {"name": "mean_flow_training", "far": 0.5},
        {"grid": [20.0]} | FLOW_MAP,
        CM,
    ),
    "shortcut of a v network": (
        "vp v",
        True,
        {"name": "shortcut", "bootstrap": 0.5},
        {"grid": [1000.0]} | FLOW_MAP,
        LATENT,
    ),
    "scm, one step": ("ve", True, SCM, {"grid": [20.0]}, CM),
    "scm, two steps": ("ve", True, SCM, {"grid": [20.0, 0.982]}, CM),
    "scm of a v network": ("vp v", True, SCM, {"grid": [1000.0, 400.0]}, LATENT),
    "sct, two steps": ("ve", True, {"name": "sct", "warmup_steps": 1}, {"grid": [20.0, 0.982]}, CM),
    "rcm, two steps": ("ve", True, RCM, {"grid": [20.0, 0.982]}, CM),
    "reflow, one step": ("ve", True, {"name": "reflow"}, {"grid": [20.0]} | EULER, CM),
    "reflow of a velocity, one step": ("rectified", True, {"name": "reflow"}, {"grid": [1.0]} | EULER, FLOW),
    "reflow of a velocity, two steps": (
        "rectified",
        False,
        {"name": "reflow"},
        {"grid": [1.0, 0.5]} | EULER,
        ("DDPMPipeline", "FlowMatchEulerDiscreteScheduler"),
    ),
    "reflow_distill, one step": ("ve", True, {"name": "reflow_distill"}, {"grid": [20.0]}, CM),
    "reflow_distill of a velocity, two steps": (
        "rectified",
        False,
        {"name": "reflow_distill"},
        {"grid": [1.0, 0.5]} | EULER,
        ("DDPMPipeline", "FlowMatchEulerDiscreteScheduler"),
    ),
}
# name: (teacher, classes, method, generator, what the reason says of the way out)
REFUSED = {
    "reflow in two steps on ve": (
        "ve",
        True,
        {"name": "reflow"},
        {"grid": [20.0, 1.0]} | EULER,
        "a grid of one time, or reflow a network with prediction velocity",
    ),
    "mean_flow in two steps": (
        "ve",
        True,
        {"name": "mean_flow"},
        {"grid": [20.0, 1.0]} | FLOW_MAP,
        "told where each of its 2 steps leads, .* export it with a grid of one time",
    ),
    "reflow in two steps with classes": (
        "rectified",
        True,
        {"name": "reflow"},
        {"grid": [1.0, 0.5]} | EULER,
        "use a grid of one time, a network without classes",
    ),
    "scm of a velocity, two steps with classes": (
        "rectified",
        True,
        SCM,
        {"grid": [1.0, 0.5]},
        "use a grid of one time, a network without classes",
    ),
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Folders of teachers, each from a real run of a few steps, made once."""
    made: dict[tuple[str, bool], Path] = {}

    def of(kind: str, classes: bool) -> Path:
        if (kind, classes) not in made:
            folder = tmp_path_factory.mktemp("teacher")
            recipe = teacher_recipe(folder)
            recipe["generator"] |= {"denoiser": MEANINGS[kind], "step_rule": "ddim"}
            if "null_label" in MEANINGS[kind]:
                recipe["generator"]["network"]["options"]["num_class_embeds"] = NUM_CLASSES + 1
            if not classes:
                del recipe["generator"]["network"]["options"]["num_class_embeds"]
            recipe["train"] |= {"steps": 2, "save_every": 2}
            api.export_denoiser(api.distill(recipe, say=silent), folder / "exported")
            api.couple(folder / "exported", folder / "pairs", count=12, steps=3, solver="ddim")
            made[kind, classes] = folder
        return made[kind, classes]

    return of


def silent(line: str) -> None:
    pass


def trained(folder: Path, output: Path, method: dict, generator: dict) -> Path:
    """The run of three steps."""
    recipe = student_recipe(folder, folder / "exported") | {"output": str(output), "method": method}
    del recipe["critic"]
    recipe["generator"] = generator
    if method["name"] != "rcm":
        del recipe["players"]["critic"]
    if method["name"].startswith("reflow"):
        recipe["data"] |= {"pairs": str(folder / "pairs")}
    # so large that three steps move the network far beyond the tolerance
    recipe["players"] = {name: player | {"learning_rate": 3e-3} for name, player in recipe["players"].items()}
    recipe["train"] |= {"steps": 3, "save_every": 3}
    return api.distill(recipe, say=silent)


@pytest.mark.parametrize("name", EXPRESSED)
def test_what_the_method_trained_is_a_stock_pipeline(name, teacher, tmp_path):
    kind, classes, method, generator, stock = EXPRESSED[name]
    run = trained(teacher(kind, classes), tmp_path / "run", method, generator)
    report = api.export(run, tmp_path / "pipeline")
    assert (report.pipeline, report.scheduler) == stock
    assert report.difference < 1e-5
    assert api.load(run).denoiser.boundary == generator.get("boundary", 0.0)


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_stock_pipeline_expresses_is_refused_with_the_way_out(name, teacher, tmp_path):
    kind, classes, method, generator, way_out = REFUSED[name]
    run = trained(teacher(kind, classes), tmp_path / "run", method, generator)
    with pytest.raises(Refusal, match=way_out):
        api.export(run, tmp_path / "pipeline")
    assert not (tmp_path / "pipeline").exists()


@pytest.mark.parametrize("method", [{"name": "scm"}, CD])
def test_a_scale_that_nothing_learns_is_refused(method, teacher, tmp_path):
    with pytest.raises(ConfigError, match="generator.guidance=3.0 is for a network that learns a range of scales"):
        trained(teacher("ve", True), tmp_path / "run", method, {"grid": [20.0], "guidance": 3.0})


def test_one_run_is_sampled_and_exported_in_other_steps_and_at_another_scale(teacher, tmp_path, capsys):
    """LCM's student: the network is told the scale that is asked for, and takes any times."""
    folder = teacher("vp v, a null label", True)
    method, given = LCM | {"guidance_range": [1.0, 4.0]}, {"grid": [1000.0, 500.0], "guidance": 3.0}
    run = trained(folder, tmp_path / "run", method, given)
    own, network = api.load(run), api.load(run).denoiser
    assert (own.grid, own.guidance) == ((1000.0, 500.0), 3.0)
    for grid, guidance in (((1000.0,), 3.0), ((1000.0, 600.0), 1.5)):
        found, labels = api.sample(run, 5, grid=grid, guidance=guidance)
        expected, _ = api.sample(Generator(network, grid, guidance=guidance), 5)
        assert torch.equal(found, expected)
        assert not torch.equal(found, api.sample(run, 5)[0])
    report = api.export(run, tmp_path / "one", grid=(1000.0,), guidance=1.5)
    assert report.difference < 1e-5
    word = [str(word) for word in ("sample", run, "--out", tmp_path / "x.png", "--grid", "1000,500", "--guidance", 1.5)]
    assert main(word) == 0 and (tmp_path / "x.png").exists()
    for options, message in (
        ({"grid": (500.0, 600.0)}, "grid must be strictly decreasing"),
        ({"grid": (1000.0, 0.0)}, r"grid must lie in \(0, t_max\]"),
        ({"guidance": 9.0}, "guidance=9.0 is not among the scales that .* learnt, 1 to 4"),
    ):
        with pytest.raises(ValueError, match=message):
            api.load(run, **options)
    with pytest.raises(ConfigError, match="is no run, so grid=.* cannot be chosen"):
        api.load(folder / "exported", grid=(1000.0,))
    with pytest.raises(ConfigError, match="teacher_steps=3 is a grid of its own"):
        api.sample(run, 2, grid=(1000.0,), teacher_steps=3)
    plain = trained(teacher("ve", True), tmp_path / "plain", CD, {"grid": [20.0]})
    with pytest.raises(ConfigError, match="told no scale; leave out guidance=2.0"):
        api.load(plain, guidance=2.0)
    assert api.load(plain, grid=(20.0, 0.5)).grid == (20.0, 0.5)
