"""Streets: the ground with its markings, and the unlabelled things beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from bevkd.world.config import WorldConfig
from bevkd.world.geometry import Bytes, Floats, Index
from bevkd.world.objects import Colour, Rng, vary
from bevkd.world.parts import Part, Texture

CELL_M = 0.1
LANE_M = 3.4
PARKING_M = 2.4

Span = tuple[float, float]


class Material(IntEnum):
    """What the ground is made of."""

    ASPHALT = 0
    WHITE_LINE = 1
    YELLOW_LINE = 2
    PATCH = 3
    PAVING = 4
    JOINT = 5
    GRASS = 6
    PLAZA = 7
    CURB = 8


DRIVABLE = (Material.ASPHALT, Material.WHITE_LINE, Material.YELLOW_LINE, Material.PATCH)

# LiDAR intensity of each material.
MATERIAL_INTENSITY = np.array([7.0, 62.0, 48.0, 4.0, 18.0, 14.0, 11.0, 16.0, 20.0])

_PALETTE = np.array(
    [
        (88, 88, 92),
        (206, 206, 202),
        (202, 168, 72),
        (70, 70, 74),
        (154, 150, 144),
        (116, 112, 108),
        (88, 112, 62),
        (136, 128, 116),
        (170, 168, 162),
    ],
    dtype=np.float64,
)


@dataclass(frozen=True)
class Terrain:
    """The height of the ground: a sum of three sine waves, or nothing at all.

    ``waves`` is ``n 4``: amplitude in metres, the two components of the wave vector in rad/m, and the phase.
    """

    waves: Floats

    @property
    def flat(self) -> bool:
        """Whether the ground is the plane z = 0."""
        return len(self.waves) == 0

    def height(self, x: Floats, y: Floats) -> Floats:
        """Return the ground height in metres at (x, y)."""
        total = np.zeros(np.broadcast(x, y).shape)
        for amplitude, kx, ky, phase in self.waves:
            total += amplitude * np.sin(kx * x + ky * y + phase)
        return total

    def slope(self, x: float, y: float) -> tuple[float, float]:
        """Return the derivatives of the height along x and y."""
        arg = self.waves[:, 1] * x + self.waves[:, 2] * y + self.waves[:, 3]
        gain = self.waves[:, 0] * np.cos(arg)
        return float((gain * self.waves[:, 1]).sum()), float((gain * self.waves[:, 2]).sum())


@dataclass(frozen=True)
class Street:
    """The layout of one scene, in metres of the scene frame; the main road runs along y = 0."""

    lanes: int
    parking: tuple[bool, bool]
    sidewalk_m: float
    setback_m: tuple[float, float]
    cross_x: float | None
    cross_half_m: float
    extent_m: float
    curb_m: float
    terrain: Terrain
    material: Bytes
    palette: Floats

    def edge(self, side: int) -> float:
        """Return the half width of the main road on the left (+1) or right (-1) side."""
        return road_half_width(self.lanes, self.parking[0 if side > 0 else 1])

    def in_cross(self, x: float, gap: float = 0.0) -> bool:
        """Return whether x lies on the cross street, or within ``gap`` of it."""
        return self.cross_x is not None and abs(x - self.cross_x) < self.cross_half_m + gap

    def cells(self, x: Floats, y: Floats) -> tuple[Index, Index]:
        """Return the row and column of the ground raster for each point, clipped to its border."""
        last = self.material.shape[0] - 1
        columns = np.clip((x + self.extent_m) / CELL_M, 0, last).astype(np.int32)
        rows = np.clip((y + self.extent_m) / CELL_M, 0, last).astype(np.int32)
        return rows, columns


def road_half_width(lanes: int, parking: bool) -> float:
    """Return the distance from the centre line to the curb."""
    return lanes * LANE_M + (PARKING_M if parking else 0.3)


def draw_street(config: WorldConfig, rng: Rng) -> Street:
    """Return a random street."""
    lanes = 1 if rng.random() < 0.45 else 2
    parking = (bool(rng.random() < 0.75), bool(rng.random() < 0.75))
    sidewalk = float(rng.uniform(2.4, 4.2))
    setback = (float(rng.uniform(0.5, 7)), float(rng.uniform(0.5, 7)))
    cross_x = float(rng.uniform(-12, 26)) if rng.random() < 0.5 else None
    cross_half = LANE_M * (1 if rng.random() < 0.7 else 2) + 0.3
    # Room for the drive of the ego vehicle and the range of its sensors.
    half_size = 2 * math.ceil((config.spawn_range_m + 24.0 + 6.5 * config.duration_s) / CELL_M / 2)
    waves = np.zeros((0, 4))
    if config.terrain == "hills":
        lengths, turns = rng.uniform(28, 70, 3), rng.uniform(0, 2 * math.pi, 3)
        slope = rng.uniform(0.018, 0.04, 3)
        k = 2 * math.pi / lengths
        waves = np.stack([slope / k, k * np.cos(turns), k * np.sin(turns), rng.uniform(0, 6.28, 3)], axis=1)
    shade = rng.normal(0, 8, (len(_PALETTE), 1)) + rng.normal(0, 2.5, _PALETTE.shape)
    palette = np.clip(_PALETTE * rng.uniform(0.8, 1.15) + shade, 20, 240)
    street = Street(
        lanes,
        parking,
        sidewalk,
        setback,
        cross_x,
        cross_half,
        half_size * CELL_M,
        0.0 if config.terrain == "hills" else 0.15,
        Terrain(waves),
        np.full((2 * half_size, 2 * half_size), Material.PLAZA, dtype=np.uint8),
        palette,
    )
    _paint(street, rng)
    return street


class _Brush:
    """Paints axis-parallel rectangles, given in metres, into the ground raster."""

    def __init__(self, street: Street) -> None:
        self._raster = street.material
        self._extent = street.extent_m

    def rect(self, x: Span, y: Span, material: Material) -> None:
        c0, c1, r0, r1 = (max(0, round((v + self._extent) / CELL_M)) for v in (*sorted(x), *sorted(y)))
        self._raster[r0:r1, c0:c1] = material


def _paint(street: Street, rng: Rng) -> None:
    brush, far = _Brush(street), street.extent_m
    along = (-far, far)
    for side in (1, -1):
        walk = (side * street.edge(side), side * (street.edge(side) + street.sidewalk_m))
        brush.rect(along, (walk[1], side * far), Material.GRASS if rng.random() < 0.55 else Material.PLAZA)
        brush.rect(along, walk, Material.PAVING)
        for x in np.arange(-far, far, 1.8):
            brush.rect((x, x + 0.1), walk, Material.JOINT)
    low, high = -street.edge(-1), street.edge(1)
    if street.cross_x is not None:
        middle, half = street.cross_x, street.cross_half_m
        for margin, material in ((street.sidewalk_m, Material.PAVING), (0.2, Material.CURB)):
            brush.rect((middle - half - margin, middle + half + margin), along, material)
    brush.rect(along, (low - 0.2, high + 0.2), Material.CURB)
    brush.rect(along, (low, high), Material.ASPHALT)
    if street.cross_x is not None:
        brush.rect((middle - half, middle + half), along, Material.ASPHALT)
        for y in np.arange(high + 1, far, 5.0):
            for start in (y, -y):
                brush.rect((middle - 0.08, middle + 0.08), (start, start + 2.2), Material.WHITE_LINE)
    for _ in range(int(rng.integers(3, 9))):
        x, y = rng.uniform(-40, 40), rng.uniform(low, high - 2)
        brush.rect((x, x + rng.uniform(1, 7)), (y, y + rng.uniform(0.6, 2.4)), Material.PATCH)
    _paint_lines(street, brush)
    if street.cross_x is not None:
        _paint_crossing(street, street.cross_x, brush)


def _paint_lines(street: Street, brush: _Brush) -> None:
    far, lines = street.extent_m, street.lanes * LANE_M
    spans = [(-far, far)]
    if street.cross_x is not None:
        gap = street.cross_half_m + 4.6
        spans = [(-far, street.cross_x - gap), (street.cross_x + gap, far)]
    for span in spans:
        for y in (-0.2, 0.1):
            brush.rect(span, (y, y + 0.12), Material.YELLOW_LINE)
        for side in (1, -1):
            if street.parking[0 if side > 0 else 1]:
                brush.rect(span, (side * lines - 0.06, side * lines + 0.06), Material.WHITE_LINE)
            for lane in range(1, street.lanes):
                y = side * lane * LANE_M
                for x in np.arange(*span, 6.0):
                    brush.rect((x, min(x + 2.6, span[1])), (y - 0.07, y + 0.07), Material.WHITE_LINE)


def _paint_crossing(street: Street, middle: float, brush: _Brush) -> None:
    for side in (1, -1):
        near = middle + side * (street.cross_half_m + 0.8)
        for y in np.arange(-street.edge(-1) + 0.3, street.edge(1) - 0.4, 1.0):
            brush.rect((near, near + side * 2.8), (y, y + 0.5), Material.WHITE_LINE)
        stop = near + side * 3.4
        brush.rect((stop, stop + side * 0.4), (0.3 * side, side * street.lanes * LANE_M), Material.WHITE_LINE)


def curb_parts(street: Street) -> list[Part]:
    """Return the raised blocks of ground beside the roads; none where the ground is uneven."""
    if street.curb_m == 0:
        return []
    far, blocks = street.extent_m, []
    spans = [(-far, far)]
    if street.cross_x is not None:
        spans = [(-far, street.cross_x - street.cross_half_m), (street.cross_x + street.cross_half_m, far)]
    for x0, x1 in spans:
        for side in (1, -1):
            y0, y1 = sorted((side * street.edge(side), side * far))
            middle = ((x0 + x1) / 2, (y0 + y1) / 2)
            blocks.append(
                Part(*middle, 0, street.curb_m, (x1 - x0) / 2, (y1 - y0) / 2, (150, 148, 142), 20, Texture.GROUND)
            )
    return blocks


_FACADES: tuple[Colour, ...] = (
    (170, 122, 96),
    (196, 184, 162),
    (142, 142, 146),
    (178, 150, 110),
    (120, 96, 88),
    (206, 200, 190),
    (110, 120, 132),
)


def building_parts(street: Street, rng: Rng) -> list[Part]:
    """Return rows of buildings on both sides, with gaps, clear of the cross street."""
    parts = []
    for side in (1, -1):
        x = -street.extent_m
        front = street.edge(side) + street.sidewalk_m + street.setback_m[0 if side > 0 else 1]
        while x < street.extent_m:
            width, depth = float(rng.uniform(8, 20)), float(rng.uniform(8, 14))
            gap = float(rng.uniform(6, 16)) if rng.random() < 0.3 else float(rng.uniform(0, 1.5))
            height, offset = float(rng.uniform(4, 15)), float(rng.uniform(0, 2))
            facade = vary(_FACADES[int(rng.integers(len(_FACADES)))], rng)
            middle = x + width / 2
            if not street.in_cross(middle, width / 2 + street.sidewalk_m):
                y = side * (front + offset + depth / 2)
                shine = float(rng.uniform(18, 45))
                parts.append(Part(middle, y, 0, height, width / 2, depth / 2, facade, shine, Texture.BUILDING))
            x += width + gap
    return parts


def _tree(x: float, y: float, rng: Rng) -> list[Part]:
    trunk, top = float(rng.uniform(1.9, 2.8)), float(rng.uniform(4.5, 7.5))
    radius, green = float(rng.uniform(1.1, 2.0)), vary((70, 104, 46), rng, 16)
    split = trunk + 0.6 * (top - trunk)
    leaf = {"texture": Texture.LEAVES, "round": True, "density": 0.55}
    return [
        Part(x, y, 0, trunk + 0.3, 0.16, 0.16, (84, 66, 50), 16, round=True),
        Part(x, y, trunk, split, radius, radius, green, 13, **leaf),  # type: ignore[arg-type]
        Part(x, y, split, top, 0.65 * radius, 0.65 * radius, green, 13, **leaf),  # type: ignore[arg-type]
    ]


def _bush(x: float, y: float, rng: Rng) -> list[Part]:
    half = float(rng.uniform(0.4, 1.0)), float(rng.uniform(0.35, 0.7))
    green, top = vary((66, 98, 50), rng, 16), float(rng.uniform(0.7, 1.5))
    return [Part(x, y, 0, top, *half, green, 12, Texture.LEAVES, True, float(rng.uniform(0, 3)), 0.8)]


def _pole(x: float, y: float, rng: Rng) -> list[Part]:
    top = float(rng.uniform(3.5, 7))
    parts = [Part(x, y, 0, top, 0.09, 0.09, (92, 94, 98), 38, round=True)]
    if rng.random() < 0.5:
        sign = vary(((40, 84, 160), (196, 50, 44), (230, 200, 60))[int(rng.integers(3))], rng)
        parts.append(Part(x, y, 2.1, 2.8, 0.05, 0.32, sign, 150))
    return parts


def _bin(x: float, y: float, rng: Rng) -> list[Part]:
    colour = vary(((54, 74, 62), (72, 76, 82), (44, 66, 110), (150, 78, 40))[int(rng.integers(4))], rng)
    half = float(rng.uniform(0.22, 0.38))
    return [Part(x, y, 0, float(rng.uniform(0.8, 1.4)), half, half, colour, 26, round=bool(rng.random() < 0.5))]


def _bollard(x: float, y: float, rng: Rng) -> list[Part]:
    colour = vary(((196, 160, 50), (120, 120, 124), (168, 84, 60))[int(rng.integers(3))], rng)
    top = float(rng.uniform(0.6, 1.0))
    return [
        Part(x, y, 0, 0.8 * top, 0.11, 0.11, colour, 40, round=True),
        Part(x, y, 0.8 * top, top, 0.12, 0.12, (214, 212, 206), 80, round=True),
    ]


def _kiosk(x: float, y: float, rng: Rng) -> list[Part]:
    size, top = rng.uniform((1.1, 0.8), (2.6, 1.3)), float(rng.uniform(1.5, 2.7))
    colour, yaw = vary(_FACADES[int(rng.integers(len(_FACADES)))], rng, 25), float(rng.choice([0, math.pi / 2]))
    half = float(size[0]), float(size[1])
    return [Part(x, y, 0, top, *half, colour, 40, Texture.CARGO, yaw=yaw)]


_CLUTTER = (
    (_tree, 0.26, 0.5),
    (_pole, 0.2, 0.4),
    (_bush, 0.2, 1.0),
    (_bin, 0.15, 0.5),
    (_bollard, 0.13, 0.3),
    (_kiosk, 0.06, 2.3),
)


def draw_clutter(street: Street, rng: Rng) -> tuple[float, float, float, list[Part]]:
    """Return one thing beside the road as (x, y, radius, parts); x and y in metres, the parts around its foot."""
    build, _, radius = _CLUTTER[int(rng.choice(len(_CLUTTER), p=[share for _, share, _ in _CLUTTER]))]
    side = 1 if rng.random() < 0.5 else -1
    x = float(rng.uniform(-street.extent_m + 8, street.extent_m - 8))
    depth = street.setback_m[0 if side > 0 else 1]
    # Most things stand along the curb, the rest in front of the buildings.
    if rng.random() < 0.6:
        y = street.edge(side) + float(rng.uniform(0.5, 0.9)) + (0 if build is not _kiosk else 1.2)
    else:
        y = street.edge(side) + street.sidewalk_m + float(rng.uniform(0.0, 1.0)) * max(0.3, depth - radius)
    return x, side * y, radius, build(0.0, 0.0, rng)
