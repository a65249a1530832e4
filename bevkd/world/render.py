"""Cameras: one image from scene to exposure, with the shadows on the ground and the masks of the objects."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bevkd.world.camera import View, look
from bevkd.world.geometry import Bools, Bytes, Floats, Floats32, Ints, Pose
from bevkd.world.parts import Parts, Texture, join
from bevkd.world.raycast import crossing
from bevkd.world.scene import Light, Scene
from bevkd.world.shade import CONTACT_SHADOW, SUN_SHADOW, shade
from bevkd.world.street import Street


@dataclass(frozen=True)
class Shot:
    """One camera image ``H W 3``, its owner map ``H W`` (-1: no labelled object) and the full size of each owner."""

    image: Bytes
    owner: Ints
    covered: Ints


def static_shadows(scene: Scene) -> Bytes:
    """Return the ground raster of shadows that all unlabelled things throw."""
    size = scene.street.material.shape[0] // 2
    # Half the resolution is enough for the long shadows of walls and trees, and four times as fast.
    shadow = np.zeros((size, size), dtype=np.uint8)
    throwers = scene.static.texture != Texture.GROUND
    _throw(shadow, scene.street, scene.static.select(throwers), scene.light.sun)
    return shadow.repeat(2, axis=0).repeat(2, axis=1)


def take(
    scene: Scene,
    t: float,
    scene_from_camera: Pose,
    k: Floats,
    size: tuple[int, int],
    shadow: Bytes,
    rng: np.random.Generator,
) -> Shot:
    """Return the image of a camera at time ``t``.

    Args:
        scene: the scene.
        t: seconds since the first key frame.
        scene_from_camera: the camera's pose (x right, y down, z forward).
        k: camera matrix 3x3 in pixels.
        size: (height, width) in pixels.
        shadow: :func:`static_shadows` of the scene.
        rng: decides exposure and pixel noise.
    """
    moving = scene.moving_parts_at(t)
    parts = join(scene.static, moving)
    view = upright_view(scene_from_camera, k, size)
    shadow = shadow.copy()
    _throw(shadow, scene.street, moving.select(_in_front(moving, view)), scene.light.sun)
    sight = look(parts, scene.street.terrain, view, len(scene.actors))
    colour = shade(parts, scene.street, scene.light, shadow, view, sight)
    part_owner = np.append(parts.owner[sight.columns.part[sight.pair]], -1)
    owner = part_owner[sight.segment]
    covered = sight.covered
    if not scene.street.terrain.flat:
        rows, columns = _turn(scene_from_camera, k, size, view)
        colour, owner = colour[rows, columns], owner[rows, columns]
    return Shot(_expose(colour, scene.light, rng), owner, covered)


def _in_front(parts: Parts, view: View) -> Bools:
    """Return which parts can throw a shadow into the near half of the view."""
    dx, dy = parts.x - view.position[0], parts.y - view.position[1]
    ahead = dx * math.cos(view.azimuth) + dy * math.sin(view.azimuth)
    aside = np.abs(dx * math.sin(view.azimuth) - dy * math.cos(view.azimuth))
    spread = 0.5 * view.width / view.focal
    return np.asarray((ahead > -4) & (ahead < 45) & (aside < spread * ahead + 9))


def upright_view(scene_from_camera: Pose, k: Floats, size: tuple[int, int]) -> View:
    """Return the upright camera of the same azimuth; it is larger where the real one tilts, to cover its image."""
    forward = scene_from_camera.rotation[:, 2]
    tilt = math.acos(float(np.clip(-scene_from_camera.rotation[2, 1], -1, 1)))
    margin = 0 if tilt < 1e-9 else math.ceil(1.3 * math.tan(tilt) * (k[0, 0] + k[0, 2])) + 2
    return View(
        scene_from_camera.translation,
        math.atan2(forward[1], forward[0]),
        float(k[0, 0]),
        float(k[0, 2]) + margin,
        float(k[1, 2]) + margin,
        size[0] + 2 * margin,
        size[1] + 2 * margin,
    )


def _turn(scene_from_camera: Pose, k: Floats, size: tuple[int, int], view: View) -> tuple[Ints, Ints]:
    """Return for each pixel of the tilted camera the row and column of the upright one."""
    cos, sin = math.cos(view.azimuth), math.sin(view.azimuth)
    upright = np.array([[sin, 0, cos], [-cos, 0, sin], [0, -1.0, 0]])
    v, u = np.mgrid[: size[0], : size[1]] + 0.5
    rays = np.stack([(u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1], np.ones(size)], axis=2)
    rays = rays @ (upright.T @ scene_from_camera.rotation).T
    rows = np.floor(view.centre_v + view.focal * rays[..., 1] / rays[..., 2]).astype(np.int64)
    columns = np.floor(view.centre_u + view.focal * rays[..., 0] / rays[..., 2]).astype(np.int64)
    return rows.clip(0, view.height - 1), columns.clip(0, view.width - 1)


def _throw(shadow: Bytes, street: Street, parts: Parts, sun: Floats) -> None:
    """Mark the cells of ``shadow`` that the parts shade from the sun, and those right beside their feet."""
    if len(parts) == 0:
        return
    lean = np.array([sun[0], sun[1]]) / max(float(sun[2]), 0.2)
    foot = np.zeros(len(parts)) if street.terrain.flat else street.terrain.height(parts.x, parts.y)
    low, high = np.maximum(parts.z0 - foot, 0), parts.z1 - foot
    cos, sin = np.cos(parts.yaw), np.sin(parts.yaw)
    half_l, half_w = parts.half_length, parts.half_width
    reach_x = np.abs(cos) * half_l + np.abs(sin) * half_w + 0.2
    reach_y = np.abs(sin) * half_l + np.abs(cos) * half_w + 0.2
    x = np.sort(np.stack([parts.x, parts.x - high * lean[0]]), axis=0)
    y = np.sort(np.stack([parts.y, parts.y - high * lean[1]]), axis=0)
    size = shadow.shape[0]
    cell_m = 2 * street.extent_m / size
    edges = x[0] - reach_x, x[1] + reach_x, y[0] - reach_y, y[1] + reach_y
    c0, c1, r0, r1 = (np.clip((v + street.extent_m) / cell_m, 0, size).astype(np.int64) for v in edges)
    wide, count = c1 - c0, (c1 - c0) * (r1 - r0)
    part = np.repeat(np.arange(len(parts)), count)
    cell = np.arange(len(part)) - np.repeat(np.cumsum(count) - count, count)
    rows, columns = r0[part] + cell // wide[part], c0[part] + cell % wide[part]
    px = (columns + 0.5) * cell_m - street.extent_m - parts.x[part]
    py = (rows + 0.5) * cell_m - street.extent_m - parts.y[part]
    c, s = cos[part], sin[part]
    ox, oy = (c * px + s * py) / half_l[part], (c * py - s * px) / half_w[part]
    dx, dy = ((cos * lean[0] + sin * lean[1]) / half_l)[part], ((cos * lean[1] - sin * lean[0]) / half_w)[part]
    # A cell lies in shadow if its line towards the sun passes the outline between the part's foot and top.
    enter, leave = crossing(ox, oy, dx, dy, parts.round[part])
    shaded = (leave > enter) & (leave > low[part]) & (enter < high[part])
    flat = rows * size + columns
    raster = shadow.ravel()
    raster[flat[shaded]] |= SUN_SHADOW
    near = (np.abs(ox) < 1 + 0.15 / half_l[part]) & (np.abs(oy) < 1 + 0.15 / half_w[part]) & (low[part] < 0.7)
    raster[flat[near]] |= CONTACT_SHADOW


def _expose(colour: Floats32, light: Light, rng: np.random.Generator) -> Bytes:
    """Return the image with this shot's exposure, vignette and pixel noise."""
    gain = float(np.clip(light.exposure * rng.uniform(0.82, 1.2), 0.5, 1.25))
    height, width = colour.shape[:2]
    v, u = np.linspace(-1, 1, height, dtype=np.float32)[:, None], np.linspace(-1, 1, width, dtype=np.float32)[None]
    vignette = gain - 0.1 * gain * (u * u + v * v)
    grain = rng.standard_normal((height, width), dtype=np.float32) * np.float32(2.6) + np.float32(0.5)
    image = colour * vignette.astype(np.float32)[..., None]
    image += grain[..., None]
    return np.asarray(image.clip(0, 255), dtype=np.uint8)
