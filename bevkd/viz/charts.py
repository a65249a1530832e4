"""Charts of results: AP per class, box counts per class and training curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bevkd.viz.image import axes_at, new_figure
from bevkd.viz.style import HAIRLINE, INK, MUTED, ROLE_COLORS, ROLE_NAMES, SMALL_PT, TEXT_PT, TITLE_PT, Role

SMOOTHING = 0.04
"""Window of the smoothed training curve as a share of its length."""


def draw_ap_bars(ap: Mapping[Role, Mapping[str, float]], *, width_px: int = 1100, height_px: int = 460) -> Figure:
    """Return bars of the average precision of each class, and of the mean, for each role.

    Args:
        ap: AP in [0, 1] by class; NaN or absent means that the class was not scored.
    """
    figure = new_figure(width_px, height_px)
    plot_ap(axes_at(figure, 70, 44, width_px - 90, height_px - 104), ap)
    return figure


def draw_curves(
    curves: Mapping[Role, Sequence[tuple[int, float]]],
    *,
    title: str = "Training loss",
    width_px: int = 560,
    height_px: int = 460,
) -> Figure:
    """Return curves of ``(step, value)``: the smoothed course in the role's colour over the raw values."""
    figure = new_figure(width_px, height_px)
    plot_curves(axes_at(figure, 70, 44, width_px - 90, height_px - 104), curves, title)
    return figure


def draw_costs(costs: Mapping[str, Mapping[str, float]], *, width_px: int = 900, height_px: int = 360) -> Figure:
    """Return one chart per cost, each with a bar per way of training and its value on it.

    Args:
        costs: by what the cost is and its unit; values by the way's name, of which ``plain`` has the colour of plain
            students, ``cached`` of distilled ones and ``online`` of teachers.
    """
    figure = new_figure(width_px, height_px)
    each = width_px / max(1, len(costs))
    for place, (title, values) in enumerate(costs.items()):
        plot_costs(axes_at(figure, place * each + 60, 44, each - 80, height_px - 84), values, title)
    return figure


def plot_costs(axes: Axes, values: Mapping[str, float], title: str) -> None:
    """Draw a bar per way of training, with its value on it."""
    roles: dict[str, Role] = {"plain": "student", "cached": "distilled", "online": "teacher"}
    colors = [ROLE_COLORS[roles[name]] for name in values]
    axes.bar(range(len(values)), list(values.values()), width=0.6, color=colors, linewidth=0, zorder=2)
    for place, value in enumerate(values.values()):
        axes.annotate(
            f"{value:.3g}",
            (place, value),
            (0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=SMALL_PT,
            color=INK,
        )
    axes.set_xticks(range(len(values)), list(values))
    axes.margins(y=0.12)
    axes.set_ylim(bottom=0)
    style_chart(axes, title)
    axes.tick_params(axis="x", length=0, labelcolor=INK)


def plot_ap(axes: Axes, ap: Mapping[Role, Mapping[str, float]]) -> None:
    """Draw grouped bars, the mean first and set apart, with values in percent on them."""
    names = list(dict.fromkeys(name for scores in ap.values() for name in scores))
    bar = 0.8 / max(1, len(ap))
    places = [0.0, *(1.3 + index for index in range(len(names)))]
    for order, (role, scores) in enumerate(ap.items()):
        known = [score for score in scores.values() if not math.isnan(score)]
        mean = sum(known) / len(known) if known else math.nan
        values = [100 * value for value in (mean, *(scores.get(name, math.nan) for name in names))]
        left = [place + (order - (len(ap) - 1) / 2) * bar for place in places]
        heights = [0.0 if math.isnan(value) else value for value in values]
        label = f"{ROLE_NAMES[role]} {values[0]:.1f}"
        axes.bar(left, heights, width=bar * 0.92, color=ROLE_COLORS[role], linewidth=0, label=label, zorder=2)
        for x, value in zip(left, values, strict=True):
            _write_value(axes, x, value)
    axes.set_xticks(places, ["mean", *(name.replace("_", "\n") for name in names)])
    axes.set_xlim(-0.6, places[-1] + 0.6)
    axes.axvline(0.65, color=HAIRLINE, linewidth=0.8)
    axes.margins(y=0.12)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("AP [%]", fontsize=TEXT_PT, color=MUTED)
    style_chart(axes, "AP per class, mean in the legend")
    axes.tick_params(axis="x", length=0, labelcolor=INK)
    _legend(axes)


def _write_value(axes: Axes, x: float, value: float) -> None:
    """Write a percentage on its bar, n/a where it is unknown."""
    text, height = ("n/a", 0.0) if math.isnan(value) else (f"{value:.0f}", value)
    axes.annotate(text, (x, height), (0, 1.5), textcoords="offset points", ha="center", fontsize=5.5, color=INK)


def plot_curves(axes: Axes, curves: Mapping[Role, Sequence[tuple[int, float]]], title: str) -> None:
    """Draw each curve raw and pale, and smoothed on top of it."""
    for role, curve in curves.items():
        finite = [(step, value) for step, value in curve if math.isfinite(value)]
        if not finite:
            continue
        steps, values = zip(*finite, strict=True)
        color = ROLE_COLORS[role]
        axes.plot(steps, values, color=color, linewidth=0.5, alpha=0.25, zorder=2)
        axes.plot(steps, smooth(values), color=color, linewidth=1.4, label=ROLE_NAMES[role], zorder=3)
    positive = [value for curve in curves.values() for _, value in curve if math.isfinite(value) and value > 0]
    if positive and max(positive) > 20 * min(positive):
        axes.set_yscale("log")
    axes.set_xlabel("step", fontsize=TEXT_PT, color=MUTED, labelpad=2)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    style_chart(axes, title)
    _legend(axes)


def plot_counts(axes: Axes, counts: Mapping[Role, Sequence[int]], classes: Sequence[str]) -> None:
    """Draw how many boxes each role has of each class, as lying bars."""
    bar = 0.8 / max(1, len(counts))
    for order, (role, numbers) in enumerate(counts.items()):
        places = [index + (order - (len(counts) - 1) / 2) * bar for index in range(len(classes))]
        axes.barh(places, list(numbers), height=bar * 0.9, color=ROLE_COLORS[role], linewidth=0, zorder=2)
        for place, number in zip(places, numbers, strict=True):
            axes.annotate(
                str(number), (number, place), (3, 0), textcoords="offset points", va="center", fontsize=5.5, color=INK
            )
    axes.set_yticks(range(len(classes)), [name.replace("_", " ") for name in classes])
    axes.set_ylim(len(classes) - 0.4, -0.6)
    axes.set_xlim(0, 1.12 * max([1, *(number for numbers in counts.values() for number in numbers)]))
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    style_chart(axes, "Boxes per class")
    axes.tick_params(axis="y", length=0, labelcolor=INK)


def smooth(values: Sequence[float]) -> list[float]:
    """Return the mean over a centred window, which does not lag; it narrows towards both ends."""
    half = round(len(values) * SMOOTHING / 2)
    total = [0.0, *accumulate(values)]
    course = []
    for index in range(len(values)):
        reach = min(half, index, len(values) - 1 - index)
        course.append((total[index + reach + 1] - total[index - reach]) / (2 * reach + 1))
    return course


def style_chart(axes: Axes, title: str) -> None:
    """Leave two hairline axes, small grey numbers and a left-aligned title."""
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(HAIRLINE)
        spine.set_linewidth(0.8)
    axes.tick_params(which="both", labelsize=SMALL_PT, colors=MUTED, length=3, width=0.6)
    axes.set_title(title, fontsize=TITLE_PT, color=INK, loc="left", pad=6)


def _legend(axes: Axes) -> None:
    """Write the legend into the line of the title, at its right end."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            handles,
            labels,
            loc="lower right",
            bbox_to_anchor=(1, 1.005),
            ncols=len(handles),
            fontsize=TEXT_PT,
            frameon=False,
            labelcolor=INK,
            handlelength=1.2,
            handleheight=0.6,
            columnspacing=1.4,
            borderpad=0.2,
            borderaxespad=0,
        )
