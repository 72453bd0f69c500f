"""The numbers of one evaluation: generated images against a reference of real ones."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffdistill.data.image_set import ImageSet
from diffdistill.evaluation.diversity import spread
from diffdistill.evaluation.extrapolation import extrapolated_distance, extrapolates, kernel_distance_error
from diffdistill.evaluation.features import Extractor
from diffdistill.evaluation.frechet import Moments, frechet_distance, moments
from diffdistill.evaluation.inception_score import inception_score
from diffdistill.evaluation.kid import kernel_distance, mean_kernel
from diffdistill.evaluation.manifold import neighbour_distances, overlap

CHUNK_IMAGES = 2000
NEIGHBOURS = 5  # of density and coverage; precision and recall take three of them
FID_SAMPLES = 50_000  # of published values
SPLITS = 10  # of the inception score
GROUPS = 8  # of samples, left out one at a time


@dataclass(frozen=True, eq=False)
class Reference:
    """What generated images are held against.

    Attributes:
        features: float32 (N, D) of real images, for KID, precision, recall, density and coverage.
        moments: mean and covariance for the Frechet distance; of the same images, or of a larger set (`with_moments`).
        content_hash: SHA-256 of the images, the extractor's weights and its input convention, as hex.
        extractor_checksum: the extractor that the features come from.
        labels: int64 (N,), the class of each image; None for images without classes.
    """

    features: Tensor
    moments: Moments
    content_hash: str
    extractor_checksum: str
    labels: Tensor | None = None

    @cached_property
    def nearest(self) -> Tensor:
        """Distances from each of its images to its five nearest neighbours, (N, 5), worked out once."""
        return neighbour_distances(self.features, NEIGHBOURS, chunk_points=1000)

    @cached_property
    def mean_kernel(self) -> float:
        """KID's share that is its own, worked out once."""
        return mean_kernel(self.features)

    def with_moments(self, values: Moments) -> Reference:
        """The same reference with the moments of another set of real images, such as a full training set.

        Raises:
            ValueError: the number of features differs.
        """
        if values.mean.shape != self.features.shape[1:]:
            raise ValueError(
                f"the moments have {len(values.mean)} features and the reference {self.features.shape[1]}; "
                "take both from the same feature extractor"
            )
        return dataclasses.replace(self, moments=values)


def build_reference(data: ImageSet, extractor: Extractor, *, cache: Path) -> Reference:
    """The reference of a set of real images, read from the cache or computed and kept there.

    Args:
        data: at least two images, of the size that the extractor takes.
        cache: folder for one safetensors file per pair of images and extractor; made when absent.
    Raises:
        ValueError: the images do not fit the extractor, or the cached file is damaged.
    """
    # the input too: the same weights see other pictures when they are resized or scaled in another way
    identity = f"{data.content_hash()} {extractor.checksum} {extractor.input}"
    content_hash = hashlib.sha256(identity.encode()).hexdigest()
    file = cache / f"reference-{content_hash[:16]}.safetensors"
    if file.is_file():
        features = _read_cached(file, content_hash)
    else:
        chunks = torch.arange(len(data)).split(CHUNK_IMAGES)
        features = torch.cat([extractor(data.select(index)[0])[0] for index in chunks])
        cache.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(f".{os.getpid()}.partial")
        save_file({"features": features}, str(beside), metadata={"content_hash": content_hash})
        beside.replace(file)  # a reader, or another process that writes the same, sees a whole file or none
    labels = data.labels if data.num_classes else None
    return Reference(features, moments(features), content_hash, extractor.checksum, labels)


def _read_cached(file: Path, content_hash: str) -> Tensor:
    try:
        with safe_open(str(file), "pt") as content:
            found = (content.metadata() or {}).get("content_hash")
            features = content.get_tensor("features")
    except SafetensorError as error:
        raise ValueError(f"{file} could not be read: {error}; delete it, and it will be computed again") from error
    if found != content_hash:
        raise ValueError(f"{file} holds {found} instead of {content_hash}; delete it, and it will be computed again")
    return features


def quantise(images: Tensor) -> Tensor:
    """Images as a saved PNG would show them: clipped to [-1, 1] and rounded to the 256 levels, still float32.

    Args:
        images: float (N, C, H, W), finite; 1 is white.
    Raises:
        ValueError: a pixel is NaN or infinite.
    """
    if not images.isfinite().all():
        bad = (~images.isfinite()).flatten(1).any(1).sum().item()
        raise ValueError(f"{bad} of {len(images)} images hold NaN or infinity; the generator has diverged")
    levels = ((images.float().clamp(-1, 1) + 1) * 127.5).round()
    return levels / 127.5 - 1


def evaluate_images(
    images: Tensor, labels: Tensor | None, reference: Reference, extractor: Extractor
) -> dict[str, float | int | str]:
    """Every metric of a set of generated images.

    Args:
        images: float (N, 3, H, W) in [-1, 1], N > 3; quantised here as a saved PNG would be.
        labels: int64 (N,), the class that each image was asked for; None for images made without a class.
        reference: real images, seen through the same extractor.
    Returns:
        the metrics of `evaluate_features`.
    Raises:
        ValueError: another extractor made the reference, a pixel is not finite, or a shape is wrong.
    """
    _refuse_unfit(images, labels, reference, extractor)
    return evaluate_features(*extractor(quantise(images)), labels, reference, extractor)


def evaluate_features(
    features: Tensor,
    logits: Tensor | None,
    labels: Tensor | None,
    reference: Reference,
    extractor: Extractor,
    *,
    errors: bool = False,
) -> dict[str, float | int | str]:
    """Every metric of a set of generated images, of which the extractor has made features.

    Args:
        features: (N, D), N > 3.
        logits: (N, classes), or None.
        labels, reference: as for `evaluate_images`.
        errors: also what few samples leave open, which takes some seconds: kid_error, and with enough samples
            extrapolated_distance and extrapolated_error (see `extrapolation`).
    Returns:
        frechet_distance, kid, precision, recall (k = 3), density, coverage (k = 5); extractor, num_samples,
        num_reference (images behind the neighbours and KID), num_moments (images behind the Frechet distance);
        diversity, the `spread` within classes as a share of the real images', or of all images where either side has no
        classes, and left out where there are not more images than classes; class_accuracy, the share of images that
        the extractor's classifier gives the class asked for, where there are labels and it knows them; inception_score
        and inception_score_deviation where it classifies; and fid, which is the Frechet distance under the name that
        only InceptionV3 at 50,000 samples has.
    Raises:
        ValueError: another extractor made the reference, a value is not finite, or a shape is wrong.
    """
    _refuse_unfit(features, labels, reference, extractor)
    found = overlap(reference.features, features, real_nearest=reference.nearest)
    report = {
        "frechet_distance": frechet_distance(moments(features), reference.moments),
        "kid": kernel_distance(reference.features, features, real_mean=reference.mean_kernel),
        "precision": found.precision,
        "recall": found.recall,
        "density": found.density,
        "coverage": found.coverage,
        "extractor": extractor.name,
        "num_samples": len(features),
        "num_reference": len(reference.features),
        "num_moments": reference.moments.count,
    }
    ours, theirs = (None, None) if labels is None or reference.labels is None else (labels.cpu(), reference.labels)
    if ours is None or len(ours) > len(ours.unique()):
        report["diversity"] = spread(features, ours) / spread(reference.features, theirs)
    if labels is not None and logits is not None and extractor.knows_classes:
        report["class_accuracy"] = (logits.argmax(1) == labels.cpu()).double().mean().item()
    if logits is not None and len(logits) >= SPLITS:
        report["inception_score"], report["inception_score_deviation"] = inception_score(logits, splits=SPLITS)
    if extractor.published and len(features) >= FID_SAMPLES:
        report["fid"] = report["frechet_distance"]
    if errors and len(features) >= 2 * GROUPS:
        report["kid_error"] = kernel_distance_error(reference.features, features, labels=labels, groups=GROUPS)
    if errors and extrapolates(len(features), features.shape[1], groups=GROUPS):
        found = extrapolated_distance(features, reference.moments, labels=labels, groups=GROUPS)
        report["extrapolated_distance"], report["extrapolated_error"] = found
    return report


def class_accuracies(logits: Tensor, labels: Tensor) -> dict[int, float]:
    """For each class asked for, the share of its images that a classifier takes for it.

    Args:
        logits: (N, classes).
        labels: int64 (N,).
    """
    right = (logits.argmax(1) == labels.cpu()).double()
    return {label: right[labels == label].mean().item() for label in labels.unique().tolist()}


def _refuse_unfit(samples: Tensor, labels: Tensor | None, reference: Reference, extractor: Extractor) -> None:
    """Refuses another extractor's reference, and labels that are not one for each of the samples."""
    if reference.extractor_checksum != extractor.checksum:
        raise ValueError(
            f"the reference was made with the extractor {reference.extractor_checksum[:16]}, and {extractor.name} is "
            f"{extractor.checksum[:16]}; build the reference again with build_reference"
        )
    if labels is not None and (labels.dtype != torch.int64 or labels.shape != samples.shape[:1]):
        raise ValueError(
            f"labels must be int64 ({len(samples)},), one for each image, got {labels.dtype} {tuple(labels.shape)}"
        )
