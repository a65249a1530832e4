"""Projection of boxes and points, and its clipping."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bevkd.viz.projection import EDGES, NEAR_M, Segments, visible_edges, visible_points
from tests.viz.pictures import FOCAL, HEIGHT, WIDTH, boxes, intrinsics, lidar_from_forward_camera


def edges(*rows: list[float]) -> Segments:
    return visible_edges(boxes(*rows).values, intrinsics(), lidar_from_forward_camera(), HEIGHT, WIDTH)


def test_a_box_ahead_shows_all_edges_where_the_pinhole_puts_them() -> None:
    found = edges([0.0, 11.0, 0.0, 2.0, 1.0, 0.5, math.pi / 2])
    assert len(found.ends_px) == len(EDGES)
    # Its near face is 10 m ahead, 1 m wide and 0.5 m high; the far face is inside of it.
    u, v = found.ends_px.reshape(-1, 2).unbind(-1)
    assert float(u.min()) == pytest.approx(WIDTH / 2 - 0.5 * FOCAL / 10, abs=1e-3)
    assert float(u.max()) == pytest.approx(WIDTH / 2 + 0.5 * FOCAL / 10, abs=1e-3)
    assert float(v.min()) == pytest.approx(HEIGHT / 2 - 0.25 * FOCAL / 10, abs=1e-3)
    assert float(v.max()) == pytest.approx(HEIGHT / 2 + 0.25 * FOCAL / 10, abs=1e-3)


def test_the_front_face_is_the_one_the_box_heads_to() -> None:
    away = edges([0.0, 11.0, 0.0, 2.0, 1.0, 0.5, math.pi / 2])
    assert int(away.front.sum()) == 4
    spread = away.ends_px[away.front].reshape(-1, 2)[:, 0]
    assert float(spread.max() - spread.min()) == pytest.approx(FOCAL / 12, abs=1e-3)


def test_right_in_the_lidar_frame_is_right_in_the_image() -> None:
    found = edges([3.0, 10.0, 0.0, 1.0, 1.0, 1.0, 0.0])
    assert float(found.ends_px[..., 0].min()) > WIDTH / 2


def test_up_in_the_lidar_frame_is_up_in_the_image() -> None:
    found = edges([0.0, 10.0, 2.0, 1.0, 1.0, 1.0, 0.0])
    assert float(found.ends_px[..., 1].max()) < HEIGHT / 2


@pytest.mark.parametrize("y", [-11.0, -2.0, -NEAR_M])
def test_a_box_behind_the_camera_shows_nothing(y: float) -> None:
    assert len(edges([0.0, y, 0.0, 0.5, 0.5, 1.0, 0.0]).ends_px) == 0


def test_a_box_through_the_camera_plane_does_not_wrap_around() -> None:
    # It stands to the right from 20 m behind to 20 m ahead: no piece may appear in the left half.
    found = edges([2.0, 0.0, 0.0, 40.0, 1.0, 1.0, math.pi / 2])
    assert len(found.ends_px) > 0
    assert float(found.ends_px[..., 0].min()) >= WIDTH / 2


def test_no_boxes_and_boxes_that_are_not_finite_show_nothing() -> None:
    assert len(edges().ends_px) == 0
    assert len(edges([math.nan, 5.0, 0.0, 1.0, 1.0, 1.0, 0.0]).ends_px) == 0


coordinate = st.floats(-30, 30, width=32)
side = st.floats(0.125, 40, width=32)


@settings(max_examples=60, deadline=None)
@given(st.tuples(coordinate, coordinate, coordinate, side, side, side, coordinate))
def test_every_piece_is_finite_and_lies_in_the_image(row: tuple[float, ...]) -> None:
    found = edges(list(row))
    u, v = found.ends_px.reshape(-1, 2).unbind(-1)
    assert bool(found.ends_px.isfinite().all())
    assert bool(((u >= -1e-3) & (u <= WIDTH + 1e-3) & (v >= -1e-3) & (v <= HEIGHT + 1e-3)).all())


def test_only_points_ahead_and_inside_are_visible_and_near_ones_come_last() -> None:
    xyz = torch.tensor([[0.0, 5.0, 0.0], [0.0, 20.0, 0.0], [0.0, -5.0, 0.0], [50.0, 5.0, 0.0], [0.0, 0.1, 0.0]])
    pixels, depth = visible_points(xyz, intrinsics(), lidar_from_forward_camera(), HEIGHT, WIDTH)
    assert depth.tolist() == [20.0, 5.0]
    assert pixels.tolist() == [[WIDTH / 2, HEIGHT / 2]] * 2
