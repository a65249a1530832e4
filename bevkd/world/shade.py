"""The colour of what a camera sees: paint, sun, sky, shadows and haze."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bevkd.world.camera import BOTTOM, FRONT, TOP, Sight, View
from bevkd.world.geometry import Bytes, Floats32, Index, Ints
from bevkd.world.parts import Parts, Texture
from bevkd.world.scene import Light
from bevkd.world.street import Street
from bevkd.world.textures import ABOVE, AHEAD, BEHIND, BELOW, LEFT, RIGHT, Surface, noise, paint

SUN_SHADOW, CONTACT_SHADOW = 1, 2
"""Bits of the shadow raster of the ground."""


@dataclass(frozen=True)
class _Canvas:
    """Everything that the colour of a pixel depends on."""

    parts: Parts
    street: Street
    light: Light
    shadow: Bytes
    view: View
    sight: Sight

    def spots(self, pixels: Ints, depth: Floats32) -> tuple[Floats32, Floats32]:
        """Return x and y in the scene frame of what pixels see at a depth."""
        ray_x, ray_y = (ray.astype(np.float32) for ray in self.view.column_directions())
        column = pixels % self.view.width
        px, py = np.float32(self.view.position[0]), np.float32(self.view.position[1])
        return px + depth * ray_x[column], py + depth * ray_y[column]


def shade(parts: Parts, street: Street, light: Light, shadow: Bytes, view: View, sight: Sight) -> Floats32:
    """Return the radiance ``H W 3`` (0-255) of every pixel before exposure.

    Args:
        parts: what stands in the scene; ``sight`` indexes it.
        street: the ground.
        light: sun, sky and haze.
        shadow: raster of the ground, of the bits SUN_SHADOW and CONTACT_SHADOW.
        view: the camera.
        sight: what each pixel sees.
    """
    canvas = _Canvas(parts, street, light, shadow, view, sight)
    segment, depth = sight.segment.ravel(), sight.depth.ravel().astype(np.float32)
    part = np.append(np.where(sight.face == TOP, sight.columns.part[sight.pair], -1), -1)
    is_paving = np.append(parts.texture == Texture.GROUND, False)[part] & (part >= 0)
    on_ground = is_paving[segment] | ((segment < 0) & np.isfinite(depth))
    ground, things = np.nonzero(on_ground)[0], np.nonzero((segment >= 0) & ~on_ground)[0]
    sky = np.nonzero((segment < 0) & ~on_ground)[0]

    colour = np.zeros((len(segment), 3), dtype=np.float32)
    colour[ground] = _ground(canvas, *canvas.spots(ground, depth[ground]))
    colour[things] = _surfaces(canvas, things, depth[things])
    clear = np.exp(depth * np.float32(-1 / light.haze_m))[:, None]
    # In tinted light everything is tinted but the air and the sky itself.
    colour *= clear * light.tint.astype(np.float32)
    colour += (1 - clear) * light.sky_low.astype(np.float32)
    colour[sky] = _sky(light, view, sky)
    return colour.reshape(view.height, view.width, 3)


def _ground(canvas: _Canvas, x: Floats32, y: Floats32) -> Floats32:
    light, street = canvas.light, canvas.street
    rows, columns = street.cells(x, y)
    cell = rows * street.material.shape[1] + columns
    grain = 0.86 + 0.14 * noise(x * 0.9, y * 0.9) + 0.14 * noise(x * 0.11, y * 0.11)
    # One level for each combination of the two shadow bits.
    open_sky, sun = light.ambient, light.strength * light.sun[2]
    levels = np.array([open_sky + sun, open_sky, 0.62 * (open_sky + sun), 0.62 * open_sky], dtype=np.float32)
    level = levels[canvas.shadow.ravel()[cell]] * grain
    return np.asarray(street.palette.astype(np.float32)[street.material.ravel()[cell]] * level[:, None])


def _surfaces(canvas: _Canvas, pixels: Ints, depth: Floats32) -> Floats32:
    """Return the lit paint of pixels that see a part."""
    parts, columns, view = canvas.parts, canvas.sight.columns, canvas.view
    seg = canvas.sight.segment.ravel()[pixels]
    pair, face = canvas.sight.pair[seg], canvas.sight.face[seg]
    part = columns.part[pair]
    ox, oy, dx, dy = (v.astype(np.float32)[pair] for v in (columns.ox, columns.oy, columns.dx, columns.dy))
    lx, ly = ox + depth * dx, oy + depth * dy
    z = np.float32(view.position[2]) - depth * view.row_slopes().astype(np.float32)[pixels // view.width]
    foot, tall = parts.z0.astype(np.float32)[part], (parts.z1 - parts.z0).astype(np.float32)[part]
    is_round = parts.round[part]
    across = (np.abs(lx) >= np.abs(ly)) & ~is_round

    side = np.where(across, np.where(lx > 0, AHEAD, BEHIND), np.where(ly > 0, LEFT, RIGHT))
    side = np.where(face == FRONT, side, np.where(face == TOP, ABOVE, BELOW))
    half = parts.half_width.astype(np.float32), parts.half_length.astype(np.float32)
    wide = np.where(across, half[0][part], half[1][part])
    surface = Surface(side, np.where(across, ly, lx), ((z - foot) / tall).clip(0, 1), wide, tall, part)
    colour = paint(surface, parts.texture[part], parts.colour.astype(np.float32)[part])

    # Normals: of the face hit, or of the round outline.
    nx = np.where(is_round, lx, np.where(across, np.sign(lx), 0))
    ny = np.where(is_round, ly, np.where(across, 0, np.sign(ly)))
    return np.asarray(colour * _level(canvas, face, part, nx, ny, z)[:, None])


def _level(canvas: _Canvas, face: Ints, part: Index, nx: Floats32, ny: Floats32, z: Floats32) -> Floats32:
    """Return how brightly sun and sky light a point; the normal (nx, ny) is in the frame of its part."""
    light, yaw = canvas.light, canvas.parts.yaw
    sun_x = np.cos(yaw) * light.sun[0] + np.sin(yaw) * light.sun[1]
    sun_y = np.cos(yaw) * light.sun[1] - np.sin(yaw) * light.sun[0]
    facing = nx * sun_x.astype(np.float32)[part] + ny * sun_y.astype(np.float32)[part]
    # Walls darken towards the ground, which hides part of the sky from them.
    wall = light.ambient * (0.69 + 0.17 * np.clip(z / 1.2, 0, 1)) + light.strength * np.maximum(facing, 0)
    top, bottom = light.ambient + light.strength * light.sun[2], 0.55 * light.ambient
    level = np.where(face == FRONT, wall, np.where(face == BOTTOM, bottom, top))
    return np.asarray(level, dtype=np.float32)


def _sky(light: Light, view: View, pixels: Ints) -> Floats32:
    """Return sky, clouds and a hazy skyline."""
    rise = -view.row_slopes().astype(np.float32)[pixels // view.width]
    a = (np.arange(view.width) + 0.5 - view.centre_u) / view.focal
    bearing = ((view.azimuth - np.arctan(a)) % (2 * math.pi)).astype(np.float32)
    block = np.floor(bearing * 26)
    skyline = (0.02 + 0.05 * noise(block * 1.7 + light.cloud, block * 0.9)).astype(np.float32)
    column = pixels % view.width
    low, high = light.sky_low.astype(np.float32), light.sky_high.astype(np.float32)
    fade = np.clip(rise / 0.42, 0, 1) ** 0.7
    cloud = noise(bearing[column] * 1.2 + light.cloud, rise * 5 + light.cloud)
    gleam = np.clip(cloud - 0.45, 0, 1) * 46 * fade
    colour = low + fade[:, None] * (high - low) + gleam[:, None]
    colour[rise < skyline[column]] = 0.66 * low + np.array([16, 17, 19], dtype=np.float32)
    return np.asarray(colour, dtype=np.float32)
