"""A data set of made-up frames that hold as much as real ones: for the suites, and to time detectors on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from bevkd.data.identity import DatasetIdentity
from bevkd.data.images import ImageView
from bevkd.data.source import Sensor
from bevkd.errors import DataError
from bevkd.geometry.camera import lidar_depth
from bevkd.grid import BEVGrid
from bevkd.types import Boxes, Frame, Rig

SENSOR_HEIGHT_M = 1.84
_SWEEP_S, _SPEED_M_PER_S, _TYPICAL_RANGE_M = 0.05, 10.0, 25.0
_WALLS, _ROUGHNESS_M = 360, 0.1
_BEAMS, _LOWEST_RAD, _HIGHEST_RAD = 32, math.radians(-30.7), math.radians(10.7)
_FOCAL_OVER_WIDTH = 0.79
_CAMERA_FROM_LIDAR = torch.tensor([[0.0, -1.0, 0.0], [0.0, 0.0, -1.0], [1.0, 0.0, 0.0]])
"""Axes: x forward, y left, z up become x right, y down, z forward."""


class MadeUpFrames:
    """A ``FrameSource`` whose frames are a function of their token.

    Of every three frames the first has boxes, the second is labelled and empty, and the third has no labels.

    Args:
        classes: of the boxes, drawn evenly.
        grid: where boxes stand; points reach beyond it.
        frames: how many.
        points, sweeps: LiDAR returns of a frame, over so many sweeps of a spinning scanner of 32 beams.
        radar: returns of a frame.
        cameras: around the car, evenly; each has an image of ``image_size`` (height, width).
        boxes: of each frame that has some.
    """

    metrics: str | None = None

    def __init__(
        self,
        classes: tuple[str, ...],
        grid: BEVGrid,
        frames: int = 3,
        points: int = 3000,
        sweeps: int = 2,
        radar: int = 60,
        cameras: int = 2,
        image_size: tuple[int, int] = (90, 160),
        boxes: int = 6,
    ) -> None:
        self.classes, self.grid = classes, grid
        self.tokens = tuple(f"frame-{index}" for index in range(frames))
        self.annotated = frozenset(self.tokens)
        self.labelled = frozenset(token for index, token in enumerate(self.tokens) if index % 3 != 2)
        self._points, self._sweeps, self._radar, self._boxes = points, sweeps, radar, boxes
        self._cameras, self._size = tuple(f"camera-{index}" for index in range(cameras)), image_size
        annotated = [self.annotations(token).pack().numpy().tobytes() for token in self.tokens]
        digest = hashlib.sha256(b"".join(annotated)).hexdigest()
        self.identity = DatasetIdentity(
            name="made-up", version="1", split="all", frames=frames, annotation_digest=digest
        )

    def load(self, token: str, sensors: frozenset[Sensor], views: Mapping[str, ImageView] | None = None) -> Frame:
        """Return the frame with the sensors asked for; see ``FrameSource.load``."""
        points = self._scan(token) if {"lidar", "lidar_depth"} & sensors else None
        images, rig = None, None
        if {"camera", "lidar_depth"} & sensors:
            names = self._cameras if views is None else tuple(views)
            rig = self._rig(names, views)
            if "previous_camera" in sensors:
                rig = _twice(rig)
            images = self._images(token, names, views, len(rig.names)) if "camera" in sensors else None
        depth = None
        if "lidar_depth" in sensors and points is not None and rig is not None:
            originals = self._rig(self._cameras if views is None else tuple(views), None)
            sizes = torch.tensor([self._size] * len(originals.names)).float()
            depth = lidar_depth(points, originals.intrinsics, originals.lidar_from_camera, sizes)
        return Frame(
            token=token,
            timestamp_us=500_000 * self._index(token),
            points=points if "lidar" in sensors else None,
            images=images,
            rig=rig if images is not None else None,
            radar=self._radar_returns(token) if "radar" in sensors else None,
            boxes=self.annotations(token) if token in self.labelled else None,
            lidar_depth=depth,
        )

    def image_sizes(self, token: str) -> dict[str, tuple[int, int]]:
        """Return the size of the original images."""
        self._index(token)
        return dict.fromkeys(self._cameras, self._size)

    def annotations(self, token: str) -> Boxes:
        """Return the frame's boxes, labelled or not."""
        index, chance = self._index(token), self._chance(token, "boxes")
        count = 0 if index % 3 == 1 else self._boxes
        x, y = self.grid.x_m, self.grid.y_m
        low = torch.tensor([x[0], y[0], -1.5, 1.0, 0.6, 1.2, -math.pi, -5.0, -5.0])
        high = torch.tensor([x[1], y[1], -0.5, 6.0, 2.4, 2.5, math.pi, 5.0, 5.0])
        values = low + torch.rand(count, 9, generator=chance) * (high - low) * 0.999
        return Boxes(values, torch.randint(len(self.classes), (count,), generator=chance), torch.ones(count))

    def global_from_lidar(self, token: str) -> Float[Tensor, "4 4"]:
        """Return the pose of a car that drives straight on."""
        pose = torch.eye(4, dtype=torch.float64)
        pose[0, 3] = _SPEED_M_PER_S * 0.5 * self._index(token)
        return pose

    def check(self, tokens: Sequence[str], sensors: frozenset[Sensor]) -> list[str]:
        """Return no fault: there are no files."""
        del tokens, sensors
        return []

    def _index(self, token: str) -> int:
        if token not in self.tokens:
            raise DataError(f"no made-up frame '{token}'. Ask for one of: {', '.join(self.tokens[:3])}, ...")
        return self.tokens.index(token)

    def _chance(self, token: str, what: str) -> torch.Generator:
        seed = hashlib.sha256(f"{token} {what}".encode()).digest()[:8]
        return torch.Generator().manual_seed(int.from_bytes(seed, "big") >> 1)

    def _scan(self, token: str) -> Float[Tensor, "P 5"]:
        """Return rays that end on the ground or on the walls before it, sweep by sweep.

        The walls stand still, so that returns crowd on surfaces and occupy about as many voxels as real ones do. Every
        box is hit by a few returns, as annotated ones are.
        """
        chance, count = self._chance(token, "points"), self._points
        azimuth = 2 * math.pi * torch.rand(count, generator=chance)
        beam = torch.randint(_BEAMS, (count,), generator=chance) / (_BEAMS - 1)
        elevation = _LOWEST_RAD + (_HIGHEST_RAD - _LOWEST_RAD) * beam
        to_ground = SENSOR_HEIGHT_M / (-elevation).clamp(min=1e-3).sin()
        walls = 2.0 - _TYPICAL_RANGE_M * torch.rand(_WALLS, generator=chance).clamp(min=1e-4).log()
        to_wall = walls[(azimuth * _WALLS / (2 * math.pi)).long().clamp(max=_WALLS - 1)] / elevation.cos()
        reach = torch.minimum(to_ground, to_wall) + _ROUGHNESS_M * torch.randn(count, generator=chance)
        sweep = torch.randint(self._sweeps, (count,), generator=chance)
        flat = reach * elevation.cos()
        xyz = torch.stack([flat * azimuth.cos(), flat * azimuth.sin(), reach * elevation.sin()], dim=1)
        hits = self.annotations(token).center.repeat_interleave(3, dim=0)[:count]
        xyz[: len(hits)] = hits
        intensity = 255 * torch.rand(count, generator=chance)
        return torch.cat([xyz, intensity[:, None], _SWEEP_S * sweep[:, None]], dim=1)

    def _radar_returns(self, token: str) -> Float[Tensor, "R 7"]:
        chance = self._chance(token, "radar")
        low = torch.tensor([-60.0, -60.0, 0.0, -10.0, -10.0, -5.0, 0.0])
        high = torch.tensor([60.0, 60.0, 0.1, 10.0, 10.0, 30.0, 0.4])
        return low + (high - low) * torch.rand(self._radar, 7, generator=chance)

    def _images(
        self, token: str, names: Sequence[str], views: Mapping[str, ImageView] | None, count: int
    ) -> UInt8[Tensor, "N 3 H W"]:
        sizes = {self._size if views is None else (views[name].height, views[name].width) for name in names}
        if len(sizes) != 1:
            raise DataError(f"the views have the sizes {sorted(sizes)}. Give each camera a view of the same size.")
        return torch.randint(
            0, 256, (count, 3, *sizes.pop()), dtype=torch.uint8, generator=self._chance(token, "images")
        )

    def _rig(self, names: Sequence[str], views: Mapping[str, ImageView] | None) -> Rig:
        if unknown := [name for name in names if name not in self._cameras]:
            raise DataError(f"no camera {', '.join(unknown)}; the data set has {', '.join(self._cameras) or 'none'}.")
        height, width = self._size
        focal = _FOCAL_OVER_WIDTH * width
        original = torch.tensor([[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]])
        seen = torch.stack([torch.eye(3) if views is None else views[name].matrix() for name in names])
        yaws = [2 * math.pi * self._cameras.index(name) / len(self._cameras) for name in names]
        return Rig(tuple(names), seen @ original, torch.stack([_lidar_from_camera(yaw) for yaw in yaws]), seen)


def _lidar_from_camera(yaw: float) -> Float[Tensor, "4 4"]:
    turn = torch.tensor([[math.cos(yaw), -math.sin(yaw), 0.0], [math.sin(yaw), math.cos(yaw), 0.0], [0.0, 0.0, 1.0]])
    pose = torch.eye(4)
    pose[:3, :3] = turn @ _CAMERA_FROM_LIDAR.T
    pose[:3, 3] = turn @ torch.tensor([0.5, 0.0, -0.3])
    return pose


def _twice(rig: Rig) -> Rig:
    """Return a rig with the cameras of the key frame before, which was somewhat further back."""
    earlier = rig.lidar_from_camera.clone()
    earlier[:, 0, 3] -= _SPEED_M_PER_S * 0.5
    return Rig(
        (*rig.names, *(f"{name}@-1" for name in rig.names)),
        rig.intrinsics.repeat(2, 1, 1),
        torch.cat([rig.lidar_from_camera, earlier]),
        rig.view_from_original.repeat(2, 1, 1),
    )
