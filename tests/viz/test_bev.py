"""Bird's-eye views."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bevkd.grid import BEVGrid
from bevkd.types import Boxes
from bevkd.viz import draw_bev, draw_bev_panels
from bevkd.viz.bev import LEFT_PX, TOP_PX, plot_boxes, point_shade, style_view
from bevkd.viz.image import axes_at, new_figure
from bevkd.viz.style import ROLE_COLORS, Role
from tests.viz.pictures import GRID, boxes, where

BLUE = ROLE_COLORS["teacher"]
PANEL = 400
PX_PER_M = PANEL / 40


def centre(row: list[float], grid: BEVGrid = GRID) -> tuple[float, float]:
    """Return (metres right, metres up) of a drawn box, as read off the pixels of the view."""
    figure = draw_bev(None, {"teacher": boxes(row)}, grid, panel_px=PANEL)
    pixels = where(figure, BLUE, 80)
    pixels = pixels[(pixels[:, 0] < TOP_PX + PANEL) & (pixels[:, 1] > LEFT_PX)]
    rows, columns = pixels.T
    row_px, column_px = (rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2
    return (column_px - LEFT_PX - PANEL / 2) / PX_PER_M, (TOP_PX + PANEL / 2 - row_px) / PX_PER_M


@pytest.mark.parametrize(("x", "y"), [(0.0, 10.0), (10.0, 0.0), (-8.0, -12.0)])
def test_y_forward_is_up_and_x_is_right(x: float, y: float) -> None:
    assert centre([x, y, 0.0, 1.0, 4.0, 1.0, 0.0]) == pytest.approx((x, y), abs=0.8)


def test_the_heading_line_leaves_through_the_front() -> None:
    figure = draw_bev(None, {"teacher": boxes([0.0, 0.0, 0.0, 6.0, 2.0, 1.0, math.pi / 2])}, GRID, panel_px=PANEL)
    rows, columns = where(figure, BLUE, 80).T
    inside = (columns > LEFT_PX) & (rows < TOP_PX + PANEL)
    up = (TOP_PX + PANEL / 2 - rows[inside].min()) / PX_PER_M
    down = (rows[inside].max() - TOP_PX - PANEL / 2) / PX_PER_M
    assert up == pytest.approx(3.8, abs=0.3)
    assert down == pytest.approx(3.0, abs=0.3)


def test_point_density_has_row_0_at_y_min_and_ignores_points_outside() -> None:
    points = torch.tensor([[-19.9, -19.9, 0.0], [19.9, 19.9, 0.0], [19.9, 19.9, 0.0], [30.0, 0.0, 0.0]])
    shade = point_shade(points, GRID, 10)
    assert shade.shape == (10, 10)
    assert shade.count_nonzero() == 2
    assert 0 < float(shade[0, 0]) < float(shade[9, 9]) <= 1


def test_points_are_drawn_where_boxes_would_be() -> None:
    cluster = torch.tensor([[10.0, 15.0, 0.0]]) + torch.rand(2000, 3)
    dark = where(draw_bev(cluster, {}, GRID, panel_px=PANEL), "#8A8D94", 45)
    dark = dark[(dark[:, 0] < TOP_PX + 140) & (dark[:, 0] > TOP_PX + 4) & (dark[:, 1] > LEFT_PX + 4)]
    row, column = np.median(dark, axis=0)
    assert row == pytest.approx(TOP_PX + PANEL / 2 - 15.5 * PX_PER_M, abs=4)
    assert column == pytest.approx(LEFT_PX + PANEL / 2 + 10.5 * PX_PER_M, abs=4)


def test_points_of_a_long_grid_keep_square_pixels() -> None:
    grid = BEVGrid(x_m=(0.0, 40.0), y_m=(-10.0, 10.0), cell_m=1.0)
    assert point_shade(torch.zeros(1, 3), grid, 100).shape == (50, 100)


def test_no_points_and_no_boxes_give_an_empty_view() -> None:
    for points in (None, torch.zeros(0, 5)):
        figure = draw_bev(points, {"teacher": Boxes.empty()}, GRID, panel_px=200)
        rows = where(figure, BLUE)[:, 0]
        assert (rows > TOP_PX + 200).all()  # the legend alone


def test_boxes_below_the_score_are_left_out() -> None:
    weak: dict[Role, Boxes] = {"student": boxes([0.0, 5.0, 0.0, 4.0, 2.0, 1.0, 0.0], score=0.2)}
    rows = where(draw_bev(None, weak, GRID, min_score=0.3, panel_px=200), ROLE_COLORS["student"])[:, 0]
    assert (rows > TOP_PX + 200).all()


def test_arrows_show_known_velocities_of_moving_boxes_only() -> None:
    some = boxes(*([x, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0] for x in (-5.0, 0.0, 5.0)))
    some.values[:, 7:9] = torch.tensor([[math.nan, math.nan], [0.1, 0.0], [0.0, 3.0]])
    figure = new_figure(300, 300)
    axes = axes_at(figure, 0, 0, 300, 300)
    plot_boxes(axes, {"teacher": some}, velocity=True)
    assert [text.xy for text in axes.texts] == [(5.0, 3.0)]  # type: ignore[attr-defined]


def test_panels_stand_side_by_side_with_titles_and_metres() -> None:
    truth = boxes([0.0, 5.0, 0.0, 4.0, 2.0, 1.0, 0.0])
    figure = draw_bev_panels(None, {"One": {"ground_truth": truth}, "Two": {"student": truth}}, GRID, panel_px=200)
    left, right = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["One", "Two"]
    assert left.get_xlabel() == "x [m]"
    assert left.get_ylabel() == "y [m]"
    assert left.get_position().x1 < right.get_position().x0
    assert left.get_xlim() == right.get_xlim() == GRID.x_m
    legend = left.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["Ground truth", "Plain student"]


def test_metres_have_the_same_length_along_both_axes() -> None:
    grid = BEVGrid(x_m=(0.0, 70.0), y_m=(-40.0, 40.0), cell_m=1.0)
    figure = draw_bev(None, {}, grid, panel_px=350)
    view = figure.axes[0].get_window_extent()
    assert view.height / view.width == pytest.approx(80 / 70, abs=0.01)


def test_titles_are_left_to_the_caller() -> None:
    figure = new_figure(100, 100)
    axes = axes_at(figure, 10, 10, 80, 80)
    style_view(axes, GRID, "Title", labelled=False)
    assert axes.get_ylabel() == ""
    assert np.allclose(axes.get_ylim(), GRID.y_m)
