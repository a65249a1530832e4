"""The written world is a genuine nuScenes data set."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from nuscenes import NuScenes
from nuscenes.eval.detection.utils import category_to_detection_name, detection_name_to_rel_attributes
from nuscenes.utils.splits import get_scenes_of_split
from pyquaternion import Quaternion

from bevkd.world import TRAIN_SPLIT, VAL_SPLIT, VERSION_FOLDER, WorldConfig, world_preset, write_world
from bevkd.world.objects import CLASSES
from bevkd.world.rig import CAMERAS, RIG
from bevkd.world.scene import draw_scene
from bevkd.world.tables import TABLE_NAMES, visibility_token


def test_devkit_opens_all_thirteen_tables_without_duplicate_tokens(nusc: NuScenes) -> None:
    assert sorted(nusc.table_names) == sorted(TABLE_NAMES)
    assert len(TABLE_NAMES) == 13
    for name in TABLE_NAMES:
        rows = getattr(nusc, name)
        assert rows, name
        assert len({row["token"] for row in rows}) == len(rows)


def test_every_key_frame_has_a_file_of_each_of_the_twelve_sensors(nusc: NuScenes, world: Path) -> None:
    for sample in nusc.sample:
        assert sorted(sample["data"]) == sorted(mount.channel for mount in RIG)
    for row in nusc.sample_data:
        assert (world / row["filename"]).stat().st_size > 0
        assert row["filename"].startswith("samples/" if row["is_key_frame"] else "sweeps/")
    on_disk = {str(p.relative_to(world)) for p in world.glob("s*/*/*") if p.is_file()}
    assert on_disk == {row["filename"] for row in nusc.sample_data}


@pytest.mark.parametrize("table", ["sample", "sample_data", "sample_annotation"])
def test_prev_and_next_are_mutual_and_run_forward_in_time(nusc: NuScenes, table: str) -> None:
    rows = getattr(nusc, table)
    assert any(row["next"] for row in rows)
    for row in rows:
        if row["next"]:
            after = nusc.get(table, row["next"])
            assert after["prev"] == row["token"]
            if table != "sample_annotation":
                assert after["timestamp"] > row["timestamp"]
            else:
                assert after["instance_token"] == row["instance_token"]


def test_a_sweep_precedes_each_key_frame(nusc: NuScenes, config: WorldConfig) -> None:
    assert config.sweeps_per_keyframe == 1
    for sample in nusc.sample:
        key = nusc.get("sample_data", sample["data"]["LIDAR_TOP"])
        sweep = nusc.get("sample_data", key["prev"])
        assert not sweep["is_key_frame"]
        assert sweep["sample_token"] == sample["token"]
        assert key["timestamp"] - sweep["timestamp"] == pytest.approx(250_000)
        assert key["timestamp"] == sample["timestamp"]


def test_cameras_fire_with_their_own_ego_pose(nusc: NuScenes) -> None:
    moved = []
    for sample in nusc.sample:
        lidar = nusc.get("ego_pose", nusc.get("sample_data", sample["data"]["LIDAR_TOP"])["ego_pose_token"])
        for camera in CAMERAS:
            data = nusc.get("sample_data", sample["data"][camera.channel])
            pose = nusc.get("ego_pose", data["ego_pose_token"])
            assert pose["timestamp"] == data["timestamp"] == sample["timestamp"] + round(camera.offset_s * 1e6)
            moved.append(np.linalg.norm(np.subtract(pose["translation"], lidar["translation"])))
    assert max(moved) > 0.1


def test_instances_point_at_their_first_and_last_annotation(nusc: NuScenes) -> None:
    for instance in nusc.instance:
        rows = [a for a in nusc.sample_annotation if a["instance_token"] == instance["token"]]
        assert len(rows) == instance["nbr_annotations"]
        assert nusc.get("sample_annotation", instance["first_annotation_token"])["prev"] == ""
        assert nusc.get("sample_annotation", instance["last_annotation_token"])["next"] == ""


def test_attributes_fit_the_class(nusc: NuScenes) -> None:
    names = {row["token"]: row["name"] for row in nusc.attribute}
    for annotation in nusc.sample_annotation:
        detection = category_to_detection_name(annotation["category_name"])
        allowed = detection_name_to_rel_attributes(detection)
        found = [names[token] for token in annotation["attribute_tokens"]]
        assert len(found) == (1 if allowed else 0)
        assert set(found) <= set(allowed)


def test_every_class_of_the_world_is_one_of_the_ten_detection_classes() -> None:
    assert len(CLASSES) == 10
    for name, cls in CLASSES.items():
        assert category_to_detection_name(cls.category) == name
        assert set(cls.attributes) == set(detection_name_to_rel_attributes(name))


def test_velocity_from_the_tables_is_the_motion_that_was_simulated(nusc: NuScenes, config: WorldConfig) -> None:
    speeds = []
    for index, scene_row in enumerate(nusc.scene):
        scene = draw_scene(config, index)
        sample = nusc.get("sample", scene_row["first_sample_token"])
        annotations = [nusc.get("sample_annotation", token) for token in sample["anns"]]
        assert len(annotations) == len(scene.actors)
        for actor, row in zip(scene.actors, annotations, strict=True):
            heading = actor.motion.yaw + scene.heading
            expected = actor.motion.speed * np.array([np.cos(heading), np.sin(heading), 0])
            np.testing.assert_allclose(nusc.box_velocity(row["token"]), expected, atol=1e-4)
            yaw = Quaternion(row["rotation"]).yaw_pitch_roll[0]
            np.testing.assert_allclose([np.cos(yaw), np.sin(yaw)], [np.cos(heading), np.sin(heading)], atol=1e-9)
            moving = nusc.get("attribute", row["attribute_tokens"][0])["name"] if row["attribute_tokens"] else ""
            if moving.endswith((".parked", ".stopped", ".standing", ".without_rider")):
                assert actor.motion.speed == 0
            speeds.append(actor.motion.speed)
    assert max(speeds) > 2


def test_visibility_is_the_level_that_the_unhidden_share_reaches() -> None:
    assert [visibility_token(share) for share in (0, 0.39, 0.4, 0.59, 0.6, 0.79, 0.8, 1)] == list("11223344")


def test_the_splits_are_disjoint_and_cover_all_scenes(nusc: NuScenes, config: WorldConfig) -> None:
    train, val = get_scenes_of_split(TRAIN_SPLIT, nusc), get_scenes_of_split(VAL_SPLIT, nusc)
    assert (len(train), len(val)) == (config.scenes_train, config.scenes_val)
    assert not set(train) & set(val)
    assert set(train) | set(val) == {row["name"] for row in nusc.scene}


def test_the_ego_vehicle_drives_on_the_drivable_area_of_the_map(nusc: NuScenes) -> None:
    for scene in nusc.scene:
        mask = nusc.get("map", nusc.get("log", scene["log_token"])["map_token"])["mask"]
        sample = nusc.get("sample", scene["first_sample_token"])
        data = nusc.get("sample_data", sample["data"]["LIDAR_TOP"])
        x, y, _ = nusc.get("ego_pose", data["ego_pose_token"])["translation"]
        assert mask.is_on_mask(x, y).all()
        share = (mask.mask() > 0).mean()
        assert 0.02 < share < 0.5


def test_the_config_is_recorded(world: Path, config: WorldConfig) -> None:
    record = json.loads((world / "world.json").read_text())
    assert WorldConfig.model_validate(record["config"]) == config


def test_all_ten_classes_and_camera_sweeps_can_be_written(tmp_path: Path) -> None:
    config = world_preset("tiny", scenes=2, classes=dict.fromkeys(CLASSES, 3.0), camera_sweeps=True, lidar_azimuths=90)
    nusc = NuScenes(VERSION_FOLDER, str(write_world(config, tmp_path / "w", workers=1)), verbose=False)
    found = {category_to_detection_name(row["category_name"]) for row in nusc.sample_annotation}
    assert found == set(CLASSES)
    for sample in nusc.sample:
        for mount in RIG:
            key = nusc.get("sample_data", sample["data"][mount.channel])
            assert not nusc.get("sample_data", key["prev"])["is_key_frame"]


def test_a_world_without_objects_is_valid(tmp_path: Path) -> None:
    config = world_preset("tiny", scenes=2, classes={"bus": 0.0}, clutter=0.0, lidar_azimuths=90, sweeps_per_keyframe=0)
    nusc = NuScenes(VERSION_FOLDER, str(write_world(config, tmp_path / "w", workers=1)), verbose=False)
    assert nusc.sample_annotation == []
    assert len(nusc.sample_data) == 2 * 2 * len(RIG)


def test_a_long_drive_meets_objects_all_along_its_way() -> None:
    config = world_preset("tiny", keyframes_per_scene=40)
    for index in range(12):
        scene = draw_scene(config, index)
        end = scene.ego_pose_at(config.duration_s).translation[:2]
        last = scene.actors_at(config.duration_s).centre[:, :2]
        assert (np.linalg.norm(last - end, axis=1) < 40).sum() >= 2
