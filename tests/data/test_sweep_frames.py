"""LiDAR sweeps between key frames as frames: what they hold, which are taken, and that key frames stay the same."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bevkd import testing
from bevkd.data.source import Sensor
from bevkd.data.sources.nuscenes import Config, NuScenesSource, build
from bevkd.errors import ContractError, DataError
from bevkd.evaluation.score import evaluate
from bevkd.types import Boxes
from bevkd.world import TRAIN_SPLIT, VERSION_FOLDER, WorldConfig, world_preset, write_world

ALL: frozenset[Sensor] = frozenset({"lidar", "camera", "previous_camera", "radar", "lidar_depth"})
Open = Callable[..., NuScenesSource]


@pytest.fixture(scope="module")
def config() -> WorldConfig:
    """Return a world of two scenes for training, each of two key frames with two sweeps of all sensors before each."""
    return world_preset("tiny", camera_sweeps=True, sweeps_per_keyframe=2)


@pytest.fixture(scope="module")
def root(config: WorldConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(config, tmp_path_factory.mktemp("world") / "sweeps")


@pytest.fixture(scope="module")
def open_source(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Open:
    index_dir = tmp_path_factory.mktemp("index")

    def open_it(sensors: frozenset[Sensor] = frozenset(), **options: Any) -> NuScenesSource:
        values = {"root": root, "version": VERSION_FOLDER, "split": TRAIN_SPLIT, "index_dir": index_dir}
        return build(Config(**{**values, **options}), sensors)

    return open_it


@pytest.fixture(scope="module")
def source(open_source: Open) -> NuScenesSource:
    """Return the frames with every sweep."""
    return open_source(ALL, sweep_frames=1)


@pytest.fixture(scope="module")
def devkit(root: Path) -> Any:
    from nuscenes import NuScenes

    return NuScenes(VERSION_FOLDER, str(root), verbose=False)


def sweeps_of(source: NuScenesSource) -> list[str]:
    return [token for token in source.tokens if token not in source.annotated]


def table(root: Path, name: str) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = json.loads((root / VERSION_FOLDER / f"{name}.json").read_bytes())
    return records


def nearest(devkit: Any, token: str, time_us: int | None = None) -> dict[str, dict[str, Any]]:
    """Return the record of each camera and radar nearest in time to a LiDAR sweep, by looking at all of them."""
    sweep = devkit.get("sample_data", token)
    scene = devkit.get("sample", sweep["sample_token"])["scene_token"]
    time_us = sweep["timestamp"] if time_us is None else time_us
    found: dict[str, dict[str, Any]] = {}
    for record in devkit.sample_data:
        if devkit.get("sample", record["sample_token"])["scene_token"] != scene:
            continue
        best = found.get(record["channel"])
        if best is None or abs(record["timestamp"] - time_us) < abs(best["timestamp"] - time_us):
            found[record["channel"]] = record
    del found["LIDAR_TOP"]
    return found


def global_from_sensor(devkit: Any, record: dict[str, Any]) -> np.ndarray:
    from nuscenes.utils.geometry_utils import transform_matrix
    from pyquaternion import Quaternion

    ego, mount = (devkit.get(name, record[f"{name}_token"]) for name in ("ego_pose", "calibrated_sensor"))
    first, second = (transform_matrix(each["translation"], Quaternion(each["rotation"])) for each in (ego, mount))
    return np.asarray(first @ second)


# ---------------------------------------------------------------------------------------------- what they hold


def test_the_points_of_a_sweep_frame_are_the_devkits_multisweep_cloud_of_that_sweep(
    open_source: Open, devkit: Any
) -> None:
    from nuscenes.utils.data_classes import LidarPointCloud

    source = open_source(sweep_frames=1, sweeps=3)
    token = sweeps_of(source)[-1]
    sample = {"data": {"LIDAR_TOP": token}, "scene_token": ""}
    cloud, lags = LidarPointCloud.from_file_multisweep(devkit, sample, "LIDAR_TOP", "LIDAR_TOP", nsweeps=3)
    points = source.load(token, frozenset({"lidar"})).points
    assert points is not None
    assert len(set(points[:, 4].tolist())) == 3
    np.testing.assert_allclose(points[:, :4], cloud.points.T, atol=1e-4)
    np.testing.assert_allclose(points[:, 4], lags[0], atol=1e-6)


def test_images_and_rig_are_of_the_camera_records_nearest_in_time(
    source: NuScenesSource, devkit: Any, root: Path
) -> None:
    for token in sweeps_of(source):
        frame, found = source.load(token, frozenset({"camera"})), nearest(devkit, token)
        lidar_from_global = np.linalg.inv(global_from_sensor(devkit, devkit.get("sample_data", token)))
        assert frame.images is not None
        assert frame.rig is not None
        for index, name in enumerate(frame.rig.names):
            assert abs(found[name]["timestamp"] - frame.timestamp_us) <= 50_000
            with Image.open(root / found[name]["filename"]) as image:
                assert np.array_equal(frame.images[index].permute(1, 2, 0), np.asarray(image))
            expected = lidar_from_global @ global_from_sensor(devkit, found[name])
            np.testing.assert_allclose(frame.rig.lidar_from_camera[index], expected, atol=1e-4)


def test_radar_returns_are_the_devkits_of_the_records_nearest_in_time(source: NuScenesSource, devkit: Any) -> None:
    from nuscenes.utils.data_classes import RadarPointCloud

    token = sweeps_of(source)[-1]
    tokens = {name: record["token"] for name, record in nearest(devkit, token).items()}
    clouds = [
        RadarPointCloud.from_file_multisweep(devkit, {"data": {**tokens, "LIDAR_TOP": token}}, name, "LIDAR_TOP", 6)[0]
        for _, name in source.index.channels("radar")
    ]
    radar = source.load(token, frozenset({"radar"})).radar
    assert radar is not None
    np.testing.assert_allclose(radar[:, :3], np.concatenate([cloud.points[:3].T for cloud in clouds]), atol=1e-4)


def test_returns_of_moving_objects_lie_on_their_pixels(
    source: NuScenesSource, config: WorldConfig, open_source: Open
) -> None:
    """Held against the world itself: where its objects were when the LiDAR fired, and when each camera did."""
    from bevkd.world.lidar import points_in_boxes
    from bevkd.world.render import static_shadows, take
    from bevkd.world.rig import CAMERAS, LIDAR, intrinsics
    from bevkd.world.scene import draw_scene

    assert source.scene(source.tokens[0]) == "scene-0000"
    scene = draw_scene(config, 0)
    shadow, size = static_shadows(scene), (config.image_height, config.image_width)
    own = [token for token in source.tokens if source.scene(token) == "scene-0000"]
    key = next(token for token in own if token in source.annotated)
    start = source.load(key, frozenset()).timestamp_us
    moving = [
        index
        for index, actor in enumerate(scene.actors)
        if actor.attribute in ("vehicle.moving", "pedestrian.moving", "cycle.with_rider")
    ]
    met: list[bool] = []
    for token in (token for token in own if token not in source.annotated):
        frame = open_source(sweeps=1, sweep_frames=1).load(token, frozenset({"lidar", "camera"}))
        assert frame.points is not None
        assert frame.rig is not None
        t = 1e-6 * (frame.timestamp_us - start)
        scene_from_lidar = scene.ego_pose_at(t) @ LIDAR.ego_from_sensor
        places = scene_from_lidar.apply(frame.points[:, :3].double().numpy())
        state = scene.actors_at(t)
        turns = np.array([[[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]] for a in state.yaw])
        inside = points_in_boxes(places, state.centre, np.array([actor.size for actor in scene.actors]), turns)
        for camera in CAMERAS:
            index = frame.rig.names.index(camera.channel)
            when = t + camera.offset_s
            pose = scene.ego_pose_at(when) @ camera.ego_from_sensor
            owner = take(scene, when, pose, intrinsics(config, camera), size, shadow, np.random.default_rng(0)).owner
            camera_from_lidar = np.linalg.inv(frame.rig.lidar_from_camera[index].double().numpy())
            for actor in moving:
                xyz = frame.points[:, :3].double().numpy()[inside[actor]] @ camera_from_lidar[:3, :3].T
                xyz = (xyz + camera_from_lidar[:3, 3]) @ frame.rig.intrinsics[index].double().numpy().T
                ahead = xyz[xyz[:, 2] > 0.5]
                u, v = (ahead[:, axis] / ahead[:, 2] for axis in (0, 1))
                shown = (u >= 0) & (u < size[1]) & (v >= 0) & (v < size[0])
                met += (owner[v[shown].astype(int), u[shown].astype(int)] == actor).tolist()
    assert len(met) > 50
    # At the rims of objects, and where the LiDAR on the roof looks over what hides an object from a camera, some miss.
    assert np.mean(met) > 0.8


def test_previous_images_of_a_sweep_frame_are_of_half_a_second_before(
    source: NuScenesSource, devkit: Any, root: Path
) -> None:
    sensors: frozenset[Sensor] = frozenset({"camera", "previous_camera"})
    last = sweeps_of(source)[-1]  # 1/6 s before the last key frame: there is a sweep half a second before it
    frame = source.load(last, sensors)
    found = nearest(devkit, last, devkit.get("sample_data", last)["timestamp"] - 500_000)
    assert frame.images is not None
    assert frame.rig is not None
    for index, name in enumerate(frame.rig.names[6:], start=6):
        with Image.open(root / found[name.removesuffix("@-1")]["filename"]) as image:
            assert np.array_equal(frame.images[index].permute(1, 2, 0), np.asarray(image))
    first = source.load(sweeps_of(source)[0], sensors)
    assert first.images is not None
    assert torch.equal(first.images[6:], first.images[:6])  # at the start of the scene the frame itself


def test_sweep_frames_have_no_annotations_and_are_never_scored(source: NuScenesSource) -> None:
    for token in sweeps_of(source):
        assert source.load(token, frozenset()).boxes is None
        assert len(source.annotations(token)) == 0
    found = {token: Boxes.empty() for token in source.tokens}
    assert evaluate(source, found).to_json()["frames"] == len(source.annotated) == 4
    with pytest.raises(ContractError, match=r"8 of 12 frames to score are no annotated frames"):
        evaluate(source, found, source.tokens)


class TestConformance(testing.FrameSourceTests):
    sensors = ALL

    @pytest.fixture(autouse=True)
    def opened(self, source: NuScenesSource) -> None:
        self.given = source

    def source(self) -> NuScenesSource:
        return self.given


# ---------------------------------------------------------------------------------------------- which ones are taken


def test_sweeps_stand_between_their_key_frames_by_scene_and_time(source: NuScenesSource, root: Path) -> None:
    records = {record["token"]: record for record in table(root, "sample_data")}
    assert all(
        not records[token]["is_key_frame"] and "LIDAR_TOP" in records[token]["filename"] for token in sweeps_of(source)
    )
    places = [(source.scene(token), source.load(token, frozenset()).timestamp_us) for token in source.tokens]
    assert places == sorted(places)
    assert len(places) == len(set(places)) == 12


@pytest.mark.parametrize(("every", "sweeps"), [(0, 0), (1, 8), (2, 4)])
def test_every_nth_sweep_after_a_key_frame_is_taken(open_source: Open, every: int, sweeps: int) -> None:
    source = open_source(sweep_frames=every)
    assert (len(source.annotated), len(sweeps_of(source))) == (4, sweeps)
    steps = [int(source.index["frame_step"][source.index.row(token)]) for token in sweeps_of(source)]
    assert set(steps) <= set(range(every or 1, 3, every or 1))
    assert source.notes == ((f"4 key frames and {sweeps} sweep frames of world_train",) if every else ())


def test_more_than_there_are_is_refused(open_source: Open) -> None:
    with pytest.raises(DataError, match="sweep_frames: 3 takes no sweep, at most 2 LiDAR sweeps follow a key frame"):
        open_source(sweep_frames=3)


def test_tokens_may_name_sweeps_if_sweeps_are_taken(open_source: Open, source: NuScenesSource) -> None:
    chosen = source.tokens[1:4]
    assert open_source(sweep_frames=1, tokens=chosen[::-1]).tokens == chosen
    with pytest.raises(DataError, match=f"'{sweeps_of(source)[1]}' is LiDAR sweep 2 after a key frame of scene-0000"):
        open_source(tokens=sweeps_of(source)[1:2])


@pytest.fixture
def edited(root: Path, tmp_path: Path) -> Callable[[str, Callable[[list[dict[str, Any]]], None]], Path]:
    """Return what changes a table of a copy of the world, and gives the copy's folder."""

    def change(name: str, how: Callable[[list[dict[str, Any]]], None]) -> Path:
        copy = tmp_path / "copy"
        if not copy.exists():
            shutil.copytree(root, copy, copy_function=os.link)
        records = table(copy, name)
        how(records)
        path = copy / VERSION_FOLDER / f"{name}.json"
        path.unlink()
        path.write_text(json.dumps(records))
        return copy

    return change


Edit = Callable[[str, Callable[[list[dict[str, Any]]], None]], Path]


@pytest.mark.parametrize(
    ("channel", "asked"), [("CAM_BACK", "camera"), ("CAM_BACK", "lidar_depth"), ("RADAR_FRONT", "radar")]
)
def test_a_sweep_without_a_reading_near_in_time_is_left_out_and_counted(
    open_source: Open, edited: Edit, channel: str, asked: Sensor
) -> None:
    def delay(records: list[dict[str, Any]]) -> None:
        late = next(each for each in records if channel in each["filename"] and not each["is_key_frame"])
        late["timestamp"] += 100_000

    copy = edited("sample_data", delay)
    whole = open_source(frozenset({"lidar"}), root=copy, sweep_frames=1)
    assert len(sweeps_of(whole)) == 8  # who does not look at it need not do without
    source = open_source(frozenset({"lidar", asked}), root=copy, sweep_frames=1)
    assert len(sweeps_of(source)) == 7
    assert source.annotated == whole.annotated
    assert source.notes[1] == "1 sweep frames left out: a sensor has no reading within 50 ms"


def test_a_data_set_with_images_of_key_frames_only_is_refused(open_source: Open, edited: Edit) -> None:
    def drop(records: list[dict[str, Any]]) -> None:
        kept = [each for each in records if each["is_key_frame"] or "CAM" not in each["filename"]]
        for each in kept:
            each["prev"] = "" if "CAM" in each["filename"] else each["prev"]
        records[:] = kept

    copy = edited("sample_data", drop)
    with pytest.raises(DataError, match="none of the 8 sweep frames has a reading of every camera within 50 ms"):
        open_source(frozenset({"camera"}), root=copy, sweep_frames=1)
    assert len(open_source(frozenset({"lidar"}), root=copy, sweep_frames=1).tokens) == 12


def test_a_sweep_with_the_token_of_a_sample_is_refused(open_source: Open, edited: Edit, root: Path) -> None:
    sample = table(root, "sample")[0]["token"]
    sweep = next(each for each in table(root, "sample_data") if "sweeps/LIDAR" in each["filename"])["token"]

    def rename(records: list[dict[str, Any]]) -> None:
        for record in records:
            record |= {key: sample for key in ("token", "prev", "next") if record[key] == sweep}

    copy = edited("sample_data", rename)
    assert len(open_source(root=copy).tokens) == 4
    with pytest.raises(DataError, match=f"'{sample}' is the token of a sample and of a LiDAR sweep"):
        open_source(root=copy, sweep_frames=1)


# ---------------------------------------------------------------------------------------------- key frames stay


def test_key_frames_are_loaded_as_without_sweeps(open_source: Open, source: NuScenesSource) -> None:
    plain = open_source(ALL)
    assert plain.tokens == tuple(token for token in source.tokens if token in source.annotated)
    for token in plain.tokens:
        one, other = plain.load(token, ALL), source.load(token, ALL)
        for name in ("points", "images", "radar"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        assert one.boxes is not None
        assert other.boxes is not None
        assert torch.equal(one.boxes.values, other.boxes.values)


def test_previous_images_of_a_key_frame_are_of_the_key_frame_before(open_source: Open) -> None:
    source = open_source(ALL, sweep_frames=1)
    keys = [token for token in source.tokens if token in source.annotated]
    sensors: frozenset[Sensor] = frozenset({"camera", "previous_camera"})
    first, second = (source.load(token, sensors).images for token in keys[:2])
    assert first is not None
    assert second is not None
    assert torch.equal(second[6:], first[:6])
    assert torch.equal(first[6:], first[:6])


def test_labels_are_drawn_as_without_sweeps(open_source: Open, source: NuScenesSource) -> None:
    for labels in (0.5, 1.0, ["scene-0001"]):
        assert open_source(sweep_frames=1, labels=labels).labelled == open_source(labels=labels).labelled
    assert source.labelled == source.annotated
    for scene in ("scene-0000", "scene-0001"):  # one with sweeps beside one without
        tokens = [token for token in source.tokens if token in source.annotated or source.scene(token) == scene]
        assert len(open_source(sweep_frames=1, tokens=tokens, labels=0.5).labelled) == 2


def test_the_digest_of_annotations_knows_key_frames_only(
    open_source: Open, source: NuScenesSource, edited: Edit
) -> None:
    """Written out here, since every cache records it: a new way to compute it would refuse all of them."""

    def keep_keys(records: list[dict[str, Any]]) -> None:
        records[:] = [each | {"prev": "", "next": ""} for each in records if each["is_key_frame"]]

    without = open_source(root=edited("sample_data", keep_keys))
    index, total = without.index, hashlib.sha256(without.index["frame_token"].tobytes())
    assert len(index["frame_token"]) == 6
    for row in range(6):
        boxes = slice(int(index["frame_boxes"][row]), int(index["frame_boxes"][row + 1]))
        categories = [index.meta["categories"][number] for number in index["box_category"][boxes]]
        attributes = [
            index.meta["attributes"][number] if number >= 0 else "" for number in index["box_attribute"][boxes]
        ]
        text = "\t".join(categories) + "\n" + "\t".join(attributes)
        numbers = index["box_global"][boxes].tobytes() + index["box_points"][boxes].tobytes()
        total.update(hashlib.sha256(text.encode() + numbers).digest())
    assert without.identity.annotation_digest == total.hexdigest() == source.identity.annotation_digest


# ---------------------------------------------------------------------------------------------- real data


def test_a_real_sweep_between_key_frames_is_a_frame(real_data: Path, tmp_path: Path) -> None:
    """The only sweep there is; its cameras are those of the key frame 50 ms later."""
    from nuscenes import NuScenes
    from nuscenes.utils.data_classes import LidarPointCloud

    token, root = "9d64a4b6538e42d7b7f6a7273a631638", real_data / "nuscenes_mini_real"
    config = Config(
        root=root,
        version="v1.0-mini",
        split="mini_val",
        sweep_frames=1,
        skip_missing=True,
        index_dir=tmp_path,
        sweeps=1,
    )
    source = build(config, frozenset({"lidar", "camera"}))
    assert source.tokens == (token,)
    assert source.annotated == frozenset()
    frame = source.load(token, frozenset({"lidar", "camera", "lidar_depth"}))
    devkit = NuScenes("v1.0-mini", str(root), verbose=False)
    cloud = LidarPointCloud.from_file(str(root / devkit.get("sample_data", token)["filename"]))
    cloud.remove_close(1.0)
    assert frame.points is not None
    np.testing.assert_array_equal(frame.points[:, :4], cloud.points.T)
    found = nearest(devkit, token)
    assert {record["sample_token"] for record in found.values()} == {"3950bd41f74548429c0f7700ff3d8269"}
    lidar_from_global = np.linalg.inv(global_from_sensor(devkit, devkit.get("sample_data", token)))
    assert frame.rig is not None
    for index, name in enumerate(frame.rig.names):
        expected = lidar_from_global @ global_from_sensor(devkit, found[name])
        np.testing.assert_allclose(frame.rig.lidar_from_camera[index], expected, atol=1e-4)
    assert frame.lidar_depth is not None
    assert len(frame.lidar_depth) > 3000
