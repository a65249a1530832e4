"""From nuScenes tables to the arrays of the frame index (:class:`_nuscenes_index.FrameIndex` lists them)."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from bevkd.data.sources._nuscenes_frames import Arrays, Readings, bytes_of, frames_of
from bevkd.data.sources._nuscenes_tables import NONE, SEVERAL, Tables
from bevkd.errors import DataError, report

LIDAR = "LIDAR_TOP"
CAMERAS = ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT")
RADARS = ("RADAR_FRONT", "RADAR_FRONT_LEFT", "RADAR_FRONT_RIGHT", "RADAR_BACK_LEFT", "RADAR_BACK_RIGHT")


def rotations(quaternions: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return rotation matrices ``[..., 3, 3]`` of quaternions ``[..., 4]`` (w, x, y, z) of any length."""
    w, x, y, z = np.moveaxis(quaternions / np.linalg.norm(quaternions, axis=-1, keepdims=True), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def transforms(poses: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return ``[..., 4, 4]`` transforms of poses ``[..., 7]`` (translation 3, quaternion 4)."""
    matrices = np.zeros((*poses.shape[:-1], 4, 4))
    matrices[..., :3, :3] = rotations(poses[..., 3:])
    matrices[..., :3, 3] = poses[..., :3]
    matrices[..., 3, 3] = 1
    return matrices


def build_index(tables: Tables) -> tuple[Arrays, dict[str, Any]]:
    """Return the arrays and the meta data of the frame index.

    Raises:
        DataError: a key frame has no LiDAR reading, or a box of a detection class has several attributes.
    """
    from nuscenes.eval.detection.utils import category_to_detection_name
    from nuscenes.utils.splits import create_splits_scenes

    channels, modalities = _channels(tables)
    calibrations: Arrays = {
        "calibration_pose": _poses(tables, "calibrated_sensor"),
        "calibration_intrinsics": tables.array("calibrated_sensor", "camera_intrinsic"),
    }
    known, readings = _readings(tables, channels, modalities)
    frames, frame_of = frames_of(tables, known)
    categories = tables.texts("category", "name")
    meta = {
        "channels": channels,
        "modalities": modalities,
        "scenes": tables.texts("scene", "name"),
        "categories": categories,
        "detection_names": [category_to_detection_name(name) for name in categories],
        "attributes": tables.texts("attribute", "name"),
        "splits": create_splits_scenes(),
    }
    faults = []
    headless = int((frames["frame_reading"][:, 0] < 0).sum())
    if headless:
        faults.append(f"{headless} of {tables.count('sample')} samples have no {LIDAR} key frame in sample_data.json")
    boxes = _annotations(tables, frame_of)
    detected = np.array([name is not None for name in meta["detection_names"]], dtype=bool)
    several = int((detected[boxes["box_category"]] & (boxes["box_attribute"] == SEVERAL)).sum())
    if several:
        faults.append(f"{several} boxes of detection classes have more than one attribute; the metrics allow one")
    if faults:
        raise report(DataError, "the tables cannot be used:", faults)
    frame_of_box = boxes.pop("box_frame")
    frames["frame_boxes"] = np.searchsorted(frame_of_box, np.arange(len(frames["frame_time"]) + 1)).astype(np.int64)
    lidar = frames["frame_reading"][:, 0]
    global_from_lidar = transforms(readings["reading_pose"][lidar]) @ transforms(
        calibrations["calibration_pose"][readings["reading_calibration"][lidar]]
    )
    boxes["box_lidar"] = _in_lidar(boxes["box_global"], global_from_lidar[frame_of_box])
    return {**frames, **readings, **calibrations, **boxes}, {**meta, "annotation_digest": _digest(frames, boxes, meta)}


def _channels(tables: Tables) -> tuple[list[str], list[str]]:
    """Return names and modalities of all channels in use: the LiDAR, cameras and radars, known names first."""
    used = np.unique(tables.rows["calibrated_sensor", "sensor_token"][tables.rows["sample_data", _CALIBRATION]])
    names, kinds = tables.texts("sensor", "channel"), tables.texts("sensor", "modality")
    present = {names[row]: kinds[row] for row in used.tolist()}
    channels = [LIDAR]
    for known, modality in ((CAMERAS, "camera"), (RADARS, "radar")):
        found = {name for name, kind in present.items() if kind == modality}
        channels += [name for name in known if name in found] + sorted(found.difference(known))
    return channels, ["lidar", *(present[name] for name in channels[1:])]


_CALIBRATION = "calibrated_sensor_token"


def _poses(tables: Tables, table: str) -> npt.NDArray[np.float64]:
    return np.concatenate([tables.array(table, "translation"), tables.array(table, "rotation")], axis=1)


def _readings(tables: Tables, channels: list[str], modalities: list[str]) -> tuple[Readings, Arrays]:
    """Return the readings of all channels by time, and what the index holds of them."""
    sensor_of = tables.rows["calibrated_sensor", "sensor_token"]
    names = tables.texts("sensor", "channel")
    column_of_sensor = np.array([channels.index(name) if name in channels else NONE for name in names], dtype=np.int64)
    calibration = tables.rows["sample_data", _CALIBRATION]
    column = column_of_sensor[sensor_of[calibration]]
    time = tables.array("sample_data", "timestamp")
    kept = np.flatnonzero(column != NONE)
    kept = kept[np.argsort(time[kept], kind="stable")]
    row = np.full(tables.count("sample_data") + 1, NONE, dtype=np.int64)
    row[kept] = np.arange(len(kept))

    files = tables.texts("sample_data", "filename")
    size = np.stack([tables.array("sample_data", "height"), tables.array("sample_data", "width")], axis=1)
    cameras = np.array([kind == "camera" for kind in modalities])
    return Readings(kept, row, column[kept], len(channels), cameras), {
        "reading_file": bytes_of([files[record] for record in kept.tolist()]),
        "reading_time": time[kept],
        "reading_pose": _poses(tables, "ego_pose")[tables.rows["sample_data", "ego_pose_token"][kept]],
        "reading_calibration": calibration[kept].astype(np.int32),
        "reading_size": size[kept].astype(np.int32),
        "reading_previous": row[tables.rows["sample_data", "prev"][kept]].astype(np.int32),
    }


def _annotations(tables: Tables, frame_of: npt.NDArray[np.int64]) -> Arrays:
    """Return the annotations by frame, in table order within a frame."""
    frame = frame_of[tables.rows["sample_annotation", "sample_token"]]
    order = np.argsort(frame, kind="stable")
    geometry = [tables.array("sample_annotation", field) for field in ("translation", "size", "rotation")]
    category = tables.rows["instance", "category_token"][tables.rows["sample_annotation", "instance_token"]]
    points = [tables.array("sample_annotation", field) for field in ("num_lidar_pts", "num_radar_pts")]
    return {
        "box_frame": frame[order],
        "box_global": np.concatenate([*geometry, _velocities(tables)], axis=1)[order],
        "box_category": category[order].astype(np.int16),
        "box_attribute": tables.attributes[order].astype(np.int16),
        "box_points": np.stack(points, axis=1)[order].astype(np.int32),
    }


def _velocities(tables: Tables) -> npt.NDArray[np.float64]:
    """Return the velocity of each annotation in the global frame, NaN where it cannot be told.

    As the devkit's ``box_velocity``: the difference of the neighbours in the track, if they are at most 1.5 s apart
    from each other (3 s if the annotation lies between them).
    """
    previous, following = (tables.rows["sample_annotation", field] for field in ("prev", "next"))
    own = np.arange(len(previous))
    first, last = np.where(previous < 0, own, previous), np.where(following < 0, own, following)
    position = tables.array("sample_annotation", "translation")
    # Seconds before the subtraction, not after: it rounds as the devkit does, which metrics to the last digit need.
    second = 1e-6 * tables.array("sample", "timestamp")[tables.rows["sample_annotation", "sample_token"]]
    elapsed = second[last] - second[first]
    limit = np.where((previous >= 0) & (following >= 0), 3.0, 1.5)
    known = (first != last) & (elapsed <= limit) & (elapsed != 0)
    velocity = np.full((len(own), 2), np.nan)
    velocity[known] = (position[last] - position[first])[known, :2] / elapsed[known, None]
    return velocity


def _in_lidar(boxes: npt.NDArray[np.float64], global_from_lidar: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Return global boxes ``[A 12]`` in the LiDAR frame of their key frame, as ``types.BOX_FIELDS``."""
    lidar_from_global = np.swapaxes(global_from_lidar[:, :3, :3], 1, 2)
    center = np.einsum("aij,aj->ai", lidar_from_global, boxes[:, :3] - global_from_lidar[:, :3, 3])
    heading = np.einsum("aij,aj->ai", lidar_from_global, rotations(boxes[:, 6:10])[:, :, 0])
    yaw = np.arctan2(heading[:, 1], heading[:, 0])
    velocity = np.einsum("aij,aj->ai", lidar_from_global[:, :2, :2], boxes[:, 10:12])
    length_width_height = boxes[:, [4, 3, 5]]
    in_lidar: npt.NDArray[np.float64] = np.concatenate(
        [center, length_width_height, yaw[:, None], velocity], axis=1, dtype=np.float64
    )
    return in_lidar.astype(np.float32)


def _digest(frames: Arrays, boxes: Arrays, meta: dict[str, Any]) -> str:
    """Return the SHA-256 over the tokens of all key frames and over the annotations of each."""
    keys = np.flatnonzero(frames["frame_step"] == 0)
    starts, stops = frames["frame_boxes"][keys].tolist(), frames["frame_boxes"][keys + 1].tolist()
    total = hashlib.sha256(np.array(frames["frame_token"][keys].tolist(), dtype=np.bytes_).tobytes())
    for start, stop in zip(starts, stops, strict=True):
        rows = slice(start, stop)
        names = [
            [meta["categories"][number] for number in boxes["box_category"][rows].tolist()],
            [meta["attributes"][number] if number >= 0 else "" for number in boxes["box_attribute"][rows].tolist()],
        ]
        # The global frame alone: a corrected ego pose is not a new annotation.
        numbers = boxes["box_global"][rows].tobytes() + boxes["box_points"][rows].tobytes()
        total.update(hashlib.sha256("\n".join(map("\t".join, names)).encode() + numbers).digest())
    return total.hexdigest()
