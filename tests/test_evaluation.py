"""The measures of image quality, held against closed forms, brute force and independent implementations."""

import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from diffdistill.data.fashion_mnist import CLASS_NAMES, load_fashion_mnist
from diffdistill.data.image_set import ImageSet
from diffdistill.evaluation.features import (
    CONFIG_FILE,
    MOMENTS_FILE,
    WEIGHTS_FILE,
    Extractor,
    FashionFeatures,
    InputConvention,
    default_extractor,
)
from diffdistill.evaluation.frechet import Moments, frechet_distance, load_moments, moments, save_moments
from diffdistill.evaluation.grid import comparison_sheet, image_grid
from diffdistill.evaluation.kid import kernel_distance
from diffdistill.evaluation.manifold import expected_coverage, overlap
from diffdistill.evaluation.metrics import build_reference, evaluate_images, quantise
from diffdistill.evaluation.train_features import ARCHITECTURE, PEAK_RATE, augment, learning_rate, save, write_moments

SHIPPED = Path(__file__).parents[1] / "checkpoints" / "fashion-features"


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def covariance(num: int, rng: torch.Generator, *, rank: int | None = None) -> torch.Tensor:
    """A random symmetric positive matrix, float64 (num, num)."""
    factor = torch.randn(num, rank or 2 * num, generator=rng, dtype=torch.float64)
    return factor @ factor.T / num


def gaussian(num: int, rng: torch.Generator) -> Moments:
    return Moments(torch.randn(num, generator=rng, dtype=torch.float64), covariance(num, rng), 100)


# Frechet distance


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form(rng):
    means, variances = torch.rand(2, 2, 9, generator=rng, dtype=torch.float64)
    a, b = (Moments(mean, torch.diag(variance), 10) for mean, variance in zip(means, variances, strict=True))
    expected = (means[0] - means[1]).square().sum() + (variances[0].sqrt() - variances[1].sqrt()).square().sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), abs=1e-13)


def test_frechet_distance_is_the_cost_of_the_optimal_map(rng):
    # The gradient x -> T x of a convex function (T symmetric positive) is the optimal transport from N(0, A) to
    # N(0, T A T), so the squared distance is E|x - T x|^2 = tr (1 - T) A (1 - T). A and T do not commute.
    a, transport = covariance(9, rng), covariance(9, rng)
    gap = torch.eye(9, dtype=torch.float64) - transport
    mean = torch.zeros(9, dtype=torch.float64)
    distance = frechet_distance(Moments(mean, a, 10), Moments(mean + 0.5, transport @ a @ transport, 10))
    assert distance == pytest.approx((gap @ a @ gap).trace().item() + 9 * 0.25, rel=1e-12)


@pytest.mark.parametrize("num_samples", [200, 20])  # with 20 samples the covariance of 64 features has rank 19
def test_frechet_distance_of_a_set_to_itself_is_zero(rng, num_samples):
    a = moments(torch.randn(num_samples, 64, generator=rng))
    assert abs(frechet_distance(a, a)) < 1e-10


def test_frechet_distance_is_symmetric_and_unchanged_by_rotation_and_translation(rng):
    a, b = gaussian(9, rng), gaussian(9, rng)
    rotation = torch.linalg.qr(torch.randn(9, 9, generator=rng, dtype=torch.float64)).Q
    shift = torch.randn(9, generator=rng, dtype=torch.float64)

    def move(one):
        return Moments(rotation @ one.mean + shift, rotation @ one.covariance @ rotation.T, one.count)

    expected = frechet_distance(a, b)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(move(a), move(b)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rank", [None, 4])
def test_frechet_distance_agrees_with_scipy(rng, rank):
    linalg = pytest.importorskip("scipy.linalg")
    mean = torch.zeros(9, dtype=torch.float64)
    a, b = covariance(9, rng, rank=rank), covariance(9, rng)
    cross = torch.as_tensor(linalg.sqrtm((a @ b).numpy())).real.trace()
    expected = (a.trace() + b.trace() - 2 * cross).item()
    # SciPy takes the root of a rank-deficient product, which costs it half of its digits
    assert frechet_distance(Moments(mean, a, 9), Moments(mean, b, 9)) == pytest.approx(
        expected, abs=1e-8 if rank is None else 1e-6
    )


def test_frechet_distance_agrees_with_torchmetrics(rng):
    fid = pytest.importorskip("torchmetrics.image.fid")
    module = nn.Sequential(nn.Flatten(), nn.Linear(48, 8)).double()
    module.num_features = 8
    images = [
        torch.rand(num, 3, 4, 4, generator=rng, dtype=torch.float64) * scale for num, scale in ((300, 1), (200, 2))
    ]
    judge = fid.FrechetInceptionDistance(feature=module, input_img_size=(3, 4, 4), normalize=True).set_dtype(
        torch.float64
    )
    for each, real in zip(images, (True, False), strict=True):
        judge.update(each, real=real)
    with torch.no_grad():
        ours = frechet_distance(*(moments(module(each)) for each in images))
    assert ours == pytest.approx(judge.compute().item(), abs=1e-8)


def test_moments_are_the_mean_and_the_unbiased_covariance(rng):
    features = torch.randn(50, 7, generator=rng, dtype=torch.float64) + 1000  # far from 0: no cancellation allowed
    found = moments(features)
    assert found.count == 50
    torch.testing.assert_close(found.mean, features.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(found.covariance, torch.cov(features.T), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(1, 4), "N >= 2"),
        (torch.zeros(4), "N >= 2"),
        (torch.full((3, 4), torch.nan), "NaN or infinity"),
        (torch.tensor([[0.0, torch.inf], [1.0, 2.0]]), "NaN or infinity"),
    ],
)
def test_features_without_moments_are_refused(features, message):
    with pytest.raises(ValueError, match=message):
        moments(features)


@pytest.mark.parametrize(
    ("mean", "cov", "count", "message"),
    [
        (torch.zeros(2), torch.eye(2), 5, "float64"),
        (torch.zeros(2).double(), torch.eye(3).double(), 5, r"\(D,\) and \(D, D\)"),
        (torch.zeros(2).double(), torch.eye(2).double(), 1, "at least 2 samples"),
        (torch.full((2,), torch.nan).double(), torch.eye(2).double(), 5, "NaN"),
    ],
)
def test_moments_that_break_their_description_are_refused(mean, cov, count, message):
    with pytest.raises(ValueError, match=message):
        Moments(mean, cov, count)


def test_a_covariance_with_a_negative_eigenvalue_is_refused_not_clipped(rng):
    bad = Moments(torch.zeros(2).double(), torch.diag(torch.tensor([1.0, -1e-6]).double()), 5)
    with pytest.raises(ValueError, match="positive semi-definite"):
        frechet_distance(bad, bad)


def test_moments_of_different_widths_are_refused(rng):
    with pytest.raises(ValueError, match="2 and 3 features"):
        frechet_distance(gaussian(2, rng), gaussian(3, rng))


def test_saved_moments_come_back_only_for_their_extractor(tmp_path, rng):
    file, original = tmp_path / "moments.safetensors", gaussian(5, rng)
    save_moments(file, original, {"extractor_checksum": "abc"})
    back = load_moments(file, checksum="abc")
    assert torch.equal(back.mean, original.mean) and torch.equal(back.covariance, original.covariance)
    assert back.count == original.count
    with pytest.raises(ValueError, match=r"belongs to the extractor abc, and xyz is in use"):
        load_moments(file, checksum="xyz")
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"moments\.safetensors could not be read"):
        load_moments(file, checksum="abc")
    with pytest.raises(ValueError, match="no moments at .*absent"):
        load_moments(tmp_path / "absent", checksum="abc")


# Kernel distance


def test_kernel_distance_is_the_mean_over_pairs_of_different_points(rng):
    real = torch.randn(7, 3, generator=rng, dtype=torch.float64)
    generated = torch.randn(5, 3, generator=rng, dtype=torch.float64) + 0.3

    def mean_kernel(a, b, *, same):
        pairs = [(x, y) for row, x in enumerate(a) for column, y in enumerate(b) if not (same and row == column)]
        return sum((float(x @ y) / 3 + 1) ** 3 for x, y in pairs) / len(pairs)

    expected = mean_kernel(real, real, same=True) + mean_kernel(generated, generated, same=True)
    expected -= 2 * mean_kernel(real, generated, same=False)
    for chunk in (1, 2, 100):
        assert kernel_distance(real, generated, chunk_points=chunk) == pytest.approx(expected, rel=1e-12)


def test_kernel_distance_has_mean_zero_on_samples_of_one_distribution(rng):
    draws = [kernel_distance(*torch.randn(2, 25, 4, generator=rng)) for _ in range(400)]
    draws = torch.tensor(draws, dtype=torch.float64)
    error = draws.std().item() / math.sqrt(len(draws))
    assert abs(draws.mean().item()) < 4 * error
    assert 4 * error < 0.1  # the biased estimate is 0.6 here: the kernel of a point with itself, over 25 points, twice


def test_kernel_distance_grows_with_a_shift(rng):
    real, generated = torch.randn(2, 200, 8, generator=rng)
    found = [kernel_distance(real, generated + shift) for shift in (0.0, 0.5, 1.0)]
    assert found[0] < found[1] < found[2]


@pytest.mark.parametrize("measure", [kernel_distance, overlap])
@pytest.mark.parametrize(
    ("real", "generated", "message"),
    [
        (torch.zeros(9, 3), torch.zeros(9, 4), "same feature extractor"),
        (torch.zeros(9), torch.zeros(9, 4), "same feature extractor"),
        (torch.zeros(9, 3), torch.full((9, 3), torch.inf), "NaN or infinity"),
        (torch.zeros(9, 3), torch.zeros(1, 3), "points"),
        (torch.zeros(1, 3), torch.zeros(9, 3), "points"),
    ],
)
def test_features_that_cannot_be_compared_are_refused(measure, real, generated, message):
    with pytest.raises(ValueError, match=message):
        measure(real, generated)


# Precision, recall, density, coverage


def clusters(centres, num, rng):
    """num points around each centre (C, D), a standard normal wide: (C * num, D)."""
    centres = torch.tensor(centres, dtype=torch.float32).repeat_interleave(num, 0)
    return centres + torch.randn(centres.shape, generator=rng)


def test_overlap_of_a_set_with_itself_is_full(rng):
    points = torch.randn(60, 4, generator=rng)
    found = overlap(points, points)
    assert found.precision == found.recall == found.coverage == 1
    # each point lies in its own ball and in those whose k nearest include it: on average 1 + k, over k
    assert found.density == pytest.approx((1 + 5) / 5, rel=1e-12)


def test_overlap_of_distant_clusters_is_empty(rng):
    found = overlap(clusters([[0, 0]], 40, rng), clusters([[1000, 0]], 40, rng))
    assert found.precision == found.recall == found.density == found.coverage == 0


def test_a_dropped_mode_costs_recall_and_coverage_but_no_precision(rng):
    centres = [[0, 0], [1000, 0], [0, 1000], [1000, 1000]]
    real = clusters(centres, 50, rng)
    full, dropped = overlap(real, clusters(centres, 50, rng)), overlap(real, clusters(centres[:3], 50, rng))
    assert full.recall > 0.8 and full.coverage > 0.8
    assert dropped.recall <= 0.75 and dropped.coverage <= 0.75  # the fourth quarter of the real points is out of reach
    assert dropped.precision > 0.8 and dropped.density > 0.8


def test_a_mode_that_is_not_real_costs_precision_but_no_recall(rng):
    real = clusters([[0, 0], [1000, 0]], 50, rng)
    found = overlap(real, clusters([[0, 0], [1000, 0], [0, 1000]], 50, rng))
    assert found.precision <= 2 / 3 and found.recall > 0.8


@pytest.mark.parametrize(("k", "density_k"), [(3, 5), (5, 3), (1, 1)])
@pytest.mark.parametrize("chunk_points", [1, 7, 1000])
def test_overlap_is_the_definition_by_brute_force(rng, k, density_k, chunk_points):
    real, generated = torch.randn(30, 2, generator=rng), torch.randn(23, 2, generator=rng) * 0.7 + 0.4

    def away(x, y):
        return float((x - y).square().sum().sqrt())

    def radius(points, place, num):
        return sorted(away(points[place], other) for index, other in enumerate(points) if index != place)[num - 1]

    def inside(points, centres, num):
        """Whether point p lies in the ball of centre c, for all pairs."""
        radii = [radius(centres, place, num) for place in range(len(centres))]
        return [[away(p, c) <= reach for c, reach in zip(centres, radii, strict=True)] for p in points]

    precise, recalled = inside(generated, real, k), inside(real, generated, k)
    balls = inside(generated, real, density_k)
    found = overlap(real, generated, k=k, density_k=density_k, chunk_points=chunk_points)
    assert found.precision == pytest.approx(sum(map(any, precise)) / 23, abs=1e-12)
    assert found.recall == pytest.approx(sum(map(any, recalled)) / 30, abs=1e-12)
    assert found.density == pytest.approx(sum(map(sum, balls)) / (density_k * 23), abs=1e-12)
    assert found.coverage == pytest.approx(sum(map(any, zip(*balls, strict=True))) / 30, abs=1e-12)


def test_density_and_coverage_of_one_distribution_average_to_their_known_values(rng):
    found = [overlap(torch.randn(24, 3, generator=rng), torch.randn(15, 3, generator=rng)) for _ in range(300)]
    for values, expected in (
        ([each.density for each in found], 1.0),
        ([each.coverage for each in found], expected_coverage(24, 15)),
    ):
        values = torch.tensor(values, dtype=torch.float64)
        assert abs(values.mean() - expected) < 4 * values.std() / math.sqrt(len(values))


def test_too_few_points_for_k_neighbours_are_refused(rng):
    with pytest.raises(ValueError, match="k=5 for 5 points"):
        overlap(torch.randn(5, 2, generator=rng), torch.randn(9, 2, generator=rng))
    with pytest.raises(ValueError, match="k=0"):
        overlap(torch.randn(9, 2, generator=rng), torch.randn(9, 2, generator=rng), k=0)


# The extractor


@pytest.fixture(scope="module")
def shipped():
    return default_extractor(SHIPPED)


@pytest.fixture(scope="module")
def stated():
    return json.loads((SHIPPED / CONFIG_FILE).read_text())["results"]


@pytest.fixture(scope="module")
def held_out():
    """Images, labels, features and logits of the embedded test split."""
    data = load_fashion_mnist(None, "test")
    images, labels = data.select(torch.arange(len(data)))
    return images, labels, *default_extractor(SHIPPED)(images)


def test_the_shipped_extractor_reaches_its_stated_accuracy(held_out, stated):
    _, labels, _, logits = held_out
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    assert accuracy == pytest.approx(stated["embedded_test_2k_accuracy"], abs=0.001)  # two images of leeway in rounding
    assert stated["test_10k_accuracy"] >= 0.93


def test_the_shipped_moments_give_the_stated_floor(held_out, shipped, stated):
    reference = load_moments(SHIPPED / MOMENTS_FILE, checksum=shipped.checksum)
    assert reference.count == 60_000
    floor = frechet_distance(moments(held_out[2]), reference)
    assert floor == pytest.approx(stated["embedded_test_2k_frechet_distance"], rel=1e-3)  # float32 convolutions


def test_the_shipped_distance_grows_with_noise_far_above_the_floor(held_out, shipped, rng):
    images, _, features, _ = held_out
    reference = load_moments(SHIPPED / MOMENTS_FILE, checksum=shipped.checksum)
    noise = torch.randn(images[::4].shape, generator=rng)
    found = [frechet_distance(moments(features[::4]), reference)]
    found += [
        frechet_distance(moments(shipped((images[::4] + level * noise).clamp(-1, 1))[0]), reference)
        for level in (0.05, 0.1, 0.2)
    ]
    assert all(2 * low < high for low, high in itertools.pairwise(found)), found


def test_the_shipped_weights_are_small():
    assert (SHIPPED / WEIGHTS_FILE).stat().st_size < 0.5e6


def test_features_do_not_depend_on_the_batch(shipped, held_out):
    images, _, features, logits = held_out
    found = shipped(images[:50], batch_images=7)
    torch.testing.assert_close(found[0], features[:50], rtol=1e-4, atol=1e-5)  # float32 convolutions
    torch.testing.assert_close(found[1], logits[:50], rtol=1e-4, atol=1e-4)
    assert features.shape == (2000, shipped.num_features) and logits.shape == (2000, len(CLASS_NAMES))


def test_features_see_the_mean_of_the_channels(shipped, held_out):
    images = held_out[0][:20] * 0.8
    tint = torch.tensor([0.1, -0.15, 0.05])[:, None, None]
    torch.testing.assert_close(shipped(images + tint)[0], shipped(images)[0], rtol=1e-4, atol=1e-5)


class Pixels(nn.Module):
    """Its features are the first D input values, times a weight; it does not classify."""

    def __init__(self, num_features):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features), requires_grad=False)

    def forward(self, images):
        return images.flatten(1)[:, : len(self.weight)] * self.weight, None


def pixels(num_features=4, *, side=2, low=-1.0, high=1.0) -> Extractor:
    return Extractor(
        "pixels", Pixels(num_features), num_features, InputConvention(side, side, low, high), False, "pixels-1"
    )


def test_an_extractor_receives_images_in_the_range_it_asks_for():
    levels = torch.linspace(-1, 1, 12).reshape(1, 3, 2, 2)
    features, logits = pixels(12, low=0.0, high=255.0)(levels)
    torch.testing.assert_close(features, torch.linspace(0, 255, 12)[None], rtol=1e-6, atol=1e-4)
    assert logits is None


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 3, 2, 3), r"takes images \(N, 3, 2, 2\) with N >= 1, got \(3, 3, 2, 3\)"),
        (torch.zeros(3, 1, 2, 2), r"got \(3, 1, 2, 2\)"),
        (torch.zeros(0, 3, 2, 2), r"got \(0, 3, 2, 2\)"),
        (torch.full((3, 3, 2, 2), torch.nan), "NaN among them"),
    ],
)
def test_images_that_an_extractor_cannot_take_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        pixels()(images)


def test_a_saved_extractor_comes_back_in_float16_precision(tmp_path, rng):
    torch.manual_seed(0)
    module = FashionFeatures(**ARCHITECTURE).eval()
    save(module, tmp_path)
    images = torch.rand(4, 3, 28, 28, generator=rng) * 2 - 1
    with torch.no_grad():
        expected, _ = module(images)
    found, _ = default_extractor(tmp_path)(images)
    assert (found - expected).norm() < 2e-3 * expected.norm()  # float16 keeps 11 bits: 5e-4 a weight


def test_a_damaged_extractor_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no model\.safetensors at .*nowhere; give the folder"):
        default_extractor(tmp_path / "nowhere")
    shutil.copytree(SHIPPED, tmp_path / "copy")
    weights = tmp_path / "copy" / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00\x01")
    with pytest.raises(ValueError, match=r"copy/model\.safetensors has the checksum"):
        default_extractor(tmp_path / "copy")
    (tmp_path / "copy" / CONFIG_FILE).write_text("{")
    with pytest.raises(ValueError, match=r"config\.json could not be read"):
        default_extractor(tmp_path / "copy")


def test_moments_are_written_for_the_extractor_that_made_them(tmp_path, shipped):
    data = load_fashion_mnist(None, "train")
    small = ImageSet(data.images[::50], data.labels[::50], 10)
    written, accuracy = write_moments(small, shipped, tmp_path)
    read = load_moments(tmp_path / MOMENTS_FILE, checksum=shipped.checksum)
    assert torch.equal(read.covariance, written.covariance) and read.count == 160
    features, logits = shipped(small.select(torch.arange(160))[0])
    assert frechet_distance(read, moments(features)) < 1e-8
    assert accuracy == (logits.argmax(1) == small.labels).sum().item() / 160


def test_augmentation_is_a_flip_and_a_shift_of_the_whole_image(rng):
    images = torch.rand(60, 1, 6, 6, generator=rng)
    seen = set()
    for original, changed in zip(images, augment(images, rng), strict=True):
        padded = nn.functional.pad(original, [2] * 4, value=-1.0)
        variants = {
            (down, right, flipped): window.flip(-1) if flipped else window
            for down in range(5)
            for right in range(5)
            for flipped in (False, True)
            for window in [padded[:, down : down + 6, right : right + 6]]
        }
        matches = [key for key, variant in variants.items() if torch.equal(variant, changed)]
        assert len(matches) == 1
        seen.update(matches)
    downs, rights, flips = (set(each) for each in zip(*seen, strict=True))
    assert downs == rights == set(range(5)) and flips == {True, False}


def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero():
    rates = [learning_rate(step, 1000) for step in range(1000)]
    assert max(rates) == pytest.approx(PEAK_RATE) and rates.index(max(rates)) in (99, 100)
    assert rates[49] == pytest.approx(PEAK_RATE / 2)  # half-way up
    assert 0 < rates[0] <= PEAK_RATE / 100 and 0 < rates[-1] < PEAK_RATE / 1000


# Reference and report


def toy_set(num=40, *, seed=0) -> ImageSet:
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (num, 3, 2, 2), generator=rng, dtype=torch.uint8)
    return ImageSet(images, torch.zeros(num, dtype=torch.int64), 0)


def test_quantised_images_are_the_nearest_of_256_levels(rng):
    images = torch.rand(5, 3, 8, 8, generator=rng) * 3 - 1.5
    found = quantise(images)
    levels = (found.double() + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert found.min() == -1 and found.max() == 1
    assert (found - images.clamp(-1, 1)).abs().max() <= 0.5 / 127.5 + 1e-6


def test_real_images_are_unchanged_by_quantising():
    levels = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 3, 16, 16)
    x0, _ = ImageSet(levels, torch.zeros(1, dtype=torch.int64), 0).select(torch.tensor([0]))
    assert torch.equal(quantise(x0), x0)


def test_images_that_are_not_finite_are_refused_with_their_number():
    images = torch.zeros(5, 3, 2, 2)
    images[1, 0, 0, 0], images[4, 2, 1, 1] = torch.nan, torch.inf
    with pytest.raises(ValueError, match="2 of 5 images hold NaN or infinity"):
        quantise(images)


def test_a_reference_is_read_back_from_the_cache_instead_of_computed(tmp_path):
    extractor = pixels()
    first = build_reference(toy_set(), extractor, cache=tmp_path / "cache")
    extractor.module.weight.zero_()  # computing again would now give zeros
    second = build_reference(toy_set(), extractor, cache=tmp_path / "cache")
    assert torch.equal(first.features, second.features) and first.features.abs().sum() > 0
    assert frechet_distance(first.moments, second.moments) < 1e-10
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".safetensors"]


def test_a_reference_is_kept_apart_by_images_and_by_weights(tmp_path):
    build_reference(toy_set(), pixels(), cache=tmp_path)
    build_reference(toy_set(seed=1), pixels(), cache=tmp_path)
    other = pixels()
    object.__setattr__(other, "checksum", "pixels-2")
    build_reference(toy_set(), other, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_damaged_cache_is_named_and_not_used(tmp_path):
    build_reference(toy_set(), pixels(), cache=tmp_path)
    build_reference(toy_set(seed=1), pixels(), cache=tmp_path)
    one, two = tmp_path.iterdir()
    one.write_bytes(two.read_bytes())  # another set's features under this name
    two.write_bytes(two.read_bytes()[:50])
    messages = []
    for seed in (0, 1):
        with pytest.raises(ValueError, match="delete it, and it will be computed again") as caught:
            build_reference(toy_set(seed=seed), pixels(), cache=tmp_path)
        messages.append(str(caught.value))
    assert sum(str(one) in message for message in messages) == sum(str(two) in message for message in messages) == 1


def test_a_reference_takes_the_moments_of_a_larger_set(tmp_path, rng):
    reference = build_reference(toy_set(), pixels(), cache=tmp_path)
    larger = gaussian(4, rng)
    assert reference.with_moments(larger).moments is larger
    assert reference.with_moments(larger).features is reference.features
    with pytest.raises(ValueError, match="5 features and the reference 4"):
        reference.with_moments(gaussian(5, rng))


def test_the_report_of_real_images_is_perfect_and_complete(tmp_path, shipped, held_out):
    data = load_fashion_mnist(None, "test")
    part = torch.arange(0, 2000, 5)
    small = ImageSet(data.images[part], data.labels[part], 10)
    reference = build_reference(small, shipped, cache=tmp_path)
    images, labels = small.select(torch.arange(len(small)))
    report = evaluate_images(images + 0.4 / 127.5, labels, reference, shipped)  # rounds back to the same levels
    assert report["frechet_distance"] == pytest.approx(0, abs=1e-8)  # features differ by float32 batches at most
    assert report["kid"] < 0  # against the very same images the pairs of equals count across, and not within
    assert report["precision"] == report["recall"] == report["coverage"] == 1
    right = (held_out[3][part].argmax(1) == labels).double().mean().item()
    assert report["class_accuracy"] == pytest.approx(right, abs=1e-12)
    assert {key: report[key] for key in ("extractor", "num_samples", "num_reference", "num_moments")} == {
        "extractor": shipped.name,
        "num_samples": 400,
        "num_reference": 400,
        "num_moments": 400,
    }
    assert json.loads(json.dumps(report)) == report
    swapped = evaluate_images(images, (labels + 1) % 10, reference, shipped)
    assert swapped["class_accuracy"] < 0.1


def test_the_report_has_no_class_accuracy_without_labels_or_classifier(tmp_path, shipped):
    data = toy_set()
    reference = build_reference(data, pixels(), cache=tmp_path)
    images, labels = data.select(torch.arange(40))
    assert "class_accuracy" not in evaluate_images(images, labels, reference, pixels())
    assert "class_accuracy" not in evaluate_images(images, None, reference, pixels())
    fashion = load_fashion_mnist(None, "test")
    part = torch.arange(0, 2000, 100)
    reference = build_reference(ImageSet(fashion.images[part], fashion.labels[part], 10), shipped, cache=tmp_path)
    assert "class_accuracy" not in evaluate_images(fashion.select(part)[0], None, reference, shipped)


def test_what_cannot_be_evaluated_is_refused(tmp_path, shipped):
    data = toy_set()
    reference = build_reference(data, pixels(), cache=tmp_path)
    images, _ = data.select(torch.arange(40))
    with pytest.raises(ValueError, match="build the reference again"):
        evaluate_images(images, None, reference, shipped)
    with pytest.raises(ValueError, match=r"int64 \(40,\), one for each image, got torch.int64 \(3,\)"):
        evaluate_images(images, torch.zeros(3, dtype=torch.int64), reference, pixels())
    with pytest.raises(ValueError, match="40 of 40 images hold NaN"):
        evaluate_images(images * torch.nan, None, reference, pixels())


# Pictures


def constant(colours, *, side=4) -> torch.Tensor:
    """One image (3, side, side) of each colour, given in levels of 0..255."""
    return (torch.tensor(colours) / 127.5 - 1)[:, :, None, None].expand(-1, -1, side, side)


def test_a_grid_places_images_row_by_row_and_scales_pixels_to_squares():
    images = constant([[200, 0, 0], [0, 200, 0], [0, 0, 200]])
    images = images.clone()
    images[0, :, 1, 2] = 1.0  # one white pixel in row 1, column 2
    page = image_grid(images, columns=2, scale=3)
    assert page.size == (2 * 12 + 3, 2 * 12 + 3)
    assert page.getpixel((0, 0)) == (200, 0, 0) and page.getpixel((15, 11)) == (0, 200, 0)
    assert page.getpixel((0, 15)) == (0, 0, 200)
    assert page.getpixel((12, 0)) == page.getpixel((20, 20)) == (255, 255, 255)  # the gap, and the empty place
    white = [(x, y) for x in range(12) for y in range(12) if page.getpixel((x, y)) == (255, 255, 255)]
    assert white == [(x, y) for x in range(6, 9) for y in range(3, 6)]


def test_a_sheet_shows_every_image_whole_in_its_column():
    colours = [[[200, 0, 0], [0, 200, 0]], [[0, 0, 200], [200, 200, 0], [0, 200, 200], [200, 0, 200]]]
    rows = [("one step", constant(colours[0])), ("teacher\nfifty steps", constant(colours[1]))]
    page = comparison_sheet(rows, ["left", "a title far wider than its image"], scale=5)
    places = {}
    for y in range(page.height):
        for x in range(page.width):
            places.setdefault(page.getpixel((x, y)), []).append((x, y))
    corners = {}
    for colour in (tuple(each) for row in colours for each in row):
        assert len(places[colour]) == (4 * 5) ** 2  # nothing is painted over, no pixel is blended
        corners[colour] = min(places[colour])
    lefts = [corners[tuple(row[place])][0] for row in colours for place in range(len(row))]
    assert len(set(lefts[0::2])) == len(set(lefts[1::2])) == 1 and lefts[0] < lefts[1]
    tops = [corners[tuple(row[place])][1] for row in colours for place in range(0, len(row), 2)]
    assert tops == sorted(set(tops))
    dark = [place for colour, found in places.items() if max(colour) < 100 for place in found]
    assert any(x < lefts[0] for x, _ in dark) and any(y < tops[0] for _, y in dark)  # row labels and titles
    edge = {page.getpixel((x, y)) for x in (0, page.width - 1) for y in range(page.height)}
    edge |= {page.getpixel((x, y)) for y in (0, page.height - 1) for x in range(page.width)}
    assert edge == {(255, 255, 255)}  # no text is cut off


def test_a_title_wider_than_its_image_is_not_cut_off():
    page = comparison_sheet([("x", constant([[0, 0, 200]]))], ["incomprehensibilities"], scale=1)
    assert {page.getpixel((page.width - 1, y)) for y in range(page.height)} == {(255, 255, 255)}


@pytest.mark.parametrize(
    ("rows", "titles", "scale", "message"),
    [
        ([], ["a"], 1, "at least one row"),
        ([("x", constant([[0, 0, 0]] * 3))], ["a", "b"], 1, "'x' has 3 images"),
        ([("x", constant([[0, 0, 0]])), ("y", constant([[0, 0, 0]], side=5))], ["a"], 1, "'y' has 1 images"),
        ([("x", constant([[0, 0, 0]]))], ["a"], 0, "scale must be at least 1"),
        ([("x", torch.zeros(1, 1, 4, 4))], ["a"], 1, r"must be \(N, 3, H, W\)"),
    ],
)
def test_a_sheet_that_does_not_fit_is_refused(rows, titles, scale, message):
    with pytest.raises(ValueError, match=message):
        comparison_sheet(rows, titles, scale)


def test_a_grid_without_columns_is_refused():
    with pytest.raises(ValueError, match="columns must be at least 1"):
        image_grid(constant([[0, 0, 0]]), 0, 1)
