"""Charts of results."""

from __future__ import annotations

import math

import pytest

from bevkd.viz import draw_ap_bars, draw_curves
from bevkd.viz.charts import smooth
from bevkd.viz.image import render
from bevkd.viz.style import ROLE_COLORS
from tests.viz.pictures import where


def test_bars_show_the_mean_and_each_class_in_percent() -> None:
    figure = draw_ap_bars({"student": {"car": 0.2, "bus": 0.4}, "distilled": {"car": 0.5, "bus": 0.7}})
    axes = figure.axes[0]
    heights = [[bar.get_height() for bar in container] for container in axes.containers]
    assert heights == [pytest.approx([30, 20, 40]), pytest.approx([60, 50, 70])]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["mean", "car", "bus"]
    assert [text.get_text() for text in axes.texts] == ["30", "20", "40", "60", "50", "70"]
    assert len(where(figure, ROLE_COLORS["distilled"])) > len(where(figure, ROLE_COLORS["student"]))


def test_classes_that_were_not_scored_are_marked_and_kept_out_of_the_mean() -> None:
    axes = draw_ap_bars({"student": {"car": 0.5, "bus": math.nan}, "teacher": {"truck": 0.2}}).axes[0]
    assert [text.get_text() for text in axes.texts] == ["50", "50", "n/a", "n/a", "20", "n/a", "n/a", "20"]


def test_curves_are_smoothed_and_survive_values_that_are_not_finite() -> None:
    figure = draw_curves({"student": [(0, 4.0), (10, math.nan), (20, 2.0)], "distilled": []}, title="Detection loss")
    axes = figure.axes[0]
    assert [line.get_xdata().tolist() for line in axes.lines] == [[0, 20]] * 2  # type: ignore[union-attr]
    assert axes.get_title(loc="left") == "Detection loss"
    assert axes.get_yscale() == "linear"


def test_curves_over_orders_of_magnitude_have_a_logarithmic_axis() -> None:
    assert draw_curves({"student": [(0, 1000.0), (1, 1.0)]}).axes[0].get_yscale() == "log"


def test_smoothing_keeps_length_ends_and_straight_lines() -> None:
    line = [float(value) for value in range(200)]
    assert smooth(line) == pytest.approx(line)
    noisy = [1.0 + (-1) ** index for index in range(200)]
    assert max(abs(value - 1) for value in smooth(noisy)[20:180]) < 0.2
    assert smooth([]) == []


def test_charts_without_input_are_empty_but_valid() -> None:
    assert render(draw_ap_bars({})).size == (1100, 460)
    assert render(draw_curves({})).size == (560, 460)
