"""LiDAR depth and the key frame before, on their way from the tables into a batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bevkd.data.augment import AugmentConfig
from bevkd.data.collate import collate
from bevkd.data.join import FrameDataset, TrainingDataset, View
from bevkd.data.sampler import FrameOrder
from bevkd.data.sources.nuscenes import Config, NuScenesSource, build
from bevkd.geometry.boxes import points_in_boxes
from bevkd.world import VAL_SPLIT, VERSION_FOLDER, world_preset, write_world

DEPTH_VIEW = View(frozenset({"camera", "lidar", "lidar_depth"}), 64, 96)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> NuScenesSource:
    folder = tmp_path_factory.mktemp("world")
    write_world(world_preset("tiny"), folder)
    return build(Config(root=folder, version=VERSION_FOLDER, split=VAL_SPLIT, index_dir=folder / "index", sweeps=1))


def test_every_depth_is_the_distance_of_a_return_along_its_pixel(source: NuScenesSource) -> None:
    frame = source.load(source.tokens[0], frozenset({"camera", "lidar", "lidar_depth"}))
    assert frame.lidar_depth is not None
    assert frame.rig is not None
    assert frame.points is not None
    depth = frame.lidar_depth
    assert len(depth) > 100
    pixels = torch.cat([depth.pixels, torch.ones(len(depth), 1)], dim=1) * depth.depth_m[:, None]
    lens, pose = frame.rig.intrinsics[depth.cameras], frame.rig.lidar_from_camera[depth.cameras]
    seen = torch.linalg.solve(lens, pixels)
    restored = torch.einsum("dij,dj->di", pose[:, :3, :3], seen) + pose[:, :3, 3]
    distance = torch.cdist(restored, frame.points[:, :3], compute_mode="donot_use_mm_for_euclid_dist")
    assert distance.min(dim=1).values.max() < 1e-2


def test_depths_are_in_pixels_of_the_original_until_training_takes_them_into_its_view(source: NuScenesSource) -> None:
    token = source.tokens[0]
    original = source.image_sizes(token)
    as_is = FrameDataset(source, source.tokens, DEPTH_VIEW)[0].frame.lidar_depth
    augment = AugmentConfig.model_validate({"image": {"flip": True, "zoom": [1.0, 1.3], "shift": True}})
    order = FrameOrder(source.tokens, [], None, 0, None)
    sample = TrainingDataset(source, DEPTH_VIEW, order, augment, {}, seed=1)[0]
    assert as_is is not None
    assert sample.frame.lidar_depth is not None
    assert as_is.pixels[:, 0].max() > 96 or next(iter(original.values()))[1] <= 96
    assert (sample.frame.lidar_depth.pixels < torch.tensor([96.0, 64.0])).all()
    batch = collate([sample, sample])
    assert batch.lidar_depth is not None
    assert [len(each) for each in batch.lidar_depth] == [len(sample.frame.lidar_depth)] * 2


def test_near_things_are_near_in_the_image_of_depth(source: NuScenesSource) -> None:
    frame = source.load(source.tokens[0], frozenset({"camera", "lidar", "lidar_depth"}))
    assert frame.boxes is not None
    assert frame.points is not None
    assert frame.lidar_depth is not None
    inside = points_in_boxes(frame.points, frame.boxes.values)
    for box, returns in zip(frame.boxes.values, inside, strict=True):
        if returns.sum() > 20:
            distance = box[:2].norm()
            assert ((frame.lidar_depth.depth_m - distance).abs() < 4).any()


def test_the_camera_before_is_the_frame_before_seen_from_where_the_car_is_now(source: NuScenesSource) -> None:
    first, second = source.tokens[:2]
    assert source.scene(first) == source.scene(second)
    sensors = frozenset({"camera", "previous_camera"})
    both, before = source.load(second, sensors), source.load(first, frozenset({"camera"}))
    assert both.images is not None
    assert before.images is not None
    assert both.rig is not None
    assert before.rig is not None
    cameras = len(before.images)
    assert torch.equal(both.images[cameras:], before.images)
    assert both.rig.names[cameras:] == tuple(f"{name}@-1" for name in before.rig.names)
    moved = torch.linalg.solve(source.global_from_lidar(second), source.global_from_lidar(first))
    expected = moved @ before.rig.lidar_from_camera.double()
    torch.testing.assert_close(both.rig.lidar_from_camera[cameras:].double(), expected, atol=1e-4, rtol=1e-4)


def test_the_first_frame_of_a_scene_stands_in_for_the_one_before(source: NuScenesSource) -> None:
    frame = source.load(source.tokens[0], frozenset({"camera", "previous_camera"}))
    assert frame.images is not None
    now, before = frame.images.chunk(2)
    assert torch.equal(now, before)


def test_missing_files_of_the_camera_before_are_reported(source: NuScenesSource) -> None:
    both = source.check(source.tokens[1:2], frozenset({"camera", "previous_camera"}))
    assert both == []
    files, _ = source._files(source.tokens[1], frozenset({"previous_camera"}))
    assert files == source._files(source.tokens[0], frozenset({"camera"}))[0]
    assert (
        source._files(source.tokens[1], frozenset({"lidar_depth"}))[0]
        == source._files(source.tokens[1], frozenset({"lidar"}))[0]
    )


def test_on_a_real_frame_depth_lands_where_the_boxes_of_the_cameras_are(real_data: Path, tmp_path: Path) -> None:
    root = real_data / "nuscenes_mini_real"
    config = Config(root=root, version="v1.0-mini", split="mini_train", scenes=("scene-0061",), index_dir=tmp_path)
    real = build(config)
    frame = real.load(real.tokens[0], frozenset({"lidar_depth"}))
    assert frame.lidar_depth is not None
    assert len(frame.lidar_depth) > 15_000
    assert sorted(set(frame.lidar_depth.cameras.tolist())) == list(range(6))
    assert 1 < frame.lidar_depth.depth_m.min() < frame.lidar_depth.depth_m.max() < 110
