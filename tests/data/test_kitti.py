"""The KITTI source on real frames, and on folders with every fault."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from bevkd.data.images import ImageView
from bevkd.data.sources._kitti_boxes import objects_from_boxes
from bevkd.data.sources.kitti import CLASSES, Config, KittiSource, build
from bevkd.errors import DataError
from bevkd.geometry.boxes import corners_3d, points_in_boxes
from tests.data import kitti_kit
from tests.data.kitti_kit import label

LABELLED = ("000000", "000001", "000002", "000008", "000134")
BOTH = frozenset[Any]({"lidar", "camera"})


@pytest.fixture(scope="module")
def real(real_data: Path) -> KittiSource:
    return build(Config(root=real_data / "kitti", split="trainval", classes=CLASSES))


def small(root: Path, count: int = 10, **options: Any) -> KittiSource:
    """Return a source of frames with one car each, all in the list of ``train``."""
    labels = {f"{index:06d}": [label()] for index in range(count)}
    kitti_kit.write(root, labels, {"train": tuple(labels)})
    return build(Config(root=root, **options))


# --- real frames ---


def test_frames_with_labels_are_the_split_when_there_is_no_list(real: KittiSource) -> None:
    assert real.tokens == LABELLED
    assert real.labelled == set(LABELLED)
    assert (real.identity.name, real.identity.split, real.identity.frames) == ("kitti", "trainval", 5)


@pytest.mark.parametrize("token", LABELLED)
def test_every_labelled_box_contains_points(real: KittiSource, token: str) -> None:
    frame = real.load(token, BOTH)
    assert frame.points is not None
    assert frame.boxes is not None
    assert points_in_boxes(frame.points, frame.boxes.values).sum(dim=1).min() >= 3
    assert (frame.points[:, 3] >= 0).all()
    assert (frame.points[:, 3] <= 1).all()
    assert (frame.points[:, 4] == 0).all()
    assert frame.boxes.velocity.isnan().all()


@pytest.mark.parametrize("token", LABELLED)
def test_boxes_come_back_as_the_label_text_has_them(real: KittiSource, token: str) -> None:
    objects = real.objects(token)
    labels = objects[np.array([name != "DontCare" for name in objects.names])]
    size = real.image_sizes(token)["image_2"]
    back = objects_from_boxes(real.annotations(token), real.classes, real.calibration(token), size)
    assert back.names == labels.names
    np.testing.assert_allclose(back.locations, labels.locations, atol=1e-5)
    np.testing.assert_allclose(back.sizes, labels.sizes, atol=1e-6)
    np.testing.assert_allclose(np.cos(back.rotations - labels.rotations), 1, atol=1e-9)
    np.testing.assert_allclose(np.cos(back.alpha - labels.alpha), 1, atol=1e-3)  # the text's own precision


@pytest.mark.parametrize("token", LABELLED)
def test_boxes_project_onto_the_rectangles_that_annotators_drew(real: KittiSource, token: str) -> None:
    objects = real.objects(token)
    labels = objects[np.array([name != "DontCare" for name in objects.names])]
    size = real.image_sizes(token)["image_2"]
    back = objects_from_boxes(real.annotations(token), real.classes, real.calibration(token), size)
    whole = labels.truncated == 0
    off = np.abs(back.rectangles - labels.rectangles)[whole]
    extent = (labels.rectangles[:, 2:] - labels.rectangles[:, :2])[whole].max(axis=1)
    assert (off.max(axis=1) <= np.maximum(5, 0.2 * extent)).all()
    assert np.median(off) < 2


@pytest.mark.parametrize("token", LABELLED)
def test_the_rig_projects_as_the_matrices_of_the_benchmark_do(real: KittiSource, token: str) -> None:
    frame, calibration = real.load(token, BOTH), real.calibration(token)
    assert frame.rig is not None
    assert frame.boxes is not None
    assert frame.images is not None
    corners = corners_3d(frame.boxes.values).double().reshape(-1, 3)
    rectified = corners @ torch.from_numpy(calibration.rectified_from_lidar[:3, :3]).T
    rectified += torch.from_numpy(calibration.rectified_from_lidar[:3, 3])
    expected = rectified @ torch.from_numpy(calibration.image_from_rectified[:, :3]).T
    expected += torch.from_numpy(calibration.image_from_rectified[:, 3])
    camera_from_lidar = torch.linalg.inv(frame.rig.lidar_from_camera[0].double())
    seen = (corners @ camera_from_lidar[:3, :3].T + camera_from_lidar[:3, 3]) @ frame.rig.intrinsics[0].double().T
    ahead = expected[:, 2] > 1
    ours, theirs = seen[:, :2] / seen[:, 2:], expected[:, :2] / expected[:, 2:]
    torch.testing.assert_close(ours[ahead], theirs[ahead], atol=0.02, rtol=1e-5)
    assert frame.rig.names == ("image_2",)
    assert tuple(frame.images.shape[2:]) == real.image_sizes(token)["image_2"]


@pytest.mark.parametrize("token", LABELLED)
def test_the_heading_follows_the_rotation_within_the_lean_of_the_axes(real: KittiSource, token: str) -> None:
    objects = real.objects(token)
    rotations = objects.rotations[np.array([name != "DontCare" for name in objects.names])]
    turned = real.annotations(token).yaw.numpy() - (-rotations - math.pi / 2)
    assert np.rad2deg(np.arccos(np.cos(turned).clip(-1, 1))).max() < 0.5


@pytest.mark.parametrize("token", ["000000", "000001", "000002"])
def test_the_reduced_scan_is_what_the_image_shows_of_the_whole(
    real_data: Path, real: KittiSource, tmp_path: Path, token: str
) -> None:
    training = real_data / "kitti" / "training"
    for folder in ("velodyne", "label_2", "calib", "image_2"):
        (tmp_path / "training").mkdir(exist_ok=True)
        (tmp_path / "training" / folder).symlink_to(training / folder)
    cropped = build(Config(root=tmp_path, split="trainval", tokens=(token,))).load(token, frozenset({"lidar"})).points
    reduced = real.load(token, frozenset({"lidar"})).points
    assert cropped is not None
    assert reduced is not None
    torch.testing.assert_close(cropped, reduced, atol=0, rtol=0)
    whole = build(Config(root=tmp_path, split="trainval", fov_only=False)).load(token, frozenset({"lidar"})).points
    assert whole is not None
    assert len(whole) > 5 * len(cropped)


def test_lidar_depth_falls_into_the_image(real: KittiSource) -> None:
    frame = real.load("000008", frozenset({"camera", "lidar_depth"}))
    assert frame.lidar_depth is not None
    assert frame.points is None
    assert len(frame.lidar_depth) == 17_238
    assert (frame.lidar_depth.pixels < torch.tensor([1242.0, 375.0])).all()
    assert 1 < frame.lidar_depth.depth_m.min() < frame.lidar_depth.depth_m.max() < 90


def test_testing_frames_have_no_labels(real_data: Path) -> None:
    source = build(Config(root=real_data / "kitti", split="test"))
    assert source.tokens == ("000002", "000007")
    assert source.labelled == frozenset()
    frame = source.load("000007", BOTH)
    assert frame.boxes is None
    assert frame.points is not None
    assert len(frame.points) > 10_000
    with pytest.raises(DataError, match="'test' has no labels"):
        source.annotations("000007")


def test_an_image_view_moves_the_intrinsics_with_it(real: KittiSource) -> None:
    view = ImageView(96, 320, 0.25, left=-4, top=2)
    plain, viewed = real.load("000001", BOTH), real.load("000001", BOTH, {"image_2": view})
    assert plain.rig is not None
    assert viewed.rig is not None
    assert viewed.images is not None
    assert viewed.images.shape == (1, 3, 96, 320)
    torch.testing.assert_close(viewed.rig.intrinsics[0], view.matrix() @ plain.rig.intrinsics[0])
    torch.testing.assert_close(viewed.rig.view_from_original[0], view.matrix())
    with pytest.raises(DataError, match="no cameras CAM_FRONT"):
        real.load("000001", BOTH, {"CAM_FRONT": view})


# --- selection ---


def test_a_split_is_read_from_its_list(tmp_path: Path) -> None:
    kitti_kit.write(tmp_path, {f"{k:06d}": [label()] for k in range(4)}, {"val": ("000003", "000001")})
    assert build(Config(root=tmp_path, split="val")).tokens == ("000001", "000003")
    assert build(Config(root=tmp_path, split="val", tokens=("000003",))).tokens == ("000003",)


def test_only_wanted_classes_become_boxes(tmp_path: Path) -> None:
    region = ("DontCare", -1, -1, -10, 0, 0, 9, 9, -1, -1, -1, -1000, -1000, -1000, -10)
    lines = [label("Van"), label("Cyclist"), region, label("Car")]
    kitti_kit.write(tmp_path, {"000000": lines, "000001": []})
    source = build(Config(root=tmp_path, split="trainval", classes=("Car", "Cyclist")))
    assert source.annotations("000000").labels.tolist() == [1, 0]
    assert len(source.annotations("000001")) == 0
    assert source.objects("000000").names == ("Van", "Cyclist", "DontCare", "Car")


def test_a_box_has_the_gravity_centre_of_its_label_and_its_heading_from_above(tmp_path: Path) -> None:
    kitti_kit.write(tmp_path, {"000000": [label(location=(2.0, 1.6, 20.0), size=(1.5, 1.7, 4.0), rotation=0.3)]})
    source = build(Config(root=tmp_path, split="trainval"))
    (box,), calibration = source.annotations("000000").values.double().numpy(), source.calibration("000000")
    center = calibration.rectified_from_lidar @ [*box[:3], 1]
    np.testing.assert_allclose(center[:3], [2.0, 1.6 - 1.5 / 2, 20.0], atol=1e-5)
    np.testing.assert_allclose(box[3:6], [4.0, 1.7, 1.5], atol=1e-6)
    ahead = calibration.rectified_from_lidar[:3, :3] @ [math.cos(box[6]), math.sin(box[6]), 0]
    np.testing.assert_allclose(ahead[[0, 2]], [math.cos(0.3), -math.sin(0.3)], atol=0.02)
    assert 15 < box[0] < 25  # ahead is x
    assert -3 < box[1] < -1  # right is negative y


def test_boxes_with_too_few_points_are_no_labels(tmp_path: Path) -> None:
    lines = [label(location=(0.0, 1.6, 20.0)), label(location=(6.0, 1.6, 30.0))]
    kitti_kit.write(tmp_path, {"000000": lines})
    first, second = build(Config(root=tmp_path, split="trainval")).annotations("000000").center.tolist()
    kitti_kit.write_points(tmp_path, "000000", [[*first, 0.5], [*first, 0.5], [*second, 0.5]])
    kept = build(Config(root=tmp_path, split="trainval", min_points=2)).annotations("000000")
    assert kept.center.tolist() == [first]


def test_a_fraction_of_frames_is_labelled_and_the_seed_says_which(tmp_path: Path) -> None:
    half, again, other = (small(tmp_path, labels=0.5, labels_seed=seed) for seed in (0, 0, 1))
    assert len(half.labelled) == len(other.labelled) == 5
    assert half.labelled == again.labelled != other.labelled
    hidden = next(token for token in half.tokens if token not in half.labelled)
    assert half.load(hidden, frozenset()).boxes is None
    assert len(half.annotations(hidden)) == 1


def test_a_file_names_the_labelled_frames(tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("000003\n\n000001\n")
    assert small(tmp_path, labels=tmp_path / "few.txt").labelled == {"000001", "000003"}
    (tmp_path / "few.txt").write_text("000077\n")
    with pytest.raises(DataError, match=r"1 token.*000077"):
        small(tmp_path, labels=tmp_path / "few.txt")


def test_the_identity_notices_changed_labels_but_not_the_choice_of_frames(tmp_path: Path) -> None:
    one, part = small(tmp_path), small(tmp_path, tokens=("000001",), labels=0.5)
    assert one.identity.annotation_digest == part.identity.annotation_digest
    (tmp_path / "training/label_2/000009.txt").write_text(kitti_kit.text([label("Tram")]))
    assert build(Config(root=tmp_path)).identity.annotation_digest != one.identity.annotation_digest


def test_a_source_travels_to_loader_processes_in_few_bytes(tmp_path: Path) -> None:
    source = small(tmp_path)
    copy = pickle.loads(pickle.dumps(source))
    assert torch.equal(copy.annotations("000004").values[:, :7], source.annotations("000004").values[:, :7])
    assert len(pickle.dumps(source)) < 3000


# --- faults ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "val"}, r"split 'val' needs its list of frames.*ImageSets/val.txt"),
        (
            {"tokens": ("000001", "000001", "9")},
            r"'9' is not in split 'train'[\s\S]*'000001' stands there more than once",
        ),
        ({"tokens": ()}, "no frame is left"),
        ({"split": "test"}, "no such folder"),
    ],
)
def test_a_selection_that_cannot_be_made_says_why(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        small(tmp_path, **options)


def test_a_list_with_frames_that_are_not_there_is_refused(tmp_path: Path) -> None:
    kitti_kit.write(tmp_path, {"000000": []}, {"train": ("000000", "000007")})
    with pytest.raises(DataError, match=r"train.txt lists 1 frames that .*label_2 does not hold: 000007"):
        build(Config(root=tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ("car",)}, "unknown classes car; KITTI's are Car, Pedestrian"),
        ({"classes": ("Car", "Car")}, "each of them once"),
        ({"labels": ("scene",)}, "KITTI has no scenes"),
        ({"labels": -0.1}, "from 0 to 1"),
        ({"split": "training"}, "'train', 'val', 'trainval' or 'test'"),
    ],
)
def test_a_wrong_config_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Config(root=tmp_path, **options)


@pytest.mark.parametrize(
    ("folder", "content", "message"),
    [
        (
            "label_2",
            "Car 0 0 0.1 1 2 3 4 1 1\n",
            r"000002.txt, line 1 is no label .*: 9 numbers after the class, not 14",
        ),
        ("label_2", "Car" + " 1" * 13 + " x\n", r"000002.txt, line 1 is no label .*could not convert string"),
        ("label_2", "Car" + " 1" * 13 + " nan\n", r"line 1 is no label .*nan is not finite"),
        ("label_2", "Bus" + " 1" * 14 + "\n", r"000002.txt names the class 'Bus'"),
        ("calib", "P2: 1 2 3\n", r"calib/000002.txt, line 1: P2 must be 12 numbers"),
        ("calib", "P2: 1 0 0 0 0 1 0 0 0 0 1 0\n", r"000002.txt has no R0_rect, Tr_velo_to_cam"),
        (
            "calib",
            kitti_kit.CALIBRATION.replace("P2: 700 0 600 45 0 700", "P2: 0 0 0 0 0 0"),
            r"P2, .* cannot be inverted",
        ),
    ],
)
def test_a_malformed_line_is_named_with_its_file(tmp_path: Path, folder: str, content: str, message: str) -> None:
    source = small(tmp_path, 3)
    path = tmp_path / "training" / folder / "000002.txt"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        source.annotations("000002")


def test_missing_and_damaged_sensor_files_are_all_named(tmp_path: Path) -> None:
    source = small(tmp_path, 3)
    kitti_kit.write_points(tmp_path, "000000", [[1, 2, 3, 0.5]])
    (tmp_path / "training/velodyne/000001.bin").write_bytes(bytes(17))
    (tmp_path / "training/image_2/000000.png").write_bytes(b"no image")
    faults = source.check(source.tokens, BOTH)
    assert [Path(fault.partition(": ")[0]).name for fault in faults] == ["000000.png", "000001.bin", "000002.bin"]
    assert "truncated (17 bytes is no multiple of the 16 bytes" in faults[1]
    assert faults[2].endswith("missing")
    assert source.check(source.tokens, frozenset({"radar"})) == ["KITTI has no radar"] * 3
    for sensors in (frozenset({"lidar"}), frozenset({"camera"})):
        with pytest.raises(DataError, match="00000"):
            source.load("000001" if "lidar" in sensors else "000000", sensors)


def test_frames_with_faults_are_left_out_on_demand(tmp_path: Path) -> None:
    kitti_kit.write(tmp_path, {f"{k:06d}": [label()] for k in range(3)}, {"train": ("000000", "000001", "000002")})
    kitti_kit.write_points(tmp_path, "000001", [[10, 0, 0, 0.5]])
    source = build(Config(root=tmp_path, skip_missing=True), frozenset({"lidar"}))
    assert source.tokens == ("000001",)
    assert source.notes == ("2 of 3 frames of train left out: sensor files missing or damaged",)
    (tmp_path / "training/velodyne/000001.bin").unlink()
    with pytest.raises(DataError, match="skip_missing leaves no frame"):
        build(Config(root=tmp_path, skip_missing=True), frozenset({"lidar"}))


def test_an_unknown_frame_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="frame '000777' is not among the 2 of split 'train'"):
        small(tmp_path, 2).global_from_lidar("000777")
