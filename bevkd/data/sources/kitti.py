"""The KITTI 3-D object benchmark (Geiger et al., CVPR 2012): single frames of a velodyne and the left colour camera."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from pydantic import AfterValidator, BeforeValidator, Field
from torch import Tensor

from bevkd.config import PluginConfig
from bevkd.data.identity import DatasetIdentity
from bevkd.data.images import ImageView, read_image
from bevkd.data.source import Sensor
from bevkd.data.sources._files import file_fault, file_faults, skipped_notes
from bevkd.data.sources._kitti_boxes import NEAR_M, boxes_from_objects
from bevkd.data.sources._kitti_files import (
    DONT_CARE,
    LIDAR_RECORD_BYTES,
    Calibration,
    Objects,
    read_calibration,
    read_image_size,
    read_objects,
    read_points,
)
from bevkd.data.sources._labels import check_labels, drawn, listed, some
from bevkd.errors import DataError, report
from bevkd.geometry.boxes import points_in_boxes
from bevkd.geometry.camera import lidar_depth
from bevkd.types import Boxes, Frame, LidarDepth, Rig

CLASSES = ("Car", "Pedestrian", "Cyclist", "Van", "Person_sitting", "Truck", "Tram", "Misc")
"""All classes with 3-D boxes; the benchmark scores the first three."""

CAMERA = "image_2"
"""The camera that labels are of."""


def _check_classes(classes: tuple[str, ...]) -> tuple[str, ...]:
    unknown = [name for name in classes if name not in CLASSES]
    if unknown:
        raise ValueError(f"unknown classes {', '.join(unknown)}; KITTI's are {', '.join(CLASSES)}")
    if not classes or len(set(classes)) < len(classes):
        raise ValueError("name at least one class, and each of them once")
    return classes


def _check_labels(labels: object) -> object:
    if isinstance(labels, list | tuple):
        raise ValueError("KITTI has no scenes to name; give a fraction, or the path of a file with a token per line")
    return check_labels(labels)


class Config(PluginConfig):
    """Which frames to read from where.

    Attributes:
        root: folder that holds ``training/`` and ``testing/``, and ``ImageSets/`` with the lists of the splits.
        split: ``train``, ``val``, ``trainval`` or ``test``. Without a list, ``trainval`` is every labelled frame and
            ``test`` every frame of ``testing/``.
        tokens: narrow the split to exactly these frames, e.g. "000008".
        classes: classes wanted; boxes of others are left out.
        fov_only: keep only LiDAR returns that image 2 shows; nothing is labelled elsewhere.
        min_points: LiDAR returns that a box must contain to be a label; above 0 every frame's scan is read for it.
        labels: labelled frames: a fraction, or a file with a token per line.
        labels_seed: changes the frames that are drawn.
        skip_missing: leave out frames with missing or damaged sensor files instead of refusing to start.
    """

    name: Literal["kitti"] = "kitti"
    root: Path
    split: Literal["train", "val", "trainval", "test"] = "train"
    tokens: tuple[str, ...] | None = None
    classes: Annotated[tuple[str, ...], AfterValidator(_check_classes)] = CLASSES[:3]
    fov_only: bool = True
    min_points: int = Field(default=0, ge=0)
    labels: Annotated[float | Path, BeforeValidator(_check_labels)] = 1.0
    labels_seed: int = 0
    skip_missing: bool = False


class KittiSource:
    """The frames that a :class:`Config` asks for; a ``FrameSource``.

    Attributes:
        annotated: all frames, but none of split ``test``.
        notes: what to tell users about the choice of frames.
    """

    metrics: str | None = "kitti"

    def __init__(
        self, config: Config, tokens: Sequence[str], labelled: frozenset[str], digest: str, notes: Sequence[str] = ()
    ) -> None:
        self.config, self.notes = config, tuple(notes)
        self.folder = config.root / ("testing" if config.split == "test" else "training")
        self.classes: tuple[str, ...] = config.classes
        self.tokens = tuple(tokens)
        self.annotated = frozenset(() if config.split == "test" else self.tokens)
        self.labelled = labelled & self.annotated
        self.identity = DatasetIdentity(
            name=config.name,
            version="object",
            split=config.split,
            frames=len(self.tokens),
            annotation_digest=digest,
        )
        self._known = frozenset(self.tokens)
        self._sizes: dict[str, tuple[int, int]] = {}

    def load(self, token: str, sensors: frozenset[Sensor], views: Mapping[str, ImageView] | None = None) -> Frame:
        """Return the frame with the sensors asked for; see ``FrameSource.load``. KITTI does not say when it was."""
        images, rig = self._camera(token, views) if "camera" in sensors else (None, None)
        return Frame(
            token=token,
            timestamp_us=0,
            points=self._points(token) if "lidar" in sensors else None,
            images=images,
            rig=rig,
            boxes=self.annotations(token) if token in self.labelled else None,
            lidar_depth=self._lidar_depth(token) if "lidar_depth" in sensors else None,
        )

    def image_sizes(self, token: str) -> dict[str, tuple[int, int]]:
        """Return ``(H, W)`` of image 2, from its header."""
        if token not in self._sizes:
            self._sizes[token] = read_image_size(self._path("image_2", token))
        return {CAMERA: self._sizes[token]}

    def annotations(self, token: str) -> Boxes:
        """Return the boxes of the wanted classes with at least ``min_points`` returns, labelled frame or not."""
        objects = self.objects(token)
        objects = objects[np.array([name in self.classes for name in objects.names], dtype=np.bool_)]
        labels = np.array([self.classes.index(name) for name in objects.names], dtype=np.float64)
        boxes = boxes_from_objects(objects, labels, self.calibration(token))
        if not self.config.min_points:
            return boxes
        inside = points_in_boxes(self._points(token), boxes.values).sum(dim=1)
        return boxes[inside >= self.config.min_points]

    def objects(self, token: str) -> Objects:
        """Return all lines of the frame's label file, ``DontCare`` included, for the metrics.

        Raises:
            DataError: the split has no labels, or the file is missing or malformed.
        """
        if self.config.split == "test":
            raise DataError("KITTI's split 'test' has no labels. Set data.split to train, val or trainval.")
        path = self._path("label_2", token)
        objects = read_objects(path)
        unknown = [name for name in objects.names if name not in CLASSES and name != DONT_CARE]
        if unknown:
            raise DataError(f"{path} names the class '{unknown[0]}'; KITTI's are {', '.join(CLASSES)}. Correct it.")
        return objects

    def calibration(self, token: str) -> Calibration:
        """Return how velodyne frame, rectified camera frame and image 2 belong together."""
        return read_calibration(self._path("calib", token))

    def global_from_lidar(self, token: str) -> Float[Tensor, "4 4"]:
        """Return the identity: KITTI's object frames have no poses."""
        self._path("calib", token)
        return torch.eye(4, dtype=torch.float64)

    def check(self, tokens: Sequence[str], sensors: frozenset[Sensor]) -> list[str]:
        """Return a fault, naming the file, for each sensor file of ``tokens`` that is missing or damaged."""
        return [fault for faults in self._faults(tokens, sensors).values() for fault in faults]

    def whole(self, tokens: Sequence[str], sensors: frozenset[Sensor]) -> list[str]:
        """Return those of ``tokens`` whose sensor files are all there and undamaged."""
        faults = self._faults(tokens, sensors)
        return [token for token in tokens if not faults[token]]

    def _faults(self, tokens: Sequence[str], sensors: frozenset[Sensor]) -> dict[str, list[str]]:
        foreign = [f"KITTI has no {sensor}" for sensor in sorted(sensors & {"radar", "previous_camera"})]
        wanted = {token: self._files(token, sensors) for token in tokens}
        files = [str(path.relative_to(self.config.root)) for paths in wanted.values() for path in paths]
        broken = file_faults(self.config.root, files, partial(file_fault, lidar_record_bytes=LIDAR_RECORD_BYTES))
        faulty = {self.config.root / name: fault for name, fault in broken.items()}
        return {
            token: [*foreign, *(f"{path}: {faulty[path]}" for path in paths if path in faulty)]
            for token, paths in wanted.items()
        }

    def _files(self, token: str, sensors: frozenset[Sensor]) -> list[Path]:
        """Return the sensor files that loading the frame reads."""
        files = []
        if sensors & {"lidar", "lidar_depth"}:
            scan = self._scan(token)
            files.append(scan)
            if "lidar_depth" in sensors or (self.config.fov_only and scan.parent.name == "velodyne"):
                files.append(self._path("image_2", token))  # its size says what it shows
        if "camera" in sensors:
            files.append(self._path("image_2", token))
        return list(dict.fromkeys(files))

    def _path(self, kind: str, token: str) -> Path:
        if token not in self._known:
            raise DataError(
                f"frame '{token}' is not among the {len(self.tokens)} of split '{self.config.split}' in "
                f"{self.config.root}. Correct the token, or the recipe's root and split."
            )
        ending = {"image_2": ".png", "velodyne": ".bin", "velodyne_reduced": ".bin"}.get(kind, ".txt")
        return self.folder / kind / f"{token}{ending}"

    def _scan(self, token: str) -> Path:
        """Return the file of the scan; ``velodyne_reduced`` holds exactly the returns that ``fov_only`` keeps."""
        reduced = self._path("velodyne_reduced", token)
        return reduced if self.config.fov_only and reduced.exists() else self._path("velodyne", token)

    def _points(self, token: str) -> Float[Tensor, "P 5"]:
        scan = self._scan(token)
        points = torch.from_numpy(read_points(scan).copy())
        if self.config.fov_only and scan.parent.name == "velodyne":
            points = points[self._shown(token, points)]
        return torch.cat([points, torch.zeros(len(points), 1)], dim=1)

    def _shown(self, token: str, points: Float[Tensor, "P 4"]) -> Tensor:
        """Return which points image 2 shows."""
        calibration = self.calibration(token)
        projection = torch.from_numpy(calibration.image_from_rectified @ calibration.rectified_from_lidar)
        image = points[:, :3].double() @ projection[:, :3].T + projection[:, 3]
        height, width = self.image_sizes(token)[CAMERA]
        pixels = image[:, :2] / image[:, 2:].clamp(min=NEAR_M)
        inside = (pixels >= 0) & (pixels < pixels.new_tensor([width, height]))
        return inside.all(dim=1) & (image[:, 2] >= NEAR_M)

    def _camera(self, token: str, views: Mapping[str, ImageView] | None) -> tuple[UInt8[Tensor, "1 3 H W"], Rig]:
        wanted = (CAMERA,) if views is None else tuple(views)
        if wanted != (CAMERA,):
            raise DataError(f"no cameras {', '.join(wanted) or '(none named)'}; KITTI's labels are of {CAMERA}.")
        view = None if views is None else views[CAMERA]
        image = read_image(self._path("image_2", token), view)
        calibration = self.calibration(token)
        original = torch.eye(3, dtype=torch.float64) if view is None else view.matrix().double()
        return image[None], Rig(
            names=(CAMERA,),
            intrinsics=(original @ torch.from_numpy(calibration.intrinsics))[None].float(),
            lidar_from_camera=torch.from_numpy(calibration.lidar_from_camera)[None].float(),
            view_from_original=original[None].float(),
        )

    def _lidar_depth(self, token: str) -> LidarDepth:
        calibration = self.calibration(token)
        return lidar_depth(
            self._points(token),
            torch.from_numpy(calibration.intrinsics.copy())[None],
            torch.from_numpy(calibration.lidar_from_camera)[None],
            torch.tensor([self.image_sizes(token)[CAMERA]]).float(),
        )


def build(config: Config, sensors: frozenset[Sensor] = frozenset()) -> KittiSource:
    """Return the source; with ``skip_missing`` only frames whose files for ``sensors`` are whole.

    Raises:
        DataError: the folder or the split's list is missing, a token is unknown, or every frame was skipped.
    """
    tokens = _select(config)
    if isinstance(config.labels, Path):
        labelled = listed(config.labels, tokens)
    else:
        labelled = drawn({token: [token] for token in tokens}, config.labels, config.labels_seed)
    source = KittiSource(config, tokens, labelled, _digest(config))
    if not config.skip_missing or not sensors:
        return source
    kept = source.whole(tokens, sensors)
    if not kept:
        faults = source.check(tokens, sensors)
        raise DataError(
            f"skip_missing leaves no frame of split '{config.split}': {len(faults)} faults, first {faults[0]}. "
            "Download the sensor files, or correct root."
        )
    notes = skipped_notes(len(tokens) - len(kept), len(tokens), config.split)
    return KittiSource(config, kept, labelled, source.identity.annotation_digest, notes)


def _select(config: Config) -> list[str]:
    """Return the tokens of the split, narrowed to ``tokens``, in ascending order."""
    folder = config.root / ("testing/calib" if config.split == "test" else "training/label_2")
    if not folder.is_dir():
        raise DataError(f"no such folder: {folder}. Set root to the folder that holds training/ and testing/.")
    present = sorted(path.stem for path in folder.glob("*.txt"))
    path = config.root / "ImageSets" / f"{config.split}.txt"
    if path.is_file():
        tokens = sorted(dict.fromkeys(path.read_text(encoding="utf-8").split()))
        absent = sorted(set(tokens).difference(present))
        if absent:
            raise DataError(f"{path} lists {len(absent)} frames that {folder} does not hold: {some(absent)}.")
    elif config.split in ("trainval", "test"):
        tokens = present
    else:
        raise DataError(
            f"split '{config.split}' needs its list of frames, one per line, in {path}; OpenPCDet and mmdetection3d "
            "ship it under data/kitti/ImageSets. Or set split: trainval, with tokens."
        )
    if config.tokens is not None:
        faults = [f"'{token}' is not in split '{config.split}'" for token in config.tokens if token not in set(tokens)]
        faults += [f"'{token}' stands there more than once" for token, n in Counter(config.tokens).items() if n > 1]
        if faults:
            raise report(DataError, "'tokens' cannot be selected; correct the list or the split:", faults[:20])
        tokens = sorted(config.tokens)
    if not tokens:
        raise DataError(f"no frame is left of split '{config.split}' in {config.root}. Widen 'tokens'.")
    return tokens


def _digest(config: Config) -> str:
    """Return the SHA-256 over all label files, so that a part of the data set is still known as the same one."""
    files = sorted((config.root / "training" / "label_2").glob("*.txt"))
    with ThreadPoolExecutor(max_workers=8) as pool:
        contents = pool.map(lambda path: hashlib.sha256(path.stem.encode() + path.read_bytes()).digest(), files)
        return hashlib.sha256(b"".join(contents)).hexdigest()
