"""The palette."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from bevkd.viz.style import DEPTH_COLORS, ENERGY_COLORS, ROLE_COLORS, ramp, rgb

# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
VISION = {
    "normal": np.eye(3),
    "protan": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deutan": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritan": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}


def lab(color: tuple[int, int, int], vision: str = "normal") -> NDArray[np.float64]:
    """Return CIELAB (D65) of a colour as seen with this vision."""
    share = np.array(color) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.119192, 0.9503041]]
    )
    xyz = to_xyz @ np.clip(VISION[vision] @ linear, 0, 1) / np.array([0.95047, 1, 1.08883])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", VISION)
def test_every_pair_of_roles_stays_apart_for_colour_blind_readers(vision: str) -> None:
    seen = [lab(rgb(color), vision) for color in ROLE_COLORS.values()]
    assert min(float(np.linalg.norm(a - b)) for a, b in combinations(seen, 2)) >= 35


@pytest.mark.parametrize("colors", [ENERGY_COLORS, DEPTH_COLORS])
def test_scales_darken_steadily_so_that_they_read_in_grey(colors: tuple[str, ...]) -> None:
    lightness = np.array([lab(color)[0] for color in ramp(colors)])
    assert (np.diff(lightness) < 0.3).all()
    assert lightness[0] - lightness[-1] > 40


def test_ramp_starts_and_ends_with_the_given_colours() -> None:
    table = ramp(("#000000", "#FF0000", "#FFFFFF"), 5)
    assert table == [(0, 0, 0), (128, 0, 0), (255, 0, 0), (255, 128, 128), (255, 255, 255)]
