"""nuScenes, and every data set written in its format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, UInt8
from pydantic import AfterValidator, BeforeValidator, Field
from torch import Tensor

from bevkd.config import PluginConfig
from bevkd.data.identity import DatasetIdentity
from bevkd.data.images import ImageView, read_image
from bevkd.data.source import Sensor
from bevkd.data.sources._files import skipped_notes
from bevkd.data.sources._labels import check_labels
from bevkd.data.sources._nuscenes_build import transforms
from bevkd.data.sources._nuscenes_files import file_faults, read_lidar, read_radar
from bevkd.data.sources._nuscenes_index import FrameIndex, open_index
from bevkd.data.sources._nuscenes_select import (
    check_folders,
    frame_notes,
    select_frames,
    select_labelled,
    with_readings,
)
from bevkd.errors import DataError
from bevkd.geometry.camera import lidar_depth
from bevkd.types import Boxes, Frame, LidarDepth, Rig

_MODALITY = {"previous_camera": "camera", "lidar_depth": "lidar"}
"""Modality of the channels whose files a sensor reads, where it has another name."""

_READ_BY: Mapping[str, frozenset[Sensor]] = {
    "camera": frozenset({"camera", "previous_camera", "lidar_depth"}),
    "radar": frozenset({"radar"}),
}
"""Sensors that cannot be loaded without the readings of a modality."""

CLASSES = (
    "car",
    "truck",
    "bus",
    "trailer",
    "construction_vehicle",
    "pedestrian",
    "motorcycle",
    "bicycle",
    "traffic_cone",
    "barrier",
)
"""The detection classes, in the devkit's order."""


def check_classes(classes: tuple[str, ...]) -> tuple[str, ...]:
    unknown = [name for name in classes if name not in CLASSES]
    if unknown:
        raise ValueError(f"unknown classes {', '.join(unknown)}; the detection classes are {', '.join(CLASSES)}")
    if not classes or len(set(classes)) < len(classes):
        raise ValueError("name at least one class, and each of them once")
    return classes


class Config(PluginConfig):
    """Which frames to read from where.

    Attributes:
        root: folder that holds ``samples/``, ``sweeps/`` and the folder ``version``.
        split: official split, or one of ``splits.json`` in the version's folder.
        scenes, tokens: narrow the split to these scene names, and to exactly these sample tokens.
        sweep_frames: take every n-th LiDAR sweep after each key frame, too, as a frame without annotations; 0 takes key
            frames only. Its token is that of the sweep's ``sample_data`` record. It has of each camera and radar the
            reading nearest in time, and is left out if one that is loaded has none within 50 ms.
        classes: detection classes wanted; boxes of others are left out.
        sweeps: LiDAR scans put together per frame, with the key frame's own.
        radar_sweeps: radar scans put together per frame and radar.
        min_points: LiDAR and radar returns that a box must contain to be a label.
        labels: labelled key frames: a fraction (whole scenes are drawn), scene names, or a file with a token per line.
        labels_seed: changes the scenes that are drawn.
        skip_missing: leave out frames with missing or damaged sensor files instead of refusing to start.
        index_dir: where the frame index is kept; None means the user's cache folder.
    """

    name: Literal["nuscenes"] = "nuscenes"
    root: Path
    version: str = "v1.0-trainval"
    split: str = "train"
    scenes: tuple[str, ...] | None = None
    tokens: tuple[str, ...] | None = None
    sweep_frames: int = Field(default=0, ge=0)
    classes: Annotated[tuple[str, ...], AfterValidator(check_classes)] = CLASSES
    sweeps: int = Field(default=10, ge=1, le=10)
    radar_sweeps: int = Field(default=6, ge=1, le=13)
    min_points: int = Field(default=1, ge=0)
    labels: Annotated[float | tuple[str, ...] | Path, BeforeValidator(check_labels)] = 1.0
    labels_seed: int = 0
    skip_missing: bool = False
    index_dir: Path | None = None


@dataclass(frozen=True)
class GlobalBoxes:
    """All annotations of one frame in the map frame, whatever their category; A of them.

    Attributes:
        categories: category names, e.g. ``static_object.bicycle_rack``.
        names: detection class of each, None for categories outside the ten.
        attributes: attribute names, empty where there is none.
        translation, size: metres; size is (width, length, height).
        rotation: quaternion (w, x, y, z).
        velocity: (vx, vy) m/s, NaN where unknown.
        points: LiDAR and radar returns inside.
    """

    categories: tuple[str, ...]
    names: tuple[str | None, ...]
    attributes: tuple[str, ...]
    translation: npt.NDArray[np.float64]
    size: npt.NDArray[np.float64]
    rotation: npt.NDArray[np.float64]
    velocity: npt.NDArray[np.float64]
    points: npt.NDArray[np.int64]


class NuScenesSource:
    """The frames that a :class:`Config` asks for; a ``FrameSource``.

    Attributes:
        annotated: key frames, if the version has annotations; the official test split has none.
        notes: what to tell users about the choice of frames.
        cameras: camera names, in the rig's order.
    """

    metrics: str | None = "nuscenes"

    def __init__(
        self, config: Config, index: FrameIndex, rows: list[int], labelled: frozenset[str], notes: Sequence[str] = ()
    ) -> None:
        self.config, self.index, self.notes = config, index, tuple(notes)
        self.classes: tuple[str, ...] = config.classes
        self.tokens = index.tokens(rows)
        self.annotated = frozenset(index.tokens(index.key_frames(rows)) if len(index["box_category"]) else ())
        self.labelled = labelled & self.annotated
        self.cameras = tuple(name for _, name in index.channels("camera"))
        self._label_of = np.array(
            [self.classes.index(name) if name in self.classes else -1 for name in index.meta["detection_names"]] or [-1]
        )
        self.identity = DatasetIdentity(
            name=config.name,
            version=config.version,
            split=config.split,
            frames=len(self.tokens),
            # Over the whole version, so that a part of it is still known as the same data set.
            annotation_digest=index.meta["annotation_digest"],
        )

    def load(self, token: str, sensors: frozenset[Sensor], views: Mapping[str, ImageView] | None = None) -> Frame:
        """Return the frame with the sensors asked for; see ``FrameSource.load``."""
        row = self._row(token)
        images, rig = None, None
        if "camera" in sensors:
            images, rig = self._cameras(row, views, "previous_camera" in sensors)
        return Frame(
            token=token,
            timestamp_us=int(self.index["frame_time"][row]),
            points=self._points(row) if "lidar" in sensors else None,
            images=images,
            rig=rig,
            radar=self._radar(row) if "radar" in sensors else None,
            boxes=self.annotations(token) if token in self.labelled else None,
            lidar_depth=self._lidar_depth(row, views) if "lidar_depth" in sensors else None,
        )

    def image_sizes(self, token: str) -> dict[str, tuple[int, int]]:
        """Return ``(H, W)`` of each camera's original image, in the rig's order, from the tables."""
        readings, sizes = self.index["frame_reading"][self._row(token)].tolist(), self.index["reading_size"]
        present = {name: readings[column] for column, name in self.index.channels("camera") if readings[column] >= 0}
        return {name: (int(sizes[reading, 0]), int(sizes[reading, 1])) for name, reading in present.items()}

    def annotations(self, token: str) -> Boxes:
        """Return the boxes of the wanted classes with at least ``min_points`` returns; sweep frames have none."""
        rows = self._boxes(token)
        labels = self._label_of[self.index["box_category"][rows]]
        kept = (labels >= 0) & (self.index["box_points"][rows].sum(axis=1) >= self.config.min_points)
        values = torch.from_numpy(self.index["box_lidar"][rows][kept])
        return Boxes(values, torch.from_numpy(labels[kept]).long(), torch.ones(len(values)))

    def global_annotations(self, token: str) -> GlobalBoxes:
        """Return all annotations of the frame in the map frame, for the metrics."""
        rows, meta = self._boxes(token), self.index.meta
        categories = self.index["box_category"][rows].tolist()
        attributes = self.index["box_attribute"][rows].tolist()
        values = np.array(self.index["box_global"][rows])
        return GlobalBoxes(
            categories=tuple(meta["categories"][number] for number in categories),
            names=tuple(meta["detection_names"][number] for number in categories),
            attributes=tuple(meta["attributes"][number] if number >= 0 else "" for number in attributes),
            translation=values[:, 0:3],
            size=values[:, 3:6],
            rotation=values[:, 6:10],
            velocity=values[:, 10:12],
            points=self.index["box_points"][rows].sum(axis=1, dtype=np.int64),
        )

    def global_from_lidar(self, token: str) -> Float[Tensor, "4 4"]:
        """Return the pose of the BEV frame in the map frame (float64)."""
        return torch.from_numpy(self._global_from_sensor(self._lidar(self._row(token))))

    def ego_position(self, token: str) -> npt.NDArray[np.float64]:
        """Return where the car is in the map frame (x, y, z, metres) at the time of the LiDAR scan."""
        return np.array(self.index["reading_pose"][self._lidar(self._row(token)), :3])

    def scene(self, token: str) -> str:
        """Return the name of the frame's scene."""
        return str(self.index.meta["scenes"][self.index["frame_scene"][self._row(token)]])

    def check(self, tokens: Sequence[str], sensors: frozenset[Sensor]) -> list[str]:
        """Return a fault, naming the file, for each sensor file of ``tokens`` that is missing or damaged."""
        faults = self._faults(tokens, sensors)
        return list(dict.fromkeys(fault for frame in faults.values() for fault in frame))

    def whole(self, tokens: Sequence[str], sensors: frozenset[Sensor]) -> list[str]:
        """Return those of ``tokens`` whose sensor files are all there and undamaged."""
        faults = self._faults(tokens, sensors)
        return [token for token in tokens if not faults[token]]

    def _faults(self, tokens: Sequence[str], sensors: frozenset[Sensor]) -> dict[str, list[str]]:
        wanted = {token: self._files(token, sensors) for token in tokens}
        files = list(dict.fromkeys(file for files, _ in wanted.values() for file in files))
        broken = file_faults(self.config.root, files)
        return {
            token: [*absent, *(f"{self.config.root / file}: {broken[file]}" for file in files if file in broken)]
            for token, (files, absent) in wanted.items()
        }

    def _files(self, token: str, sensors: frozenset[Sensor]) -> tuple[list[str], list[str]]:
        """Return the files that loading the frame reads, and a fault for each sensor that has no record."""
        sweeps = {"lidar": self.config.sweeps, "radar": self.config.radar_sweeps}
        row = self._row(token)
        files, absent = [], []
        for sensor in sorted(sensors):
            readings = self.index["frame_reading"][self._previous(row) if sensor == "previous_camera" else row]
            for column, name in self.index.channels(_MODALITY.get(sensor, sensor)):
                chain = self.index.sweeps(int(readings[column]), sweeps.get(sensor, 1))
                files += [self.index.file(reading) for reading in chain]
                if not chain:
                    absent.append(f"frame {token}: sample_data.json has no reading of {name}")
        return files, absent

    def _previous(self, row: int) -> int:
        """Return the row of the frame whose images are the previous ones of a frame."""
        return int(self.index["frame_previous"][row])

    def _row(self, token: str) -> int:
        row = self.index.row(token)
        if row is None:
            raise DataError(
                f"sample token '{token}' is not in {self.config.root / self.config.version}. "
                "Correct the token, or the recipe's root and version."
            )
        return row

    def _boxes(self, token: str) -> slice:
        row, offsets = self._row(token), self.index["frame_boxes"]
        return slice(int(offsets[row]), int(offsets[row + 1]))

    def _lidar(self, row: int) -> int:
        return int(self.index["frame_reading"][row, 0])

    def _global_from_sensor(self, reading: int) -> npt.NDArray[np.float64]:
        calibration = self.index["calibration_pose"][self.index["reading_calibration"][reading]]
        global_from_ego, ego_from_sensor = transforms(np.stack([self.index["reading_pose"][reading], calibration]))
        fused: npt.NDArray[np.float64] = global_from_ego @ ego_from_sensor
        return fused

    def _lidar_from_sensor(self, row: int, reading: int) -> npt.NDArray[np.float64]:
        """Return the transform to the frame's LiDAR frame, through the ego poses of both timestamps."""
        lidar_from_sensor: npt.NDArray[np.float64] = np.linalg.solve(
            self._global_from_sensor(self._lidar(row)), self._global_from_sensor(reading)
        )
        return lidar_from_sensor

    def _points(self, row: int) -> Float[Tensor, "P 5"]:
        scans = []
        for reading in self.index.sweeps(self._lidar(row), self.config.sweeps):
            points = read_lidar(self.config.root / self.index.file(reading))
            lidar_from_sweep = self._lidar_from_sensor(row, reading)
            xyz = points[:, :3] @ lidar_from_sweep[:3, :3].T + lidar_from_sweep[:3, 3]
            scans.append(np.column_stack([xyz, points[:, 3], self._lags(row, reading, len(points))]))
        return torch.from_numpy(np.concatenate(scans).astype(np.float32))

    def _radar(self, row: int) -> Float[Tensor, "R 7"]:
        scans = [np.zeros((0, 7))]
        for column, _ in self.index.channels("radar"):
            newest = int(self.index["frame_reading"][row, column])
            for reading in self.index.sweeps(newest, self.config.radar_sweeps):
                points = read_radar(self.config.root / self.index.file(reading))
                lidar_from_radar = self._lidar_from_sensor(row, reading)
                xyz = points[:, :3] @ lidar_from_radar[:3, :3].T + lidar_from_radar[:3, 3]
                velocity = points[:, 3:5] @ lidar_from_radar[:2, :2].T
                scans.append(np.column_stack([xyz, velocity, points[:, 5], self._lags(row, reading, len(points))]))
        return torch.from_numpy(np.concatenate(scans).astype(np.float32))

    def _lags(self, row: int, reading: int, count: int) -> npt.NDArray[np.float64]:
        times = self.index["reading_time"]
        return np.full(count, 1e-6 * float(times[self._lidar(row)] - times[reading]))

    def _cameras(
        self, row: int, views: Mapping[str, ImageView] | None, previous: bool
    ) -> tuple[UInt8[Tensor, "N 3 H W"], Rig]:
        shots = self._shots(row, views)
        if previous:
            shots = {
                **shots,
                **{f"{name}@-1": reading for name, reading in self._shots(self._previous(row), views).items()},
            }
        sizes = self.index["reading_size"]
        seen = {name: None if views is None else views[name.removesuffix("@-1")] for name in shots}
        images = [
            read_image(self.config.root / self.index.file(reading), seen[name], tuple(sizes[reading].tolist()))
            for name, reading in shots.items()
        ]
        if len({image.shape for image in images}) > 1:
            raise DataError("the cameras have images of different sizes. Give each a view of the same size.")
        originals = [torch.eye(3) if view is None else view.matrix() for view in seen.values()]
        view_from_original = torch.stack(originals).double()
        intrinsics, poses = self._calibration(row, list(shots.values()))
        return torch.stack(images), Rig(
            tuple(shots), (view_from_original @ intrinsics).float(), poses.float(), view_from_original.float()
        )

    def _shots(self, row: int, views: Mapping[str, ImageView] | None) -> dict[str, int]:
        """Return the reading of each camera wanted at a frame, in the rig's order."""
        wanted = self.cameras if views is None else tuple(views)
        unknown = [name for name in wanted if name not in self.cameras]
        if unknown or not wanted:
            raise DataError(f"no camera {', '.join(unknown)}; the data set has {', '.join(self.cameras) or 'none'}.")
        shots = {
            name: int(self.index["frame_reading"][row, column])
            for column, name in self.index.channels("camera")
            if name in wanted
        }
        for name, reading in shots.items():
            if reading < 0:
                token = self.index["frame_token"][row].decode()
                raise DataError(f"frame {token} has no reading of {name} in sample_data.json. Leave the frame out.")
        return shots

    def _calibration(self, row: int, readings: Sequence[int]) -> tuple[Float[Tensor, "N 3 3"], Float[Tensor, "N 4 4"]]:
        """Return intrinsics of the original images and ``lidar_from_camera``, both float64."""
        calibrations = self.index["reading_calibration"][np.array(readings)]
        intrinsics = torch.tensor(self.index["calibration_intrinsics"][calibrations])
        poses = np.stack([self._lidar_from_sensor(row, reading) for reading in readings])
        return intrinsics, torch.from_numpy(poses)

    def _lidar_depth(self, row: int, views: Mapping[str, ImageView] | None) -> LidarDepth:
        """Return the depth of the frame's own returns; sweeps of other times do not fit moving objects."""
        reading = self._lidar(row)
        points = torch.from_numpy(read_lidar(self.config.root / self.index.file(reading))[:, :3].copy())
        readings = list(self._shots(row, views).values())
        intrinsics, poses = self._calibration(row, readings)
        sizes = torch.tensor(self.index["reading_size"][np.array(readings)]).float()
        return lidar_depth(points, intrinsics, poses, sizes)


def build(config: Config, sensors: frozenset[Sensor] = frozenset()) -> NuScenesSource:
    """Return the source: sweep frames have readings for all ``sensors``; with ``skip_missing`` files are whole.

    Raises:
        DataError: folder, version, split, scene or token unknown; tables damaged; there is no such sweep; or every
            frame was skipped.
    """
    tables = check_folders(config.root, config.version)
    index = open_index(tables, config.index_dir)
    chosen = select_frames(index, tables, config.split, config.scenes, config.tokens, config.sweep_frames)
    labelled = select_labelled(index, index.key_frames(chosen), config.labels, config.labels_seed)
    rows = with_readings(index, chosen, [modality for modality, read in _READ_BY.items() if read & sensors])
    lacking = len(chosen) - len(rows)
    source = NuScenesSource(config, index, rows, labelled, frame_notes(index, rows, lacking, config.split))
    if not config.skip_missing or not sensors:
        return source
    kept = source.whole(source.tokens, sensors)
    if not kept:
        faults = source.check(source.tokens, sensors)
        raise DataError(
            f"skip_missing leaves no frame of split '{config.split}': {len(faults)} faults, first {faults[0]}. "
            "Download the sensor files, or correct root."
        )
    there = set(kept)
    whole = [row for row, token in zip(rows, source.tokens, strict=True) if token in there]
    notes = frame_notes(index, whole, lacking, config.split)
    notes += skipped_notes(len(rows) - len(whole), len(rows), config.split)
    return NuScenesSource(config, index, whole, labelled, notes)
