"""Cameras, second half: light, paint, shadows, air and exposure."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bevkd.world.camera import FRONT, TOP, Sight, View, look
from bevkd.world.geometry import Bools, Bytes, Floats, Floats32, Ints, Pose
from bevkd.world.parts import Parts, Texture, join
from bevkd.world.raycast import crossing
from bevkd.world.scene import Light, Scene
from bevkd.world.street import CELL_M, Street
from bevkd.world.textures import ABOVE, AHEAD, BEHIND, BELOW, LEFT, RIGHT, Surface, noise, paint

SUN_SHADOW, CONTACT_SHADOW = 1, 2


@dataclass(frozen=True)
class Shot:
    """One camera image ``H W 3``, its owner map ``H W`` (-1: no labelled object) and the full size of each owner."""

    image: Bytes
    owner: Ints
    covered: Ints


def static_shadows(scene: Scene) -> Bytes:
    """Return the ground raster of shadows that all unlabelled things throw."""
    shadow = np.zeros_like(scene.street.material)
    throwers = scene.static.texture != Texture.GROUND
    _throw(shadow, scene.street, scene.static.select(throwers), scene.light.sun)
    return shadow


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
    colour = _shade(parts, scene.street, scene.light, shadow, view, sight)
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
    return (ahead > -4) & (ahead < 45) & (aside < spread * ahead + 9)


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
    size = street.material.shape[0]
    edges = x[0] - reach_x, x[1] + reach_x, y[0] - reach_y, y[1] + reach_y
    c0, c1, r0, r1 = (np.clip((v + street.extent_m) / CELL_M, 0, size).astype(np.int64) for v in edges)
    wide, count = c1 - c0, (c1 - c0) * (r1 - r0)
    part = np.repeat(np.arange(len(parts)), count)
    cell = np.arange(len(part)) - np.repeat(np.cumsum(count) - count, count)
    rows, columns = r0[part] + cell // wide[part], c0[part] + cell % wide[part]
    px = (columns + 0.5) * CELL_M - street.extent_m - parts.x[part]
    py = (rows + 0.5) * CELL_M - street.extent_m - parts.y[part]
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


def _shade(parts: Parts, street: Street, light: Light, shadow: Bytes, view: View, sight: Sight) -> Floats32:
    """Return the radiance ``H W 3`` (0-255) before exposure."""
    segment, depth = sight.segment.ravel(), sight.depth.ravel()
    colour = np.empty((len(segment), 3), dtype=np.float32)
    ray_x, ray_y = view.column_directions()
    on_part = np.nonzero(segment >= 0)[0]
    on_ground = np.nonzero((segment < 0) & np.isfinite(depth))[0]
    sky = np.nonzero((segment < 0) & ~np.isfinite(depth))[0]

    x = view.position[0] + depth[on_ground] * ray_x[on_ground % view.width]
    y = view.position[1] + depth[on_ground] * ray_y[on_ground % view.width]
    colour[on_ground] = _ground(street, light, shadow, x, y)
    colour[on_part] = _surfaces(parts, street, light, shadow, view, sight, on_part)
    solid = np.concatenate([on_ground, on_part])
    air = 1 - np.exp(-depth[solid] / light.haze_m).astype(np.float32)[:, None]
    colour[solid] += air * (light.sky_low.astype(np.float32) - colour[solid])
    colour[sky] = _sky(light, view, sky)
    return colour.reshape(view.height, view.width, 3)


def _ground(street: Street, light: Light, shadow: Bytes, x: Floats, y: Floats) -> Floats:
    rows, columns = street.cells(x, y)
    base = street.palette[street.material[rows, columns]]
    grain = 0.86 + 0.28 * noise(x * 0.9, y * 0.9) * 0.5 + 0.14 * noise(x * 0.11, y * 0.11)
    marks = shadow[rows, columns]
    sun = light.strength * light.sun[2] * np.where(marks & SUN_SHADOW, 0.0, 1.0)
    level = (light.ambient + sun) * np.where(marks & CONTACT_SHADOW, 0.62, 1.0) * grain
    return np.asarray(base * level[:, None] * light.tint)


def _surfaces(
    parts: Parts, street: Street, light: Light, shadow: Bytes, view: View, sight: Sight, pixels: Ints
) -> Floats:
    """Return the lit paint of all pixels that see a part."""
    seg = sight.segment.ravel()[pixels]
    depth, pair, face = sight.depth.ravel()[pixels], sight.pair[seg], sight.face[seg]
    columns, part = sight.columns, sight.columns.part[pair]
    lx, ly = columns.ox[pair] + depth * columns.dx[pair], columns.oy[pair] + depth * columns.dy[pair]
    tall = parts.z1[part] - parts.z0[part]
    z = view.position[2] - depth * view.row_slopes()[pixels // view.width]
    is_round = parts.round[part]
    across = (np.abs(lx) >= np.abs(ly)) & ~is_round
    side = np.where(across, np.where(lx > 0, AHEAD, BEHIND), np.where(ly > 0, LEFT, RIGHT))
    side = np.where(face == FRONT, side, np.where(face == TOP, ABOVE, BELOW))
    a = np.where(across, ly, lx)
    wide = np.where(across, parts.half_width[part], parts.half_length[part])
    surface = Surface(side, a, ((z - parts.z0[part]) / tall).clip(0, 1), wide, tall, part)
    colour = paint(surface, parts.texture[part], parts.colour[part].astype(np.float32))

    # Normals: of the face hit, or of the round outline.
    nx = np.where(is_round, lx, np.where(across, np.sign(lx), 0.0))
    ny = np.where(is_round, ly, np.where(across, 0.0, np.sign(ly)))
    yaw = parts.yaw[part]
    facing = nx * np.cos(yaw - math.atan2(light.sun[1], light.sun[0])) - ny * np.sin(
        yaw - math.atan2(light.sun[1], light.sun[0])
    )
    lit = np.where(face == FRONT, np.maximum(facing, 0) * math.hypot(light.sun[0], light.sun[1]), light.sun[2])
    sky_share = np.where(face == FRONT, 0.86, np.where(face == TOP, 1.0, 0.55))
    # Surfaces darken towards the ground, which hides part of the sky from them.
    sky_share = sky_share * np.where(face == FRONT, 0.8 + 0.2 * np.clip(z / 1.2, 0, 1), 1.0)
    level = light.ambient * sky_share + light.strength * np.where(face == FRONT + 2, 0.0, lit)
    result = colour * level[:, None] * light.tint
    paving = np.nonzero((parts.texture[part] == Texture.GROUND) & (face == TOP))[0]
    if len(paving):
        x = view.position[0] + depth[paving] * view.column_directions()[0][pixels[paving] % view.width]
        y = view.position[1] + depth[paving] * view.column_directions()[1][pixels[paving] % view.width]
        result[paving] = _ground(street, light, shadow, x, y)
    return np.asarray(result)


def _sky(light: Light, view: View, pixels: Ints) -> Floats:
    """Return sky and a hazy skyline."""
    rise = -view.row_slopes()[pixels // view.width]
    a = (pixels % view.width + 0.5 - view.centre_u) / view.focal
    bearing = (view.azimuth - np.arctan(a)) % (2 * math.pi)
    fade = np.clip(rise / 0.42, 0, 1)[:, None] ** 0.7
    colour = light.sky_low + fade * (light.sky_high - light.sky_low)
    cloud = noise(bearing * 1.2 + light.cloud, rise * 5 + light.cloud)
    colour = colour + np.clip(cloud - 0.45, 0, 1)[:, None] * 46 * fade
    step = noise(np.floor(bearing * 26) * 1.7 + light.cloud, np.floor(bearing * 26) * 0.9)
    town = (rise < 0.02 + 0.05 * step)[:, None]
    grey = 0.66 * light.sky_low + 0.18 * np.array([90, 96, 104.0])
    return np.asarray(np.where(town, grey, colour))


def _expose(colour: Floats32, light: Light, rng: np.random.Generator) -> Bytes:
    """Return the image with this shot's exposure, vignette and pixel noise."""
    gain = float(np.clip(light.exposure * rng.uniform(0.82, 1.2), 0.5, 1.25))
    height, width = colour.shape[:2]
    v, u = np.linspace(-1, 1, height, dtype=np.float32)[:, None], np.linspace(-1, 1, width, dtype=np.float32)[None]
    vignette = (gain * (1 - 0.1 * (u * u + v * v)))[..., None]
    # One grey grain per pixel and a weaker one per channel.
    grain = rng.standard_normal((height, width, 1), dtype=np.float32) * 2.6
    image = colour * vignette + grain
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)
