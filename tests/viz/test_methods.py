"""The chart of methods side by side."""

from __future__ import annotations

import pytest

from bevkd.viz import MethodScores, draw_methods
from bevkd.viz.image import render
from bevkd.viz.style import ROLE_COLORS
from tests.viz.pictures import where

PLAIN = MethodScores("plain", "student", (0.2, 0.3), 0.05)
BETTER = MethodScores("x3kd", "distilled", (0.4, 0.6), 0.1, (0.2, 0.3), (0.1, 0.4))


def test_each_seed_is_a_dot_in_percent_and_the_mean_is_written() -> None:
    scores, gains = draw_methods([PLAIN, BETTER], "mean AP").axes
    assert [dots.get_offsets().tolist() for dots in scores.collections] == [
        [pytest.approx([20, 0]), pytest.approx([30, 0])],
        [pytest.approx([40, 1]), pytest.approx([60, 1])],
    ]
    assert [text.get_text() for text in scores.texts] == ["25.0", "50.0"]
    assert [text.get_text() for text in gains.texts] == ["+25.0"]
    assert [label.get_text() for label in scores.get_yticklabels()] == ["plain", "x3kd"]


def test_lines_are_the_spread_of_scores_and_the_interval_of_gains() -> None:
    scores, gains = draw_methods([BETTER], "mean AP").axes
    assert list(scores.lines[0].get_xdata()) == pytest.approx([40, 60])
    assert list(gains.lines[1].get_xdata()) == pytest.approx([10, 40])


def test_a_single_seed_has_no_line_and_without_gains_there_is_one_chart() -> None:
    figure = draw_methods([MethodScores("plain", "student", (0.2,))], "NDS")
    (axes,) = figure.axes
    assert len(axes.lines) == 1  # the bar of the mean
    assert len(where(figure, ROLE_COLORS["student"])) > 20


def test_long_names_leave_room_for_the_chart() -> None:
    figure = draw_methods([MethodScores("x" * 300, "distilled", (0.5,))], "mean AP")
    assert figure.axes[0].get_yticklabels()[0].get_text() == "x" * 55 + "..."
    assert figure.axes[0].get_position().width > 0.3
    assert render(draw_methods([], "mean AP")).width == 1100
