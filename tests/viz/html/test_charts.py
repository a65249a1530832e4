"""Charts and tables of the page: where marks stand, and what is written."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest

from bevkd.viz.html.charts import (
    HEIGHT,
    LEFT,
    RAW_POINTS,
    RIGHT,
    WIDTH,
    Curve,
    Dots,
    Series,
    dot_rows,
    line_chart,
    range_chart,
    short,
    thinned,
    ticks,
)
from bevkd.viz.html.tables import Cell, Gain, decimal, heat_table, result_table, signed


def curve(values: list[float], name: str = "plain") -> Curve:
    return Curve(name, "c-plain", tuple((float(step), value) for step, value in enumerate(values)), "run")


def paths(chart: str, kind: str) -> list[list[tuple[float, float]]]:
    """Return the points of each line of a kind."""
    found = re.findall(rf'<path d="([^"]*)" class="{kind}"', chart)
    return [[tuple(map(float, each.split())) for each in re.split("[ML]", path) if each] for path in found]


def test_a_curve_runs_from_the_left_to_the_right_within_its_chart() -> None:
    (line,) = paths(line_chart("loss", [curve([3.0, 2.0, 2.5, 1.0])]), "mean")
    assert (line[0][0], line[-1][0]) == (LEFT, WIDTH - RIGHT)
    assert all(0 <= y <= HEIGHT for _, y in line)
    assert line[0][1] < line[-1][1], "a smaller value lies lower"


def test_seeds_are_thin_and_their_mean_is_bold() -> None:
    chart = line_chart("loss", [curve([1.0, 2.0, 3.0]), curve([3.0, 4.0, 5.0])])
    assert (len(paths(chart, "raw")), len(paths(chart, "seed")), len(paths(chart, "mean"))) == (2, 2, 1)
    (mean,), seeds = paths(chart, "mean"), paths(chart, "seed")
    for (_, y), (_, first), (_, second) in zip(mean, *seeds, strict=True):
        assert y == pytest.approx((first + second) / 2, abs=0.02)


def test_a_chart_is_logarithmic_where_values_differ_by_orders() -> None:
    values = [1000.0, 100.0, 10.0, 1.0]
    (logarithmic,), (linear,) = (paths(line_chart("x", [curve(values)], flat), "mean") for flat in (False, True))
    steps = [second[1] - first[1] for first, second in pairwise(logarithmic)]
    assert max(steps) - min(steps) < 0.05 * max(steps)
    assert linear[1][1] - linear[0][1] > 5 * (linear[3][1] - linear[2][1])


def test_values_that_are_not_finite_are_left_out() -> None:
    (line,) = paths(line_chart("x", [curve([1.0, math.nan, math.inf, 2.0])]), "mean")
    assert len(line) == 2


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0], [0.0, 0.0, 0.0], [-1.0, 1.0], [0.0, 1e-12]])
def test_odd_curves_are_drawn_too(values: list[float]) -> None:
    assert "nan" not in line_chart("x", [curve(values)]).replace("aria", "")


def test_long_curves_are_thinned_to_their_means() -> None:
    points = [(float(step), float(step % 2)) for step in range(4800)]
    few = thinned(points, RAW_POINTS)
    assert len(few) == RAW_POINTS
    assert {value for _, value in few} == {0.5}


def test_ticks_are_round_and_within_the_axis() -> None:
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert ticks(3.1, 4.9) == pytest.approx([3.5, 4.0, 4.5])
    assert ticks(5, 5) == [5]


def test_numbers_of_an_axis_are_short() -> None:
    assert [short(value) for value in (0.25, 20, 1000, 24000, 3e6, 1e-5)] == ["0.25", "20", "1k", "24k", "3M", "1e-5"]


def dots(name: str, *values: float, aside: bool = False) -> Dots:
    return Dots(name, "c-plain", values, tuple(name for _ in values), "shown", aside)


def places(chart: str) -> list[float]:
    return [float(each) for each in re.findall(r'<circle cx="([\d.]+)%" cy="17" r="6.5"', chart)]


def test_dots_stand_in_the_order_of_their_values() -> None:
    chart = dot_rows([dots("a", 10.0, 12.0), dots("b", 20.0)], 11.0, "points")
    first, second = places(chart)
    assert 0 < first < second < 100
    assert chart.count('class="ref"') == 2


def test_a_distant_teacher_does_not_press_the_students_together() -> None:
    rows = [dots("a", 10.0, 12.0), dots("b", 14.0)]
    with_teacher = dot_rows([*rows, dots("teacher", 80.0, aside=True)], None, "points")
    assert places(with_teacher) == places(dot_rows(rows, None, "points"))
    assert "\N{BLACK RIGHT-POINTING TRIANGLE}" in with_teacher
    near = dot_rows([*rows, dots("teacher", 17.0, aside=True)], None, "points")
    assert len(places(near)) == 3


def test_categories_without_a_value_have_no_dot() -> None:
    series = [Series("a", "c-plain", (10.0, math.nan, 30.0), (1.0, math.nan, math.nan))]
    chart = range_chart("AP", ["near", "mid", "far"], series, "points")
    assert chart.count("<circle") == 2
    assert "a, near: 10.0 ± 1.0 points" in chart


def test_gains_are_coloured_by_their_sign_and_size() -> None:
    gains = [Gain(10, 20, 1.0), Gain(10, 8, 5.0), Gain(10, 10.01, 0.0), Gain(math.nan, 3, 0.0)]
    table = heat_table("gains", "class", ["a", "b", "c", "d"], [("car", gains)], 10.0)
    assert re.findall(r'<span class="(\w+)" style="--a:([\d.]+)"', table)[0] == ("up", "0.55")
    assert re.findall(r'<span class="(\w+)"', table) == ["up", "down", "level", "level"]
    assert "<b>+10.0</b>" in table
    assert f"<i>{signed(-2)}</i>" in table, "less than its spread"
    assert "10.0 → 20.0" in table


def test_signs_are_those_of_print() -> None:
    assert [signed(value) for value in (1.25, -1.25, 0.04, -0.04)] == ["+1.2", "\N{MINUS SIGN}1.2", "0.0", "0.0"]
    assert decimal(None) == decimal(math.nan) == "\N{EN DASH}"


def test_a_table_scrolls_by_keyboard_and_names_its_rows() -> None:
    table = result_table("results", ["", "AP"], [("plain", [Cell("1.0")])])
    assert 'tabindex="0" role="region" aria-label="results"' in table
    assert '<th scope="row">plain</th><td>1.0</td>' in table
