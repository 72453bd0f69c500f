"""K-means on embeddings: which student a prompt or class goes to. Centroids are stored, so that the answer stays."""

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

EMBEDDINGS, CENTROIDS = "embeddings", "centroids"  # the names of the arrays in the files


def fit(embeddings: Tensor, number: int, *, seed: int = 0, rounds: int = 100) -> Tensor:
    """Centroids of shape (number, D), float64, of points (N, D): Lloyd's iteration until nothing changes.

    The first centroids are drawn by k-means++ (Arthur and Vassilvitskii 2007). A cluster that loses all its points is
    given the point farthest from its own centroid.

    Args:
        seed: of the draw; the same points and seed give the same centroids.
        rounds: at most so many.
    Raises:
        ValueError: fewer different points than centroids.
    """
    points = embeddings.detach().cpu().double()
    if number < 1 or len(points.unique(dim=0)) < number:
        raise ValueError(f"{number} centroids need as many different points, got {len(points.unique(dim=0))}")
    generator = torch.Generator().manual_seed(seed)
    centroids = points[torch.randint(len(points), (1,), generator=generator)]
    while len(centroids) < number:
        distance = torch.cdist(points, centroids).amin(1).square()
        centroids = torch.cat([centroids, points[torch.multinomial(distance, 1, generator=generator)]])
    owner = nearest(points, centroids)
    for _ in range(rounds):
        for k in range(number):
            mine = points[owner == k]
            if len(mine):
                centroids[k] = mine.mean(0)
            else:
                farthest = (points - centroids[owner]).square().sum(1).argmax()
                centroids[k], owner[farthest] = points[farthest], k
        before, owner = owner, nearest(points, centroids)
        if torch.equal(before, owner):
            break
    return centroids


def nearest(embeddings: Tensor, centroids: Tensor) -> Tensor:
    """The place of the nearest centroid (K, D) to each point (N, D), int64 (N,); of equally near ones the first."""
    points, centroids = embeddings.double(), centroids.to(embeddings.device).double()
    return (points[:, None] - centroids).square().sum(2).argmin(1)


def read_embeddings(file: Path) -> Tensor:
    """The array `embeddings` (N, D) of a .safetensors or .npz file.

    Raises:
        ValueError: there is no such file or array, or it is not a matrix of finite numbers.
    """
    return _read(file, EMBEDDINGS)


def read_centroids(file: Path) -> Tensor:
    """The centroids (K, D) that `write_centroids` stored."""
    return _read(file, CENTROIDS)


def write_centroids(centroids: Tensor, file: Path) -> None:
    """Store them, for `read_centroids`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({CENTROIDS: centroids.contiguous()}, file)


def _read(file: Path, name: str) -> Tensor:
    try:
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                found = {key: torch.from_numpy(arrays[key]) for key in arrays.files if key == name}
        else:
            found = load_file(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read ({error}); give a .safetensors or .npz file") from error
    if name not in found:
        raise ValueError(f"{file} has no array {name}; it has {', '.join(found) or 'none of that name'}")
    matrix = found[name]
    if matrix.ndim != 2 or not matrix.is_floating_point() or not matrix.isfinite().all():
        raise ValueError(
            f"{name} in {file} must be a matrix of finite numbers, got {matrix.dtype} {tuple(matrix.shape)}"
        )
    return matrix
