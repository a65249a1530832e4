"""Ray casting against parts, for LiDAR and radar."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bevkd.world.geometry import Bools, Floats, Ints, Pose
from bevkd.world.parts import Parts

_TINY = 1e-9


@dataclass(frozen=True)
class Hits:
    """The first hit of every ray: range in metres (inf if none) and row of the part (-1 if none), each ``A B``."""

    range_m: Floats
    part: Ints


def local_frame(parts: Parts, origin: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Return, per part, cos and sin of its yaw and the origin in its frame, scaled so that it spans [-1, 1]."""
    cos, sin = np.cos(parts.yaw), np.sin(parts.yaw)
    dx, dy = origin[0] - parts.x, origin[1] - parts.y
    return cos, sin, (cos * dx + sin * dy) / parts.half_length, (cos * dy - sin * dx) / parts.half_width


def crossing(ox: Floats, oy: Floats, dx: Floats, dy: Floats, is_round: Bools) -> tuple[Floats, Floats]:
    """Return where rays o + t d enter and leave the unit square, or the unit disc where ``is_round``, in the plane.

    A ray that misses leaves before it enters.
    """
    ix, iy = 1 / np.where(np.abs(dx) < _TINY, _TINY, dx), 1 / np.where(np.abs(dy) < _TINY, _TINY, dy)
    ax, ay = np.abs(ix), np.abs(iy)
    t_in = np.maximum(-ox * ix - ax, -oy * iy - ay)
    t_out = np.minimum(-ox * ix + ax, -oy * iy + ay)
    if is_round.any():
        r = np.nonzero(is_round)[0]
        ox, oy, dx, dy = ox[r], oy[r], dx[r], dy[r]
        a = np.maximum(dx * dx + dy * dy, _TINY)
        b = ox * dx + oy * dy
        root = b * b - a * (ox * ox + oy * oy - 1)
        half = np.sqrt(np.maximum(root, 0))
        t_in[r] = np.where(root > 0, (-b - half) / a, 1.0)
        t_out[r] = np.where(root > 0, (-b + half) / a, -1.0)
    return t_in, t_out


def cast(
    parts: Parts,
    scene_from_sensor: Pose,
    azimuths: Floats,
    elevations: Floats,
    reach_m: float,
    rng: np.random.Generator,
) -> Hits:
    """Return the first hit of each ray of a sensor.

    Args:
        parts: everything that can be hit.
        scene_from_sensor: the sensor's pose.
        azimuths: ``A`` angles from the sensor's x axis in radians, evenly spaced if they close a full circle.
        elevations: ``B`` angles in radians.
        reach_m: parts farther away are not hit.
        rng: decides which rays pass through leaves and spokes.
    """
    origin = scene_from_sensor.translation
    near = np.hypot(parts.x - origin[0], parts.y - origin[1])
    radius = np.hypot(parts.half_length, parts.half_width)
    rows = np.nonzero(near - radius < reach_m)[0]
    parts = parts.select(rows)
    ca, sa = np.cos(azimuths)[:, None], np.sin(azimuths)[:, None]
    ce, se = np.cos(elevations)[None], np.sin(elevations)[None]
    rays = np.stack([ca * ce, sa * ce, np.broadcast_to(se, (len(azimuths), len(elevations)))], axis=2)
    rays = rays @ scene_from_sensor.rotation.T

    part, azimuth = _candidates(parts, scene_from_sensor, azimuths)
    level = bool(abs(scene_from_sensor.rotation[2, 2] - 1) < 1e-12)
    t = _pair_ranges(parts, origin, rays, part, azimuth, level)
    solid = parts.density[part]
    thin = np.nonzero(solid < 1)[0]
    passed = rng.random((len(thin), t.shape[1])) > solid[thin, None]
    t[thin] = np.where(passed, np.inf, t[thin])

    best = np.full(rays.shape[:2], np.inf)
    winner = np.full(rays.shape[:2], -1, dtype=np.int64)
    pair, beam = np.nonzero(t < reach_m)
    order = np.argsort(-t[pair, beam], kind="stable")
    pair, beam = pair[order], beam[order]
    # The nearest hit is written last and stays.
    best[azimuth[pair], beam] = t[pair, beam]
    winner[azimuth[pair], beam] = rows[part[pair]]
    return Hits(best, winner)


def _candidates(parts: Parts, scene_from_sensor: Pose, azimuths: Floats) -> tuple[Ints, Ints]:
    """Return the pairs (part, azimuth index) that can meet, judged by the circle around each part."""
    forward = scene_from_sensor.rotation[:2, 0]
    dx, dy = parts.x - scene_from_sensor.translation[0], parts.y - scene_from_sensor.translation[1]
    bearing = np.arctan2(dy, dx) - math.atan2(forward[1], forward[0])
    distance, radius = np.hypot(dx, dy), np.hypot(parts.half_length, parts.half_width)
    # A tilted sensor sweeps cones, not planes: rays of one azimuth spread by up to the tilt.
    slack = 2.0 * math.acos(min(1.0, float(scene_from_sensor.rotation[2, 2])))
    half = np.where(distance > radius, np.arcsin(np.minimum(1, radius / np.maximum(distance, _TINY))), math.pi) + slack
    away = np.abs((azimuths[None] - bearing[:, None] + math.pi) % (2 * math.pi) - math.pi)
    part, azimuth = np.nonzero(away <= half[:, None])
    return part, azimuth


def _pair_ranges(parts: Parts, origin: Floats, rays: Floats, part: Ints, azimuth: Ints, level: bool) -> Floats:
    """Return the range ``P B`` at which each beam of each pair enters the part, inf where it misses."""
    cos, sin, ox, oy = (v[part] for v in local_frame(parts, origin))
    down = parts.z0[part] - origin[2], parts.z1[part] - origin[2]
    if level:
        # All beams of one azimuth share a vertical plane: cross the outline once, in horizontal metres.
        d = rays[azimuth, 0, :2]
        d = d / np.hypot(d[:, 0], d[:, 1])[:, None]
        near, far = crossing(*_scaled(parts, part, cos, sin, ox, oy, d[:, 0], d[:, 1]), parts.round[part])
        hit = np.nonzero((far > near) & (far > 0))[0]
        reach = np.full((len(part), rays.shape[1]), np.inf)
        flat = np.hypot(rays[0, :, 0], rays[0, :, 1])[None]
        reach[hit] = _clip_height(near[hit, None] / flat, far[hit, None] / flat, rays[0, :, 2][None], down, hit)
        return reach
    d = rays[azimuth]
    shape = d.shape[:2]
    wide = [np.broadcast_to(v[:, None], shape).ravel() for v in (part, cos, sin, ox, oy)]
    of = wide[0].astype(np.int64)
    near, far = crossing(
        *_scaled(parts, of, wide[1], wide[2], wide[3], wide[4], d[..., 0].ravel(), d[..., 1].ravel()), parts.round[of]
    )
    every = np.arange(len(part))
    return _clip_height(near.reshape(shape), far.reshape(shape), d[..., 2], down, every)


def _scaled(
    parts: Parts, part: Ints, cos: Floats, sin: Floats, ox: Floats, oy: Floats, dx: Floats, dy: Floats
) -> tuple[Floats, Floats, Floats, Floats]:
    """Return origin and direction of each ray in the frame of its part."""
    return ox, oy, (cos * dx + sin * dy) / parts.half_length[part], (cos * dy - sin * dx) / parts.half_width[part]


def _clip_height(near: Floats, far: Floats, dz: Floats, down: tuple[Floats, Floats], rows: Ints) -> Floats:
    """Return the range at which rays that are inside the outline for [near, far] are also within the height, or inf."""
    rise = np.where(np.abs(dz) < _TINY, _TINY, dz)
    a, b = down[0][rows, None] / rise, down[1][rows, None] / rise
    enter = np.maximum(near, np.minimum(a, b))
    leave = np.minimum(far, np.maximum(a, b))
    return np.where((leave >= enter) & (enter > 0.2), enter, np.inf)
