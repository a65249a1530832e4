"""Voxelization against a loop over points."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bevkd.models.voxelize import voxelize
from tests.geometry.strategies import seeds

LOW = (-2.0, -1.0, -1.0)
EDGES = (0.5, 0.25, 0.5)
SHAPE = (4, 8, 8)


def brute_force(
    points: Tensor, frame: Tensor, max_points: int
) -> tuple[list[list[float]], list[tuple[int, int, int, int]]]:
    """Return means and (frame, z, y, x) indices by walking over the points in order."""
    found: dict[tuple[int, int, int, int], list[list[float]]] = {}
    for point, owner in zip(points.tolist(), frame.tolist(), strict=True):
        x, y, z = (math.floor((point[axis] - LOW[axis]) / EDGES[axis]) for axis in range(3))
        if 0 <= x < SHAPE[2] and 0 <= y < SHAPE[1] and 0 <= z < SHAPE[0]:
            members = found.setdefault((owner, z, y, x), [])
            if len(members) < max_points:
                members.append(point)
    means = [[sum(column) / len(found[key]) for column in zip(*found[key], strict=True)] for key in sorted(found)]
    return means, sorted(found)


def cloud(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Return points around the range, a fifth of them outside, crowded so that voxels overflow."""
    points = torch.rand(count, 5, generator=generator) * torch.tensor([4.8, 2.4, 2.4, 255, 0.5])
    points[:, :3] += torch.tensor([-2.4, -1.2, -1.2])
    # Multiples of 1/64 keep every quotient exact, so that both sides agree on which voxel owns a point on a face.
    return (points * 64).round() / 64, torch.randint(0, 2, (count,), generator=generator)


@given(seeds(), st.integers(0, 300), st.integers(1, 4))
def test_it_equals_a_loop_over_points(generator: torch.Generator, count: int, max_points: int) -> None:
    points, frame = cloud(generator, count)
    features, indices = voxelize(points, frame, LOW, EDGES, SHAPE, max_points)
    means, keys = brute_force(points, frame, max_points)
    assert [tuple(index) for index in indices.tolist()] == keys
    torch.testing.assert_close(features, torch.tensor(means).reshape(-1, 5), atol=1e-4, rtol=1e-5)


def test_only_the_first_points_of_a_voxel_count() -> None:
    points = torch.tensor([[0.1, 0.1, 0.1, value, 0.0] for value in (1.0, 2.0, 30.0)])
    features, indices = voxelize(points, torch.zeros(3, dtype=torch.int64), LOW, EDGES, SHAPE, 2)
    assert features[:, 3].tolist() == [1.5]
    assert indices.tolist() == [[0, 2, 4, 4]]


def test_the_lower_face_belongs_to_the_range_and_the_upper_does_not() -> None:
    points = torch.tensor([[-2.0, -1.0, -1.0, 0, 0], [2.0, -1.0, -1.0, 0, 0]])
    _, indices = voxelize(points, torch.zeros(2, dtype=torch.int64), LOW, EDGES, SHAPE, 5)
    assert indices.tolist() == [[0, 0, 0, 0]]


def test_the_same_place_in_two_frames_is_two_voxels() -> None:
    points = torch.zeros(2, 5)
    _, indices = voxelize(points, torch.tensor([1, 0]), LOW, EDGES, SHAPE, 5)
    assert indices[:, 0].tolist() == [0, 1]


def test_no_points_are_no_voxels() -> None:
    features, indices = voxelize(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), LOW, EDGES, SHAPE, 5)
    assert features.shape == (0, 5)
    assert indices.shape == (0, 4)
