"""Text and sensor files of KITTI's object benchmark.

Rectified camera frame: x right, y down, z forward, metres. Labels and results stand in it; lines have 15 columns, those
of results a 16th with the score.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from bevkd.errors import DataError

LIDAR_RECORD_BYTES = 16
"""One LiDAR return: x, y, z (m), reflectance (0-1), each a float32."""

DONT_CARE = "DontCare"
"""Label of an image region in which objects were not labelled; it has no 3-D box."""

_COLUMNS = 14
_MATRICES = {"P2": (3, 4), "R0_rect": (3, 3), "Tr_velo_to_cam": (3, 4)}

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Calibration:
    """How the velodyne frame, the rectified camera frame and the pixels of image 2 belong together.

    Attributes:
        image_from_rectified: the 3x4 projection P2.
        rectified_from_lidar: 4x4, R0_rect times Tr_velo_to_cam.
    """

    image_from_rectified: Floats
    rectified_from_lidar: Floats

    @property
    def intrinsics(self) -> Floats:
        """3x3 matrix of camera 2."""
        return self.image_from_rectified[:, :3]

    @property
    def lidar_from_camera(self) -> Floats:
        """4x4 pose of camera 2, which stands beside the origin of the rectified frame, in the velodyne frame."""
        camera_from_rectified = np.eye(4)
        camera_from_rectified[:3, 3] = np.linalg.solve(self.intrinsics, self.image_from_rectified[:, 3])
        inverse: Floats = np.linalg.inv(camera_from_rectified @ self.rectified_from_lidar)
        return inverse


@dataclass(frozen=True)
class Objects:
    """Labels or results of one frame, in the order of the file; n of them.

    Attributes:
        names: classes, ``DontCare`` included.
        truncated: share of the object that leaves the image, from 0 to 1; -1 unknown.
        occluded: 0 fully visible, 1 partly, 2 largely occluded, 3 unknown; -1 unknown.
        alpha: observation angle, rad.
        rectangles: left, top, right, bottom in pixels of image 2, ``[n, 4]``.
        sizes: height, width, length in metres, ``[n, 3]``.
        locations: bottom centre in the rectified camera frame, metres, ``[n, 3]``.
        rotations: heading about the camera's y axis (0 looks along x), rad.
        scores: confidence of results; ones for labels.
    """

    names: tuple[str, ...]
    truncated: Floats
    occluded: Floats
    alpha: Floats
    rectangles: Floats
    sizes: Floats
    locations: Floats
    rotations: Floats
    scores: Floats

    @classmethod
    def from_table(cls, names: Iterable[str], table: Floats) -> Objects:
        """Return objects from the 15 numbers of each line, the score included."""
        truncated, occluded, alpha = table[:, 0], table[:, 1], table[:, 2]
        return cls(
            tuple(names), truncated, occluded, alpha, table[:, 3:7], table[:, 7:10], table[:, 10:13], *table[:, 13:].T
        )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: npt.NDArray[np.bool_]) -> Objects:
        names = tuple(name for name, kept in zip(self.names, index.tolist(), strict=True) if kept)
        return Objects.from_table(names, self.table()[index])

    def table(self) -> Floats:
        """Return the 15 numbers of each line, the score included."""
        edges = (self.truncated, self.occluded, self.alpha, self.rectangles, self.sizes, self.locations)
        return np.column_stack([*edges, self.rotations, self.scores])


def read_calibration(path: Path) -> Calibration:
    """Return what a calibration file says of the velodyne and of camera 2.

    Raises:
        DataError: the file is missing, or names each matrix that is missing or malformed, with its line.
    """
    found: dict[str, Floats] = {}
    for number, line in enumerate(_lines(path), start=1):
        key, colon, values = line.partition(":")
        if not colon or key not in _MATRICES:
            continue
        rows, columns = _MATRICES[key]
        try:
            found[key] = np.array([_finite(value) for value in values.split()]).reshape(rows, columns)
        except ValueError as error:
            raise DataError(
                f"{path}, line {number}: {key} must be {rows * columns} numbers ({error}). Restore the file."
            ) from error
    missing = [key for key in _MATRICES if key not in found]
    if missing:
        raise DataError(f"{path} has no {', '.join(missing)}. Restore the file.")
    rectification, lidar = np.eye(4), np.eye(4)
    rectification[:3, :3] = found["R0_rect"]
    lidar[:3] = found["Tr_velo_to_cam"]
    if np.linalg.matrix_rank(found["P2"][:, :3]) < 3 or np.linalg.matrix_rank(rectification @ lidar) < 4:
        raise DataError(f"{path}: P2, R0_rect or Tr_velo_to_cam cannot be inverted. Restore the file.")
    return Calibration(found["P2"], rectification @ lidar)


def read_objects(path: Path, scored: bool = False) -> Objects:
    """Return the objects in a label file, or in a result file if ``scored``.

    Raises:
        DataError: the file is missing, or a line is malformed; names its number.
    """
    names, rows = [], []
    for number, line in enumerate(_lines(path), start=1):
        name, *values = line.split()
        wanted = _COLUMNS + scored
        try:
            if len(values) != wanted:
                raise ValueError(f"{len(values)} numbers after the class, not {wanted}")
            row = [_finite(value) for value in values]
        except ValueError as error:
            kind = "result (class, 14 numbers, score)" if scored else "label (class and 14 numbers)"
            raise DataError(f"{path}, line {number} is no {kind}: {error}. Correct the line.") from error
        names.append(name)
        rows.append(row if scored else [*row, 1.0])
    return Objects.from_table(names, np.array(rows, dtype=np.float64).reshape(-1, _COLUMNS + 1))


def format_results(objects: Objects) -> str:
    """Return the content of a result file: lengths to a tenth of a millimetre, scores to a millionth."""
    lines = []
    for name, row in zip(objects.names, objects.table().tolist(), strict=True):
        numbers = [f"{value:.4f}" for value in row[2:-1]]
        lines.append(" ".join([name, f"{row[0]:g}", f"{row[1]:g}", *numbers, f"{row[-1]:.6f}"]) + "\n")
    return "".join(lines)


def read_points(path: Path) -> npt.NDArray[np.float32]:
    """Return x, y, z (velodyne frame, m) and reflectance (0-1), ``[P, 4]``.

    Raises:
        DataError: the file is missing or truncated.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}. Download it again, or leave its frame out."
        ) from error
    if len(content) % LIDAR_RECORD_BYTES or not content:
        raise DataError(
            f"{path}: {len(content)} bytes is no multiple of the {LIDAR_RECORD_BYTES} bytes of a LiDAR return. "
            "Download it again, or leave its frame out (skip_missing: true)."
        )
    return np.frombuffer(content, dtype=np.float32).reshape(-1, 4)


def read_image_size(path: Path) -> tuple[int, int]:
    """Return ``(H, W)`` from an image's header.

    Raises:
        DataError: the file is missing or no image.
    """
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise DataError(f"{path} is no image: {error}. Download it again, or leave its frame out.") from error


def _lines(path: Path) -> list[str]:
    """Return the lines of a text file without blank ones at its end."""
    try:
        return path.read_text(encoding="ascii").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}. Restore the file, or leave its frame out.") from error


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value
