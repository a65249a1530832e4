"""The eight symmetries of a square, by the names of the variants that caches hold."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from types import MappingProxyType

from bevkd.geometry.affine import BEVAffine
from bevkd.grid import BEVGrid

_NAMES = (("", "x"), ("r90", "r90x"), ("r180", "r180x"), ("r270", "r270x"))

SYMMETRIES: Mapping[str, BEVAffine] = MappingProxyType(
    {
        name: BEVAffine(flip_x=mirrored, rotation_rad=quarters * math.pi / 2)
        for mirrored in (False, True)
        for quarters, names in enumerate(_NAMES)
        for name in (names[mirrored],)
    }
)
"""``augmented_from_canonical`` of each; the empty name changes nothing."""


def symmetries_of(grid: BEVGrid, quarter_turns: bool) -> tuple[str, ...]:
    """Return the symmetries that map the cells of ``grid`` onto its cells: at most eight, always the one that is none.

    Args:
        quarter_turns: also those that are no flips in x and y.
    """
    flips = ("", "r180", "x", "r180x")
    return tuple(
        name for name, affine in SYMMETRIES.items() if affine.is_grid_exact(grid) and (quarter_turns or name in flips)
    )


def nearest_symmetry(affine: BEVAffine, among: Collection[str]) -> tuple[str, BEVAffine]:
    """Return the symmetry that comes nearest to ``affine``, and what is left to do: ``augmented_from_symmetry``.

    What is left does not mirror, unless no symmetry among those does, and turns as little as they allow.

    Args:
        among: names of the symmetries that there are; the empty name must be one.
    """
    mirrored = affine.flip_x != affine.flip_y
    nearest = round(affine.rotation_rad / (math.pi / 2))
    for quarters in (nearest, nearest - 1, nearest + 1, nearest + 2):
        # Flipping both axes is a half turn.
        name = _NAMES[(quarters + 2 * affine.flip_y) % 4][mirrored]
        if name in among:
            left = affine.rotation_rad - quarters * (math.pi / 2)
            x, y, z = affine.translation_m
            moved = (-x if affine.flip_x else x, -y if affine.flip_y else y, z)
            turn = -left if mirrored else left
            return name, BEVAffine(rotation_rad=turn, scale=affine.scale, translation_m=moved)
    return "", affine
