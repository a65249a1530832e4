"""KITTI folders for tests: text files as the benchmark has them, without sensor files unless asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

CALIBRATION = """P0: 700 0 600 0 0 700 180 0 0 0 1 0
P2: 700 0 600 45 0 700 180 0.2 0 0 1 0.003
R0_rect: 0.9999 0.0098 -0.0074 -0.0099 0.9999 -0.0043 0.0074 0.0044 0.9999
Tr_velo_to_cam: 0.0075 -0.9999 -0.0006 -0.004 0.0148 0.0007 -0.9998 -0.076 0.9998 0.0075 0.0148 -0.27
Tr_imu_to_velo: 1 0 0 -0.8 0 1 0 0.3 0 0 1 -0.8

"""
"""Rounded from a real frame: rotations to 1e-4."""

SIZE = (375, 1242)

Line = Sequence[str | float]


def text(lines: Sequence[Line]) -> str:
    return "".join(" ".join(str(value) for value in line) + "\n" for line in lines)


def label(
    name: str = "Car",
    location: tuple[float, float, float] = (2.0, 1.6, 20.0),
    *,
    rotation: float = 0.3,
    size: tuple[float, float, float] = (1.5, 1.6, 4.0),
    rectangle: tuple[float, float, float, float] = (600.0, 150.0, 700.0, 210.0),
    truncated: float = 0.0,
    occluded: int = 0,
) -> Line:
    """Return a label line; ``size`` is height, width, length."""
    return (name, truncated, occluded, 0.1, *rectangle, *size, *location, rotation)


def write(root: Path, labels: Mapping[str, Sequence[Line]], lists: Mapping[str, Sequence[str]] | None = None) -> Path:
    """Write ``training`` with labels, calibrations and blank images, and ``ImageSets``; return ``root``."""
    for folder in ("label_2", "calib", "image_2", "velodyne"):
        (root / "training" / folder).mkdir(parents=True, exist_ok=True)
    blank = Image.new("RGB", (SIZE[1], SIZE[0]))
    for token, lines in labels.items():
        (root / "training" / "label_2" / f"{token}.txt").write_text(text(lines))
        (root / "training" / "calib" / f"{token}.txt").write_text(CALIBRATION)
        blank.save(root / "training" / "image_2" / f"{token}.png", compress_level=1)
    (root / "ImageSets").mkdir(exist_ok=True)
    for name, tokens in (lists or {}).items():
        (root / "ImageSets" / f"{name}.txt").write_text("\n".join(tokens) + "\n")
    return root


def write_points(root: Path, token: str, points: Sequence[Sequence[float]]) -> Path:
    """Write a scan of x, y, z, reflectance and return its path."""
    path = root / "training" / "velodyne" / f"{token}.bin"
    np.array(points, dtype=np.float32).tofile(path)
    return path
