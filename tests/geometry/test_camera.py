"""Points in cameras."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bevkd.data.images import ImageView
from bevkd.geometry.camera import lidar_depth, move_depth

SIZES = torch.tensor([[90.0, 160.0], [90.0, 160.0]])
EXACT = "donot_use_mm_for_euclid_dist"
LENS = torch.tensor([[100.0, 0, 80], [0, 100, 45], [0, 0, 1]]).expand(2, 3, 3)


def poses() -> Tensor:
    """Return cameras that look along +x and along -x."""
    forward = torch.tensor([[0.0, 0, 1, 0.5], [-1, 0, 0, 0], [0, -1, 0, 1.6], [0, 0, 0, 1]])
    back = torch.diag(torch.tensor([-1.0, -1, 1, 1])) @ forward
    return torch.stack([forward, back])


def scene(seed: int, count: int = 300) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, 3, generator=generator) - 0.5) * torch.tensor([80.0, 80, 6])


def test_a_point_straight_ahead_is_at_the_centre_of_its_camera() -> None:
    found = lidar_depth(torch.tensor([[20.5, 0, 1.6], [-10.5, 0, 1.6]]), LENS, poses(), SIZES)
    assert found.cameras.tolist() == [0, 1]
    torch.testing.assert_close(found.pixels, torch.tensor([[80.0, 45], [80, 45]]))
    torch.testing.assert_close(found.depth_m, torch.tensor([20.0, 10.0]))


@given(st.integers(0, 1000))
def test_depths_are_of_the_points_that_the_cameras_see_and_of_no_others(seed: int) -> None:
    points = scene(seed)
    found = lidar_depth(points, LENS, poses(), SIZES)
    assert (found.depth_m > 0).all()
    assert ((found.pixels >= 0) & (found.pixels < SIZES[found.cameras].flip(1))).all()
    rays = torch.cat([(found.pixels - LENS[0, :2, 2]) / 100, torch.ones(len(found), 1)], dim=1) * found.depth_m[:, None]
    pose = poses()[found.cameras]
    restored = torch.einsum("dij,dj->di", pose[:, :3, :3], rays) + pose[:, :3, 3]
    nearest = torch.cdist(restored, points, compute_mode=EXACT).min(dim=1)
    assert (nearest.values < 1e-3).all()
    assert len(set(zip(found.cameras.tolist(), nearest.indices.tolist(), strict=True))) == len(found)


@given(st.integers(0, 1000), st.booleans(), st.floats(0.3, 1.5), st.floats(-1, 1))
def test_depths_move_as_the_pixels_of_their_images_do(seed: int, flip: bool, zoom: float, turn: float) -> None:
    view = ImageView(60, 100, zoom, left=7, top=5, flip=flip, rotation_rad=turn)
    original = lidar_depth(scene(seed), LENS, poses(), SIZES)
    moved = move_depth(original, view.matrix().expand(2, 3, 3), 60, 100)
    direct = lidar_depth(scene(seed), view.matrix() @ LENS, poses(), torch.tensor([[60.0, 100.0]]).expand(2, 2))
    inside_original = (
        torch.cdist(moved.pixels, direct.pixels, compute_mode=EXACT).min(dim=1).values if len(moved) else torch.zeros(0)
    )
    assert (inside_original < 1e-2).all()
    assert ((moved.pixels >= 0) & (moved.pixels < torch.tensor([100.0, 60.0]))).all()
    assert len(moved) <= len(direct)
