"""Small frames with known geometry, and questions to ask a picture."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bevkd.grid import BEVGrid
from bevkd.types import Boxes, Frame, Rig
from bevkd.viz.image import Picture, render
from bevkd.viz.style import rgb

CLASSES = ("car", "pedestrian")
GRID = BEVGrid(x_m=(-20.0, 20.0), y_m=(-20.0, 20.0), cell_m=1.0)
HEIGHT, WIDTH, FOCAL = 90, 160, 100.0


def lidar_from_forward_camera() -> Tensor:
    """Return the pose of a camera at the origin that looks along +y of a nuScenes LiDAR frame."""
    return torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])


def intrinsics() -> Tensor:
    """Return a pinhole camera with its principal point at the centre of the image."""
    return torch.tensor([[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]])


def boxes(*rows: list[float], score: float = 1.0) -> Boxes:
    """Return boxes from (x, y, z, length, width, height, yaw), with unknown velocity."""
    values = torch.tensor([[*row, float("nan"), float("nan")] for row in rows]).reshape(-1, 9)
    return Boxes(values, torch.zeros(len(rows), dtype=torch.int64), torch.full((len(rows),), score))


def frame(names: tuple[str, ...] = ("CAM_FRONT",), shade: int = 40, **changes: object) -> Frame:
    """Return a frame with plain grey images; every camera looks along +y from the origin."""
    count = len(names)
    rig = Rig(
        names,
        intrinsics().expand(count, 3, 3),
        lidar_from_forward_camera().expand(count, 4, 4),
        torch.eye(3).expand(count, 3, 3),
    )
    images = torch.full((count, 3, HEIGHT, WIDTH), shade, dtype=torch.uint8)
    return Frame(**{"token": "abc", "timestamp_us": 0, "images": images, "rig": rig, **changes})  # type: ignore[arg-type]


def where(picture: Picture, color: str, tolerance: int = 24) -> NDArray[np.int64]:
    """Return ``(row, column)`` of each pixel whose channels are all within ``tolerance`` of the colour."""
    pixels = np.asarray(render(picture))
    low, high = (np.clip(np.array(rgb(color)) + shift, 0, 255).astype(np.uint8) for shift in (-tolerance, tolerance))
    return np.argwhere(((pixels >= low) & (pixels <= high)).all(axis=-1))
