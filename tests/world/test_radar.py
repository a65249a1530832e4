"""Radar files are read by the devkit, and their Doppler is consistent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from nuscenes import NuScenes
from nuscenes.utils.data_classes import RadarPointCloud
from nuscenes.utils.geometry_utils import points_in_box
from pyquaternion import Quaternion

from bevkd.world import WorldConfig
from bevkd.world.radar import DETECTION, pcd_bytes
from bevkd.world.rig import RADARS
from bevkd.world.scene import draw_scene


def test_the_devkit_reads_every_radar_file_with_its_default_filters(nusc: NuScenes) -> None:
    counts = []
    for row in nusc.sample_data:
        if row["sensor_modality"] == "radar":
            cloud = RadarPointCloud.from_file(nusc.get_sample_data_path(row["token"]))
            assert cloud.points.shape[0] == RadarPointCloud.nbr_dims()
            assert (np.hypot(*cloud.points[:2]) < 71).all()
            assert (cloud.points[0] > 0).all()
            counts.append(cloud.points.shape[1])
    assert np.mean(counts) > 4


def test_num_radar_pts_is_what_the_devkit_counts_for_standing_objects(nusc: NuScenes) -> None:
    total = 0
    for sample in nusc.sample:
        clouds = {
            mount.channel: RadarPointCloud.from_file(nusc.get_sample_data_path(sample["data"][mount.channel])).points[
                :3
            ]
            for mount in RADARS
        }
        for token in sample["anns"]:
            annotation = nusc.get("sample_annotation", token)
            if np.linalg.norm(nusc.box_velocity(token)) > 1e-3:
                continue
            count = 0
            for channel, points in clouds.items():
                _, (box,), _ = nusc.get_sample_data(sample["data"][channel], selected_anntokens=[token])
                count += int(points_in_box(box, points).sum())
            assert count == annotation["num_radar_pts"]
            total += count
    assert total > 5


def test_doppler_without_ego_motion_is_zero_for_what_stands_still(nusc: NuScenes, config: WorldConfig) -> None:
    for index, scene_row in enumerate(nusc.scene):
        scene = draw_scene(config, index)
        sample = nusc.get("sample", scene_row["first_sample_token"])
        for mount in RADARS:
            cloud = RadarPointCloud.from_file(nusc.get_sample_data_path(sample["data"][mount.channel])).points
            line = cloud[:2] / np.hypot(*cloud[:2])
            raw, compensated = (cloud[6:8] * line).sum(axis=0), (cloud[8:10] * line).sum(axis=0)
            # Doppler has no part across the line of sight.
            np.testing.assert_allclose(cloud[6:8], raw * line, atol=1e-5)
            np.testing.assert_allclose(cloud[8:10], compensated * line, atol=1e-5)
            velocity, turn = scene.ego_velocity_at(mount.offset_s)
            pose = scene.ego_pose_at(mount.offset_s)
            forward = pose.rotation[:2, :2].T @ velocity
            arm = np.array(mount.translation[:2])
            own = forward + turn * np.array([-arm[1], arm[0]])
            own_radar = mount.ego_from_sensor.rotation[:2, :2].T @ own
            np.testing.assert_allclose(compensated - raw, own_radar @ line, atol=1e-4)
            still = cloud[3] == 1
            assert (np.abs(compensated[still]) < 0.45).all()


def test_moving_objects_show_their_radial_speed(nusc: NuScenes) -> None:
    compared = 0
    for sample in nusc.sample:
        for mount in RADARS:
            token = sample["data"][mount.channel]
            points = RadarPointCloud.from_file(nusc.get_sample_data_path(token)).points
            line = points[:2] / np.hypot(*points[:2])
            _, boxes, _ = nusc.get_sample_data(token)
            data = nusc.get("sample_data", token)
            pose, calibration = (
                nusc.get("ego_pose", data["ego_pose_token"]),
                nusc.get("calibrated_sensor", data["calibrated_sensor_token"]),
            )
            turn = (Quaternion(pose["rotation"]) * Quaternion(calibration["rotation"])).inverse
            for box in boxes:
                velocity = turn.rotate(nusc.box_velocity(box.token))[:2]
                if np.linalg.norm(velocity) < 1:
                    continue
                inside = points_in_box(box, points[:3], wlh_factor=0.9)
                radial = (points[8:10] * line).sum(axis=0)[inside]
                np.testing.assert_allclose(radial, velocity @ line[:, inside], atol=0.5)
                compared += int(inside.sum())
    assert compared > 3


def test_a_file_without_detections_reads_as_empty(tmp_path: Path) -> None:
    path = tmp_path / "empty.pcd"
    path.write_bytes(pcd_bytes(np.zeros(0, dtype=DETECTION)))
    assert RadarPointCloud.from_file(str(path)).points.shape == (18, 0)
