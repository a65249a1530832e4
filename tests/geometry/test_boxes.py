from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bevkd.geometry.boxes import bev_corners, corners_3d, nine_points, points_in_boxes, rotate, wrap_angle
from tests.geometry.strategies import random_boxes, seeds


def test_corners_of_an_unturned_box_start_rear_right_and_run_clockwise() -> None:
    corners = bev_corners(torch.tensor([[1.0, 2.0, 0.0, 4.0, 2.0, 1.5, 0.0]]))
    assert corners.tolist() == [[[-1.0, 1.0], [-1.0, 3.0], [3.0, 3.0], [3.0, 1.0]]]


def test_yaw_turns_corners_counter_clockwise() -> None:
    corners = bev_corners(torch.tensor([[0.0, 0.0, 0.0, 4.0, 2.0, 1.5, math.pi / 2]]))
    torch.testing.assert_close(corners, torch.tensor([[[1.0, -2.0], [-1.0, -2.0], [-1.0, 2.0], [1.0, 2.0]]]))


def test_nine_points_are_corners_centre_and_edge_middles() -> None:
    points = nine_points(torch.tensor([[0.0, 0.0, 0.0, 4.0, 2.0, 1.0, 0.0]]))[0]
    assert points[4:].tolist() == [[0, 0], [-2, 0], [0, 1], [2, 0], [0, -1]]
    assert torch.equal(points[:4], bev_corners(torch.tensor([[0.0, 0.0, 0.0, 4.0, 2.0, 1.0, 0.0]]))[0])


def test_eight_corners_stand_half_a_height_below_and_above_the_centre() -> None:
    corners = corners_3d(torch.tensor([[0.0, 0.0, 5.0, 4.0, 2.0, 3.0, 0.3]]))[0]
    assert corners[:, 2].tolist() == [3.5] * 4 + [6.5] * 4
    assert torch.equal(corners[:4, :2], corners[4:, :2])


@given(seeds())
def test_a_box_holds_points_inside_its_corners_and_none_outside(generator: torch.Generator) -> None:
    boxes = random_boxes(5, generator).values
    center = boxes[:, None, 0:3]
    inside = center + (corners_3d(boxes) - center) * 0.99
    outside = center + (corners_3d(boxes) - center) * 1.01
    for index in range(5):
        assert points_in_boxes(inside[index], boxes)[index].all()
        assert not points_in_boxes(outside[index], boxes)[index].any()


def test_points_in_boxes_ignores_values_after_x_y_z() -> None:
    points = torch.tensor([[0.0, 0.0, 0.0, 255.0, 0.05], [9.0, 0.0, 0.0, 0.0, 0.0]])
    assert points_in_boxes(points, torch.tensor([[0.0, 0.0, 0.0, 2.0, 2.0, 2.0, 0.0]])).tolist() == [[True, False]]


@given(st.floats(-50, 50))
def test_a_wrapped_angle_points_the_same_way(angle: float) -> None:
    wrapped = wrap_angle(torch.tensor([angle], dtype=torch.float64))
    assert -math.pi <= wrapped.item() < math.pi
    assert (math.cos(wrapped.item()), math.sin(wrapped.item())) == pytest.approx(
        (math.cos(angle), math.sin(angle)), abs=1e-12
    )


def test_rotation_is_counter_clockwise() -> None:
    turned = rotate(torch.tensor([[1.0, 0.0]]), torch.tensor([math.pi / 2]))
    torch.testing.assert_close(turned, torch.tensor([[0.0, 1.0]]))
