"""The one visual language of all pictures: colours of roles, ink, fonts and text sizes."""

from __future__ import annotations

from typing import Literal

Role = Literal["ground_truth", "teacher", "student", "distilled"]
"""Whose boxes, features or scores are drawn: the annotations, the teacher, the plain or the distilled student."""

ROLE_COLORS: dict[Role, str] = {
    "ground_truth": "#00B97E",
    "teacher": "#1F4EDB",
    "student": "#F1A305",
    "distilled": "#B80287",
}
"""One colour per role; every pair stays apart (CIELAB distance >= 35) for protan, deutan and tritan readers."""

ROLE_NAMES: dict[Role, str] = {
    "ground_truth": "Ground truth",
    "teacher": "Teacher",
    "student": "Plain student",
    "distilled": "Distilled student",
}

CLASS_COLORS = (
    "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#8C6BB1", "#41AE76", "#B15928",
)  # fmt: skip
"""Fill of the masks of each class, in the order of the classes; later classes begin again."""

PAPER = "#FFFFFF"
INK = "#1F2430"
MUTED = "#6B7280"
HAIRLINE = "#D5D9E0"

DPI = 144.0
"""Pixels per inch of every figure: 8 pt text is 16 px high."""

TITLE_PT = 9.0
TEXT_PT = 7.5
SMALL_PT = 6.5

ENERGY_COLORS = ("#FFFFFF", "#FBE7C6", "#F8BB8A", "#EE7F6B", "#C8466E", "#84236F", "#3F1258", "#12061F")
"""Light to dark, monotone in lightness, so that it also reads in grey and for colour-blind readers."""

DEPTH_COLORS = ("#FFF7B0", "#FFD166", "#FF9E6D", "#F46A8A", "#B65FC2", "#6F5BD0")
"""Near to far LiDAR points on images; all light enough for dark asphalt."""


def rgb(color: str) -> tuple[int, int, int]:
    """Return the 8-bit red, green and blue of ``#RRGGBB``."""
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)


def ramp(colors: tuple[str, ...], steps: int = 256) -> list[tuple[int, int, int]]:
    """Return ``steps`` colours that run evenly through ``colors``."""
    stops = [rgb(color) for color in colors]
    table = []
    for step in range(steps):
        position = step / (steps - 1) * (len(stops) - 1)
        left = min(int(position), len(stops) - 2)
        share = position - left
        red, green, blue = (round(a + (b - a) * share) for a, b in zip(stops[left], stops[left + 1], strict=True))
        table.append((red, green, blue))
    return table
