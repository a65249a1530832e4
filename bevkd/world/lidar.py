"""The spinning LiDAR."""

from __future__ import annotations

import math

import numpy as np

from bevkd.world.config import WorldConfig
from bevkd.world.geometry import Bools, Floats, Floats32, Pose
from bevkd.world.parts import Parts, Texture
from bevkd.world.raycast import cast
from bevkd.world.rig import beam_elevations
from bevkd.world.street import MATERIAL_INTENSITY, Street

REACH_M = 70.0


def scan(
    config: WorldConfig, street: Street, parts: Parts, scene_from_sensor: Pose, rng: np.random.Generator
) -> Floats32:
    """Return one turn as points ``n 5``: x, y, z in the sensor frame (metres), intensity (0-255) and ring."""
    azimuths = -np.arange(config.lidar_azimuths) * (2 * math.pi / config.lidar_azimuths)
    elevations = beam_elevations(config.lidar_beams)
    hits = cast(parts, scene_from_sensor, azimuths, elevations, REACH_M, rng)
    ca, sa = np.cos(azimuths)[:, None], np.sin(azimuths)[:, None]
    ce, se = np.cos(elevations)[None], np.sin(elevations)[None]
    rays = np.stack([ca * ce, sa * ce, np.broadcast_to(se, hits.range_m.shape)], axis=2)
    rays_scene = rays @ scene_from_sensor.rotation.T
    ground = _ground_range(street, scene_from_sensor, rays_scene)

    on_ground = ground < hits.range_m
    reach = np.where(on_ground, ground, hits.range_m)
    spots = scene_from_sensor.translation[:2] + reach[..., None].clip(0, REACH_M) * rays_scene[..., :2]
    rows, columns = street.cells(spots[..., 0], spots[..., 1])
    soil = MATERIAL_INTENSITY[street.material[rows, columns]]
    # The top of a curb block shows the ground material as well.
    part = hits.part.clip(0)
    on_ground |= (parts.texture[part] == Texture.GROUND) & (hits.part >= 0)
    intensity = np.where(on_ground, soil, parts.intensity[part])

    keep = (reach < REACH_M) & (rng.random(reach.shape) >= config.lidar_dropout)
    # Far and dark surfaces send too little light back.
    keep &= rng.random(reach.shape) < 1.6 - reach / REACH_M + intensity / 255
    noisy = reach[keep] + rng.normal(0, config.lidar_noise_m, int(keep.sum()))
    points = rays[keep] * noisy[:, None]
    speckle = np.clip(rng.normal(1, 0.18, len(points)), 0.3, 2)
    shine = np.clip(np.rint(intensity[keep] * speckle * (1 - 0.2 * reach[keep] / REACH_M)), 0, 255)
    rings = np.broadcast_to(np.arange(config.lidar_beams), reach.shape)[keep]
    return np.column_stack([points, shine, rings]).astype(np.float32)


def _ground_range(street: Street, scene_from_sensor: Pose, rays: Floats) -> Floats:
    """Return the range ``A B`` at which rays in the scene frame meet the ground, inf if they do not."""
    origin, falling = scene_from_sensor.translation, rays[..., 2] < -1e-4
    if street.terrain.flat:
        return np.where(falling, origin[2] / np.maximum(-rays[..., 2], 1e-4), np.inf)
    steps = np.geomspace(1.0, REACH_M, 40)
    reach = np.full(rays.shape[:2], np.inf)
    active = rays[..., 2] < 0.12
    d = rays[active]
    above = np.empty((len(d), len(steps)))
    for k, t in enumerate(steps):
        above[:, k] = origin[2] + t * d[:, 2] - street.terrain.height(origin[0] + t * d[:, 0], origin[1] + t * d[:, 1])
    below = above < 0
    first = below.argmax(axis=1)
    met = np.nonzero(below.any(axis=1) & (first > 0))[0]
    k = first[met]
    upper, lower = above[met, k - 1], above[met, k]
    found = np.full(len(d), np.inf)
    found[met] = steps[k - 1] + (steps[k] - steps[k - 1]) * upper / (upper - lower)
    reach[active] = found
    return reach


def points_in_boxes(points: Floats, centre: Floats, size: Floats, rotation: Floats) -> list[Bools]:
    """Return for each box which points lie in it, borders included; all in metres of one frame.

    Args:
        points: ``n 3``.
        centre: ``m 3``.
        size: ``m 3`` as (length, width, height).
        rotation: ``m 3 3``.
    """
    inside = []
    x, y = np.ascontiguousarray(points[:, 0]), np.ascontiguousarray(points[:, 1])
    for c, s, r in zip(centre, size, rotation, strict=True):
        near = np.nonzero((np.abs(x - c[0]) < s[:2].sum()) & (np.abs(y - c[1]) < s[:2].sum()))[0]
        local = (points[near] - c) @ r
        mask = np.zeros(len(points), dtype=bool)
        mask[near] = (np.abs(local) <= s / 2).all(axis=1)
        inside.append(mask)
    return inside
