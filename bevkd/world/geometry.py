"""Poses, quaternions and the array types of the world.

Every scene lives in its own *scene frame* (x along the main road, z up, metres). The scene frame is turned and moved
into the global frame of the tables only when they are written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Floats32 = NDArray[np.float32]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Bytes = NDArray[np.uint8]
Index = NDArray[np.signedinteger[Any]]
"""Integers of any width, for the larger index tables."""


@dataclass(frozen=True)
class Pose:
    """A rigid transform ``target_from_source``: rotation 3x3 and translation 3 in metres."""

    rotation: Floats
    translation: Floats

    def __matmul__(self, other: Pose) -> Pose:
        """Return ``self`` after ``other``."""
        return Pose(self.rotation @ other.rotation, self.rotation @ other.translation + self.translation)

    def inverse(self) -> Pose:
        """Return ``source_from_target``."""
        return Pose(self.rotation.T, -self.rotation.T @ self.translation)

    def apply(self, points: Floats) -> Floats:
        """Return points ``n 3`` moved from the source into the target frame."""
        moved: Floats = points @ self.rotation.T + self.translation
        return moved


def rotation_zyx(yaw: float, pitch: float = 0.0, roll: float = 0.0) -> Floats:
    """Return Rz(yaw) Ry(pitch) Rx(roll); angles in radians, a positive pitch looks down."""
    cy, sy, cp, sp, cr, sr = (f(a) for a in (yaw, pitch, roll) for f in (math.cos, math.sin))
    return np.array(
        [
            [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
            [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
            [-sp, cp * sr, cp * cr],
        ]
    )


def planar_pose(x: float, y: float, z: float, yaw: float) -> Pose:
    """Return the pose at (x, y, z) metres, turned by ``yaw`` radians about the vertical."""
    return Pose(rotation_zyx(yaw), np.array([x, y, z], dtype=np.float64))


def quaternion(rotation: Floats) -> list[float]:
    """Return the unit quaternion (w, x, y, z), w >= 0, of a 3x3 rotation."""
    m = rotation
    diagonal = np.array([m[0, 0] + m[1, 1] + m[2, 2], m[0, 0], m[1, 1], m[2, 2]])
    # The largest of the four candidates keeps the square root away from zero.
    pivot = int(np.argmax(diagonal))
    if pivot == 0:
        s = 2 * math.sqrt(1 + diagonal[0])
        q = np.array([s / 4, (m[2, 1] - m[1, 2]) / s, (m[0, 2] - m[2, 0]) / s, (m[1, 0] - m[0, 1]) / s])
    else:
        i = pivot - 1
        j, k = (i + 1) % 3, (i + 2) % 3
        s = 2 * math.sqrt(1 + m[i, i] - m[j, j] - m[k, k])
        q = np.empty(4)
        q[0] = (m[k, j] - m[j, k]) / s
        q[1 + i] = s / 4
        q[1 + j] = (m[j, i] + m[i, j]) / s
        q[1 + k] = (m[k, i] + m[i, k]) / s
    q = q / np.linalg.norm(q) * (-1.0 if q[0] < 0 else 1.0)
    return [float(v) for v in q]
