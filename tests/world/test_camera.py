"""What the cameras see agrees with the boxes, and walls hide what is behind them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from nuimages.utils.utils import mask_decode
from nuscenes import NuScenes
from nuscenes.utils.geometry_utils import BoxVisibility, view_points
from PIL import Image

from bevkd.world import WorldConfig
from bevkd.world.camera import View, look
from bevkd.world.parts import Part, stack
from bevkd.world.street import Terrain
from bevkd.world.tables import MASK_TABLE

GREY = (90.0, 90.0, 90.0)
FLAT = Terrain(np.zeros((0, 4)))


def _masks(nusc: NuScenes) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = json.loads((Path(nusc.table_root) / f"{MASK_TABLE}.json").read_text())
    return rows


def _view() -> View:
    return View(np.array([0.0, 0.0, 1.5]), 0.0, 100.0, 100.0, 50.0, 100, 200)


def test_masks_are_read_by_nuimages_and_fit_their_box(nusc: NuScenes, config: WorldConfig) -> None:
    rows = _masks(nusc)
    assert len(rows) > 40
    for row in rows:
        mask = mask_decode(row["mask"])
        assert mask.shape == (config.image_height, config.image_width)
        v, u = np.nonzero(mask)
        assert row["bbox"] == [u.min(), v.min(), u.max() + 1, v.max() + 1]
        data = nusc.get("sample_data", row["sample_data_token"])
        assert data["is_key_frame"]
        assert nusc.get("instance", row["instance_token"])["category_token"] == row["category_token"]


def test_masks_of_one_image_do_not_overlap(nusc: NuScenes) -> None:
    total: dict[str, np.ndarray] = {}
    for row in _masks(nusc):
        token = str(row["sample_data_token"])
        total[token] = total.get(token, 0) + mask_decode(row["mask"]).astype(int)
    assert max(int(count.max()) for count in total.values()) == 1


def _projection_overlaps(nusc: NuScenes) -> list[float]:
    """Return, for each standing, unhidden object inside an image, the IoU of its mask's box with its projected box."""
    overlaps = []
    annotation_of = {(a["sample_token"], a["instance_token"]): a for a in nusc.sample_annotation}
    for row in _masks(nusc):
        data = nusc.get("sample_data", row["sample_data_token"])
        annotation = annotation_of[data["sample_token"], row["instance_token"]]
        if np.linalg.norm(nusc.box_velocity(annotation["token"])) > 1e-3 or annotation["visibility_token"] != "4":
            continue
        _, boxes, k = nusc.get_sample_data(data["token"], BoxVisibility.ALL, [annotation["token"]])
        x0, y0, x1, y1 = row["bbox"]  # type: ignore[misc]
        if not boxes or (x1 - x0) * (y1 - y0) < 60:
            continue
        corners = view_points(boxes[0].corners(), k, normalize=True)[:2]
        (u0, v0), (u1, v1) = corners.min(axis=1), corners.max(axis=1)
        # One pixel of slack for the margin of the annotated box and rasterisation.
        assert x0 > u0 - 1.5
        assert y0 > v0 - 1.5
        assert x1 < u1 + 1.5
        assert y1 < v1 + 1.5
        shared = (min(x1, u1) - max(x0, u0)) * (min(y1, v1) - max(y0, v0))
        overlaps.append(shared / ((x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - shared))
    return overlaps


def test_a_projected_box_covers_the_mask_of_its_object(nusc: NuScenes) -> None:
    overlaps = _projection_overlaps(nusc)
    assert len(overlaps) >= 5
    assert np.median(overlaps) > 0.7


def test_a_projected_box_covers_the_mask_when_the_camera_tilts(hills: NuScenes) -> None:
    overlaps = _projection_overlaps(hills)
    assert len(overlaps) >= 5
    assert np.median(overlaps) > 0.65


def test_images_have_the_asked_size_and_differ_in_exposure(nusc: NuScenes, config: WorldConfig) -> None:
    means = []
    for row in nusc.sample_data:
        if row["sensor_modality"] == "camera":
            image = np.asarray(Image.open(nusc.get_sample_data_path(row["token"])))
            assert image.shape == (config.image_height, config.image_width, 3)
            assert (row["height"], row["width"]) == image.shape[:2]
            means.append(image.mean())
    assert np.std(means) > 5
    assert 30 < np.mean(means) < 220


def test_a_box_covers_the_pixels_of_its_projection() -> None:
    parts = stack([(0, [Part(10, 0, 0, 3, 1, 1, GREY, 20)])])
    sight = look(parts, FLAT, _view(), 1)
    rows, columns = np.nonzero(sight.segment >= 0)
    # The front stands at 9 m: +-1 m is +-11.1 px, 1.5 m up and down is 16.7 px.
    assert (columns.min(), columns.max()) == (89, 110)
    assert (rows.min(), rows.max()) == (33, 66)
    assert sight.depth[50, 100] == pytest.approx(9.0)
    assert sight.covered[0] == len(rows)


def test_a_wall_hides_what_is_behind_it() -> None:
    car = Part(20, 0, 0, 1.5, 2, 1, GREY, 20)
    wall = Part(10, 0, 0, 5, 0.2, 8, GREY, 20)
    alone = look(stack([(0, [car])]), FLAT, _view(), 1)
    hidden = look(stack([(0, [car]), (-1, [wall])]), FLAT, _view(), 1)
    owner = np.append(hidden.columns.part[hidden.pair], -1)[hidden.segment]
    assert not (owner == 0).any()
    # The hidden car still counts towards its full size, so its visibility is zero.
    assert hidden.covered[0] == alone.covered[0] > 0


def test_the_top_of_a_low_box_is_seen_at_its_own_depth() -> None:
    slab = Part(10, 0, 0, 0.5, 5, 5, GREY, 20)
    sight = look(stack([(0, [slab])]), FLAT, _view(), 1)
    # Row 62 falls by 0.125 per metre: 1 m above the slab it meets its top at 8 m, the ground would be at 12 m.
    assert sight.depth[62, 100] == pytest.approx(8.0)


def test_a_hill_hides_what_is_behind_it() -> None:
    # One crest 3 m high at x = 20, valleys at 0 and 40.
    hill = Terrain(np.array([[1.5, 2 * np.pi / 40, 0.0, -np.pi / 2]]))
    eye = View(np.array([0.0, 0.0, 0.0]), 0.0, 100.0, 100.0, 50.0, 100, 200)
    foot = -1.5
    behind = Part(40, 0, foot, foot + 1.5, 2, 1, GREY, 20)
    before = Part(8, 0, foot, foot + 1.5, 1, 1, GREY, 20)
    assert not (look(stack([(0, [behind])]), hill, eye, 1).segment >= 0).any()
    assert (look(stack([(0, [before])]), hill, eye, 1).segment >= 0).any()
