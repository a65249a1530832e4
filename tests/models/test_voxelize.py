"""Voxelization against a loop over points."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bevkd.models.sparse import load_spconv
from bevkd.models.voxelize import group_points, voxelize
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


# ------------------------------------------------------------------------------------------ spconv's own

NUSCENES = ((0.075, 0.075, 0.2), (-54.0, -54.0, -5.0, 54.0, 54.0, 3.0))
KITTI = ((0.05, 0.05, 0.1), (0.0, -40.0, -3.0, 70.4, 40.0, 1.0))


def equals_spconv(
    points: Tensor, voxel: tuple[float, float, float], reach: tuple[float, ...], max_points: int, max_voxels: int
) -> int:
    """Hold voxels and means against spconv's ``PointToVoxel`` and return the number of voxels."""
    load_spconv()
    from spconv.pytorch.utils import PointToVoxel

    slots, place, counts = PointToVoxel(list(voxel), list(reach), points.shape[1], max_voxels, max_points)(points)
    low, high = reach[:3], reach[3:]
    shape = tuple(round((high[axis] - low[axis]) / voxel[axis]) for axis in (2, 1, 0))
    frame = torch.zeros(len(points), dtype=torch.int64)
    features, indices = voxelize(points, frame, low, voxel, shape, max_points, max_voxels)  # type: ignore[arg-type]
    order = ((place[:, 0].long() * shape[1] + place[:, 1]) * shape[2] + place[:, 2]).argsort()
    assert torch.equal(indices[:, 1:], place[order])
    means = slots.sum(1) / counts[:, None]
    torch.testing.assert_close(features, means[order], atol=1e-4, rtol=1e-6)
    return len(indices)


@settings(max_examples=40)
@given(seeds(), st.integers(1, 3000), st.integers(1, 6), st.sampled_from([20, 100, 100_000]))
def test_it_equals_spconvs_own_on_random_points(
    generator: torch.Generator, count: int, max_points: int, max_voxels: int
) -> None:
    # Half of the points stand close together, and all of them may lie on faces.
    points = torch.randn(count, 5, generator=generator) * torch.tensor([3.0, 3.0, 2.0, 1.0, 1.0])
    points[::2] = (points[::2] / 4 * 16).round() / 16
    equals_spconv(points, (0.3, 0.25, 0.4), (-3.0, -2.0, -2.0, 3.0, 2.0, 2.0), max_points, max_voxels)


@pytest.mark.parametrize("max_voxels", [160_000, 5_000])
def test_it_equals_spconvs_own_on_a_nuscenes_frame_as_dense_as_ten_sweeps(real_data: Path, max_voxels: int) -> None:
    scan = sorted((real_data / "nuscenes_mini_real" / "samples" / "LIDAR_TOP").glob("*.bin"))[0]
    points = torch.from_numpy(np.fromfile(scan, np.float32).reshape(-1, 5))
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.05, 0.05, 0.02, 0.0, 0.0])
    sweeps = torch.cat([points + spread * torch.randn(points.shape, generator=generator) for _ in range(7)])
    assert len(sweeps) > 200_000
    assert equals_spconv(sweeps, *NUSCENES, 10, max_voxels) > min(max_voxels, 50_000) - 1


@pytest.mark.parametrize("max_voxels", [40_000, 16_000])
def test_it_equals_spconvs_own_on_a_kitti_frame(real_data: Path, max_voxels: int) -> None:
    scan = real_data / "kitti" / "training" / "velodyne" / "000001.bin"
    points = torch.from_numpy(np.fromfile(scan, np.float32).reshape(-1, 4))
    assert equals_spconv(points, *KITTI, 5, max_voxels) == max_voxels


def test_each_frame_has_its_own_limit_of_voxels() -> None:
    points = torch.tensor([[0.1, 0.1, 0.1, 0, 0], [0.6, 0.1, 0.1, 0, 0], [1.1, 0.1, 0.1, 0, 0], [0.1, 0.1, 0.1, 1, 0]])
    frame = torch.tensor([0, 1, 0, 0])
    features, indices = voxelize(points, frame, LOW, EDGES, SHAPE, 5, max_voxels=1)
    assert indices.tolist() == [[0, 2, 4, 4], [1, 2, 4, 5]]
    assert features[:, 3].tolist() == [0.5, 0.0]  # a later point still joins a voxel that is there


def test_a_point_that_is_no_number_is_dropped() -> None:
    points = torch.tensor([[math.nan, 0.1, 0.1, 0, 0], [0.1, 0.1, math.inf, 0, 0], [0.1, 0.1, 0.1, 7, 0]])
    features, _ = voxelize(points, torch.zeros(3, dtype=torch.int64), LOW, EDGES, SHAPE, 5)
    assert features[:, 3].tolist() == [7.0]


def test_a_batch_with_more_cells_than_32_bits_count_is_indexed_correctly() -> None:
    shape = (40, 6000, 6000)
    points = torch.tensor([[1499.9, 1499.9, 3.95, 1, 0], [0.1, 0.1, 0.15, 2, 0]])
    _, indices = voxelize(points, torch.tensor([1, 1]), (0.0, 0.0, 0.0), (0.25, 0.25, 0.1), shape, 5)
    assert indices.tolist() == [[1, 1, 0, 0], [1, 39, 5999, 5999]]


@given(seeds(), st.integers(1, 200), st.integers(1, 4))
def test_groups_list_the_points_of_each_voxel_in_their_order(
    generator: torch.Generator, count: int, max_points: int
) -> None:
    points, frame = cloud(generator, count)
    groups = group_points(points, frame, LOW, EDGES, SHAPE, max_points)
    for voxel, own in enumerate(groups.points.split(groups.counts.tolist())):
        assert own.tolist() == sorted(own.tolist())
        assert (frame[own] == groups.indices[voxel, 0]).all()
        assert (groups.voxel_of_point[groups.starts[voxel] : groups.starts[voxel] + len(own)] == voxel).all()
