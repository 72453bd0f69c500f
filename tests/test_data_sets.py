"""The image sets: what is embedded, what is read from disk, and what every mistake is told."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffdistill.data.fashion_mnist import EMBEDDED_FILE, ORIGINAL_FILES, load_fashion_mnist
from diffdistill.data.folder import class_names, load_images
from diffdistill.data.image_set import ImageSet, concatenate

SPLITS = {"train": 800, "test": 200}


@pytest.fixture(scope="module")
def embedded():
    return {split: load_fashion_mnist(None, split) for split in SPLITS}


def write_idx(file: Path, array: np.ndarray):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    content = header + array.tobytes()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)


def write_full_set(path: Path, arrays: dict[str, np.ndarray], *, suffix: str):
    """The arrays train, ytrain, test, ytest as an .npz, or as a folder of idx files."""
    if suffix == ".npz":
        np.savez_compressed(path, **arrays)
        return
    path.mkdir()
    for split, names in ORIGINAL_FILES.items():
        for name, key in zip(names, (split, f"y{split}"), strict=True):
            write_idx(path / f"{name}{suffix}", arrays[key])


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    images = {split: rng.integers(0, 256, (num, 28, 28), np.uint8) for split, num in (("train", 30), ("test", 20))}
    labels = {f"y{split}": rng.integers(0, 10, len(each), np.uint8) for split, each in images.items()}
    return images | labels


@pytest.mark.parametrize(("split", "per_class"), SPLITS.items())
def test_the_embedded_split_has_equally_many_images_of_each_class(embedded, split, per_class):
    data = embedded[split]
    assert data.images.shape == (10 * per_class, 3, 28, 28)
    assert data.num_classes == 10
    assert data.labels.bincount().tolist() == [per_class] * 10


def test_no_embedded_image_appears_twice_in_or_across_splits(embedded):
    pictures = [image.numpy().tobytes() for data in embedded.values() for image in data.images[:, 0]]
    assert len(set(pictures)) == len(pictures) == 10_000


@pytest.mark.parametrize(("split", "num_full"), [("train", 60_000), ("test", 10_000)])
def test_the_embedded_file_says_where_each_image_stands_in_the_full_set(split, num_full):
    with np.load(EMBEDDED_FILE, allow_pickle=False) as file:
        index = file[f"{split}_index"]
    assert len(set(index.tolist())) == len(index) == 10 * SPLITS[split]
    assert 0 <= index.min() and index.max() < num_full


def test_the_embedded_file_is_small_and_carries_its_licence():
    assert EMBEDDED_FILE.stat().st_size < 4.4e6
    notice = EMBEDDED_FILE.with_name("FASHION_MNIST_LICENSE").read_text(encoding="utf-8")
    assert "MIT License" in notice and "Zalando SE" in notice


def test_select_gives_the_pixels_asked_for_scaled_to_one(embedded):
    data = embedded["test"]
    index = torch.tensor([1999, 0, 0, 700])
    x0, labels = data.select(index)
    assert x0.dtype == torch.float32 and x0.shape == (4, 3, 28, 28)
    assert x0.min() == -1 and x0.max() <= 1
    torch.testing.assert_close((x0.double() + 1) * 127.5, data.images[index].double(), rtol=0, atol=1e-5)
    assert labels.tolist() == [9, 0, 0, 3]


def test_grey_images_share_the_memory_of_one_channel(embedded):
    joined = concatenate(list(embedded.values()))
    assert len(joined) == 10_000
    for data in (*embedded.values(), joined):
        assert data.images.stride(1) == 0
    assert torch.equal(joined.images[8000:], embedded["test"].images)


def test_joining_unlike_sets_is_refused(embedded):
    other = ImageSet(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), 10)
    with pytest.raises(ValueError, match="must agree in image shape"):
        concatenate([embedded["test"], other])


def test_the_content_hash_sees_pixels_and_not_memory_layout(embedded):
    data = embedded["test"]
    packed = ImageSet(data.images.contiguous(), data.labels, 10)
    assert packed.content_hash() == data.content_hash()
    packed.images[1999, 2, 27, 27] ^= 1
    assert packed.content_hash() != data.content_hash()


@pytest.mark.parametrize("index", [torch.tensor([0.0]), torch.tensor([[0]]), torch.tensor(0)])
def test_an_index_that_is_no_list_of_places_is_refused(embedded, index):
    with pytest.raises(ValueError, match=r"int64 \(B,\)"):
        embedded["test"].select(index)


@pytest.mark.parametrize(
    ("images", "labels", "num_classes", "message"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2).long(), 1, "uint8"),
        (torch.zeros(2, 1, 4, 4).byte(), torch.zeros(2).long(), 1, "expand"),
        (torch.zeros(0, 3, 4, 4).byte(), torch.zeros(0).long(), 1, "at least one image"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.zeros(3).long(), 1, "one for each image"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.zeros(2), 1, "int64"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.tensor([0, 2]), 2, "got 0 to 2"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.tensor([-1, 0]), 2, "got -1 to 0"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.tensor([0, 1]), 0, "num_classes=0"),
    ],
)
def test_a_set_that_breaks_its_own_description_is_refused(images, labels, num_classes, message):
    with pytest.raises(ValueError, match=message):
        ImageSet(images, labels, num_classes)


@pytest.mark.parametrize("suffix", [".npz", "", ".gz"])
@pytest.mark.parametrize("split", SPLITS)
def test_the_full_set_reads_the_same_from_npz_and_from_idx_files(tmp_path, arrays, suffix, split):
    path = tmp_path / f"full{'.npz' if suffix == '.npz' else ''}"
    write_full_set(path, arrays, suffix=suffix)
    data = load_fashion_mnist(path, split)
    assert data.num_classes == 10
    for channel in range(3):
        assert np.array_equal(data.images[:, channel].numpy(), arrays[split])
    assert np.array_equal(data.labels.numpy(), arrays[f"y{split}"])


def test_a_missing_full_set_is_named_with_the_ways_out(tmp_path):
    with pytest.raises(ValueError, match=r"no Fashion-MNIST at .*nowhere.*\.npz.*idx.*None"):
        load_fashion_mnist(tmp_path / "nowhere", "train")


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'validation'"):
        load_fashion_mnist(None, "validation")


@pytest.mark.parametrize("suffix", [".npz", "", ".gz"])
def test_a_truncated_full_set_is_named(tmp_path, arrays, suffix):
    path = tmp_path / f"full{'.npz' if suffix == '.npz' else ''}"
    write_full_set(path, arrays, suffix=suffix)
    damaged = path if suffix == ".npz" else path / f"train-images-idx3-ubyte{suffix}"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(ValueError) as caught:
        load_fashion_mnist(path, "train")
    assert str(damaged) in str(caught.value)


def test_an_npz_with_a_flipped_byte_is_named(tmp_path, arrays):
    path = tmp_path / "full.npz"
    np.savez(path, **arrays)
    content = bytearray(path.read_bytes())
    content[5000] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"full\.npz could not be read"):
        load_fashion_mnist(path, "train")


def test_a_folder_that_lacks_an_idx_file_lists_the_four_names(tmp_path, arrays):
    write_full_set(tmp_path / "full", arrays, suffix="")
    (tmp_path / "full" / "t10k-labels-idx1-ubyte").unlink()
    assert len(load_fashion_mnist(tmp_path / "full", "train")) == 30
    with pytest.raises(ValueError, match=r"full has no t10k-labels-idx1-ubyte.*train-images-idx3-ubyte"):
        load_fashion_mnist(tmp_path / "full", "test")


def test_a_file_that_is_no_idx_is_named(tmp_path, arrays):
    write_full_set(tmp_path / "full", arrays, suffix="")
    (tmp_path / "full" / "train-images-idx3-ubyte").write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is no idx file"):
        load_fashion_mnist(tmp_path / "full", "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": np.zeros((30, 32, 32), np.uint8)}, r"\(N, 28, 28\), got uint8 \(30, 32, 32\)"),
        ({"train": np.zeros((30, 28, 28), np.float32)}, r"got float32"),
        ({"ytrain": np.zeros(29, np.uint8)}, r"labels must be integers \(30,\), got uint8 \(29,\)"),
        ({"ytrain": np.zeros(30, np.float64)}, r"got float64"),
        ({"ytrain": np.full(30, 10)}, r"got 10 to 10"),
        ({"train": np.full((30, 28, 28), None)}, r"could not be read"),  # an array of objects would need pickle
    ],
)
def test_wrong_arrays_in_the_full_set_are_named(tmp_path, arrays, change, message):
    np.savez(tmp_path / "full.npz", **(arrays | change))
    with pytest.raises(ValueError, match=rf"full\.npz.*{message}"):
        load_fashion_mnist(tmp_path / "full.npz", "train")


def test_an_npz_of_other_arrays_says_what_it_has(tmp_path, arrays):
    np.savez(tmp_path / "full.npz", x=arrays["train"])
    with pytest.raises(ValueError, match=r"full\.npz has no array train, ytrain, only x"):
        load_fashion_mnist(tmp_path / "full.npz", "train")


def picture(level: int, *, size=(6, 5), mode="RGB") -> Image.Image:
    return Image.new(mode, size, level if mode in ("L", "P") else (level, 2, 3, 255)[: len(mode)])


def test_sub_folders_are_classes_in_the_order_of_their_names(tmp_path):
    for name, level in (("boot", 10), ("apron", 20), ("coat", 30)):
        (tmp_path / name).mkdir()
        for place, suffix in enumerate(("png", "webp")):
            picture(level + place).save(tmp_path / name / f"{place}.{suffix}", lossless=True)
    (tmp_path / "boot" / "notes.txt").write_text("not a picture")
    (tmp_path / ".cache").mkdir()
    data = load_images(tmp_path)
    assert class_names(tmp_path) == ["apron", "boot", "coat"]
    assert data.num_classes == 3 and data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.images.shape == (6, 3, 5, 6)  # height before width
    assert data.images[:, 0, 0, 0].tolist() == [20, 21, 10, 11, 30, 31]
    assert data.images[0, :, 4, 5].tolist() == [20, 2, 3]  # red, green, blue


def test_a_flat_folder_is_unlabelled_and_sorted_by_name(tmp_path):
    for number in (11, 3, 8, 14, 1, 9, 6, 13, 2, 7):
        picture(number).save(tmp_path / f"{number:02}.png")
    data = load_images(tmp_path)
    assert data.num_classes == 0 and data.labels.tolist() == [0] * 10
    assert data.images[:, 0, 0, 0].tolist() == [1, 2, 3, 6, 7, 8, 9, 11, 13, 14]


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_grey_picture_has_three_equal_channels(tmp_path, suffix):
    picture(40, mode="L").save(tmp_path / f"a.{suffix}")
    assert load_images(tmp_path).images[0, :, 2, 2].tolist() == [40, 40, 40]


def test_a_photograph_is_turned_upright(tmp_path):
    photo = picture(90)
    tags = photo.getexif()
    tags[0x0112] = 6  # orientation: turned by a quarter
    photo.save(tmp_path / "photo.jpg", exif=tags)
    assert load_images(tmp_path).images.shape == (1, 3, 6, 5)


def make_mixed_sizes(path):
    picture(1).save(path / "a.png")
    picture(1, size=(7, 5)).save(path / "b.png")


def make_transparent(path):
    picture(1, mode="RGBA").save(path / "a.png")


def make_transparent_palette(path):
    picture(1, mode="P").save(path / "a.png", transparency=0)


def make_deep(path):
    Image.fromarray(np.full((5, 6), 40_000, np.uint16)).save(path / "a.png")


def make_damaged(path):
    picture(1).save(path / "a.png")
    (path / "a.png").write_bytes((path / "a.png").read_bytes()[:-30])


def make_renamed_text(path):
    (path / "a.png").write_text("no picture at all")


def make_nothing(path):
    (path / "notes.txt").write_text("no picture here")


def make_empty_class(path):
    for name in ("boot", "coat"):
        (path / name).mkdir()
    picture(1).save(path / "boot" / "a.png")


def make_loose_beside_classes(path):
    make_empty_class(path)
    picture(1).save(path / "coat" / "b.png")
    picture(1).save(path / "stray.png")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_mixed_sizes, r"b\.png has 7 x 5 .* and .*a\.png 6 x 5; resize"),
        (make_transparent, r"a\.png has the mode RGBA; save it as"),
        (make_transparent_palette, r"a\.png has the mode P with transparency; save it as"),
        (make_deep, r"a\.png has the mode I;16; save it as"),
        (make_damaged, r"a\.png could not be read"),
        (make_renamed_text, r"a\.png could not be read"),
        (make_nothing, r"holds no picture"),
        (make_empty_class, r"coat holds no picture"),
        (make_loose_beside_classes, r"both sub-folders \(boot, coat\) and pictures \(stray\.png\)"),
    ],
)
def test_a_folder_that_cannot_be_used_is_named_with_the_way_out(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_images(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("labelled", [True, False])
def test_an_npz_of_colour_images_is_read_channels_last(tmp_path, labelled):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (7, 5, 6, 3), np.uint8), np.arange(7, dtype=np.uint8) % 4
    np.savez(tmp_path / "own.npz", images=images, **({"labels": labels} if labelled else {}))
    data = load_images(tmp_path / "own.npz")
    assert np.array_equal(data.images.numpy(), images.transpose(0, 3, 1, 2))
    assert data.num_classes == (4 if labelled else 0)
    assert data.labels.tolist() == (labels.tolist() if labelled else [0] * 7)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": np.zeros(2, np.int64)}, "has no array images, only labels"),
        ({"images": np.zeros((2, 4, 4), np.uint8)}, r"uint8 \(N, H, W, 3\), got uint8 \(2, 4, 4\)"),
        ({"images": np.zeros((2, 4, 3), np.uint8)}, r"uint8 \(N, H, W, 3\), got uint8 \(2, 4, 3\)"),
        ({"images": np.zeros((2, 4, 4, 3), np.float32)}, "got float32"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.zeros(2)}, "labels must be integers, got float64"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.array([-1, 0])}, "got -1 to 0"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.zeros(3, np.int64)}, "one for each image"),
        ({"images": np.zeros((0, 4, 4, 3), np.uint8), "labels": np.zeros(0, np.int64)}, "at least one image"),
    ],
)
def test_wrong_arrays_in_an_own_npz_are_named(tmp_path, arrays, message):
    np.savez(tmp_path / "own.npz", **arrays)
    with pytest.raises(ValueError, match=rf"own\.npz.*{message}"):
        load_images(tmp_path / "own.npz")


def test_a_path_without_images_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no images at .*nowhere; give a folder"):
        load_images(tmp_path / "nowhere")
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(ValueError, match=r"text\.npz could not be read"):
        load_images(tmp_path / "text.npz")
