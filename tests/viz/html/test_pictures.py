"""Frames and maps of the page: pictures as data, boxes where the objects are."""

from __future__ import annotations

import base64
import io
import re

import torch
from PIL import Image

from bevkd.grid import BEVGrid
from bevkd.viz.html.pictures import (
    CAMERA_PX,
    CAMERA_UNITS,
    Layer,
    camera_views,
    map_view,
    points_defs,
    top_view,
)
from tests.viz import pictures
from tests.viz.pictures import CLASSES, GRID

CAR = [0.0, 10.0, 0.0, 4.0, 2.0, 1.5, 1.57]
NONE = pictures.boxes()


def layer(found: list[list[float]], right: list[bool], missed: list[bool]) -> Layer:
    return Layer(
        "plain",
        "c-plain",
        pictures.boxes(*found, score=0.5),
        torch.tensor(right, dtype=torch.bool),
        torch.tensor(missed, dtype=torch.bool),
    )


def decoded(markup: str) -> list[Image.Image]:
    data = re.findall(r'"data:image/\w+;base64,([^"]+)"', markup)
    return [Image.open(io.BytesIO(base64.b64decode(each))) for each in data]


def test_a_box_is_drawn_where_the_camera_sees_it() -> None:
    views = camera_views(pictures.frame(), pictures.boxes(CAR), [layer([CAR], [True], [False])], CLASSES)
    assert views is not None
    corners = [(int(u), int(v)) for u, v in re.findall(r"[ML](\d+) (\d+)", views)]
    scale = CAMERA_UNITS / pictures.WIDTH
    # The near face is 8 m ahead: 2 m of width are 25 pixels.
    assert min(u for u, _ in corners) == round((pictures.WIDTH / 2 - 12.5) * scale)
    assert "plain: car 0.50, 10 m away" in views
    assert "annotated: car, 10 m away" in views


def test_large_images_are_made_smaller_and_small_ones_are_not() -> None:
    frame = pictures.frame()
    assert frame.images is not None
    (small,) = decoded(camera_views(frame, NONE, [], CLASSES) or "")
    assert small.size == (pictures.WIDTH, pictures.HEIGHT)
    big = pictures.frame(images=torch.zeros(1, 3, 900, 1600, dtype=torch.uint8))
    (picture,) = decoded(camera_views(big, NONE, [], CLASSES) or "")
    assert picture.size == (CAMERA_PX, CAMERA_PX * 9 // 16)


def test_a_frame_without_cameras_has_no_views() -> None:
    assert camera_views(pictures.frame(images=None), NONE, [], CLASSES) is None


def test_a_view_from_above_says_what_was_found_and_missed() -> None:
    truth = pictures.boxes(CAR, [5.0, -5.0, 0, 1, 1, 1, 0])
    view = top_view(layer([CAR, [9.0, 9, 0, 4, 2, 1, 0]], [True, False], [False, True]), truth, GRID, CLASSES, None)
    assert "1 of 2 found, 1 false" in view
    assert re.findall(r'<path d="[^"]*" class="(\w+)"/>', view)[1:] == ["truth", "missed", "true", "false"]


def test_left_and_up_are_where_they_should_be_from_above() -> None:
    view = top_view(layer([], [], [False]), pictures.boxes([5.0, 10.0, 0, 2, 2, 1, 0]), GRID, CLASSES, None)
    path = re.findall(r'<path d="([^"]*)" class="truth"', view)[0]
    assert "M4 -9" in path, "y points up the page"
    ahead = BEVGrid(x_m=(0.0, 40.0), y_m=(-10.0, 30.0), cell_m=1.0)
    assert 'viewBox="0 -30 40 40"' in top_view(layer([], [], []), NONE, ahead, CLASSES, None)


def test_points_are_shown_as_often_as_asked_but_kept_once() -> None:
    points = torch.tensor([[5.0, 10.0, 0.0], [-5.0, -10.0, 0.0]])
    defs = points_defs(points, GRID, "points-1")
    assert defs is not None
    (picture,) = decoded(defs)
    alpha = picture.getchannel("A")
    width, height = picture.size
    halves = [(width // 2 * right, height // 2 * down) for right in (0, 1) for down in (0, 1)]
    filled = [alpha.crop((x, y, x + width // 2, y + height // 2)).getbbox() is not None for x, y in halves]
    assert filled == [False, True, True, False], "right of and above the ego, left of and below it"
    assert 'href="#points-1"' in top_view(layer([], [], []), NONE, GRID, CLASSES, "points-1")
    assert points_defs(None, GRID, "points-1") is None


def test_a_map_has_a_pixel_per_cell_and_its_first_row_at_the_bottom() -> None:
    values = torch.zeros(40, 40)
    values[0, 3] = 1.0
    (picture,) = decoded(map_view(values, GRID, None, "teacher", "c-teacher", "bev_low"))
    assert picture.size == (40, 40)
    dark = picture.convert("L")
    assert dark.getpixel((3, 39)) < 60 < dark.getpixel((3, 0))
