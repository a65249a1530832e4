"""Paint: the colour of a point on a surface, before light and air."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from bevkd.world.geometry import Bools, Floats, Floats32, Ints
from bevkd.world.parts import Texture

_TILE = 256

AHEAD, BEHIND, LEFT, RIGHT, ABOVE, BELOW = range(6)


@cache
def _tile() -> Floats32:
    """Return a tileable noise image in [0, 1], the same in every process."""
    rng = np.random.default_rng(20240229)
    total = np.zeros((_TILE, _TILE))
    for octave, weight in ((4, 0.5), (16, 0.8), (64, 0.6), (256, 0.35)):
        grid = rng.random((octave, octave))
        at = np.arange(_TILE) * octave / _TILE
        low, part = at.astype(int), at % 1
        part = part * part * (3 - 2 * part)
        high = (low + 1) % octave
        rows = grid[low] * (1 - part)[:, None] + grid[high] * part[:, None]
        total += weight * (rows[:, low] * (1 - part) + rows[:, high] * part)
    flat = np.argsort(np.argsort(total.ravel())) / total.size
    return flat.reshape(_TILE, _TILE).astype(np.float32)


def noise(a: Floats, b: Floats) -> Floats32:
    """Return smooth-ish noise in [0, 1], uniformly distributed, at texture coordinates in sixteenths of a tile."""
    i = (np.asarray(a) * 16).astype(np.int64) & (_TILE - 1)
    j = (np.asarray(b) * 16).astype(np.int64) & (_TILE - 1)
    return np.asarray(_tile()[i, j])


@dataclass(frozen=True)
class Surface:
    """Points on surfaces, one row each.

    ``side`` is one of AHEAD ... BELOW; ``a`` runs across the face from -1 to 1 and ``h`` up the part from 0 to 1;
    ``wide`` is the half width of the face and ``tall`` the height of the part in metres; ``part`` its index.
    """

    side: Ints
    a: Floats
    h: Floats
    wide: Floats
    tall: Floats
    part: Ints

    def select(self, rows: Ints) -> Surface:
        """Return the chosen rows."""
        return Surface(*(getattr(self, n)[rows] for n in ("side", "a", "h", "wide", "tall", "part")))


def paint(surface: Surface, texture: Ints, colour: Floats32) -> Floats32:
    """Return the colour ``n 3`` (0-255) of each point, given the paint of its part."""
    grain = noise(surface.a * surface.wide * 4 + surface.part, surface.h * surface.tall * 4)
    result = colour * (0.93 + 0.14 * grain)[:, None]
    for kind, painter in _PAINTERS.items():
        rows = np.nonzero(texture == kind)[0]
        if len(rows):
            result[rows] = painter(surface.select(rows), result[rows])
    return result


def _put(colour: Floats32, where: Bools, rgb: tuple[float, float, float]) -> None:
    colour[where] = rgb


def _glass(s: Surface, colour: Floats32, where: Bools) -> None:
    # Panes mirror a little sky towards their upper edge.
    shine = 38 + 46 * s.h[where] + 20 * noise(s.a[where] * s.wide[where] + 3.7 * s.part[where], s.h[where])
    colour[where] = shine[:, None] * np.array([0.9, 1.0, 1.12])


def _ends(s: Surface) -> tuple[Bools, Bools, Bools]:
    return s.side == AHEAD, s.side == BEHIND, (s.side == LEFT) | (s.side == RIGHT)


def _car_body(s: Surface, colour: Floats32) -> Floats32:
    front, rear, flank = _ends(s)
    corner = np.abs(s.a) > 0.62
    _put(colour, (front | rear) & (s.h < 0.28), (40, 40, 44))
    _put(colour, front & (np.abs(s.a) < 0.5) & (s.h > 0.38) & (s.h < 0.68), (34, 34, 38))
    _put(colour, front & corner & (s.h > 0.5) & (s.h < 0.8), (246, 244, 226))
    _put(colour, rear & corner & (s.h > 0.52) & (s.h < 0.86), (186, 22, 24))
    _put(colour, (front | rear) & (np.abs(s.a) < 0.26) & (s.h > 0.3) & (s.h < 0.46), (226, 226, 218))
    seam = flank & (np.abs(np.abs(s.a + 0.06) - 0.27) < 0.012)
    colour[seam | (flank & (s.h < 0.12))] *= 0.5
    return colour


def _cabin(s: Surface, colour: Floats32) -> Floats32:
    upright = s.side <= RIGHT
    flank = (s.side == LEFT) | (s.side == RIGHT)
    pillar = flank & ((np.abs(s.a) > 0.93) | (np.abs(s.a + 0.04) < 0.045))
    _glass(s, colour, upright & (s.h > 0.1) & (s.h < 0.86) & ~pillar & ~(~flank & (np.abs(s.a) > 0.9)))
    return colour


def _cargo(s: Surface, colour: Floats32) -> Floats32:
    front, rear, flank = _ends(s)
    style = s.part % 3
    rib = np.abs((s.a * s.wide * 1.3) % 1.0 - 0.5) > 0.46
    colour[(flank | front) & rib & (style != 1)] *= 0.82
    band = flank & (style == 1) & (s.h > 0.42) & (s.h < 0.66)
    colour[band] = 255 - 0.7 * colour[band]
    logo = flank & (style == 2) & (np.abs(s.a - 0.2) < 0.34) & (np.abs(s.h - 0.6) < 0.2)
    colour[logo] = np.array([200, 60, 40.0]) * 0.5 + colour[logo] * 0.3
    _put(colour, rear & ((np.abs(s.a) < 0.02) | (np.abs(s.a) > 0.95) | (s.h > 0.95)), (70, 70, 74))
    _put(colour, rear & (s.h < 0.07) & (np.abs(s.a) > 0.7), (182, 24, 26))
    return colour


def _cab(s: Surface, colour: Floats32) -> Floats32:
    front, _, flank = _ends(s)
    _glass(s, colour, front & (s.h > 0.52) & (s.h < 0.9) & (np.abs(s.a) < 0.9))
    _glass(s, colour, flank & (s.h > 0.55) & (s.h < 0.88) & (np.abs(s.a) < 0.62))
    _put(colour, front & (s.h > 0.2) & (s.h < 0.42) & (np.abs(s.a) < 0.55), (44, 44, 48))
    _put(colour, front & (s.h > 0.12) & (s.h < 0.24) & (np.abs(s.a) > 0.66), (246, 244, 226))
    return colour


def _bus(s: Surface, colour: Floats32) -> Floats32:
    front, rear, flank = _ends(s)
    mullion = np.abs((s.a * s.wide * 0.75) % 1.0 - 0.5) > 0.45
    _glass(s, colour, flank & (s.h > 0.42) & (s.h < 0.8) & ~mullion & (np.abs(s.a) < 0.97))
    _glass(s, colour, front & (s.h > 0.3) & (s.h < 0.8) & (np.abs(s.a) < 0.92))
    _glass(s, colour, rear & (s.h > 0.5) & (s.h < 0.78) & (np.abs(s.a) < 0.7))
    _put(colour, front & (s.h > 0.84) & (s.h < 0.95) & (np.abs(s.a) < 0.7), (230, 160, 40))
    _put(colour, front & (s.h > 0.1) & (s.h < 0.2) & (np.abs(s.a) > 0.7), (246, 244, 226))
    _put(colour, rear & (s.h > 0.1) & (s.h < 0.25) & (np.abs(s.a) > 0.8), (186, 22, 24))
    return colour


def _wheel(s: Surface, colour: Floats32) -> Floats32:
    flank = (s.side == LEFT) | (s.side == RIGHT)
    hub = flank & (s.a**2 + (2 * s.h - 1) ** 2 < 0.3)
    _put(colour, hub, (132, 134, 138))
    return colour


def _stripes(s: Surface, colour: Floats32) -> Floats32:
    slant = ((s.a * s.wide * 2.2 + s.h * s.tall * 2.2) % 1.0) < 0.5
    _put(colour, slant & (s.side < ABOVE), (204, 52, 40))
    return colour


# Width, height and half pane of the windows (metres, metres, share of the width) of the four styles of building.
_FACADE_GRID = ((2.4, 1.8, 3.2, 2.0), (3.0, 2.8, 3.3, 3.1), (0.24, 0.3, 0.4, 0.2))


def _building(s: Surface, colour: Floats32) -> Floats32:
    up, across = s.h * s.tall, s.a * s.wide + 40.0
    style = s.part % 4
    pitch_a, pitch_h, pane_half = (np.array(v, dtype=np.float32)[style] for v in _FACADE_GRID)
    cell_a, cell_h = across / pitch_a, (up - 0.4) / pitch_h
    in_a, in_h = cell_a % 1.0, cell_h % 1.0
    pane = (np.abs(in_a - 0.5) < pane_half) & (in_h > 0.28) & (in_h < 0.82)
    pane &= (s.h < 0.96) & (s.side < ABOVE)
    lit = noise(np.floor(cell_a) * 3.3 + s.part, np.floor(cell_h) * 5.1 + s.part)
    brick = (style == 0) & ((up % 0.3) < 0.05)
    colour[brick] *= 0.9
    colour[(s.h > 0.955) | ((up > 2.95) & (up < 3.15))] *= 1.12
    frame = pane & ((np.abs(in_a - 0.5) < 0.02) | (np.abs(in_h - 0.55) < 0.02))
    glass = 46 + 70 * lit
    colour[pane] = (glass[:, None] * np.array([0.86, 0.96, 1.1]))[pane]
    _put(colour, pane & (lit > 0.93), (226, 204, 150))
    _put(colour, frame, (196, 194, 188))
    return colour


def _leaves(s: Surface, colour: Floats32) -> Floats32:
    grain = noise(s.a * s.wide * 6 + 5 * s.part, s.h * s.tall * 6 + 3 * s.part)
    return np.asarray(colour * (0.62 + 0.62 * grain + 0.2 * s.h)[:, None], dtype=np.float32)


def _cloth(s: Surface, colour: Floats32) -> Floats32:
    fold = noise(s.a * 2 + s.part * 1.7, s.h * s.tall * 5)
    colour = colour * (0.82 + 0.36 * fold)[:, None]
    arm = (np.abs(s.a) > 0.7) & (s.side < ABOVE)
    colour[arm] *= 0.78
    return np.asarray(colour, dtype=np.float32)


_PAINTERS = {
    Texture.CAR_BODY: _car_body,
    Texture.CABIN: _cabin,
    Texture.CARGO: _cargo,
    Texture.CAB: _cab,
    Texture.BUS: _bus,
    Texture.WHEEL: _wheel,
    Texture.STRIPES: _stripes,
    Texture.BUILDING: _building,
    Texture.LEAVES: _leaves,
    Texture.CLOTH: _cloth,
}
