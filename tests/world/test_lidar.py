"""LiDAR points are where the boxes and the ground are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from nuscenes import NuScenes
from nuscenes.utils.data_classes import LidarPointCloud
from nuscenes.utils.geometry_utils import points_in_box

from bevkd.world import WorldConfig
from bevkd.world.geometry import planar_pose
from bevkd.world.parts import Part, join, place, stack
from bevkd.world.raycast import cast


def _check_counts(nusc: NuScenes) -> int:
    total = 0
    for sample in nusc.sample:
        path, boxes, _ = nusc.get_sample_data(sample["data"]["LIDAR_TOP"])
        points = LidarPointCloud.from_file(path).points[:3]
        assert len(boxes) == len(sample["anns"])
        for box in boxes:
            expected = nusc.get("sample_annotation", box.token)["num_lidar_pts"]
            assert int(points_in_box(box, points).sum()) == expected
            total += expected
    return total


def test_num_lidar_pts_is_what_the_devkit_counts(nusc: NuScenes) -> None:
    assert _check_counts(nusc) > 300


def test_num_lidar_pts_is_what_the_devkit_counts_when_the_vehicle_tilts(hills: NuScenes) -> None:
    assert _check_counts(hills) > 200


def test_the_file_holds_five_floats_per_point_in_the_sensor_frame(nusc: NuScenes, config: WorldConfig) -> None:
    path = Path(nusc.get_sample_data_path(nusc.sample[0]["data"]["LIDAR_TOP"]))
    points = np.fromfile(path, dtype=np.float32).reshape(-1, 5)
    assert np.isfinite(points).all()
    assert set(np.unique(points[:, 4])) <= set(range(config.lidar_beams))
    assert points[:, 3].min() >= 0
    assert points[:, 3].max() <= 255
    assert len(np.unique(points[:, 3])) > 20
    # Ring by ring, the elevation rises.
    elevation = np.degrees(np.arctan2(points[:, 2], np.hypot(points[:, 0], points[:, 1])))
    means = [elevation[points[:, 4] == ring].mean() for ring in np.unique(points[:, 4])]
    assert (np.diff(means) > 0.5).all()
    assert elevation.min() > -31.5


def test_flat_ground_lies_a_sensor_height_below_with_two_centimetres_of_noise(nusc: NuScenes) -> None:
    path = Path(nusc.get_sample_data_path(nusc.sample[0]["data"]["LIDAR_TOP"]))
    points = np.fromfile(path, dtype=np.float32).reshape(-1, 5)
    low = points[points[:, 4] == 0]
    assert abs(np.median(low[:, 2]) + 1.84) < 0.01
    spread = np.median(np.abs(low[:, 2] + 1.84)) * 1.48
    assert 0.005 < spread < 0.02


def test_the_vehicle_looks_along_y_of_the_sensor(nusc: NuScenes) -> None:
    data = nusc.get("sample_data", nusc.sample[0]["data"]["LIDAR_TOP"])
    calibration = nusc.get("calibrated_sensor", data["calibrated_sensor_token"])
    half = np.sqrt(0.5)
    np.testing.assert_allclose(calibration["rotation"], [half, 0, 0, -half], atol=1e-12)
    assert calibration["translation"] == pytest.approx([0.94, 0, 1.84])


def _ray(parts: list[Part]) -> tuple[float, int]:
    table = stack([(i, [part]) for i, part in enumerate(parts)])
    zero = np.zeros(len(parts))
    table = join(place(table, zero, zero, zero, zero), table.select(np.zeros(0, dtype=np.int64)))
    rng = np.random.default_rng(0)
    hits = cast(table, planar_pose(0, 0, 1.0, 0), np.array([0.0]), np.array([0.0]), 70.0, rng)
    return float(hits.range_m[0, 0]), int(hits.part[0, 0])


def test_a_ray_stops_at_the_nearest_part() -> None:
    grey = (90.0, 90.0, 90.0)
    near = Part(10, 0, 0, 2, 1, 1, grey, 20)
    far = Part(20, 0, 0, 2, 1, 1, grey, 20)
    assert _ray([far, near]) == (pytest.approx(9.0), 1)
    assert _ray([near, far]) == (pytest.approx(9.0), 0)


def test_a_ray_passes_above_a_low_part_and_meets_a_round_one_at_its_radius() -> None:
    grey = (90.0, 90.0, 90.0)
    low = Part(10, 0, 0, 0.9, 1, 1, grey, 20)
    column = Part(20, 0, 0, 2, 0.5, 0.5, grey, 20, round=True)
    assert _ray([low, column]) == (pytest.approx(19.5), 1)
    beside = Part(20, 0.6, 0, 2, 0.5, 0.5, grey, 20, round=True)
    assert _ray([beside]) == (np.inf, -1)


def test_a_turned_box_is_met_at_its_turned_face() -> None:
    box = Part(10, 0, 0, 2, 4, 0.5, (90.0, 90.0, 90.0), 20, yaw=np.pi / 2)
    assert _ray([box])[0] == pytest.approx(9.5)
