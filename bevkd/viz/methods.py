"""A chart of methods side by side: what each scores, and what it gains over the plain student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bevkd.viz.charts import style_chart
from bevkd.viz.image import axes_at, new_figure, text_at
from bevkd.viz.style import HAIRLINE, INK, MUTED, ROLE_COLORS, SMALL_PT, TEXT_PT, Role

_ROW_PX, _TOP_PX, _BOTTOM_PX, _LETTER_PX = 46, 44, 62, 8.6
_LONGEST = 58


@dataclass(frozen=True)
class MethodScores:
    """Scores of a method, from 0 to 1.

    Attributes:
        role: whose colour it has.
        values: of each seed.
        spread: their standard deviation, None of one seed.
        gains: differences to the plain run of each seed; empty where there is none.
        interval: of their mean.
    """

    label: str
    role: Role
    values: tuple[float, ...]
    spread: float | None = None
    gains: tuple[float, ...] = ()
    interval: tuple[float, float] | None = None


def draw_methods(methods: Sequence[MethodScores], score: str, *, width_px: int = 1100) -> Figure:
    """Return a line per method: its score on the left, its gain on the right if any has one; a dot is a seed.

    Args:
        score: what the values are called.
    """
    left = round(max((len(_short(method.label)) for method in methods), default=0) * _LETTER_PX) + 24
    height = max(1, len(methods)) * _ROW_PX
    figure_height = height + _TOP_PX + _BOTTOM_PX
    figure = new_figure(width_px, figure_height)
    gained = any(method.gains for method in methods)
    free = width_px - left - 30
    wide = round(free * 0.52) if gained else free
    plot_scores(axes_at(figure, left, _TOP_PX, wide, height), methods, f"{score} [%]")
    if gained:
        gap = 40
        axes = axes_at(figure, left + wide + gap, _TOP_PX, free - wide - gap, height)
        plot_gains(axes, methods, f"gain in {score} [points]")
    caption = (
        "a dot is a seed, a bar their mean; lines: one standard deviation on the left, 95 % of the mean on the right"
    )
    text_at(
        figure,
        left,
        figure_height - 22,
        caption if gained else caption.partition(" on the left")[0],
        fontsize=SMALL_PT,
        color=MUTED,
    )
    return figure


def plot_scores(axes: Axes, methods: Sequence[MethodScores], title: str) -> None:
    """Draw each method's seeds as dots on a line of one spread to either side, and write the mean."""
    for row, method in enumerate(methods):
        reach = None if method.spread is None else (-method.spread, method.spread)
        mean = fmean(method.values)
        _draw_line(axes, row, method, method.values, reach and (mean + reach[0], mean + reach[1]), "{:.1f}")
    axes.set_yticks(range(len(methods)), [_short(method.label) for method in methods])
    _finish(axes, len(methods), title)


def plot_gains(axes: Axes, methods: Sequence[MethodScores], title: str) -> None:
    """Draw each method's differences as dots on a line of their mean's interval, and write the mean."""
    axes.axvline(0, color=MUTED, linewidth=0.8, zorder=1)
    for row, method in enumerate(methods):
        if method.gains:
            _draw_line(axes, row, method, method.gains, method.interval, "{:+.1f}")
    axes.set_yticks([])
    _finish(axes, len(methods), title)


def _draw_line(
    axes: Axes,
    row: int,
    method: MethodScores,
    values: Sequence[float],
    ends: tuple[float, float] | None,
    form: str,
) -> None:
    color, mean = ROLE_COLORS[method.role], 100 * fmean(values)
    if ends:
        axes.plot([100 * end for end in ends], [row, row], color=color, linewidth=1.4, alpha=0.55, zorder=2)
    axes.scatter([100 * value for value in values], [row] * len(values), s=16, color=color, alpha=0.75, lw=0, zorder=3)
    axes.plot([mean, mean], [row - 0.2, row + 0.2], color=color, linewidth=2.2, zorder=4)
    axes.annotate(
        form.format(mean),
        (mean, row - 0.22),
        (0, 1),
        textcoords="offset points",
        ha="center",
        fontsize=SMALL_PT,
        color=INK,
    )


def _finish(axes: Axes, rows: int, title: str) -> None:
    axes.set_ylim(rows - 0.4, -0.75)
    axes.margins(x=0.08)
    axes.grid(axis="x", color=HAIRLINE, linewidth=0.6, zorder=0)
    style_chart(axes, title)
    axes.tick_params(axis="y", length=0, labelcolor=INK, labelsize=TEXT_PT)
    axes.spines["left"].set_visible(False)


def _short(label: str) -> str:
    return label if len(label) <= _LONGEST else f"{label[: _LONGEST - 3]}..."
