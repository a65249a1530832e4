"""The smallest config of every plug-in that ships with bevkd: a new plug-in needs one entry here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bevkd.data.join import View
from bevkd.data.source import Sensor
from bevkd.testing.losses import STUDENT

CLASSES = ("car", "truck", "pedestrian")
CAMERA: dict[str, Any] = {name: value for name, value in STUDENT["encoder"].items() if name != "name"}
GRID = {"x_m": [-12.8, 12.8], "y_m": [-12.8, 12.8], "z_m": [-5, 3], "cell_m": 1.6}
TASKS = [["car", "truck"], ["pedestrian"]]
VOXEL = {"voxel_m": [0.8, 0.8, 1.0], "channels": [8, 8], "blocks": 1, "out_channels": 8}
DETECTOR = {
    "grid": GRID,
    "encoder": {"name": "voxel", **VOXEL},
    "bev_encoder": STUDENT["bev_encoder"],
    "head": STUDENT["head"],
}


@dataclass(frozen=True)
class EncoderCase:
    """An encoder's config without its name, and what it reads."""

    config: dict[str, Any]
    view: View


@dataclass(frozen=True)
class SourceCase:
    """How a source's config is found, and what the data set has.

    Attributes:
        config: given the folder of a generated world and that of real samples (None where there are none).
    """

    config: Callable[[Path, Path | None], dict[str, Any] | None]
    sensors: frozenset[Sensor] = field(default_factory=lambda: frozenset({"lidar", "camera", "radar"}))


def lidar() -> View:
    """Return what LiDAR encoders read."""
    return View(frozenset({"lidar"}))


def cameras(*more: Sensor) -> View:
    """Return what camera encoders read."""
    return View(frozenset({"camera", *more}), CAMERA["image_height"], CAMERA["image_width"])


ENCODERS: Mapping[str, EncoderCase] = {
    "voxel": EncoderCase(VOXEL, lidar()),
    "lift_splat": EncoderCase(CAMERA, cameras()),
}

HEADS: Mapping[str, dict[str, Any]] = {
    "center": {"tasks": TASKS, "channels": 8, "min_radius": 1, "nms": {"type": "circle", "squared_distance": [4, 1]}},
}

TEACHERS: Mapping[str, dict[str, Any]] = {
    "detector": {"detector": DETECTOR},
    "synthetic": {"grid": GRID, "bev_low": 8, "bev_high": 8, "tasks": 2, "boxes": 10, "lidar": True},
}

LOSSES: Mapping[str, tuple[dict[str, Any], ...]] = {
    "x3kd": ({"score": 0.1},),
    "unidistill": ({}, {"adapter": True, "pseudo_score": 0.3}, {"source": "points"}),
}

SOURCES: Mapping[str, SourceCase] = {
    "nuscenes": SourceCase(
        lambda world, _: {"root": str(world), "version": "v1.0-world", "split": "world_train", "sweeps": 2}
    ),
}
