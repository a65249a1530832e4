"""The embedded world is read like any other data set in nuScenes format, sweeps and radars included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bevkd.data.sources.nuscenes import CLASSES, Config, NuScenesSource, build
from bevkd.world import VAL_SPLIT, VERSION_FOLDER, world_preset, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(world_preset("tiny", sweeps_per_keyframe=3), folder)
    return folder


@pytest.fixture(scope="module")
def source(world: Path, tmp_path_factory: pytest.TempPathFactory) -> NuScenesSource:
    index_dir = tmp_path_factory.mktemp("index")
    return build(Config(root=world, version=VERSION_FOLDER, split=VAL_SPLIT, index_dir=index_dir, sweeps=3))


@pytest.fixture(scope="module")
def devkit(world: Path) -> Any:
    from nuscenes import NuScenes

    return NuScenes(VERSION_FOLDER, str(world), verbose=False)


def rotation(devkit: Any, sample_data: str) -> np.ndarray:
    """Return the rotation from a sensor to the global frame."""
    from pyquaternion import Quaternion

    record = devkit.get("sample_data", sample_data)
    turns = (devkit.get(table, record[f"{table}_token"])["rotation"] for table in ("ego_pose", "calibrated_sensor"))
    first, second = (Quaternion(turn).rotation_matrix for turn in turns)
    return np.asarray(first @ second)


def test_all_files_of_the_world_are_whole(source: NuScenesSource) -> None:
    assert source.check(source.tokens, frozenset({"lidar", "camera", "radar"})) == []


def test_three_sweeps_equal_the_devkits_cloud(source: NuScenesSource, devkit: Any) -> None:
    from nuscenes.utils.data_classes import LidarPointCloud

    token = source.tokens[-1]
    cloud, lags = LidarPointCloud.from_file_multisweep(
        devkit, devkit.get("sample", token), "LIDAR_TOP", "LIDAR_TOP", nsweeps=3
    )
    points = source.load(token, frozenset({"lidar"})).points
    assert points is not None
    assert len(set(points[:, 4].tolist())) == 3
    np.testing.assert_allclose(points[:, :4], cloud.points.T, atol=1e-4)
    np.testing.assert_allclose(points[:, 4], lags[0], atol=1e-6)


def test_five_radars_equal_the_devkits_clouds(source: NuScenesSource, devkit: Any) -> None:
    from nuscenes.utils.data_classes import RadarPointCloud

    token = source.tokens[-1]
    sample = devkit.get("sample", token)
    radar = source.load(token, frozenset({"radar"})).radar
    assert radar is not None
    found = {name: column for column, name in source.index.channels("radar")}
    assert len(found) == 5
    start = 0
    for name in found:
        cloud, lags = RadarPointCloud.from_file_multisweep(
            devkit, sample, name, "LIDAR_TOP", nsweeps=source.config.radar_sweeps
        )
        ours = radar[start : start + cloud.nbr_points()]
        start += len(ours)
        np.testing.assert_allclose(ours[:, :3], cloud.points[:3].T, atol=1e-4)
        np.testing.assert_allclose(ours[:, 5], cloud.points[5], atol=1e-6)
        np.testing.assert_allclose(ours[:, 6], lags[0], atol=1e-6)
        velocity = np.concatenate([cloud.points[8:10], np.zeros((1, len(ours)))])
        turned = rotation(devkit, sample["data"]["LIDAR_TOP"]).T @ rotation(devkit, sample["data"][name]) @ velocity
        newest = np.isclose(ours[:, 6], ours[:, 6].min())
        np.testing.assert_allclose(ours[newest, 3:5], turned[:2].T[newest], atol=1e-5)
        np.testing.assert_allclose(ours[:, 3:5].norm(dim=1), np.hypot(*cloud.points[8:10]), atol=1e-2)
    assert start == len(radar) > 0


def test_images_have_the_worlds_size(source: NuScenesSource) -> None:
    config = world_preset("tiny")
    size = (config.image_height, config.image_width)
    frame = source.load(source.tokens[0], frozenset({"camera"}))
    assert frame.images is not None
    assert frame.images.shape[-2:] == size
    assert set(source.image_sizes(source.tokens[0]).values()) == {size}


def test_every_labelled_box_contains_lidar_or_radar_returns(source: NuScenesSource) -> None:
    for token in source.tokens:
        boxes = source.load(token, frozenset()).boxes
        assert boxes is not None
        truth = source.global_annotations(token)
        labels = [CLASSES.index(name) for name, n in zip(truth.names, truth.points, strict=True) if name and n]
        assert boxes.labels.tolist() == labels
