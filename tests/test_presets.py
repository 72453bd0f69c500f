"""The published recipes in configs/: they build, and what was converted from the papers' units is right by hand."""

import json
from pathlib import Path

import pytest
from tiny import write_vgg16

from diffdistill import run, trial
from diffdistill.backbones.folder import MEANING, NETWORK
from diffdistill.config import Config, ConfigError
from diffdistill.methods import METHODS
from diffdistill.player import HalfLifeDecay
from diffdistill.recipe import load_config, plain

CONFIGS = Path(__file__).parents[1] / "configs"
DATA_SETS = ("cifar10", "imagenet64")
STAGES = ("teacher", "degrade")  # what other recipes start from
WITHOUT_NODES = ["method.nodes=[]", "method.degraded=''"]  # META has no run of the first stage to read them from
PRESETS = sorted(path for name in DATA_SETS for path in (CONFIGS / name).glob("*.yaml") if path.stem not in STAGES)


def named(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> dict[str, Path]:
    """For each data set a teacher's folder of the right shape, without weights, which META never reads."""
    folders = {}
    for name in DATA_SETS:
        wanted = load_config(CONFIGS / name / "teacher.yaml").generator
        folder = tmp_path_factory.mktemp(name)
        (folder / NETWORK).mkdir()
        (folder / MEANING).write_text(json.dumps(plain(wanted.denoiser)))
        options = {"_class_name": wanted.network.name, **wanted.network.options}
        (folder / NETWORK / "config.json").write_text(json.dumps(options))
        folders[name] = folder
    return folders


def test_every_method_has_the_presets_that_it_names():
    """A paper's recipe and one to begin with for each of its data sets, and no file beside them."""
    wanted = {f"{name}/{method}{end}" for method in METHODS for name in METHODS[method].presets for end in ENDS}
    assert {named(path) for path in PRESETS} == wanted


ENDS = ("", "-recommended")


@pytest.mark.parametrize("path", PRESETS, ids=named)
def test_a_preset_builds_and_is_planned(path, stand_ins, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    method = path.stem.removesuffix("-recommended")
    without = WITHOUT_NODES if method == "disback" else []
    monkeypatch.setenv("VGG16", str(write_vgg16(tmp_path / "vgg16.safetensors")))
    config = load_config(path, [f"teacher.path={stand_ins[path.parent.name]}", *without])
    assert (config.method_name, config.output) == (method, f"runs/{path.parent.name}-{path.stem.replace('_', '-')}")
    run.look(config)
    assert any("generator" in role.name for role in trial.plan_memory(config))  # data are for the user to fetch


@pytest.mark.parametrize("path", PRESETS, ids=named)
def test_a_preset_names_nobodys_machine_and_says_where_the_teacher_comes_from(path):
    text = " ".join(path.read_text().replace("\n# ", " ").split())  # comments are wrapped
    assert not any(place in text for place in ("/opt", "/work", "/tmp", "/home"))
    if not path.stem.endswith("-recommended"):
        assert "teacher.path=FOLDER" in text and "teacher.yaml" in text and "Never run here" in text


# What was published, by hand: iterations or images, what one update takes of them, and the updates that makes.
PUBLISHED = {
    "cifar10/dmd2": (100_000, 5, 20_000),
    "cifar10/f_distill": (100_000, 5, 20_000),
    "imagenet64/dmd2": (200_000, 5, 40_000),
    "imagenet64/f_distill": (200_000, 5, 40_000),
    "imagenet64/dmd2-recommended": (600_000, 5, 120_000),
    "imagenet64/f_distill-recommended": (600_000, 5, 120_000),
    "cifar10/teacher": (200_000_000, 512, 390_625),
    "imagenet64/teacher": (2_500_000_000, 4096, 610_351),
    "cifar10/diff_instruct": (50_000_000, 128, 390_625),
    "imagenet64/diff_instruct": (50_000_000, 128, 390_625),
    "cifar10/sid": (800_000_000, 256, 3_125_000),
    "imagenet64/sid": (1_000_000_000, 8192, 122_070),
    "cifar10/sim": (500_000_000, 256, 1_953_125),
    "imagenet64/sim": (1_000_000_000, 8192, 122_070),
    "cifar10/uni_instruct": (300_000_000, 256, 1_171_875),
    "imagenet64/uni_instruct": (300_000_000, 8192, 36_621),
    "cifar10/scm": (204_800_000, 512, 400_000),
    "imagenet64/scm": (819_200_000, 2048, 400_000),
}


def preset(name: str) -> Config:
    return load_config(CONFIGS / f"{name}.yaml")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_length_is_counted_in_generator_updates(name):
    """Iterations that train the critic count as well in the papers, ratio of them to an update; images by the batch."""
    total, share, updates = PUBLISHED[name]
    config = preset(name)
    assert config.train.steps == updates == total // share
    assert share == (config.method.ratio if total < 1_000_000 else config.train.batch)


@pytest.mark.parametrize("data", DATA_SETS)
def test_backtracking_is_counted_in_generator_updates(data):
    """1000 iterations towards each of ten nodes and 100,000 towards the teacher, 5 an update."""
    config = preset(f"{data}/disback")
    assert (len(config.method.nodes), config.method.steps_per_node, config.method.inside.ratio) == (10, 200, 5)
    assert config.train.steps == 10 * 200 + 20_000
    first = preset(f"{data}/degrade")
    assert config.method.degraded == first.output and config.method.nodes[-1] == first.train.steps
    assert config.method.nodes == tuple(range(100, 1001, first.train.keep_every))


def test_the_published_order_of_updates_is_kept():
    """The papers' own alternate at every iteration, FastGen's leave the critic out where the generator trains."""
    assert preset("imagenet64/dmd2").method.time_scale == "interleaved"
    assert preset("cifar10/dmd2").method.time_scale == "alternating"
    assert all(preset(f"{name}/sid").method.ratio == 1 for name in DATA_SETS)


@pytest.mark.parametrize("name", ["cifar10/dmd2", "cifar10/f_distill"])
def test_an_average_of_every_iteration_becomes_one_of_every_update(name):
    """beta^5: four in five iterations leave the generator where it is, and its average moves on towards it."""
    betas = {average: decay.beta for average, decay in preset(name).averages.items()}
    assert betas == pytest.approx({"fast": 0.9980016, "slow": 0.9995001, "slowest": 0.99975002}, abs=1e-8)
    published = {"fast": 0.9996, "slow": 0.9999, "slowest": 0.99995}
    assert betas == pytest.approx({average: beta**5 for average, beta in published.items()}, abs=1e-8)


@pytest.mark.parametrize(
    ("name", "early", "late"),
    [
        # 0.5^(256 / 1280) after the first update, where 0.05 x 25,600 images rule at the hundredth; 0.5^(256 / 500,000)
        ("cifar10/sid", {0: 0.5 ** (1 / 0.05), 99: 0.5**0.2}, 0.999645),
        ("imagenet64/sid", {0: 0.5 ** (1 / 0.05), 99: 0.5**0.2}, 0.997165),  # 0.5^(8192 / 2,000,000)
        ("cifar10/diff_instruct", {0: 0.5 ** (1 / 0.05), 99: 0.5**0.2}, 0.999823),  # 0.5^(128 / 500,000)
    ],
)
def test_a_half_life_in_images_is_a_decay_per_update(name, early, late):
    config = preset(name)
    average = config.averages["half_life"]
    decay = HalfLifeDecay(average.images, config.train.batch, average.ramp_up)
    for step, beta in early.items():
        assert decay(step) == pytest.approx(beta, rel=1e-12)
    assert decay(config.train.steps - 1) == pytest.approx(late, abs=5e-7)


@pytest.mark.parametrize("method", ["sid", "sim", "uni_instruct"])
@pytest.mark.parametrize("data", DATA_SETS)
def test_adams_epsilon_follows_the_reduction_of_the_loss(data, method):
    """A loss divided by c divides gradients by c: Adam is the same where its epsilon is divided too."""
    config = preset(f"{data}/{method}")
    size = 3 * {"cifar10": 32, "imagenet64": 64}[data] ** 2
    assert config.players["critic"].epsilon == pytest.approx(1e-8 / size, rel=0.02)  # two digits are given
    assert config.players["generator"].epsilon == pytest.approx(1e-8 / (100 * size), rel=0.02)


def test_a_recommended_preset_says_only_what_it_changes():
    for path in PRESETS:
        if path.stem.endswith("-recommended"):
            ours, published = plain(load_config(path)), plain(preset(named(path).removesuffix("-recommended")))
            assert ours["method"]["name"] == published["method"]["name"] and ours["teacher"] == published["teacher"]
            assert f"base: {path.stem.removesuffix('-recommended')}.yaml" in path.read_text()
            assert ours != published


def test_a_file_on_a_base_says_what_differs(tmp_path):
    (tmp_path / "under").mkdir()
    below = CONFIGS / "fashion" / "demo.yaml"
    (tmp_path / "under" / "demo.yaml").write_text(below.read_text())
    mine = tmp_path / "mine.yaml"
    mine.write_text("base: under/demo.yaml\nmethod: {ratio: 3}\ngenerator: {grid: [80.0, 1.0]}\n")
    ours, theirs = load_config(mine, ["train.batch=8"]), load_config(below)
    assert ours.method.ratio == 3 and ours.generator.grid == (80.0, 1.0) and ours.train.batch == 8
    assert ours.players == theirs.players and ours.train.steps == theirs.train.steps


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: nowhere.yaml\n", "names base=.*nowhere.yaml, which is no file; give a path from the folder of"),
        ("base: mine.yaml\n", "names base=.*mine.yaml, which has a base of its own"),
        ("base: [1]\n", "which is no file"),
    ],
)
def test_a_base_that_cannot_be_used_is_refused(tmp_path, text, message):
    mine = tmp_path / "mine.yaml"
    mine.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(mine)


def test_the_stages_of_consistency_training_are_counted_in_updates():
    """250 ticks of 12,800 images, and 3,200,000 images, at the batch of each."""
    for name, images in (("cifar10", 250 * 12_800), ("imagenet64", 3_200_000)):
        for end in ENDS:
            config = preset(f"{name}/consistency_training{end}")
            assert config.method.pairs.stage_steps == images // config.train.batch


def test_the_constant_of_the_norm_follows_its_division():
    """c of a norm over the whole sample, and Adam's epsilon, over the root of its size; two digits are given."""
    for name, c, size in (("cifar10", 1e-8, 3 * 32**2), ("imagenet64", 0.06, 3 * 64**2)):
        config = preset(f"{name}/consistency_training")
        assert config.method.distance.huber == pytest.approx(c / size**0.5, rel=0.02)
        assert config.players["generator"].epsilon == pytest.approx(1e-8 / size**0.5, rel=0.02)
