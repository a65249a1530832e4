"""Parts: the yawed boxes and upright cylinders that everything in the world is made of."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum

import numpy as np

from bevkd.world.geometry import Bools, Floats, Ints


class Texture(IntEnum):
    """How the surface of a part is painted."""

    PLAIN = 0
    CAR_BODY = 1
    CABIN = 2
    CARGO = 3
    CAB = 4
    BUS = 5
    WHEEL = 6
    BIKE = 7
    STRIPES = 8
    BUILDING = 9
    LEAVES = 10
    GROUND = 11
    CLOTH = 12


@dataclass(frozen=True)
class Part:
    """A box or an upright elliptic cylinder in the frame of its object (x forward, y left, z up from its foot)."""

    x: float
    y: float
    z0: float
    z1: float
    half_length: float
    half_width: float
    colour: tuple[float, float, float]
    intensity: float
    texture: Texture = Texture.PLAIN
    round: bool = False
    yaw: float = 0.0
    density: float = 1.0


@dataclass(frozen=True)
class Parts:
    """Parts of a whole scene in the scene frame, one row each.

    ``owner`` is the index of the object, or -1 for clutter. ``density`` is the share of LiDAR rays that a part stops.
    """

    x: Floats
    y: Floats
    z0: Floats
    z1: Floats
    half_length: Floats
    half_width: Floats
    yaw: Floats
    round: Bools
    colour: Floats
    intensity: Floats
    density: Floats
    texture: Ints
    owner: Ints

    def __len__(self) -> int:
        return len(self.x)

    def select(self, keep: Bools | Ints) -> Parts:
        """Return the chosen rows."""
        return Parts(**{f.name: getattr(self, f.name)[keep] for f in fields(self)})


def stack(groups: list[tuple[int, list[Part]]]) -> Parts:
    """Return the parts of all ``(owner, parts)`` groups as one table, still in the frames of their objects."""
    rows = [(owner, part) for owner, parts in groups for part in parts]

    def column(name: str) -> Floats:
        return np.array([getattr(part, name) for _, part in rows], dtype=np.float64)

    return Parts(
        **{n: column(n) for n in ("x", "y", "z0", "z1", "half_length", "half_width", "yaw", "intensity", "density")},
        round=np.array([part.round for _, part in rows], dtype=bool),
        colour=np.array([part.colour for _, part in rows], dtype=np.float64).reshape(-1, 3),
        texture=np.array([int(part.texture) for _, part in rows], dtype=np.int64),
        owner=np.array([owner for owner, _ in rows], dtype=np.int64),
    )


def place(parts: Parts, x: Floats, y: Floats, z: Floats, yaw: Floats) -> Parts:
    """Return ``parts`` moved from the frame of their object to its pose; all arguments have one row per part."""
    cos, sin = np.cos(yaw), np.sin(yaw)
    moved = {f.name: getattr(parts, f.name) for f in fields(parts)}
    moved["x"] = x + cos * parts.x - sin * parts.y
    moved["y"] = y + sin * parts.x + cos * parts.y
    moved["z0"] = z + parts.z0
    moved["z1"] = z + parts.z1
    moved["yaw"] = yaw + parts.yaw
    return Parts(**moved)


def join(first: Parts, second: Parts) -> Parts:
    """Return the rows of both tables."""
    return Parts(**{f.name: np.concatenate([getattr(first, f.name), getattr(second, f.name)]) for f in fields(first)})
