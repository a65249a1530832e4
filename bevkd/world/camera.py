"""Cameras, first half: which surface each pixel sees, and how far away it is.

An upright camera sees everything in one image column in one vertical plane. So a part is crossed once per *column*, in
two dimensions, and only its top and bottom edges are worked out per pixel row. On hills the camera tilts: the image is
then rendered by an upright twin with some margin and turned (a homography, exact for a pure rotation).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bevkd.world.geometry import Bools, Floats, Index, Ints
from bevkd.world.parts import Parts, Texture
from bevkd.world.raycast import crossing, local_frame
from bevkd.world.street import Terrain
from bevkd.world.textures import noise

NEAR_M = 0.3
FAR_M = 160.0

FRONT, TOP, BOTTOM = 0, 1, 2


@dataclass(frozen=True)
class View:
    """An upright pinhole camera: position in the scene frame (metres), azimuth (radians) and pixel geometry."""

    position: Floats
    azimuth: float
    focal: float
    centre_u: float
    centre_v: float
    height: int
    width: int

    def column_directions(self) -> tuple[Floats, Floats]:
        """Return the x and y components ``W`` of the rays of the columns, per metre of depth."""
        a = (np.arange(self.width) + 0.5 - self.centre_u) / self.focal
        cos, sin = math.cos(self.azimuth), math.sin(self.azimuth)
        return cos + a * sin, sin - a * cos

    def row_slopes(self) -> Floats:
        """Return the fall of the rays of the rows ``H``, per metre of depth."""
        slopes: Floats = (np.arange(self.height) + 0.5 - self.centre_v) / self.focal
        return slopes


@dataclass(frozen=True)
class Columns:
    """All meetings of parts and image columns, one row each: entry and exit depth, and the ray in the part's frame."""

    part: Ints
    column: Ints
    t_in: Floats
    t_out: Floats
    ox: Floats
    oy: Floats
    dx: Floats
    dy: Floats


@dataclass(frozen=True)
class Sight:
    """What every pixel of a view sees.

    ``segment`` (``H W``) indexes the segments, -1 for ground or sky; ``depth`` (``H W``) is in metres along the camera
    axis, inf for the sky. A segment is one face of one part in one column: ``pair`` indexes ``columns``. ``covered``
    counts, per owner, the pixels that it would fill if nothing stood in front.
    """

    segment: Index
    depth: Floats
    pair: Ints
    face: Ints
    columns: Columns
    covered: Ints


def look(parts: Parts, terrain: Terrain, view: View, owners: int) -> Sight:
    """Return what ``view`` sees of ``parts`` and the ground; ``owners`` is the number of labelled objects."""
    columns = _meet(parts, view)
    pair, face, r0, r1 = _segments(parts, view, columns)
    count = r1 - r0
    segment = np.repeat(np.arange(len(pair), dtype=np.int32), count)
    start = np.cumsum(count) - count
    row = np.arange(len(segment), dtype=np.int32) - np.repeat((start - r0).astype(np.int32), count)
    pixel = row * view.width + columns.column[pair].astype(np.int32)[segment]

    solid = _solid(parts, view, columns, pair, face, segment, row)
    if solid is not None:
        segment, row, pixel = segment[solid], row[solid], pixel[solid]
    ground = ground_depth(terrain, view)
    if not terrain.flat:
        depth = _fragment_depth(parts, view, columns, pair, face, segment, row)
        above = depth < ground.ravel()[pixel] + 0.05
        segment, row, pixel = segment[above], row[above], pixel[above]

    buffer = np.full(view.height * view.width, -1, dtype=np.int32)
    # Segments are ordered from far to near, so that the nearest is written last and stays.
    buffer[pixel] = segment
    seen = np.nonzero(buffer >= 0)[0]
    depth_map = ground.ravel()
    depth_map[seen] = _fragment_depth(parts, view, columns, pair, face, buffer[seen], seen // view.width)
    shape = (view.height, view.width)
    covered = _covered(parts.owner[columns.part[pair]][segment], pixel, owners, view.height * view.width)
    return Sight(buffer.reshape(shape), depth_map.reshape(shape), pair, face, columns, covered)


def ground_depth(terrain: Terrain, view: View) -> Floats:
    """Return the depth ``H W`` at which each pixel meets the bare ground, inf above the horizon."""
    slopes = view.row_slopes()
    if terrain.flat:
        falling = slopes > view.position[2] / FAR_M
        depth = np.where(falling, view.position[2] / np.maximum(slopes, 1e-6), np.inf)
        return np.repeat(depth[:, None], view.width, axis=1)
    steps = np.geomspace(1.5, FAR_M, 72)
    dx, dy = view.column_directions()
    heights = terrain.height(view.position[0] + steps[:, None] * dx, view.position[1] + steps[:, None] * dy)
    # A pixel meets the ground at the first step whose line of sight is no higher than its own.
    crest = np.maximum.accumulate((heights - view.position[2]) / steps[:, None], axis=0)
    depth = np.full((view.height, view.width), np.inf)
    for column in range(view.width):
        profile = crest[:, column]
        k = np.searchsorted(profile, -slopes)
        inner = np.clip(k, 1, len(steps) - 1)
        low, high = profile[inner - 1], profile[inner]
        share = np.clip((-slopes - low) / np.maximum(high - low, 1e-9), 0, 1)
        reach = steps[inner - 1] + share * (steps[inner] - steps[inner - 1])
        depth[:, column] = np.where(k < len(steps), reach, np.inf)
    return depth


def _meet(parts: Parts, view: View) -> Columns:
    """Return where the rays of the image columns cross the outlines of the parts."""
    dx, dy = parts.x - view.position[0], parts.y - view.position[1]
    cos, sin = math.cos(view.azimuth), math.sin(view.azimuth)
    ahead, right = dx * cos + dy * sin, dx * sin - dy * cos
    radius, distance = np.hypot(parts.half_length, parts.half_width), np.hypot(dx, dy)
    half = np.where(distance > radius, np.arcsin(np.minimum(1, radius / np.maximum(distance, 1e-9))), math.pi)
    bearing = np.arctan2(right, ahead)
    low, high = np.clip(bearing - half, -1.5, 1.5), np.clip(bearing + half, -1.5, 1.5)
    u0 = np.clip(np.floor(view.centre_u + view.focal * np.tan(low) - 0.5), 0, view.width).astype(np.int64)
    u1 = np.clip(np.ceil(view.centre_u + view.focal * np.tan(high) + 0.5), 0, view.width).astype(np.int64)
    count = np.where((ahead + radius > NEAR_M) & (distance - radius < FAR_M), np.maximum(u1 - u0, 0), 0)
    part = np.repeat(np.arange(len(parts)), count)
    column = np.arange(len(part)) - np.repeat(np.cumsum(count) - count - u0, count)

    ray_x, ray_y = view.column_directions()
    c, s, ox, oy = (v[part] for v in local_frame(parts, view.position))
    rx, ry = ray_x[column], ray_y[column]
    local_x, local_y = (c * rx + s * ry) / parts.half_length[part], (c * ry - s * rx) / parts.half_width[part]
    t_in, t_out = crossing(ox, oy, local_x, local_y, parts.round[part])
    hit = np.nonzero((t_out > t_in) & (t_out > NEAR_M))[0]
    return Columns(part[hit], column[hit], t_in[hit], t_out[hit], ox[hit], oy[hit], local_x[hit], local_y[hit])


def _segments(parts: Parts, view: View, columns: Columns) -> tuple[Ints, Ints, Ints, Ints]:
    """Return (pair, face, first row, end row) of all visible sides, from far to near."""
    eye, near = view.position[2], np.maximum(columns.t_in, NEAR_M)
    z0, z1 = parts.z0[columns.part], parts.z1[columns.part]

    def row(z: Floats, t: Floats) -> Floats:
        return np.asarray(np.ceil(view.centre_v + view.focal * (eye - z) / t - 0.5).clip(0, view.height))

    sides = (
        (FRONT, columns.t_in > NEAR_M, row(z1, near), row(z0, near), near),
        (TOP, z1 < eye, row(z1, columns.t_out), row(z1, near), columns.t_out),
        (BOTTOM, z0 > eye, row(z0, near), row(z0, columns.t_out), columns.t_out),
    )
    pair, face, first, end, key = [], [], [], [], []
    for kind, shown, r0, r1, far in sides:
        rows = np.nonzero(shown & (r1 > r0))[0]
        pair.append(rows)
        face.append(np.full(len(rows), kind))
        first.append(r0[rows])
        end.append(r1[rows])
        key.append(far[rows])
    order = np.argsort(-np.concatenate(key), kind="stable")
    whole = (np.concatenate(v)[order].astype(np.int64) for v in (pair, face, first, end))
    a, b, c, d = whole
    return a, b, c, d


def _fragment_depth(
    parts: Parts, view: View, columns: Columns, pair: Ints, face: Ints, segment: Index, row: Index
) -> Floats:
    """Return the depth in metres of pieces of segments, given the image row of each piece."""
    level = np.where(face == TOP, parts.z1[columns.part[pair]], parts.z0[columns.part[pair]])
    # For a level face depth = rise / slope; a front has one depth: its entry.
    rise = np.where(face == FRONT, 0.0, view.position[2] - level)
    entry = np.where(face == FRONT, columns.t_in[pair], 0.0)
    slope = view.row_slopes()[row]
    slope = np.where(np.abs(slope) < 1e-9, 1e-9, slope)
    return np.asarray(entry[segment] + rise[segment] / slope)


def _solid(
    parts: Parts, view: View, columns: Columns, pair: Ints, face: Ints, segment: Index, row: Index
) -> Bools | None:
    """Return which pieces are not holes of leaves, wheels or cycles; None if nothing has holes."""
    texture = parts.texture[columns.part[pair]]
    holed = (texture == Texture.LEAVES) | (texture == Texture.BIKE) | (texture == Texture.WHEEL)
    pieces = np.nonzero(holed[segment])[0]
    if len(pieces) == 0:
        return None
    seg, row = segment[pieces], row[pieces]
    part, p = columns.part[pair[seg]], pair[seg]
    depth = _fragment_depth(parts, view, columns, pair, face, seg, row)
    tall = parts.z1[part] - parts.z0[part]
    h = (view.position[2] - depth * view.row_slopes()[row] - parts.z0[part]) / tall
    lx, ly = columns.ox[p] + depth * columns.dx[p], columns.oy[p] + depth * columns.dy[p]
    kind = parts.texture[part]
    keep = np.ones(len(segment), dtype=bool)

    # Leaves: ragged towards the rim of the crown.
    angle = np.arctan2(ly, lx) * parts.half_length[part]
    inward = parts.half_length[part] * np.hypot(lx, ly)
    ragged = noise(3.1 * angle + 7.0 * part, 3.1 * (h * tall + inward) + 3.0 * part)
    rim = np.abs(2 * h - 1) ** 2
    open_leaf = ragged < 0.34 + 0.3 * rim
    # Wheels: the disc on the sides of the axle's box.
    disc = lx**2 + (2 * h - 1) ** 2
    side = np.abs(ly) > 0.98
    across = np.abs(columns.dy[p]) * parts.half_width[part]
    oblique = across > 0.25 * np.abs(columns.dx[p]) * parts.half_length[part]
    # The ends of the box stand for the tread when seen from behind; at an angle they would stick out of the disc.
    open_wheel = np.where(side, disc > 1, oblique)
    # Cycles: two rims and a frame, when seen from the side.
    along, up = lx * parts.half_length[part], h * tall
    wheel = np.minimum(0.36, 0.22 * 2 * parts.half_length[part])
    spoke = np.hypot(np.abs(along) - (parts.half_length[part] - wheel), up - wheel) / wheel
    bar = (np.abs(along) < 0.55 * parts.half_length[part]) & (np.abs(up - 0.55 * tall - 0.25 * along) < 0.09)
    rim_or_hub = ((spoke < 1) & (spoke > 0.72)) | (spoke < 0.2)
    seat = (h > 0.6) & (np.abs(lx + 0.25) < 0.12)
    open_bike = np.where(side, ~(rim_or_hub | bar | seat), oblique)
    keep[pieces] = ~np.where(kind == Texture.LEAVES, open_leaf, np.where(kind == Texture.WHEEL, open_wheel, open_bike))
    return keep


def _covered(owner: Ints, pixel: Index, owners: int, pixels: int) -> Ints:
    """Return the number of distinct pixels of each owner among all pieces, hidden or not."""
    labelled = np.nonzero(owner >= 0)[0]
    flags = np.zeros(owners * pixels, dtype=bool)
    flags[owner[labelled] * pixels + pixel[labelled]] = True
    return np.asarray(flags.reshape(owners, pixels).sum(axis=1), dtype=np.int64)
