"""The nuScenes source gives on real data what the devkit and published info files give."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bevkd.data.images import ImageView
from bevkd.data.sources.nuscenes import CLASSES, Config, NuScenesSource, build
from bevkd.errors import DataError

Open = Callable[..., NuScenesSource]
COMPLETE = {"v1.0-mini": "ca9a282c9e77460f8360f564131a8af5", "v1.0-trainval": "fd8420396768425eabec9bdddf7e64b6"}
SPLITS = {"v1.0-mini": "mini_train", "v1.0-trainval": "val"}


@pytest.fixture(scope="module")
def open_source(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Open:
    index_dir = tmp_path_factory.mktemp("index")

    def open_it(version: str = "v1.0-mini", split: str = "mini_val", **options: Any) -> NuScenesSource:
        sensors = options.pop("sensors", frozenset())
        values = {"root": real_data / "nuscenes_mini_real", "version": version, "split": split, "index_dir": index_dir}
        return build(Config(**{**values, **options}), sensors)

    return open_it


@pytest.fixture(scope="module")
def devkits(real_data: Path) -> dict[str, Any]:
    from nuscenes import NuScenes

    root = str(real_data / "nuscenes_mini_real")
    return {version: NuScenes(version, root, verbose=False) for version in COMPLETE}


def homogeneous(xyz: np.ndarray) -> np.ndarray:
    return np.concatenate([xyz, np.ones((len(xyz), 1))], axis=1)


@pytest.mark.parametrize("version", COMPLETE)
def test_points_equal_the_devkits_multisweep_cloud(open_source: Open, devkits: dict[str, Any], version: str) -> None:
    from nuscenes.utils.data_classes import LidarPointCloud

    devkit, token = devkits[version], COMPLETE[version]
    cloud, lags = LidarPointCloud.from_file_multisweep(
        devkit, devkit.get("sample", token), "LIDAR_TOP", "LIDAR_TOP", nsweeps=10
    )
    points = open_source(version, SPLITS[version], tokens=[token]).load(token, frozenset({"lidar"})).points
    assert points is not None
    assert len(points) == {"v1.0-mini": 26_414, "v1.0-trainval": 27_007}[version]
    np.testing.assert_allclose(points[:, :4], cloud.points.T, atol=2e-5)
    np.testing.assert_allclose(points[:, 4], lags[0], atol=1e-6)


@pytest.mark.parametrize(("version", "split"), [("v1.0-mini", "mini_val"), *SPLITS.items()])
def test_boxes_equal_the_devkits_in_the_lidar_frame(
    open_source: Open, devkits: dict[str, Any], version: str, split: str
) -> None:
    from nuscenes.eval.common.utils import quaternion_yaw
    from nuscenes.eval.detection.utils import category_to_detection_name

    devkit, source = devkits[version], open_source(version, split, min_points=0)
    for token in source.tokens[::7]:
        _, boxes, _ = devkit.get_sample_data(devkit.get("sample", token)["data"]["LIDAR_TOP"])
        boxes = [box for box in boxes if category_to_detection_name(box.name)]
        ours = source.annotations(token)
        assert [CLASSES[label] for label in ours.labels] == [category_to_detection_name(box.name) for box in boxes]
        np.testing.assert_allclose(ours.center, [box.center for box in boxes], atol=1e-5)
        np.testing.assert_allclose(ours.size, [box.wlh[[1, 0, 2]] for box in boxes], atol=1e-6)
        np.testing.assert_allclose(ours.yaw, [quaternion_yaw(box.orientation) for box in boxes], atol=1e-6)


def test_global_annotations_equal_the_devkits_records_and_velocities(
    open_source: Open, devkits: dict[str, Any]
) -> None:
    devkit, source = devkits["v1.0-mini"], open_source()
    for token in source.tokens[::5]:
        records = [devkit.get("sample_annotation", name) for name in devkit.get("sample", token)["anns"]]
        boxes = source.global_annotations(token)
        assert boxes.categories == tuple(record["category_name"] for record in records)
        assert boxes.attributes == tuple(
            "".join(devkit.get("attribute", name)["name"] for name in record["attribute_tokens"]) for record in records
        )
        for values, field in ((boxes.translation, "translation"), (boxes.size, "size"), (boxes.rotation, "rotation")):
            np.testing.assert_array_equal(values, [record[field] for record in records])
        velocities = [devkit.box_velocity(record["token"])[:2] for record in records]
        np.testing.assert_array_equal(boxes.velocity, velocities)
        np.testing.assert_array_equal(
            boxes.points, [record["num_lidar_pts"] + record["num_radar_pts"] for record in records]
        )


def test_boxes_equal_the_published_info_file(open_source: Open, real_data: Path) -> None:
    infos = json.loads((real_data / "nuscenes_infos" / "mini_val_infos.json").read_text())["infos"]
    source = open_source(min_points=0)
    for info in infos:
        named = [number for number, name in enumerate(info["gt_names"]) if name in CLASSES]
        theirs = np.array([info["gt_boxes"][number] for number in named], dtype=float).reshape(-1, 7)
        velocity = np.array([info["gt_velocity"][number] for number in named], dtype=float).reshape(-1, 2)
        boxes = source.annotations(info["token"])
        # The tables list the boxes of a frame in another order than the info file.
        pairing = np.linalg.norm(boxes.center.numpy()[:, None] - theirs[None, :, :3], axis=2).argmin(axis=1)
        assert sorted(pairing) == list(range(len(theirs)))
        theirs, velocity = theirs[pairing], velocity[pairing]
        assert [CLASSES[label] for label in boxes.labels] == [info["gt_names"][named[number]] for number in pairing]
        np.testing.assert_allclose(boxes.center, theirs[:, :3], atol=2e-5)
        np.testing.assert_allclose(boxes.size, theirs[:, [4, 3, 5]], atol=1e-5)
        turn = boxes.yaw.numpy() - (-theirs[:, 6] - np.pi / 2)
        # Info files take the yaw from pyquaternion's Euler angles, bevkd from the direction of the heading (as the
        # metrics do); in a LiDAR frame that leans by a degree the two differ by 2 mrad.
        np.testing.assert_allclose(np.angle(np.exp(1j * turn)), 0, atol=4e-3)
        np.testing.assert_allclose(boxes.velocity, velocity, atol=1e-5)


@pytest.mark.parametrize("version", COMPLETE)
def test_lidar_lands_on_the_pixels_where_the_devkit_puts_it(
    open_source: Open, devkits: dict[str, Any], version: str
) -> None:
    from nuscenes.utils.data_classes import LidarPointCloud
    from pyquaternion import Quaternion

    devkit, token = devkits[version], COMPLETE[version]
    frame = open_source(version, SPLITS[version], tokens=[token]).load(token, frozenset({"camera"}))
    assert frame.rig is not None
    sample = devkit.get("sample", token)
    lidar = devkit.get("sample_data", sample["data"]["LIDAR_TOP"])
    for number, name in enumerate(frame.rig.names):
        cloud = LidarPointCloud.from_file(devkit.get_sample_data_path(lidar["token"]))
        xyz = cloud.points[:3].T.copy()
        camera = devkit.get("sample_data", sample["data"][name])
        for table, record, inverse in (
            ("calibrated_sensor", lidar, False),
            ("ego_pose", lidar, False),
            ("ego_pose", camera, True),
            ("calibrated_sensor", camera, True),
        ):
            pose = devkit.get(table, record[f"{table}_token"])
            rotation = Quaternion(pose["rotation"]).rotation_matrix
            if inverse:
                cloud.translate(-np.array(pose["translation"]))
                cloud.rotate(rotation.T)
            else:
                cloud.rotate(rotation)
                cloud.translate(np.array(pose["translation"]))
        camera_from_lidar = np.linalg.inv(frame.rig.lidar_from_camera[number].double().numpy())
        ours = (homogeneous(xyz) @ camera_from_lidar.T)[:, :3]
        # The devkit works in float32 in the global frame, where a step is 0.1 mm.
        np.testing.assert_allclose(ours, cloud.points[:3].T, atol=1e-3)
        intrinsics = devkit.get("calibrated_sensor", camera["calibrated_sensor_token"])["camera_intrinsic"]
        np.testing.assert_allclose(frame.rig.intrinsics[number], intrinsics, rtol=1e-6)


def test_a_view_moves_the_intrinsics_with_the_pixels(open_source: Open) -> None:
    token = COMPLETE["v1.0-mini"]
    source = open_source(split="mini_train", tokens=[token])
    view = ImageView.cover((900, 1600), 256, 704)
    whole = source.load(token, frozenset({"camera"}))
    part = source.load(token, frozenset({"camera"}), {"CAM_BACK": view, "CAM_FRONT": view})
    assert whole.images is not None
    assert whole.rig is not None
    assert part.images is not None
    assert part.rig is not None
    assert whole.images.shape == (6, 3, 900, 1600)
    assert part.images.shape == (2, 3, 256, 704)
    assert part.rig.names == ("CAM_FRONT", "CAM_BACK")  # the rig's order, whatever the order of the views
    front = whole.rig.names.index("CAM_FRONT")
    torch.testing.assert_close(part.rig.intrinsics[0], view.matrix() @ whole.rig.intrinsics[front])
    torch.testing.assert_close(part.rig.lidar_from_camera[0], whole.rig.lidar_from_camera[front])


def test_check_lists_every_missing_file_at_once(open_source: Open, real_data: Path) -> None:
    source = open_source()
    listed = json.loads((real_data / "nuscenes_mini_real" / "available_files.json").read_text())
    here = {entry["sample_token"] for entry in listed}
    faults = source.check(source.tokens, frozenset({"camera"}))
    assert len(faults) == 6 * sum(token not in here for token in source.tokens)
    assert all("CAM_" in fault and fault.endswith(": missing") for fault in faults)


def test_skip_missing_keeps_the_frames_that_have_their_files(open_source: Open) -> None:
    source = open_source(skip_missing=True, sensors=frozenset({"camera"}))
    assert len(source.tokens) == 4
    assert source.notes == ("77 of 81 frames of mini_val left out: sensor files missing or damaged",)
    assert source.identity.frames == 4
    assert source.labelled == frozenset(source.tokens)
    with pytest.raises(DataError, match="leaves no frame"):
        open_source(skip_missing=True, sensors=frozenset({"lidar"}))


def test_loading_a_frame_without_its_file_names_the_file(open_source: Open) -> None:
    source = open_source()
    with pytest.raises(DataError, match=r"LIDAR_TOP.*\.pcd\.bin: missing"):
        source.load(source.tokens[0], frozenset({"lidar"}))


def test_a_source_is_small_to_pickle_and_loads_the_same_afterwards(open_source: Open) -> None:
    source = open_source()
    packed = pickle.dumps(source)
    assert len(packed) < 10_000
    token = source.tokens[3]
    copy = pickle.loads(packed)
    assert torch.equal(copy.annotations(token).values.nan_to_num(), source.annotations(token).values.nan_to_num())
    assert copy.identity == source.identity


def test_opening_a_known_data_set_reads_no_tables_and_no_devkit(open_source: Open) -> None:
    config = open_source().config.model_dump_json()
    program = (
        "import sys, time; from bevkd.data.sources.nuscenes import Config, build\n"
        f"config = Config.model_validate_json({config!r})\n"
        "start = time.perf_counter(); build(config); assert time.perf_counter() - start < 0.2\n"
        "assert 'nuscenes' not in sys.modules and 'matplotlib' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
