"""Charts as SVG within a page: small multiples of curves, dots per seed, values by range.

Colours are classes of ``page.css`` (``c-plain``, ``c-d0``, ...), so that charts follow the page's theme.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from bevkd.viz.charts import smooth
from bevkd.viz.html.element import Html, element, markup, number

WIDTH, HEIGHT = 340, 200
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 8, 24
"""Size of a chart and room around its plot, in the units of its view box; text is 11 of them high."""

RAW_POINTS, SMOOTH_POINTS = 240, 120
"""Most points of a curve that are drawn: beyond them, a chart of its size shows no more."""

FAR = 2.0
"""Values in the background beyond this many times the range of the others are left off the axis."""

LOG_FROM = 20.0
"""A chart is logarithmic if its largest value is this many times its smallest."""


@dataclass(frozen=True)
class Curve:
    """The course of a figure in one run.

    Attributes:
        name: of the method; curves of one name are seeds of it.
        tone: the method's colour class.
        points: ``(step, value)`` in order.
        label: of the run, shown when pointed at.
    """

    name: str
    tone: str
    points: tuple[tuple[float, float], ...]
    label: str = ""


@dataclass(frozen=True)
class Dots:
    """The values of one method, a seed each.

    Attributes:
        labels: of each value, shown when pointed at.
        shown: mean and spread as they are to be read.
        aside: whether the axis may end before these values, if they are far from all others.
    """

    name: str
    tone: str
    values: tuple[float, ...]
    labels: tuple[str, ...]
    shown: str
    aside: bool = False


@dataclass(frozen=True)
class Series:
    """Values of one method by category, with their spread over seeds; NaN is left out."""

    name: str
    tone: str
    values: tuple[float, ...]
    spreads: tuple[float, ...]


@dataclass(frozen=True)
class _Scale:
    """Where values of the vertical axis lie."""

    low: float
    high: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Return the height of ``value`` in the view box; values beyond the axis lie on its end."""
        low, high, value = (
            (math.log10(each) for each in (self.low, self.high, max(value, self.low)))
            if self.logarithmic
            else (self.low, self.high, value)
        )
        share = (value - low) / (high - low)
        return TOP + (1 - min(max(share, 0.0), 1.0)) * (HEIGHT - TOP - BOTTOM)

    def ticks(self) -> list[float]:
        """Return the values that are written beside the axis."""
        if not self.logarithmic:
            return ticks(self.low, self.high)
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        steps = [1.0] if last - first > 2 else [1.0, 2.0, 5.0]
        every = 1 + (last - first) // 5
        candidates = [step * 10.0**power for power in range(first, last + 1, every) for step in steps]
        return [value for value in candidates if self.low <= value <= self.high]


def line_chart(title: str, curves: Sequence[Curve], linear: bool = False) -> Html:
    """Return a chart of curves over training steps: raw values faint, smoothed ones thin, the mean of seeds bold.

    Args:
        linear: keep the axis linear; by default it is logarithmic where values differ by orders.
    """
    known = [_finite(curve) for curve in curves]
    known = [curve for curve in known if curve.points]
    values = [value for curve in known for _, value in curve.points]
    last = max(step for curve in known for step, _ in curve.points)
    first = min(step for curve in known for step, _ in curve.points)
    scale = _scale_of(values, linear)

    def x(step: float) -> float:
        return LEFT + (step - first) / max(last - first, 1) * (WIDTH - LEFT - RIGHT)

    def line(points: Sequence[tuple[float, float]], kind: str, label: str = "") -> Html:
        path = "M" + "L".join(f"{number(x(step))} {number(scale.place(value))}" for step, value in points)
        return element("g", element("title", label) if label else None, element("path", d=path, class_=kind))

    drawn: list[Html] = []
    for name, own in _by_name(known).items():
        smoothed = [_smoothed(curve) for curve in own]
        alone = len(own) == 1
        lines = [line(thinned(curve.points, RAW_POINTS), "raw") for curve in own]
        lines += [
            line(
                thinned(points, SMOOTH_POINTS), "mean" if alone else "seed", f"{curve.label or name}: {_course(points)}"
            )
            for curve, points in zip(own, smoothed, strict=True)
        ]
        if not alone:
            mean = _mean(smoothed)
            lines.append(line(thinned(mean, SMOOTH_POINTS), "mean", f"{name}, mean of {len(own)}: {_course(mean)}"))
        drawn.append(element("g", lines, class_=own[0].tone))
    labels = [(x(step), short(step)) for step in ticks(first, last, 4)]
    return _chart(title, [_axes(scale, labels), drawn], _ends(known))


def range_chart(title: str, categories: Sequence[str], series: Sequence[Series], unit: str) -> Html:
    """Return values by category as dots joined by lines, one line per method, with their spread as a bar."""
    tops = [
        value + (spread if math.isfinite(spread) else 0.0)
        for each in series
        for value, spread in zip(each.values, each.spreads, strict=True)
        if math.isfinite(value)
    ]
    scale = _Scale(0.0, _above(max([*tops, 1.0])))
    width = (WIDTH - LEFT - RIGHT) / len(categories)

    def x(index: int, shift: float) -> float:
        return LEFT + (index + 0.5) * width + shift

    drawn = []
    for order, each in enumerate(series):
        shift = (order - (len(series) - 1) / 2) * min(7.0, width / (2 * len(series)))
        known = [index for index, value in enumerate(each.values) if math.isfinite(value)]
        path = "M" + "L".join(f"{number(x(i, shift))} {number(scale.place(each.values[i]))}" for i in known)
        marks = []
        for index in known:
            value, spread = each.values[index], each.spreads[index]
            middle = x(index, shift)
            written = f"{each.name}, {categories[index]}: {value:.1f}"
            if math.isfinite(spread):
                written += f" ± {spread:.1f}"
                low, high = scale.place(value - spread), scale.place(value + spread)
                marks.append(element("path", d=f"M{number(middle)} {number(low)}V{number(high)}", class_="span"))
            dot = element("circle", cx=middle, cy=scale.place(value), r=4, class_="dot")
            marks.append(element("g", element("title", f"{written} {unit}"), dot))
        line = element("path", d=path, class_="seed") if len(known) > 1 else None
        drawn.append(element("g", line, marks, class_=each.tone))
    labels = [(x(index, 0), name) for index, name in enumerate(categories)]
    return _chart(title, [_axes(scale, labels), drawn], None)


def dot_rows(rows: Sequence[Dots], reference: float | None, unit: str) -> Html:
    """Return a row per method: its name, a dot per seed and a bold one for their mean, and the mean in words.

    Args:
        reference: where a dashed line stands, e.g. the mean of the plain student.
        unit: of the values, below the axis.
    """
    low, high = _range_of(rows)

    def x(value: float) -> str:
        return f"{number((value - low) / (high - low) * 100)}%"

    marks = ticks(low, high, 6)
    grid = [element("line", x1=x(mark), x2=x(mark), y1=0, y2="100%", class_="grid") for mark in marks]
    if reference is not None:
        grid.append(element("line", x1=x(reference), x2=x(reference), y1=0, y2="100%", class_="ref"))
    cells = []
    for row in rows:
        drawn = _beyond(row, low, high) or _dots(row, x)
        svg = element("svg", grid, drawn, height=34, role="img", aria_label=f"{row.name}: {row.shown}")
        cells += [
            element("div", element("span", class_="swatch"), row.name, class_=f"name {row.tone}"),
            element("div", svg, class_=f"track {row.tone}"),
            element("div", row.shown, class_="value"),
        ]
    labels = [element("text", short(mark), x=x(mark), y=11, text_anchor="middle") for mark in marks]
    cells += [
        element("div", class_="axis-gap"),
        element("div", element("svg", labels, height=16, aria_hidden="true"), class_="axis track"),
        element("div", unit, class_="axis value"),
    ]
    return element("div", cells, class_="dots")


def _dots(row: Dots, x: Callable[[float], str]) -> Html:
    """Return the seeds of a method, and their mean over them."""
    middle = element("circle", cx=x(fmean(row.values)), cy=17, r=6.5, class_="dot")
    mean = element("g", element("title", f"{row.name}: {row.shown}"), middle)
    if len(row.values) == 1:
        return mean
    span = element("line", x1=x(min(row.values)), x2=x(max(row.values)), y1=17, y2=17, class_="span")
    seeds = [
        element("g", element("title", label), element("circle", cx=x(value), cy=17, r=4, class_="faint"))
        for value, label in zip(row.values, row.labels, strict=True)
    ]
    return markup(span, mean, seeds)


def _beyond(row: Dots, low: float, high: float) -> Html | None:
    """Return an arrow at the end of the axis for values beyond it, None for others."""
    mean = fmean(row.values)
    if low <= mean <= high:
        return None
    place, arrow = (
        ("100%", "\N{BLACK RIGHT-POINTING TRIANGLE}") if mean > high else ("0%", "\N{BLACK LEFT-POINTING TRIANGLE}")
    )
    anchor = "end" if mean > high else "start"
    label = element("title", f"{row.name}: {row.shown}, beyond the axis")
    return element("g", label, element("text", arrow, x=place, y=21, text_anchor=anchor, class_="beyond"))


def _range_of(rows: Sequence[Dots]) -> tuple[float, float]:
    """Return the ends of the axis: around all values, or around those in the foreground if others are far away."""
    front = [value for row in rows if not row.aside for value in row.values] or [row.values[0] for row in rows]
    everything = [value for row in rows for value in row.values]
    reach = max(max(front) - min(front), 1.0)
    far = max(everything) - max(front) > FAR * reach or min(front) - min(everything) > FAR * reach
    values = front if far else everything
    room = max((max(values) - min(values)) * 0.08, 0.5)
    low = min(values) - room
    return max(0.0, low) if min(values) >= 0 else low, max(values) + room


def legend(names: Mapping[str, str]) -> Html:
    """Return names with their colour classes as a line of swatches."""
    items = [element("li", element("span", class_="swatch"), name, class_=tone) for name, tone in names.items()]
    return element("ul", items, class_="legend")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round values from ``low`` to ``high``, about ``count`` of them."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(each * power for each in (1, 2, 2.5, 5, 10) if each * power >= raw * 0.999)
    return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """Return a number for an axis: few digits, thousands and millions as k and M."""
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * limit or (abs(value) >= limit and value % limit == 0):
            return f"{value / limit:.3g}{unit}"
    return f"{value:.4g}".replace("e-0", "e-")


def thinned(points: Sequence[tuple[float, float]], count: int) -> list[tuple[float, float]]:
    """Return at most ``count`` points: the means of equal runs of ``points``."""
    if len(points) <= count:
        return list(points)
    edges = [round(index * len(points) / count) for index in range(count + 1)]
    runs = [points[start:stop] for start, stop in pairwise(edges)]
    return [(fmean(step for step, _ in run), fmean(value for _, value in run)) for run in runs]


def _chart(title: str, content: list[object], ends: Html | None) -> Html:
    svg = element(
        "svg",
        content,  # type: ignore[arg-type]
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=title,
    )
    return element("figure", element("h4", title), svg, ends, class_="chart")


def _axes(scale: _Scale, labels: Sequence[tuple[float, str]]) -> Html:
    """Return hairlines with values at the left, and ``labels`` below."""
    lines = []
    for value in scale.ticks():
        y = scale.place(value)
        lines.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        lines.append(element("text", short(value), x=LEFT - 7, y=y + 4, text_anchor="end"))
    floor = HEIGHT - BOTTOM
    lines.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=floor, y2=floor, class_="base"))
    below = []
    for x, label in labels:
        edge = "end" if x > WIDTH - RIGHT - 12 else "middle"
        below.append(element("text", label, x=min(x, WIDTH - RIGHT + 4), y=HEIGHT - 7, text_anchor=edge))
    return markup(lines, below)


def _ends(curves: Sequence[Curve]) -> Html:
    """Return where the curves end, in words: the smoothed last value of each method."""
    items = []
    for name, own in _by_name(curves).items():
        last = fmean(_smoothed(curve)[-1][1] for curve in own)
        items.append(element("span", element("span", class_="swatch"), f"{name} {last:.3g}", class_=own[0].tone))
    return element("p", element("span", "at the end"), items, class_="ends")


def _scale_of(values: Sequence[float], linear: bool) -> _Scale:
    low, high = min(values), max(values)
    positive = [value for value in values if value > 0]
    if not linear and low >= 0 and positive and high > LOG_FROM * min(positive):
        # A few values near zero must not squeeze all others into a corner.
        floor = sorted(positive)[len(positive) // 100]
        return _Scale(floor / 1.1, high * 1.1, True)
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return _Scale(max(0.0, low - room) if low >= 0 else low - room, high + room)


def _above(value: float) -> float:
    """Return the next round value."""
    return ticks(0.0, value * 1.05)[-1] if ticks(0.0, value * 1.05)[-1] >= value else value * 1.1


def _by_name(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    grouped: dict[str, list[Curve]] = {}
    for curve in curves:
        grouped.setdefault(curve.name, []).append(curve)
    return grouped


def _finite(curve: Curve) -> Curve:
    points = tuple((step, value) for step, value in curve.points if math.isfinite(value))
    return Curve(curve.name, curve.tone, points, curve.label)


def _smoothed(curve: Curve) -> list[tuple[float, float]]:
    steps, values = zip(*curve.points, strict=True)
    return list(zip(steps, smooth(values), strict=True))


def _mean(curves: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Return the mean of curves at the steps that all of them have."""
    by_step = [dict(curve) for curve in curves]
    common = [step for step in by_step[0] if all(step in other for other in by_step)]
    return [(step, fmean(curve[step] for curve in by_step)) for step in common] or list(curves[0])


def _course(points: Sequence[tuple[float, float]]) -> str:
    return f"{points[0][1]:.3g} at step {points[0][0]:.0f}, {points[-1][1]:.3g} at step {points[-1][0]:.0f}"
