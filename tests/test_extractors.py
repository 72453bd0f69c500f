"""Feature networks from folders, TorchScript files and transformers, and the resizing that scores depend on."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import write_clip
from torch import nn
from transformers import (
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)

from diffdistill import api
from diffdistill.config import DataConfig, EvaluateConfig
from diffdistill.evaluation import inception
from diffdistill.evaluation.convention import InputConvention
from diffdistill.evaluation.extractors import module_extractor, open_extractor
from diffdistill.evaluation.inception import FIRST_FEATURES, inception_features, is_inception, probe
from diffdistill.evaluation.pretrained import ClipScorer
from diffdistill.evaluation.resize import RESIZES, bicubic, shorter_bicubic, tf1_bilinear

SHIPPED = Path(__file__).parents[1] / "checkpoints" / "fashion-features"
SMALL = InputConvention(4, 4, low=0.0, high=1.0)


def pictures(count=3, height=8, width=8, seed=0, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, height, width, generator=generator, dtype=dtype) * 2 - 1


@pytest.mark.parametrize(("old", "new"), [((5, 7), (11, 9)), ((9, 6), (4, 6)), ((32, 32), (299, 299))])
def test_the_first_fids_resizing_reads_place_i_at_i_times_the_ratio(old, new):
    """Against `grid_sample` told to read pixel i * old / n, whose last pixel goes on beyond the edge."""
    images = pictures(2, *old, dtype=torch.float64)
    rows, columns = (
        (2 * (torch.arange(n, dtype=torch.float64) * o / n) + 1) / o - 1 for n, o in zip(new, old, strict=True)
    )
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], -1).expand(2, -1, -1, -1)
    expected = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    torch.testing.assert_close(tf1_bilinear(images, *new), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(5, 6), (20, 17)])
def test_bicubic_is_pillows(size):
    """Of smooth pictures, whose overshoot stays within the range; Pillow rounds its weights a little."""
    places = torch.linspace(0, 3, 12)
    image = (places[:, None] * 1.3 + places).sin() * 0.7
    expected = Image.fromarray(image.numpy(), mode="F").resize(size[::-1], Image.BICUBIC)
    found = bicubic(image.expand(1, 3, 12, 12), *size)[0, 1]
    torch.testing.assert_close(found, torch.frombuffer(bytearray(expected.tobytes()), dtype=torch.float32).view(size),
                               rtol=0, atol=1e-5)  # fmt: skip


def test_the_shorter_side_decides_and_the_middle_is_kept():
    image = torch.zeros(1, 3, 8, 16)
    image[..., 4:12] = 1.0  # the middle square
    assert shorter_bicubic(image, 8, 8).eq(1).all()
    assert shorter_bicubic(image, 4, 4).shape == (1, 3, 4, 4)


class Means(nn.Module):
    """Features: the mean of each channel, scaled."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, images):
        return images.mean((2, 3)) * self.scale


class Classifier(Means):
    def forward(self, images):
        features = images.mean((2, 3)) * self.scale
        return features, torch.cat([features, -features], 1)


def scripted(module: nn.Module, path: Path) -> Path:
    torch.jit.script(module.eval()).save(str(path))
    return path


def test_a_torchscript_file_is_an_extractor_of_the_images_that_it_is_said_to_take(tmp_path):
    path = scripted(Means(), tmp_path / "means.pt")
    found = open_extractor(str(path), input=SMALL)
    images = pictures(5, 4, 4)
    features, logits = found(images)
    expected = (images + 1).mean((2, 3)) / 2 * torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(features, expected)
    assert logits is None and (found.name, found.num_features, found.published) == ("means", 3, False)
    other = Means()
    other.scale.data[0] = 5.0
    assert open_extractor(str(scripted(other, tmp_path / "other.pt")), input=SMALL).checksum != found.checksum


def test_a_network_that_classifies_gives_its_logits(tmp_path):
    found = open_extractor(str(scripted(Classifier(), tmp_path / "both.pt")), input=SMALL)
    features, logits = found(pictures(2, 4, 4))
    assert torch.equal(logits, torch.cat([features, -features], 1)) and not found.knows_classes


def test_any_module_is_an_extractor_and_resizes_if_told():
    small = module_extractor(Means(), name="means", input=SMALL)
    larger = module_extractor(Means(), name="means", input=InputConvention(4, 4, low=0.0, high=1.0, resize="bicubic"))
    assert small.checksum == larger.checksum  # of the weights
    with pytest.raises(ValueError, match=r"means takes images \(N, 3, 4, 4\) with N >= 1, got \(3, 3, 8, 8\)"):
        small(pictures())
    torch.testing.assert_close(larger(pictures())[0], small(RESIZES["bicubic"](pictures(), 4, 4))[0])
    with pytest.raises(ValueError, match=r"takes images \(N, 3, any height, any width\)"):
        larger(pictures()[:, :1])
    with pytest.raises(ValueError, match=r"flat gave \(2, 3, 4, 4\) for 2 images, and features are \(2, D\)"):
        module_extractor(nn.Conv2d(3, 3, 1), name="flat", input=SMALL)


def test_features_stay_in_float64_where_the_network_computes_in_it():
    assert module_extractor(Means().double(), name="m", input=SMALL)(pictures(2, 4, 4))[0].dtype == torch.float64
    assert module_extractor(Means().half(), name="m", input=SMALL)(pictures(2, 4, 4))[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", r"there is no feature extractor at nowhere; give a folder that train_features wrote"),
        ("{path}/text.pt", r"text\.pt is no TorchScript file"),
        ("{path}/means.pt", r"is not InceptionV3 of 2015-12-05 .* give evaluate\.input="),
        ("{path}/bert", r"holds a model of type 'bert'; feature networks of transformers are clip, dinov2"),
        ("{path}/broken", r"config\.json could not be read"),
        ("clip:/nowhere/at/all", r"CLIPModel could not be read from /nowhere/at/all: .*give a folder that has it"),
    ],
)
def test_what_cannot_be_an_extractor_is_refused_with_the_way_to_get_one(name, message, tmp_path):
    scripted(Means(), tmp_path / "means.pt")
    (tmp_path / "text.pt").write_text("no network")
    for folder, text in (("bert", '{"model_type": "bert"}'), ("broken", "{")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_extractor(name.format(path=tmp_path))


def test_an_extractor_that_knows_its_input_takes_no_other():
    with pytest.raises(ValueError, match="knows what images it takes; leave the input convention out"):
        open_extractor(str(SHIPPED), input=SMALL)


class Recorded(nn.Module):
    """Gives the same features whatever the picture."""

    def __init__(self, features):
        super().__init__()
        self.features = nn.Parameter(features)

    def forward(self, images):
        return self.features.expand(len(images), -1) + 0 * images.mean((1, 2, 3))[:, None]


def known_features(share=1.0) -> torch.Tensor:
    return torch.cat([share * torch.tensor(FIRST_FEATURES), torch.zeros(2048 - len(FIRST_FEATURES))])[None]


def test_inception_is_known_by_its_features(tmp_path):
    path = tmp_path / "a.pt"
    torch.jit.script(Recorded(known_features(1.005))).save(str(path))
    found = open_extractor(str(path))
    assert (found.name, found.num_features, found.published) == ("inception-v3-2015-12-05", 2048, True)
    assert found.input.resize == "tf1_bilinear" and not found.has_logits and not found.knows_classes
    assert found(pictures(2, 32, 32))[0].shape == (2, 2048)
    torch.jit.script(Recorded(known_features(1.05))).save(str(path))
    with pytest.raises(ValueError, match="is not InceptionV3 of 2015-12-05"):
        open_extractor(str(path))


class Metrics(nn.Module):
    """Named as the parts of the file that StyleGAN's metrics use, and small."""

    def __init__(self):
        super().__init__()
        self.layers, self.output = Recorded(known_features()), nn.Linear(2048, 7)

    def forward(self, images):
        return self.output(self.layers(images))


def test_the_parts_of_a_file_that_classifies_too_give_features_and_logits():
    module = torch.jit.script(Metrics())
    found = inception_features(module)
    features, logits = found(probe())
    assert found.has_logits and is_inception(found, "cpu")
    torch.testing.assert_close(logits, features @ module.output.weight.T)  # no bias, as in the inception score


@pytest.mark.skipif("INCEPTION" not in os.environ, reason="INCEPTION names no file of InceptionV3 of 2015-12-05")
def test_the_real_inception_is_taken():
    assert open_extractor(os.environ["INCEPTION"]).published


def test_black_and_white_are_what_the_inception_network_takes():
    """Bytes 0 and 255 become -1 and 127 / 128, as (byte - 128) / 128 does."""
    low, high = inception.InceptionFeatures.input.low, inception.InceptionFeatures.input.high
    levels = torch.arange(256.0)
    images = levels / 127.5 - 1
    torch.testing.assert_close((images + 1) * (high - low) / 2 + low, (levels - 128) / 128)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def test_clips_features_are_its_image_embedding(clip):
    found = open_extractor(str(clip))
    images = pictures(3, 16, 16)
    pixels = ((images + 1) / 2 - CLIP_MEAN) / CLIP_STD
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(clip).eval().get_image_features(pixels)
    expected = expected if isinstance(expected, torch.Tensor) else expected.pooler_output
    torch.testing.assert_close(found(images)[0], expected, rtol=1e-5, atol=1e-5)
    assert (found.num_features, found.published, found.name) == (8, False, f"clip:{clip.name}")
    assert found(pictures(2, 20, 30))[0].shape == (2, 8)  # of any size
    assert torch.equal(open_extractor(f"clip:{clip}")(images)[0], found(images)[0])


def test_dinov2s_features_are_its_class_token(tmp_path):
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path / "dino")
    found = open_extractor(str(tmp_path / "dino"))
    images = pictures(2, 224, 224)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = model(((images + 1) / 2 - mean) / std).last_hidden_state[:, 0]
    torch.testing.assert_close(found(images)[0], expected, rtol=1e-5, atol=1e-5)
    assert found.name == "dinov2:dino" and found.num_features == 16


def test_the_clip_score_is_a_hundred_times_the_cosine_of_each_picture_with_its_prompt(clip):
    scorer, model = ClipScorer(str(clip)), CLIPModel.from_pretrained(clip).eval()
    tokenizer = CLIPTokenizer.from_pretrained(clip)
    images, prompts = pictures(3, 16, 16), ["a cat", "the quick brown fox jumps over", "a cat"]
    tokens = tokenizer(prompts, padding=True, truncation=True, max_length=12, return_tensors="pt")
    with torch.no_grad():
        said = model(**tokens, pixel_values=((images + 1) / 2 - CLIP_MEAN) / CLIP_STD)
    cosines = (said.logits_per_image / model.logit_scale.exp()).diagonal()
    assert cosines.abs().min() > 0.01
    expected = 100 * cosines.clamp(min=0).double()
    torch.testing.assert_close(scorer.scores(images, prompts), expected, rtol=1e-4, atol=1e-3)
    scorer._model.text_projection.weight.data.neg_()  # now all cosines have the other sign
    assert torch.equal(scorer.scores(images, prompts) > 0, expected == 0)
    with pytest.raises(ValueError, match="each picture needs a prompt, got 3 and 2"):
        scorer.scores(images, prompts[:2])


def test_the_config_names_any_extractor(tmp_path):
    path = scripted(Means(), tmp_path / "means.pt")
    data = DataConfig("folder", str(tmp_path / "data.npz"))
    save_images(tmp_path / "data.npz")
    settings = EvaluateConfig(features=str(path), input=SMALL)
    extractor, reference = api.yardstick(settings, data, cache=tmp_path / "cache", device="cpu")
    assert extractor.name == "means" and reference.features.shape == (6, 3)


def save_images(path: Path) -> None:
    images = ((pictures(6, 4, 4) + 1) * 127.5).round().to(torch.uint8).movedim(1, -1)
    np.savez(path, images=images.numpy())
