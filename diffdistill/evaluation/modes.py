"""What a student lost, class by class, and how far it is from its teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from diffdistill.evaluation.manifold import overlap
from diffdistill.evaluation.sampling import Solved, classes_of, denoisers, draw, evaluating
from diffdistill.generator import Sampler

LEAST = 6  # points of a class, on either side, for five neighbours
LOST = 0.5  # of the teacher's recall of a class, below which its modes count as lost


def class_overlaps(real: Tensor, real_labels: Tensor, generated: Tensor, labels: Tensor) -> dict[int, dict[str, float]]:
    """Precision, recall, density and coverage within each class, of which both sides have six samples or more.

    Args:
        real, generated: features (N, D) and (M, D).
        real_labels, labels: int64 (N,) and (M,).
    """
    found = {}
    for label in labels.unique().tolist():
        theirs, ours = real[real_labels == label], generated[labels == label]
        if min(len(theirs), len(ours)) >= LEAST:
            within = overlap(theirs, ours)
            found[label] = {name: getattr(within, name) for name in ("precision", "recall", "density", "coverage")}
    return found


def lost_classes(student: Mapping[int, Mapping], teacher: Mapping[int, Mapping]) -> list[int]:
    """Classes of which the student has less than half of the teacher's recall."""
    both = [label for label in teacher if label in student]
    return [label for label in both if student[label]["recall"] < LOST * teacher[label]["recall"]]


def paired_distances(
    student: Sampler,
    teacher: Solved,
    count: int,
    *,
    seed: int,
    batch: int,
    distances: Mapping[str, Callable[[Tensor, Tensor], Tensor]],
) -> dict[str, float]:
    """Mean distances of the student's samples from the teacher's, which begin with the same noises and classes.

    Small for methods that learn the teacher's trajectories, and nothing to go by for those that learn its distribution.

    Args:
        distances: of two batches of images, (N,), by name.
    Raises:
        ValueError: they make samples of other shapes or classes.
    """
    theirs = teacher.teacher.denoiser
    if tuple(student.denoiser.sample_shape) != tuple(theirs.sample_shape):
        raise ValueError(
            f"the student makes samples of shape {tuple(student.denoiser.sample_shape)}, and the teacher "
            f"{tuple(theirs.sample_shape)}; they cannot be paired"
        )
    classes: Sequence[int] = classes_of(student)
    sums = dict.fromkeys(distances, 0.0)
    with evaluating(*denoisers(student), *denoisers(teacher)), torch.no_grad():
        for first in range(0, count, batch):
            slots = range(first, min(first + batch, count))
            labels = torch.tensor([classes[slot % len(classes)] for slot in slots]) if classes else None
            made, wanted = (draw(source, slots, labels, seed=seed).float() for source in (student, teacher))
            for name, distance in distances.items():
                sums[name] += distance(made.clamp(-1, 1), wanted.clamp(-1, 1)).double().sum().item()
    return {name: total / count for name, total in sums.items()}


def squared(made: Tensor, wanted: Tensor) -> Tensor:
    """The mean squared difference of each pair, (N,)."""
    return (made - wanted).square().flatten(1).mean(1)
