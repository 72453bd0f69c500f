"""K-means: what Lloyd's iteration must give, and that its answer is kept in a file."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffdistill.kmeans import fit, nearest, read_centroids, read_embeddings, write_centroids


def groups(number: int = 4, each: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around corners that are far apart, and the corner of each."""
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(number * each) % number
    corners = 100 * torch.randn(number, 5, generator=generator)
    return corners[owner] + torch.randn(number * each, 5, generator=generator), owner


@pytest.mark.parametrize("seed", range(5))
def test_groups_that_are_far_apart_are_found(seed):
    points, owner = groups()
    found = nearest(points, fit(points, 4, seed=seed))
    assert len({(a, b) for a, b in zip(owner.tolist(), found.tolist(), strict=True)}) == 4


@pytest.mark.parametrize("number", [1, 2, 7])
def test_at_the_end_each_centroid_is_the_mean_of_the_points_nearest_to_it(number):
    points = torch.randn(200, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    centroids = fit(points, number)
    owner = nearest(points, centroids)
    assert owner.unique().tolist() == list(range(number))
    for k in range(number):
        torch.testing.assert_close(points[owner == k].mean(0), centroids[k], rtol=1e-12, atol=1e-12)


def test_the_spread_around_the_centroids_never_grows_with_rounds():
    points = torch.randn(200, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def spread(rounds: int) -> float:
        centroids = fit(points, 6, rounds=rounds)
        return (points - centroids[nearest(points, centroids)]).square().sum().item()

    spreads = [spread(rounds) for rounds in range(12)]
    assert all(after <= before for before, after in zip(spreads, spreads[1:], strict=False))
    assert spreads[-1] < spreads[0]


def test_no_cluster_is_left_empty_where_points_coincide():
    points = torch.tensor([[0.0], [0.0], [0.0], [1.0], [9.0]])
    for seed in range(20):
        assert nearest(points, fit(points, 3, seed=seed)).unique().tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="4 centroids need as many different points, got 3"):
        fit(points, 4)


def test_the_stored_centroids_route_as_before(tmp_path):
    points, _ = groups()
    centroids = fit(points, 4)
    assert torch.equal(fit(points, 4), centroids)
    write_centroids(centroids, tmp_path / "centroids.safetensors")
    assert torch.equal(read_centroids(tmp_path / "centroids.safetensors"), centroids)
    new = torch.randn(50, 5)
    assert torch.equal(nearest(new, read_centroids(tmp_path / "centroids.safetensors")), nearest(new, centroids))
    assert nearest(points[3:4], centroids) == nearest(points, centroids)[3]  # a function of the point alone


def test_embeddings_are_read_from_either_kind_of_file_or_refused(tmp_path):
    points, _ = groups()
    np.savez(tmp_path / "points.npz", embeddings=points.numpy())
    save_file({"embeddings": points}, tmp_path / "points.safetensors")
    for kind in ("npz", "safetensors"):
        assert torch.equal(read_embeddings(tmp_path / f"points.{kind}"), points)
    with pytest.raises(ValueError, match="has no array centroids"):
        read_centroids(tmp_path / "points.npz")
    with pytest.raises(ValueError, match="cannot be read"):
        read_embeddings(tmp_path / "missing.npz")
    save_file({"embeddings": points * torch.inf}, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="must be a matrix of finite numbers"):
        read_embeddings(tmp_path / "bad.safetensors")
