"""The commands as functions, and sampling that depends on seed and index alone."""

import json

import pytest
import torch
from tiny import NUM_CLASSES, student_recipe, teacher_recipe, write_images

import diffdistill
from diffdistill import api, build, networks
from diffdistill.backbones.folder import META
from diffdistill.backbones.mlp import MLP
from diffdistill.config import ConfigError, DataConfig, DenoiserConfig, TeacherConfig, VEConfig, VPConfig
from diffdistill.data import refuse_unfit
from diffdistill.denoiser import Denoiser
from diffdistill.evaluation.sampling import Solved, evaluating, sample_images
from diffdistill.generator import Generator
from diffdistill.method import Networks, Sample
from diffdistill.methods.denoise import Denoise
from diffdistill.prediction import Prediction
from diffdistill.process import VE, VP
from diffdistill.recipe import parse
from diffdistill.rng import replace_dropout
from diffdistill.teacher import Teacher


def toy_denoiser() -> Denoiser:
    """A random MLP in float64 with classes and dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = MLP(width=16, num_classes=NUM_CLASSES, dropout=0.3).double()
        torch.nn.init.normal_(network.leave.weight)
    replace_dropout(network)
    return Denoiser(network, VE(sigma_max=5.0), Prediction.F, clock="log_ratio", scale_input=True)


SOURCES = {
    "one step": lambda: Generator(toy_denoiser(), [5.0]),
    "renoised": lambda: Generator(toy_denoiser(), [5.0, 2.0, 0.5]),
    "teacher": lambda: Solved(Teacher(toy_denoiser()), 4),
    "teacher by euler": lambda: Solved(Teacher(toy_denoiser()), 4, "euler"),
}
EVERY_SOURCE = pytest.mark.parametrize("name", SOURCES)


@EVERY_SOURCE
def test_a_sample_depends_on_seed_and_index_and_not_on_batch_or_count(name):
    source = SOURCES[name]()
    whole, labels = sample_images(source, 10, seed=3, batch=10)
    for batch, count in ((1, 10), (3, 10), (4, 7)):
        part, some = sample_images(source, count, seed=3, batch=batch)
        torch.testing.assert_close(part, whole[:count], rtol=0, atol=1e-12)  # matrix products of other sizes
        assert torch.equal(some, labels[:count])
    other, _ = sample_images(source, 10, seed=4, batch=10)
    assert not (other == whole).any()
    assert labels.tolist() == [index % NUM_CLASSES for index in range(10)]


@EVERY_SOURCE
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_shares_of_all_ranks_are_the_samples_of_one(name, ranks):
    source = SOURCES[name]()
    whole, labels = sample_images(source, 10, seed=3, batch=4)
    shares = [sample_images(source, 10, seed=3, batch=4, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert len({len(share) for share, _ in shares}) == 1  # sharded networks need equal numbers of forwards
    torch.testing.assert_close(torch.cat([share for share, _ in shares])[:10], whole, rtol=0, atol=1e-12)
    assert torch.equal(torch.cat([some for _, some in shares])[:10], labels)


@pytest.mark.parametrize(("steps", "solver"), [(1, "euler"), (3, "heun")])
def test_a_generator_on_the_customary_grid_is_the_teacher_on_it(steps, solver):
    model = toy_denoiser()
    ours, _ = sample_images(Generator(model, model.process.grid(steps), step_rule=solver), 5, seed=0, batch=5)
    theirs, _ = sample_images(Solved(Teacher(model), steps, solver), 5, seed=0, batch=5)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)  # the last step is written in two ways


def test_sampling_is_in_evaluation_mode_and_restores_every_mode():
    model = toy_denoiser().train()
    model.backbone.layers[1].eval()
    modes = [part.training for part in model.modules()]
    with evaluating(model):
        assert not any(part.training for part in model.modules())
    assert [part.training for part in model.modules()] == modes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count": 0}, "count and batch must be at least 1"),
        ({"batch": 0}, "count and batch must be at least 1"),
        ({"labels": [0, 1]}, "labels must be 3 numbers"),
        ({"labels": [0, 1, NUM_CLASSES]}, "labels must be 3 numbers"),
        ({"labels": [0, 1, -1]}, "labels must be 3 numbers"),
    ],
)
def test_wrong_requests_for_samples_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        sample_images(SOURCES["one step"](), **({"count": 3, "batch": 2, "seed": 0} | options))
    with pytest.raises(ValueError, match="no classes"):
        sample_images(Generator(without_classes(), [5.0]), 3, seed=0, batch=2, labels=[0, 0, 0])


def without_classes() -> Denoiser:
    return Denoiser(MLP(width=16), VE(), Prediction.F, clock="log_ratio", scale_input=True)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A teacher made, exported, and distilled, by functions alone."""
    folder = tmp_path_factory.mktemp("chain")
    said: list[str] = []
    run = diffdistill.distill(teacher_recipe(folder), say=said.append)
    api.export_denoiser(run, folder / "exported", weights="raw")
    recipe = student_recipe(folder, folder / "exported")
    recipe["averages"] = {"fast": {"name": "constant", "beta": 0.0}, "slow": {"name": "constant", "beta": 0.999}}
    student = diffdistill.distill(recipe, say=said.append)
    return folder, run, student, said


def test_a_run_is_loaded_with_the_weights_asked_for(chain):
    _, _, student, said = chain
    first, raw, slow = (diffdistill.load(student, weights=name) for name in ("", "raw", "slow"))
    assert isinstance(first, Generator) and first.grid == (20.0,)

    def difference(ours: Generator, theirs: Generator) -> float:
        pairs = zip(ours.denoiser.parameters(), theirs.denoiser.parameters(), strict=True)
        return max((a - b).abs().max().item() for a, b in pairs)

    assert difference(first, raw) == 0  # the first average, with beta = 0, is the last step's weights
    assert difference(slow, raw) > 0
    assert said[-1].endswith("is complete")


def test_a_denoisers_folder_is_a_teacher_and_gives_the_samples_of_its_run(chain):
    folder, run, student, _ = chain
    assert isinstance(diffdistill.load(folder / "exported"), Teacher)
    ours, labels = diffdistill.sample(folder / "exported", 5, teacher_steps=3)
    theirs, _ = diffdistill.sample(run, 5, teacher_steps=3, weights="raw")
    through_student, _ = diffdistill.sample(student, 5, teacher_steps=3)
    assert torch.equal(ours, theirs) and torch.equal(ours, through_student)
    assert labels.tolist() == [0, 1, 2, 0, 1]


def test_half_the_bytes_hold_the_weights_to_half_precision(chain):
    folder, run, _, _ = chain
    api.export_denoiser(run, folder / "half", weights="raw", half=True)
    (full,), (half,) = (list((folder / name / "network").glob("*.safetensors")) for name in ("exported", "half"))
    assert half.stat().st_size < 0.75 * full.stat().st_size
    ours, theirs = (networks.read_denoiser(folder / name)[0] for name in ("half", "exported"))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2**-11, atol=2**-25)  # fp16 rounds to 11 bits, and to 2^-24 near zero


def test_an_existing_folder_is_not_overwritten_unless_asked(chain):
    folder, run, _, _ = chain
    with pytest.raises(ConfigError, match="exists"):
        api.export_denoiser(run, folder / "exported")
    with pytest.raises(ConfigError, match="exists"):
        api.export_denoiser(run, folder / "teacher", replace=True)  # a run, and no export
    assert (folder / "teacher" / "config.yaml").is_file()


def test_a_pipeline_of_diffusers_is_a_teacher(chain, tmp_path):
    folder, _, student, _ = chain
    with pytest.raises(ValueError, match="0e\\+00 is allowed; nothing was written"):
        api.export(student, tmp_path / "pipeline", tolerance=0.0)
    api.export(student, tmp_path / "pipeline")
    config = TeacherConfig(str(tmp_path / "pipeline"))
    model, meaning = networks.teacher_denoiser(config)
    ours = diffdistill.load(student).denoiser
    x, t = torch.randn(2, 3, 8, 8, dtype=torch.float64).float(), torch.tensor([0.5, 3.0], dtype=torch.float64)
    with torch.no_grad():
        outputs = [each(x, t, {"label": torch.tensor([0, 2])}) for each in (model, ours)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-6)
    bare, same = networks.teacher_denoiser(config, device=META)
    assert same == meaning and next(bare.parameters()).is_meta
    with pytest.raises(ConfigError, match="teacher.denoiser is missing"):
        networks.teacher_denoiser(TeacherConfig(str(tmp_path / "pipeline" / "unet")))
    named, _ = networks.teacher_denoiser(TeacherConfig(str(tmp_path / "pipeline" / "unet"), denoiser=meaning))
    assert isinstance(named, Denoiser)
    with pytest.raises(ConfigError, match="leave it out"):
        networks.teacher_denoiser(TeacherConfig(str(folder / "exported"), denoiser=meaning))
    with pytest.raises(ConfigError, match="is no folder; give one, or hub:owner/name"):
        networks.teacher_denoiser(TeacherConfig("owner/name"))


def test_a_table_rescaled_to_zero_snr_ends_at_pure_noise_and_begins_as_before():
    before, after = networks.process(VPConfig()), networks.process(VPConfig(zero_snr=True))
    first, last = (torch.tensor([t], dtype=torch.float64) for t in (1, 1000))
    assert after.alpha(last).item() == pytest.approx(0, abs=1e-15)
    assert after.alpha(first).item() == pytest.approx(before.alpha(first).item(), rel=1e-12)
    listed = networks.process(VPConfig(betas=tuple(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).tolist())))
    assert listed.same_law(before) and isinstance(listed, VP)


def test_a_student_may_speak_another_process_than_its_teacher(chain, tmp_path):
    folder, _, _, _ = chain
    recipe = student_recipe(tmp_path, folder / "exported")
    made = teacher_recipe(tmp_path)["generator"]
    made["denoiser"]["process"] = {"name": "vp", "sigma_data": 0.5}
    recipe["generator"] = {"grid": [1000.0], "network": made["network"], "denoiser": made["denoiser"]}
    chosen = build.method(parse(recipe), torch.device("cpu"))
    assert isinstance(chosen.generator.process, VP) and chosen.teacher.process.same_law(chosen.generator.process)
    assert chosen.critic.process.same_law(chosen.generator.process)


def recomputes(model: Denoiser) -> bool:
    return any(getattr(part, "gradient_checkpointing", False) for part in model.modules())


@pytest.mark.parametrize("wanted", [True, False])
def test_every_network_recomputes_its_activations_where_asked(wanted, chain, tmp_path):
    recipe = student_recipe(tmp_path, chain[0] / "exported")
    recipe["train"]["gradient_checkpointing"] = wanted
    chosen = build.method(parse(recipe), torch.device("cpu"))
    for model in (chosen.generator.denoiser, chosen.critic.denoiser, chosen.teacher.denoiser):
        assert recomputes(model) == wanted  # the teacher too: some methods differentiate through its input


def test_a_stream_that_nothing_makes_is_refused():
    class Blind(Denoise):
        def streams(self) -> frozenset[str]:
            return frozenset({"smells"})

    chosen = Blind(Denoise.Config(), Networks(lambda: Generator(toy_denoiser(), [1.0]), lambda: None))
    with pytest.raises(ConfigError, match="reads the stream smells, which nothing makes; known are conditions, images"):
        build.streams(parse(smallest_recipe()), chosen, torch.device("cpu"))


def smallest_recipe() -> dict:
    """What `parse` needs, and no file."""
    return {
        "output": "run",
        "method": {"name": "denoise"},
        "generator": {"grid": [1.0]},
        "players": {"generator": {"learning_rate": 1e-3}},
        "train": {"steps": 1, "batch": 1},
    }


def refusal(recipe: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        build.method(parse(recipe), META)
    return str(caught.value)


def test_weights_chosen_from_what_holds_one_set_of_them_are_refused(chain, tmp_path):
    folder, run, _, _ = chain
    recipe = teacher_recipe(tmp_path)
    recipe["generator"] |= {"init_weights": "fast"}
    assert "generator.init_weights=fast is given without generator.init_from" in refusal(recipe)
    recipe["generator"] |= {"init_from": str(folder / "exported")}
    assert "holds one set of weights; leave init_weights out, or give a run" in refusal(recipe)
    recipe["generator"] |= {"init_from": str(run)}
    build.method(parse(recipe), torch.device("cpu"))


def test_a_teacher_that_changes_nothing_is_refused(chain, tmp_path):
    path = str(chain[0] / "exported")
    recipe = teacher_recipe(tmp_path) | {"teacher": {"path": path}}
    assert f"teacher.path={path} is given, but method denoise needs no teacher" in refusal(recipe)
    recipe["generator"] = {"grid": [20.0]}
    build.method(parse(recipe), META)  # fine-tuning: the generator starts from it
    recipe["teacher"]["guidance"] = 2.0
    assert "teacher.guidance=2.0 has no meaning for method denoise" in refusal(recipe)


@pytest.mark.parametrize(("name", "value"), [("taps", ["network.conv_in"]), ("trunk", "teacher")])
def test_settings_of_a_discriminator_that_is_not_there_are_refused(name, value, chain, tmp_path):
    recipe = student_recipe(tmp_path, chain[0] / "exported") | {"critic": {name: value}}
    build.method(parse(recipe), META)
    recipe["method"] = {"name": "dmd2"}
    assert f"critic.{name}={value} is about a discriminator, and method dmd2 has none" in refusal(recipe)
    assert f"critic.{name}={value}" in refusal(teacher_recipe(tmp_path) | {"critic": {name: value}})


def test_guidance_of_a_teacher_without_classes_is_refused_before_the_first_step(tmp_path):
    meaning = DenoiserConfig(VEConfig(), Prediction.F, "log_ratio", scale_input=True)
    networks.write_denoiser(without_classes(), meaning, tmp_path / "plain")
    recipe = student_recipe(tmp_path, tmp_path / "plain")
    recipe |= {"method": {"name": "dmd2"}, "critic": {}}
    build.method(parse(recipe), META)
    recipe["teacher"]["guidance"] = 2.0
    assert "teacher.guidance=2.0 needs a teacher with classes" in refusal(recipe)


def test_a_first_batch_that_does_not_fit_is_refused():
    good = torch.linspace(-1, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)

    def answer(x0, dtype=torch.float32) -> None:
        refuse_unfit({"images": Sample(x0=x0), "conditions": Sample()}, (3, 4, 4), dtype)

    answer(good)
    for wrong, words in (
        (good[:, :1], r"shape \(1, 4, 4\)"),
        (good.double(), "float64"),
        (good * 255, "from -255 to 255; scale them"),
        (good / 255, "not 0 to 1"),
        (good.clone().fill_(torch.nan), "NaN"),
    ):
        with pytest.raises(ValueError, match=words):
            answer(wrong)


def test_evaluation_at_intervals_is_logged_and_equals_the_command(tmp_path, monkeypatch):
    extractor_folder = "checkpoints/fashion-features"
    data = {"name": "folder", "path": str(write_images(tmp_path / "large.npz", size=28))}
    recipe = teacher_recipe(tmp_path)
    recipe["generator"]["network"]["options"]["sample_size"] = 28
    recipe["train"] |= {"steps": 2, "log_every": 0}
    wanted = {"every": 2, "samples": 8, "batch": 3, "features": extractor_folder}
    recipe |= {"data": data, "evaluate": wanted}
    monkeypatch.chdir(build.Path(__file__).parents[1])
    run = api.distill(recipe, say=lambda line: None)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [("evaluate", 0), ("evaluate", 2)]
    found = api.evaluate(run)
    assert found["num_samples"] == 8 and found["num_reference"] == 60
    for name in set(lines[-1]) - {"kind", "step", "seconds"}:
        value = found[name]
        assert lines[-1][name] == (pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value)
    with pytest.raises(ConfigError, match="does not say which real images"):
        api.evaluate(tmp_path)
    with pytest.raises(ConfigError, match="evaluate.features is missing"):
        api.evaluate(run, data={"name": "folder", "path": data["path"]}, settings={"features": "", "every": 0})


def test_trackers_get_the_same_scalars_and_stay_at_home(tmp_path):
    recipe = teacher_recipe(tmp_path) | {"trackers": ["tensorboard", "wandb"]}
    run = api.distill(recipe, say=lambda line: None)
    assert list(run.rglob("events.out.tfevents*"))
    assert list(run.glob("wandb/offline-run-*"))


def test_no_real_images_are_a_clear_mistake():
    with pytest.raises(ConfigError, match="data.name is none"):
        build.images(DataConfig(), "train")


def test_check_tells_of_data_that_is_not_there(tmp_path):
    teacher = api.export_denoiser(api.distill(teacher_recipe(tmp_path), say=lambda line: None), tmp_path / "exported")
    recipe = student_recipe(tmp_path, teacher) | {"output": str(tmp_path / "run")}

    def said(**changes) -> str:
        with pytest.raises(ConfigError) as caught:
            api.check(recipe | changes)
        return str(caught.value)

    assert "data.name is none" in said(data={"name": "none"})
    assert "data.path=nowhere does not exist" in said(data={"name": "folder", "path": "nowhere"})
    dmd = {"method": {"name": "dmd"}, "generator": {"grid": [20.0]}}
    without_critic = {key: value for key, value in recipe.items() if key != "critic"}
    recipe = without_critic | dmd
    assert "data.pairs is missing" in said(data={"name": "none"})
    assert "data.pairs: nowhere holds no pairs" in said(data={"pairs": "nowhere"})
    pairs = str(api.couple(teacher, tmp_path / "pairs", count=3, steps=2))
    assert "step" not in api.check(recipe | {"data": {"pairs": pairs}})
    assert "has start 20.0, and this run needs 15.0" in said(data={"pairs": pairs}, generator={"grid": [15.0]})
    features = {"every": 1, "features": "nowhere"}
    assert "evaluate.features=nowhere does not exist; give a folder" in said(data={"pairs": pairs}, evaluate=features)
