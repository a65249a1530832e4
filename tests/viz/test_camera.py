"""Camera mosaics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bevkd.errors import DataError
from bevkd.types import Boxes, Instances
from bevkd.viz import draw_cameras
from bevkd.viz.camera import MOSAIC, reading_order
from bevkd.viz.style import DEPTH_COLORS, PAPER, ROLE_COLORS
from tests.viz.pictures import CLASSES, FOCAL, WIDTH, boxes, frame, where

GREEN, BLUE = ROLE_COLORS["ground_truth"], ROLE_COLORS["teacher"]
BARE = {"tags": False, "legend": False, "tile_width_px": WIDTH}


def test_a_box_is_drawn_in_its_roles_colour_where_it_projects_to() -> None:
    picture = draw_cameras(frame(), {"teacher": boxes([2.0, 11.0, 0.0, 2.0, 2.0, 2.0, math.pi / 2])}, CLASSES, **BARE)
    rows, columns = where(picture, BLUE, tolerance=60).T
    assert columns.min() == pytest.approx(WIDTH / 2 + 1 * FOCAL / 12, abs=2)
    assert columns.max() == pytest.approx(WIDTH / 2 + 3 * FOCAL / 10, abs=2)
    assert rows.min() == pytest.approx(45 - 10, abs=2)
    assert rows.max() == pytest.approx(45 + 10, abs=2)


def test_the_size_of_the_mosaic_does_not_move_the_boxes() -> None:
    box = {"teacher": boxes([2.0, 11.0, 0.0, 2.0, 2.0, 2.0, math.pi / 2])}
    small = draw_cameras(frame(), box, CLASSES, **BARE)
    large = draw_cameras(frame(), box, CLASSES, **{**BARE, "tile_width_px": 3 * WIDTH})
    centre_small, centre_large = (where(picture, BLUE, 60).mean(axis=0) for picture in (small, large))
    assert np.allclose(centre_small, centre_large / 3, atol=1.5)


def test_a_box_behind_the_camera_changes_no_pixel() -> None:
    behind = draw_cameras(frame(), {"teacher": boxes([0.0, -10.0, 0.0, 4.0, 2.0, 2.0, 0.0])}, CLASSES)
    nothing = draw_cameras(frame(), {"teacher": Boxes.empty()}, CLASSES)
    assert behind.tobytes() == nothing.tobytes()


def test_boxes_below_the_score_are_left_out() -> None:
    weak = boxes([0.0, 10.0, 0.0, 2.0, 2.0, 2.0, 0.0], score=0.2)
    assert len(where(draw_cameras(frame(), {"teacher": weak}, CLASSES, min_score=0.1, legend=False), BLUE)) > 0
    assert len(where(draw_cameras(frame(), {"teacher": weak}, CLASSES, min_score=0.3, legend=False), BLUE)) == 0


def test_class_names_stand_on_large_boxes_only() -> None:
    near, far = boxes([0.0, 6.0, 0.0, 2.0, 2.0, 2.0, 0.0]), boxes([0.0, 60.0, 0.0, 2.0, 2.0, 2.0, 0.0])
    for some, tagged in ((near, True), (far, False)):
        counts = [
            len(where(draw_cameras(frame(), {"teacher": some}, CLASSES, tags=tags, legend=False), BLUE))
            for tags in (True, False)
        ]
        assert (counts[0] > counts[1] + 100) == tagged


def test_points_are_coloured_by_depth() -> None:
    points = torch.tensor([[-1.0, 5.0, 0.0, 0.0, 0.0], [12.0, 60.0, 0.0, 0.0, 0.0]])
    picture = draw_cameras(frame(), {}, CLASSES, points=points, **BARE)
    far = where(picture, DEPTH_COLORS[-1], 40)
    assert far[:, 1].mean() == pytest.approx(WIDTH / 2 + 12 / 60 * FOCAL, abs=2)
    assert len(where(picture, DEPTH_COLORS[0], 90)) > 0


def test_the_nuscenes_rig_reads_front_row_then_back_row() -> None:
    rig = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_FRONT_LEFT")
    assert [rig[index] for index in reading_order(rig)] == list(MOSAIC)
    six = frame(rig)
    assert six.images is not None
    six.images[0] = 255
    six.images[3] = 0
    picture = np.asarray(draw_cameras(six, {}, CLASSES, legend=False).convert("L"))
    height, width = picture.shape
    assert picture[height // 4, width // 2] == 255
    assert picture[3 * height // 4, width // 2] == 0


@pytest.mark.parametrize("names", [("image_2",), ("left", "right"), ("a", "b", "c", "d")])
def test_other_rigs_keep_their_order(names: tuple[str, ...]) -> None:
    assert reading_order(names) == list(range(len(names)))
    picture = draw_cameras(frame(names), {}, CLASSES, tile_width_px=120, legend=False)
    assert picture.width < 120 * 3 + 20


def test_the_legend_names_each_role_with_its_colour() -> None:
    picture = draw_cameras(frame(), {"ground_truth": Boxes.empty(), "teacher": Boxes.empty()}, CLASSES)
    assert where(picture, GREEN)[:, 1].max() < where(picture, BLUE)[:, 1].min()
    assert len(where(draw_cameras(frame(), {}, CLASSES), PAPER)) > 0


def test_a_frame_without_cameras_says_how_to_load_them() -> None:
    with pytest.raises(DataError, match=r"frame 'abc' was loaded without cameras.*sensors=\{'camera'\}"):
        draw_cameras(frame(images=None), {}, CLASSES)


def masked(score: float = 0.9) -> Instances:
    """Return one instance of the second class in the second camera: the upper half of a box of 40 x 20 pixels."""
    mask = torch.zeros(20, 40, dtype=torch.bool)
    mask[:10] = True
    box = torch.tensor([[20.0, 30.0, 60.0, 50.0]])
    return Instances(torch.tensor([1]), box, torch.tensor([1]), torch.tensor([score]), (mask,))


def test_a_mask_is_filled_in_its_camera_where_it_is() -> None:
    two = frame(("CAM_FRONT_LEFT", "CAM_FRONT"))
    plain = np.asarray(draw_cameras(two, {}, CLASSES, **BARE)).astype(int)
    drawn = np.asarray(draw_cameras(two, {}, CLASSES, instances=masked(), **BARE)).astype(int)
    rows, columns = np.nonzero(np.abs(drawn - plain).sum(axis=2) > 60)
    own = columns - plain.shape[1] // 2
    filled = (rows >= 31) & (rows < 39)
    assert abs(own.min() - 20) <= 4
    assert abs(own.max() - 60) <= 4
    assert set(range(32, 38)) <= set(rows[filled].tolist())
    inside = (rows > 42) & (rows < 48) & (own > 24) & (own < 54)
    assert not inside.any()


def test_masks_below_the_score_are_left_out() -> None:
    two = frame(("CAM_FRONT_LEFT", "CAM_FRONT"))
    weak = draw_cameras(two, {}, CLASSES, instances=masked(0.2), min_score=0.3, **BARE)
    assert weak.tobytes() == draw_cameras(two, {}, CLASSES, **BARE).tobytes()
