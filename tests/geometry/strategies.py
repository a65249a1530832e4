"""Random boxes and affines for property tests."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from bevkd.geometry.affine import BEVAffine
from bevkd.types import Boxes

D4 = tuple(
    BEVAffine(flip_x=flip_x, rotation_rad=quarters * math.pi / 2) for flip_x in (False, True) for quarters in range(4)
)
"""The eight symmetries of a square."""


def seeds() -> st.SearchStrategy[torch.Generator]:
    """Return seeded generators."""
    return st.integers(0, 2**31).map(lambda seed: torch.Generator().manual_seed(seed))


def affines() -> st.SearchStrategy[BEVAffine]:
    """Return affines beyond the range of any published augmentation."""
    shift = st.floats(-3, 3)
    return st.builds(
        BEVAffine,
        flip_x=st.booleans(),
        flip_y=st.booleans(),
        rotation_rad=st.floats(-4, 4),
        scale=st.floats(0.7, 1.4),
        translation_m=st.tuples(shift, shift, shift),
    )


def random_boxes(n: int, generator: torch.Generator, reach_m: float = 50.0) -> Boxes:
    """Return boxes from pedestrian to bus size with centres within ``reach_m`` of the origin."""

    def uniform(low: float, high: float, count: int) -> Tensor:
        return low + (high - low) * torch.rand(n, count, generator=generator)

    parts = [
        uniform(-reach_m, reach_m, 2),
        uniform(-2, 2, 1),
        uniform(0.4, 12, 1),
        uniform(0.4, 4, 2),
        uniform(-4, 4, 1),
        uniform(-10, 10, 2),
    ]
    return Boxes(torch.cat(parts, dim=1), torch.arange(n) % 3, torch.ones(n))
