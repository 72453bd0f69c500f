"""Shares: how the classes are divided among students, and the table that routes a class to its student."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffdistill.kmeans import nearest, read_centroids, read_embeddings

Classes = tuple[int, ...]


class Shares(ABC):
    """A rule that gives each of so many students its classes."""

    @abstractmethod
    def divide(self, students: int, num_classes: int) -> tuple[Classes, ...]:
        """The classes of each student, in order of the students.

        Raises:
            ValueError: the rule does not give each of the classes to exactly one student, and each student a class.
        """


@dataclass(frozen=True)
class Blocks(Shares):
    """Consecutive classes, as many to each; the first students get one more where it does not come out even.

    Source: Song et al. 2024 (MSD), which found it as good as k-means on ImageNet, whose neighbouring classes are alike.
    """

    def divide(self, students: int, num_classes: int) -> tuple[Classes, ...]:
        size, rest = divmod(num_classes, students)
        edges = [k * size + min(k, rest) for k in range(students + 1)]
        return checked([tuple(range(edges[k], edges[k + 1])) for k in range(students)], students, num_classes)


@dataclass(frozen=True)
class Lists(Shares):
    """The classes of each student, written out."""

    classes: tuple[Classes, ...]

    def divide(self, students: int, num_classes: int) -> tuple[Classes, ...]:
        return checked(self.classes, students, num_classes)


@dataclass(frozen=True)
class Clusters(Shares):
    """To each class the student whose centroid is nearest to its embedding.

    The centroids lie in a file, which `diffdistill cluster` makes, so that a run always goes on with the same shares.
    """

    embeddings: str  # one row for each class: .safetensors or .npz with the one array embeddings
    centroids: str  # one row for each student: .safetensors

    def divide(self, students: int, num_classes: int) -> tuple[Classes, ...]:
        points, centroids = read_embeddings(Path(self.embeddings)), read_centroids(Path(self.centroids))
        if len(points) != num_classes or len(centroids) != students:
            raise ValueError(
                f"method.shares has {len(points)} embeddings in {self.embeddings} and {len(centroids)} centroids in "
                f"{self.centroids}, for {num_classes} classes and {students} students; give one row for each"
            )
        owner = nearest(points, centroids).tolist()
        shares = [tuple(label for label in range(num_classes) if owner[label] == k) for k in range(students)]
        return checked(shares, students, num_classes)


def checked(shares: Sequence[Sequence[int]], students: int, num_classes: int) -> tuple[Classes, ...]:
    """The shares, each in ascending order, when they are disjoint, exhaustive and none is empty.

    Raises:
        ValueError: naming the first class that is in the way.
    """
    if len(shares) != students:
        raise ValueError(
            f"method.shares is for {len(shares)} students, and method.students={students}; make them agree"
        )
    owners: dict[int, int] = {}
    for student, classes in enumerate(shares):
        if not classes:
            raise ValueError(
                f"method.shares leaves student {student} of {students} without a class of {num_classes}; choose fewer "
                "students or other shares"
            )
        for label in classes:
            if not 0 <= label < num_classes:
                raise ValueError(f"method.shares names class {label}, and the network has 0 to {num_classes - 1}")
            if label in owners:
                raise ValueError(
                    f"method.shares gives class {label} to students {owners[label]} and {student}; give it to one"
                )
            owners[label] = student
    missing = [label for label in range(num_classes) if label not in owners]
    if missing:
        raise ValueError(f"method.shares gives class {missing[0]} to no student; every class needs one")
    return tuple(tuple(sorted(classes)) for classes in shares)


def table(shares: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The student of each class, in order of the classes."""
    owners = {label: student for student, classes in enumerate(shares) for label in classes}
    return tuple(owners[label] for label in range(len(owners)))


SHARES: dict[str, type[Shares]] = {"blocks": Blocks, "lists": Lists, "clusters": Clusters}
