"""The sensors on the ego vehicle: where they sit, where they look and when they fire."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bevkd.world.config import WorldConfig
from bevkd.world.geometry import Floats, Pose, rotation_zyx

# Camera axes (x right, y down, z forward) seen in the ego frame (x forward, y left, z up) at yaw 0.
_EGO_FROM_FORWARD_CAMERA = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])


@dataclass(frozen=True)
class Mount:
    """One sensor: its place in the ego frame, its yaw, and how much later than the LiDAR it fires."""

    channel: str
    modality: Literal["camera", "lidar", "radar"]
    translation: tuple[float, float, float]
    yaw_deg: float
    offset_s: float
    hfov_deg: float = 0.0

    @property
    def ego_from_sensor(self) -> Pose:
        """The calibration, as in the table ``calibrated_sensor``."""
        rotation = rotation_zyx(math.radians(self.yaw_deg))
        if self.modality == "camera":
            rotation = rotation @ _EGO_FROM_FORWARD_CAMERA
        return Pose(rotation, np.array(self.translation))


LIDAR = Mount("LIDAR_TOP", "lidar", (0.94, 0.0, 1.84), -90.0, 0.0)

# Places, directions and firing times follow the vehicles of nuScenes.
CAMERAS = (
    Mount("CAM_FRONT", "camera", (1.70, 0.00, 1.51), 0.0, -0.035, 70.0),
    Mount("CAM_FRONT_RIGHT", "camera", (1.55, -0.49, 1.50), -55.0, -0.027, 70.0),
    Mount("CAM_BACK_RIGHT", "camera", (1.02, -0.48, 1.56), -110.0, -0.020, 70.0),
    Mount("CAM_BACK", "camera", (0.03, 0.00, 1.57), 180.0, -0.010, 95.0),
    Mount("CAM_BACK_LEFT", "camera", (1.03, 0.48, 1.58), 110.0, -0.001, 70.0),
    Mount("CAM_FRONT_LEFT", "camera", (1.53, 0.49, 1.51), 55.0, -0.043, 70.0),
)

RADARS = (
    Mount("RADAR_FRONT", "radar", (3.41, 0.00, 0.50), 0.0, 0.012),
    Mount("RADAR_FRONT_LEFT", "radar", (2.42, 0.80, 0.78), 90.0, -0.018),
    Mount("RADAR_FRONT_RIGHT", "radar", (2.42, -0.80, 0.77), -90.0, 0.022),
    Mount("RADAR_BACK_LEFT", "radar", (-0.56, 0.63, 0.53), 175.0, -0.008),
    Mount("RADAR_BACK_RIGHT", "radar", (-0.56, -0.63, 0.53), -175.0, 0.003),
)

RIG = (LIDAR, *CAMERAS, *RADARS)


def intrinsics(config: WorldConfig, camera: Mount) -> Floats:
    """Return the 3x3 camera matrix in pixels; pixel (row i, column j) covers [j, j + 1) x [i, i + 1)."""
    focal = config.image_width / 2 / math.tan(math.radians(camera.hfov_deg) / 2)
    # The horizon lies a little above the middle: more road, less sky, as in the usual crop of nuScenes images.
    return np.array([[focal, 0, config.image_width / 2], [0, focal, 0.42 * config.image_height], [0, 0, 1.0]])


def beam_elevations(beams: int) -> Floats:
    """Return the elevation of each LiDAR ring in radians, ring 0 lowest."""
    return np.asarray(np.radians(np.linspace(-30.67, 10.67, beams)))
