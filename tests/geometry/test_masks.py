"""Instances keep their place on the image through views, and masks fit their boxes."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from bevkd.data.images import ImageView
from bevkd.geometry.masks import gather_cameras, in_views, join_views, move_instances, split_cameras, tighten
from bevkd.models.instance_head import InstanceHead, InstanceHeadConfig
from bevkd.types import Instances
from tests.geometry.kit import paste

H, W = 24, 40


def instances(*masks: Tensor, cameras: list[int] | None = None) -> Instances:
    """Return instances of whole-image masks."""
    found = [tight for mask in masks if (tight := tighten(mask)) is not None]
    n = len(found)
    return Instances(
        torch.tensor(cameras if cameras is not None else [0] * n),
        torch.tensor([box for _, box in found], dtype=torch.float32).view(-1, 4),
        torch.arange(n),
        torch.linspace(0.5, 1, n),
        tuple(mask for mask, _ in found),
    )


def blob(top: int, left: int, height: int, width: int) -> Tensor:
    """Return a triangle on the image, which looks different when it is mirrored."""
    mask = torch.zeros(H, W, dtype=torch.bool)
    steps = (torch.arange(height)[:, None] + 1) * width > torch.arange(width)[None] * height
    mask[top : top + height, left : left + width] = steps
    return mask


def matrices(*views: ImageView) -> Tensor:
    return torch.stack([view.matrix() for view in views])


def test_a_tight_box_holds_every_pixel_and_no_empty_row_or_column() -> None:
    found = tighten(blob(3, 5, 4, 7), left=100, top=10)
    assert found is not None
    mask, box = found
    assert box == (105, 13, 112, 17)
    assert mask.any(dim=0).all()
    assert mask.any(dim=1).all()
    assert tighten(torch.zeros(4, 5, dtype=torch.bool)) is None


def test_a_view_of_the_whole_image_changes_nothing() -> None:
    before = instances(blob(2, 3, 6, 9), blob(10, 20, 1, 1))
    after = move_instances(before, matrices(ImageView(H, W, 1.0)), (H, W))
    assert torch.equal(after.boxes, before.boxes)
    assert all(torch.equal(new, old) for new, old in zip(after.masks, before.masks, strict=True))
    assert torch.equal(after.scores, before.scores)


@given(st.integers(0, 12), st.integers(0, 25), st.integers(1, 10), st.integers(1, 12), st.booleans())
def test_a_cropped_and_mirrored_view_shows_what_the_moved_mask_says(
    top: int, left: int, height: int, width: int, flip: bool
) -> None:
    whole = blob(top, left, height, width)
    view = ImageView(16, 20, 1.0, left=8, top=4, flip=flip)
    expected = whole[4:20, 8:28]
    expected = expected.flip(1) if flip else expected
    moved = move_instances(instances(whole), matrices(view), (16, 20))
    shown = paste(moved, 16, 20).any(dim=0) if len(moved) else torch.zeros(16, 20, dtype=torch.bool)
    assert torch.equal(shown, expected)
    assert len(moved) == int(expected.any())


def test_an_enlarged_view_and_back_gives_the_same_pixels() -> None:
    before = instances(blob(2, 3, 9, 7), blob(12, 20, 1, 5), blob(0, 30, 20, 10))
    view = ImageView(3 * H, 3 * W, 3.0, flip=True)
    there = move_instances(before, matrices(view), (3 * H, 3 * W))
    back = move_instances(there, torch.linalg.inv(matrices(view)), (H, W))
    assert torch.equal(back.boxes, before.boxes)
    assert all(torch.equal(new, old) for new, old in zip(back.masks, before.masks, strict=True))


@given(st.integers(0, 3), st.booleans(), st.integers(0, 15), st.integers(0, 25))
def test_a_quarter_turn_of_the_view_turns_every_pixel_of_a_mask(quarters: int, flip: bool, top: int, left: int) -> None:
    whole = blob(top, left, 8, 12)
    view = ImageView(20, 20, 1.0, left=8, top=2, flip=flip, rotation_rad=quarters * math.pi / 2)
    expected = whole[2:22, 8:28]
    expected = torch.rot90(expected.flip(1) if flip else expected, quarters)
    moved = move_instances(instances(whole), matrices(view), (20, 20))
    shown = paste(moved, 20, 20).any(dim=0) if len(moved) else torch.zeros(20, 20, dtype=torch.bool)
    assert torch.equal(shown, expected)


@given(st.floats(-1, 1), st.floats(0.5, 2), st.booleans())
def test_a_turned_mask_lies_where_its_pixels_went(turn: float, zoom: float, flip: bool) -> None:
    whole = blob(6, 10, 12, 18)
    view = ImageView(40, 50, zoom, left=-5, top=-4, flip=flip, rotation_rad=turn)
    shown = paste(move_instances(instances(whole), matrices(view), (40, 50)), 40, 50).any(dim=0)
    x, y = torch.meshgrid(torch.arange(50) + 0.5, torch.arange(40) + 0.5, indexing="xy")
    back = torch.linalg.inv(view.matrix())
    u, v = (back[row, 0] * x + back[row, 1] * y + back[row, 2] for row in (0, 1))
    # The mask's edge is interpolated between pixels: a pixel's value is certain where its neighbours agree.
    near = functional.pad(whole, (1, 1, 1, 1)).float()[None, None]
    surely_in = -functional.max_pool2d(-near, 3, 1, 0)[0, 0] > 0
    surely_out = functional.max_pool2d(near, 3, 1, 0)[0, 0] == 0
    inside = (u >= 0) & (u < W) & (v >= 0) & (v < H)
    cell = v.clamp(0, H - 1).long(), u.clamp(0, W - 1).long()
    assert shown[inside & surely_in[cell]].all()
    assert not shown[surely_out[cell] | ~inside].any()


def test_a_mask_on_a_coarse_grid_is_spread_over_the_pixels_of_its_box() -> None:
    coarse = Instances(
        torch.tensor([0]),
        torch.tensor([[4.0, 2.0, 20.0, 18.0]]),
        torch.tensor([1]),
        torch.ones(1),
        (torch.tensor([[True, False], [True, True]]),),
    )
    moved = move_instances(coarse, torch.eye(3)[None], (H, W))
    (mask,) = moved.masks
    assert mask.shape == (16, 16)
    assert mask[:7, :7].all()
    assert not mask[:6, 10:].any()
    assert mask[10:].all()


def test_an_object_without_a_pixel_centre_left_is_dropped_and_the_others_keep_their_rows() -> None:
    both = instances(blob(0, 0, 1, 1), blob(8, 8, 12, 12))
    half = move_instances(both, matrices(ImageView(H // 4, W // 4, 0.25)), (H // 4, W // 4))
    assert half.labels.tolist() == [1]
    assert half.boxes.tolist() == [[2, 2, 5, 5]]


def test_every_instance_moves_with_its_own_camera() -> None:
    pair = instances(blob(5, 5, 4, 4), blob(5, 5, 4, 4), cameras=[1, 0])
    moved = move_instances(pair, matrices(ImageView(H, W, 1.0), ImageView(H, W, 1.0, left=3, top=1)), (H, W))
    assert moved.boxes.tolist() == [[2, 4, 6, 8], [5, 5, 9, 9]]


def test_nothing_moves_to_nothing() -> None:
    moved = move_instances(Instances.empty(), torch.eye(3)[None], (H, W))
    assert len(moved) == 0
    assert paste(moved, H, W).shape == (0, H, W)


def test_frames_side_by_side_come_apart_again() -> None:
    first = instances(blob(1, 1, 3, 3), blob(6, 6, 2, 2), cameras=[2, 0])
    frames = (first, Instances.empty(), instances(blob(9, 9, 5, 5), cameras=[1]))
    joined = gather_cameras(frames, 3)
    assert joined.cameras.tolist() == [2, 0, 7]
    for apart, frame in zip(split_cameras(joined, 3, 3), frames, strict=True):
        assert torch.equal(apart.cameras, frame.cameras)
        assert torch.equal(apart.boxes, frame.boxes)
        assert len(apart.masks) == len(frame.masks)


def test_instances_are_picked_by_number_and_by_mark() -> None:
    three = instances(blob(1, 1, 3, 3), blob(6, 6, 2, 2), blob(9, 9, 5, 5))
    assert three[torch.tensor([2, 0])].labels.tolist() == [2, 0]
    marked = three[torch.tensor([False, True, False])]
    assert marked.labels.tolist() == [1]
    assert marked.masks[0].shape == (2, 2)


def test_instances_in_views_have_the_targets_of_moved_ones() -> None:
    torch.manual_seed(0)
    pair = instances(blob(5, 5, 9, 12), blob(7, 2, 14, 6), cameras=[1, 0])
    views = matrices(ImageView(H, W, 1.2, left=3, top=1, flip=True), ImageView(H, W, 1.0, rotation_rad=0.2))
    head = InstanceHead(InstanceHeadConfig(channels=4), 4, 4, 3)
    moved, seen = move_instances(pair, views, (H, W)), in_views(pair, views, (H, W))
    assert len(seen) == 2
    one, other = head.targets(moved, 2, H, W), head.targets(seen, 2, H, W)
    for name in ("heatmap", "cells", "boxes", "masks"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_views_side_by_side_keep_the_sure_instances_with_their_cameras() -> None:
    first = in_views(
        instances(blob(1, 1, 3, 3), blob(6, 6, 2, 2), cameras=[2, 0]), torch.eye(3).expand(3, 3, 3), (H, W)
    )
    first, unsure = (replace(first, scores=torch.tensor([low, 0.8])) for low in (0.9, 0.1))
    joined = join_views([first, in_views(Instances.empty(), torch.eye(3)[None], (H, W)), unsure], 3, 0.5)
    assert joined.cameras.tolist() == [2, 0, 6]
    assert joined.masks.shape == (3, 64, 64)
    assert len(join_views([unsure], 3, 0.9)) == 0
