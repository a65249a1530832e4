"""Tables within a page: results with their spread, and gains as a heat table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bevkd.viz.html.element import Content, Html, element

DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
"""What stands for an unknown value, and before a negative one."""

DEEPEST = 0.55
"""Opacity of the colour behind the largest gain or loss: the text on it stays legible in both themes."""


@dataclass(frozen=True)
class Cell:
    """A value in a table of results.

    Attributes:
        note: shown when pointed at.
        words: whether it holds text, which is left-aligned and may break, and not a number.
    """

    content: Content
    note: str = ""
    words: bool = False


@dataclass(frozen=True)
class Gain:
    """A value beside the one that it is compared with, both in points; NaN is unknown.

    Attributes:
        spread: standard deviation of the difference over seeds, NaN if unknown; only larger differences are bold.
    """

    base: float
    value: float
    spread: float

    @property
    def points(self) -> float:
        """The difference."""
        return self.value - self.base


def scrolling(table: Html, label: str) -> Html:
    """Return a table in a region that scrolls on its own, by keyboard too, where the page is too narrow."""
    return element("div", table, class_="scroll", tabindex=0, role="region", aria_label=label)


def result_table(
    caption: str, heads: Sequence[Content], rows: Sequence[tuple[Content, Sequence[Cell]]], kind: str = ""
) -> Html:
    """Return a table with a name and cells in each row.

    Args:
        heads: of the columns, that of the names included.
        kind: classes of the page: ``text`` for words rather than numbers, ``keys`` for long names of rows,
            ``captionless`` where a heading above says already what it is.
    """
    head = element("tr", [element("th", each, scope="col") for each in heads])
    body = [
        element("tr", element("th", name, scope="row"), [_result_cell(cell) for cell in cells]) for name, cells in rows
    ]
    table = element(
        "table",
        element("caption", caption),
        element("thead", head),
        element("tbody", body),
        class_=f"wide {kind}".strip(),
    )
    return scrolling(table, caption)


def heat_table(
    caption: str,
    corner: str,
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Gain]]],
    deepest: float,
) -> Html:
    """Return gains in points with a colour that grows with them; below each stand the two values.

    Args:
        corner: above the names of the rows.
        deepest: points of the deepest colour, the same for all tables that are compared.
    """
    head = element("tr", [element("th", each, scope="col") for each in (corner, *columns)])
    body = [
        element(
            "tr",
            element("th", name, scope="row"),
            [_heat_cell(gain, deepest, f"{name}, {column}") for column, gain in zip(columns, gains, strict=True)],
        )
        for name, gains in rows
    ]
    table = element("table", element("caption", caption), element("thead", head), element("tbody", body), class_="heat")
    return scrolling(table, caption)


def ramp(deepest: float) -> Html:
    """Return the colours of a heat table with the points at their ends."""
    words = f"from {-deepest:.0f} to {deepest:+.0f} points"
    return element(
        "p",
        f"{MINUS}{deepest:.0f}",
        element("i", role="img", aria_label=words),
        f"+{deepest:.0f} points",
        class_="ramp",
    )


def signed(points: float, digits: int = 1) -> str:
    """Return points with their sign; what rounds to nothing has none."""
    if not math.isfinite(points):
        return DASH
    rounded = round(points, digits)
    return f"{0:.{digits}f}" if rounded == 0 else f"{rounded:+.{digits}f}".replace("-", MINUS)


def decimal(value: float | None, digits: int = 1) -> str:
    """Return a value with a fixed number of decimals, a dash for one that is unknown."""
    return DASH if value is None or not math.isfinite(value) else f"{value:.{digits}f}".replace("-", MINUS)


def _result_cell(cell: Cell) -> Html:
    return element("td", cell.content, class_="wrap" if cell.words else None, title=cell.note or None)


def _heat_cell(gain: Gain, deepest: float, place: str) -> Html:
    points = gain.points
    if not math.isfinite(points):
        return element("td", element("span", element("b", DASH), class_="level", style="--a:0"))
    share = min(abs(points) / deepest, 1.0) if deepest > 0 else 0.0
    shown = signed(points)
    kind = "level" if shown == "0.0" else "up" if points > 0 else "down"
    strength = 0.0 if kind == "level" else DEEPEST * share**0.8
    content = element(
        "span",
        element("b" if kind != "level" and abs(points) > gain.spread else "i", shown),
        element("small", f"{decimal(gain.base)} → {decimal(gain.value)}"),
        class_=kind,
        style=f"--a:{strength:.2f}",
        title=f"{place}: {decimal(gain.base)} before, {decimal(gain.value)} after, {shown} points",
    )
    return element("td", content)
