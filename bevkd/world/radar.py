"""The five radars: few, noisy detections with Doppler, in the nuScenes .pcd layout."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bevkd.world.geometry import Bools, Floats, Ints, Pose
from bevkd.world.parts import Parts
from bevkd.world.raycast import cast
from bevkd.world.scene import ActorState

REACH_M = 70.0
HALF_FOV_RAD = math.radians(58)

DETECTION = np.dtype(
    [
        ("x", "<f4"),
        ("y", "<f4"),
        ("z", "<f4"),
        ("dyn_prop", "i1"),
        ("id", "<i2"),
        ("rcs", "<f4"),
        ("vx", "<f4"),
        ("vy", "<f4"),
        ("vx_comp", "<f4"),
        ("vy_comp", "<f4"),
        ("is_quality_valid", "i1"),
        ("ambig_state", "i1"),
        ("x_rms", "i1"),
        ("y_rms", "i1"),
        ("invalid_state", "i1"),
        ("pdh0", "i1"),
        ("vx_rms", "i1"),
        ("vy_rms", "i1"),
    ]
)
"""One radar detection as it lies in the file; positions and velocities in the radar frame (x forward, y left)."""

Detections = NDArray[np.void]

_MOVING, _STATIONARY, _ONCOMING = 0, 1, 2
_UNAMBIGUOUS = 3


@dataclass(frozen=True)
class RadarMotion:
    """The radar's own velocity ``2`` in the scene frame, m/s."""

    velocity: Floats


def detect(
    parts: Parts, actors: ActorState, scene_from_radar: Pose, motion: RadarMotion, rng: np.random.Generator
) -> Detections:
    """Return the detections of one radar, an array of :data:`DETECTION`.

    Doppler sees the radial velocity only: ``(vx, vy)`` is it along the line of sight relative to the moving radar,
    ``(vx_comp, vy_comp)`` the same with the radar's own motion taken out.
    """
    azimuths = np.linspace(-HALF_FOV_RAD, HALF_FOV_RAD, 117)
    elevations = np.radians([0.0, 1.5])
    # Radar waves pass below cars and around edges: a second, slightly raised fan stands for that.
    hits = cast(parts, scene_from_radar, azimuths, elevations, REACH_M, rng)
    keep = _returned(parts, hits.part, hits.range_m, rng)
    ray, fan = np.nonzero(keep)
    reach, part = hits.range_m[ray, fan], hits.part[ray, fan]
    angle = azimuths[ray] + rng.normal(0, math.radians(0.5), len(ray))
    reach = reach + rng.normal(0, 0.12, len(ray)) + rng.uniform(0, 0.4, len(ray))
    owner = parts.owner[part]

    line = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    line_scene = line @ scene_from_radar.rotation[:2, :2].T
    line_scene /= np.linalg.norm(line_scene, axis=1, keepdims=True)
    target = np.zeros((len(ray), 2))
    target[owner >= 0] = actors.velocity[owner[owner >= 0]]
    noise = rng.normal(0, 0.1, len(ray))
    radial = (target * line_scene).sum(axis=1) + noise
    relative = radial - line_scene @ motion.velocity

    found = np.zeros(len(ray), dtype=DETECTION)
    found["x"], found["y"] = (line * reach[:, None]).T
    found["vx"], found["vy"] = (line * relative[:, None]).T
    found["vx_comp"], found["vy_comp"] = (line * radial[:, None]).T
    found["rcs"] = _cross_section(parts.intensity[part], owner, rng)
    found["dyn_prop"] = np.where(np.abs(radial) < 0.4, _STATIONARY, np.where(radial < 0, _ONCOMING, _MOVING))
    found["id"] = np.arange(len(ray))
    found["is_quality_valid"], found["ambig_state"], found["pdh0"] = 1, _UNAMBIGUOUS, 1
    found["x_rms"] = found["y_rms"] = found["vx_rms"] = found["vy_rms"] = 19
    return found


def _returned(parts: Parts, part: Ints, reach: Floats, rng: np.random.Generator) -> Bools:
    """Return which rays yield a detection: metal objects often, people seldom, walls and leaves hardly ever."""
    index = part.clip(0)
    chance = np.where(parts.owner[index] >= 0, 0.12 + parts.intensity[index] / 260, 0.035)
    # Near objects fill many rays, of which a real radar reports a few.
    chance = chance * np.clip(reach / 18, 0.25, 1.0)
    return np.asarray((part >= 0) & (rng.random(part.shape) < chance))


def _cross_section(intensity: Floats, owner: Ints, rng: np.random.Generator) -> Floats:
    mean = np.where(owner >= 0, -4 + 0.2 * intensity, 2.0)
    return np.asarray(np.clip(mean + rng.normal(0, 3.5, len(owner)), -14, 32))


def pcd_bytes(found: Detections) -> bytes:
    """Return the file of an array of :data:`DETECTION`; a single NaN detection stands for none."""
    if len(found) == 0:
        found = np.zeros(1, dtype=DETECTION)
        found["x"] = found["y"] = found["z"] = np.nan
    kinds = [DETECTION[name] for name in DETECTION.names or ()]
    header = [
        "# .PCD v0.7 - Point Cloud Data file format",
        "VERSION 0.7",
        "FIELDS " + " ".join(DETECTION.names or ()),
        "SIZE " + " ".join(str(kind.itemsize) for kind in kinds),
        "TYPE " + " ".join("F" if kind.kind == "f" else "I" for kind in kinds),
        "COUNT " + " ".join("1" for _ in kinds),
        f"WIDTH {len(found)}",
        "HEIGHT 1",
        "VIEWPOINT 0 0 0 1 0 0 0",
        f"POINTS {len(found)}",
        "DATA binary",
    ]
    # The reader of nuscenes-devkit wants at least one byte after the last point.
    return "\n".join(header).encode() + b"\n" + found.tobytes() + b"\n"
