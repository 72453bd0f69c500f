"""Trains the shipped feature extractor on the full Fashion-MNIST and writes its folder.

    python -m diffdistill.evaluation.train_features --data fashion_mnist.npz --out checkpoints/fashion-features

The folder then holds model.safetensors (float16), config.json, train60k_moments.safetensors and a README.md with what
was measured. The moments and every number are those of the float16 weights as they are loaded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from diffdistill.data.fashion_mnist import CLASS_NAMES, load_fashion_mnist
from diffdistill.data.image_set import ImageSet
from diffdistill.evaluation.features import (
    CONFIG_FILE,
    MOMENTS_FILE,
    WEIGHTS_FILE,
    Extractor,
    FashionFeatures,
    default_extractor,
)
from diffdistill.evaluation.frechet import Moments, frechet_distance, moments, save_moments
from diffdistill.evaluation.metrics import quantise

ARCHITECTURE = {"channels": [24, 48, 96], "num_features": 64, "num_classes": len(CLASS_NAMES)}
BATCH_IMAGES = 128
PEAK_RATE = 4e-3
WARMUP_SHARE = 0.1
WEIGHT_DECAY = 0.02
SHIFT_PIXELS = 2


def learning_rate(step: int, num_steps: int) -> float:
    """Linear warm-up to PEAK_RATE, then a cosine to 0."""
    warmup_steps = WARMUP_SHARE * num_steps
    if step < warmup_steps:
        return PEAK_RATE * (step + 1) / warmup_steps
    return PEAK_RATE * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (num_steps - warmup_steps)))


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random horizontal flips and shifts of up to SHIFT_PIXELS, black coming in at the edge.

    Args:
        images: (N, C, H, W) in [-1, 1].
    """
    num, _, height, width = images.shape
    padded = F.pad(images, [SHIFT_PIXELS] * 4, value=-1.0)
    down, right = torch.randint(0, 2 * SHIFT_PIXELS + 1, (2, num, 1), generator=generator)
    flipped = torch.rand(num, 1, generator=generator) < 0.5
    rows, columns = torch.arange(height), torch.arange(width)
    columns = torch.where(flipped, columns.flip(0), columns) + right
    place = torch.arange(num)[:, None, None]
    shifted = padded.movedim(1, -1)[place, (rows + down)[:, :, None], columns[:, None, :]]  # (N, H, W, C)
    return shifted.movedim(-1, 1)


def train(data: ImageSet, *, epochs: int, seed: int) -> FashionFeatures:
    """A classifier trained on the set, in evaluation mode."""
    torch.manual_seed(seed)  # the initial weights
    module = FashionFeatures(**ARCHITECTURE).to(memory_format=torch.channels_last)
    matrices = [parameter for parameter in module.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in module.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    generator = torch.Generator().manual_seed(seed)
    steps_per_epoch = len(data) // BATCH_IMAGES
    num_steps = epochs * steps_per_epoch
    bar = tqdm(range(num_steps), desc="train", unit="step", mininterval=1)
    for step in bar:
        if step % steps_per_epoch == 0:
            order = torch.randperm(len(data), generator=generator)
        first = step % steps_per_epoch * BATCH_IMAGES
        images, labels = data.select(order[first : first + BATCH_IMAGES])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps)
        _, logits = module(augment(images, generator))
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return module.eval()


def features_and_accuracy(data: ImageSet, extractor: Extractor) -> tuple[Tensor, float]:
    """Features (N, D) of a whole set, and the share of its images that are classified as labelled."""
    features, right = [], 0
    for index in tqdm(torch.arange(len(data)).split(2000), desc="measure", unit="batch"):
        images, labels = data.select(index)
        found, logits = extractor(images)
        features.append(found)
        right += (logits.argmax(1) == labels).sum().item()
    return torch.cat(features), right / len(data)


def save(module: FashionFeatures, folder: Path):
    """Writes the weights in float16 and a config.json that names their checksum."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in module.state_dict().items()
    }
    save_file(state, str(folder / WEIGHTS_FILE))
    config = {
        "name": "fashion-features-64",
        "architecture": ARCHITECTURE,
        "input": {"height": 28, "width": 28, "low": -1.0, "high": 1.0},
        "checksum": hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest(),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def write_moments(training: ImageSet, extractor: Extractor, folder: Path) -> tuple[Moments, float]:
    """Moments of the features of a set, kept in the folder for this extractor; and the share classified rightly."""
    features, accuracy = features_and_accuracy(training, extractor)
    found = moments(features)
    origin = {"extractor_checksum": extractor.checksum, "content_hash": training.content_hash()}
    save_moments(folder / MOMENTS_FILE, found, origin)
    return found, accuracy


def measure(training: ImageSet, test: ImageSet, reference: Moments, extractor: Extractor) -> dict[str, float]:
    """Accuracies, and distances of real and of faulty images to the moments of the training set."""
    results = {}
    parts = {"test_10k": test, "embedded_test_2k": load_fashion_mnist(None, "test")}
    for name, part in parts.items():
        found, results[f"{name}_accuracy"] = features_and_accuracy(part, extractor)
        results[f"{name}_frechet_distance"] = frechet_distance(moments(found), reference)
    embedded, _ = features_and_accuracy(load_fashion_mnist(None, "train"), extractor)
    results["embedded_train_8k_frechet_distance"] = frechet_distance(moments(embedded), reference)
    draw = torch.Generator().manual_seed(0)
    chosen, _ = training.select(torch.randperm(len(training), generator=draw)[:2000])
    results["random_train_2k_frechet_distance"] = frechet_distance(moments(extractor(chosen)[0]), reference)
    for name, images in damaged(parts["embedded_test_2k"], draw).items():
        results[f"{name}_frechet_distance"] = frechet_distance(moments(extractor(quantise(images))[0]), reference)
    return results


def damaged(data: ImageSet, draw: torch.Generator) -> dict[str, Tensor]:
    """Images of the set with known faults, by the name of the fault: what a distance of some size looks like."""
    images, labels = data.select(torch.arange(len(data)))
    noise = torch.randn(images[:, :1].shape, generator=draw)
    return {
        "noise_0.05": images + 0.05 * noise,
        "noise_0.2": images + 0.2 * noise,
        "blur": F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False),
        "without_bags": images[labels != CLASS_NAMES.index("Bag")],
    }


def card(options: argparse.Namespace, num_parameters: int, results: dict[str, float], train_seconds: float) -> str:
    """The README.md of the folder."""
    return f"""# fashion-features

A small classifier of Fashion-MNIST (28 x 28, grey = mean of the three channels) whose 64 features, the last activation
averaged over the picture, are what Frechet distance, KID, precision and recall are measured on. It has never been part
of a training loss; keep it so, or its distances mean nothing.

| file | content |
|---|---|
| `{WEIGHTS_FILE}` | {num_parameters:,} parameters, float16 |
| `{CONFIG_FILE}` | architecture, input, checksum, and the numbers below |
| `{MOMENTS_FILE}` | mean and covariance (float64) of the features of all 60,000 training images |

## How it was made

    python -m diffdistill.evaluation.train_features --data fashion_mnist.npz --out checkpoints/fashion-features \\
        --epochs {options.epochs} --seed {options.seed} --threads {options.threads}

All 60,000 training images, {options.epochs} epochs of AdamW in float32 (peak rate {PEAK_RATE}, cosine, batch \
{BATCH_IMAGES}), horizontal flips
and shifts of up to {SHIFT_PIXELS} pixels. The last weights, none chosen by test accuracy; one seed.
Time: {train_seconds / 60:.0f} minutes on {options.hardware}, PyTorch {torch.__version__}. Commit: the one that added \
these files.
Data: Fashion-MNIST, MIT, Zalando SE.

## What it scores

| | value |
|---|---|
| test accuracy, 10,000 images | {results["test_10k_accuracy"]:.4f} |
| test accuracy, the 2,000 embedded images | {results["embedded_test_2k_accuracy"]:.4f} |
| training accuracy, 60,000 images | {results["training_accuracy"]:.4f} |

Real against real, the floor for every Frechet distance to the 60,000 training images:

| real images | number | Frechet distance (fashion-features-64) |
|---|---|---|
| full test set | 10,000 | {results["test_10k_frechet_distance"]:.4f} |
| embedded test images | 2,000 | {results["embedded_test_2k_frechet_distance"]:.4f} |
| embedded training images | 8,000 | {results["embedded_train_8k_frechet_distance"]:.4f} |
| training images drawn at random | 2,000 | {results["random_train_2k_frechet_distance"]:.4f} |

The embedded sets hold equally many images of each class, which brings them closer than a random draw of their size.
For scale, the embedded test images with known faults:

| fault | number | Frechet distance |
|---|---|---|
| noise of standard deviation 0.05 in [-1, 1] | 2,000 | {results["noise_0.05_frechet_distance"]:.2f} |
| noise of standard deviation 0.2 | 2,000 | {results["noise_0.2_frechet_distance"]:.2f} |
| 3 x 3 box blur | 2,000 | {results["blur_frechet_distance"]:.2f} |
| one class of ten, the bags, left out | 1,800 | {results["without_bags_frechet_distance"]:.2f} |

These distances are not FID: the scale is this network's own. Compare only values with the same extractor and the same
number of samples.
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the full Fashion-MNIST, .npz or folder")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--epochs", type=int, default=18)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--hardware", default="a CPU", help="what the card says that this ran on")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    started = time.monotonic()
    training = load_fashion_mnist(options.data, "train")
    module = train(training, epochs=options.epochs, seed=options.seed)
    train_seconds = time.monotonic() - started
    save(module, options.out)
    extractor = default_extractor(options.out)
    reference, training_accuracy = write_moments(training, extractor, options.out)
    test = load_fashion_mnist(options.data, "test")
    results = {"training_accuracy": training_accuracy} | measure(training, test, reference, extractor)
    config_file = options.out / CONFIG_FILE
    config = json.loads(config_file.read_text()) | {"results": results}
    config_file.write_text(json.dumps(config, indent=2) + "\n")
    num_parameters = sum(parameter.numel() for parameter in module.parameters())
    (options.out / "README.md").write_text(card(options, num_parameters, results, train_seconds))
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
