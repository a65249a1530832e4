"""Feature energy and heatmaps."""

from __future__ import annotations

import math

import pytest
import torch

from bevkd.types import Boxes
from bevkd.viz import draw_features, draw_heatmaps
from bevkd.viz.bev import LEFT_PX, TOP_PX
from bevkd.viz.maps import class_peak, feature_energy, robust_range
from bevkd.viz.style import ENERGY_COLORS, ROLE_COLORS
from tests.viz.pictures import GRID, boxes, where


def test_energy_is_the_norm_over_channels() -> None:
    features = torch.zeros(2, 3, 4)
    features[:, 1, 2] = torch.tensor([3.0, 4.0])
    assert feature_energy(features.half())[1, 2] == 5
    assert feature_energy(features).sum() == 5


def test_class_peak_is_the_highest_probability() -> None:
    logits = torch.tensor([[[0.0, -2.0]], [[-1.0, 2.0]]])
    assert class_peak(logits).tolist() == [[0.5, pytest.approx(1 / (1 + math.exp(-2)))]]


def test_a_single_outlier_does_not_stretch_the_scale() -> None:
    values = torch.linspace(0, 1, 10_000).reshape(100, 100).clone()
    values[0, 0] = 1e6
    low, high = robust_range(values)
    assert low == pytest.approx(0.01, abs=1e-3)
    assert high == pytest.approx(0.995, abs=1e-3)


@pytest.mark.parametrize("value", [0.0, 7.0, math.nan])
def test_constant_and_undefined_maps_have_a_scale(value: float) -> None:
    low, high = robust_range(torch.full((4, 4), value))
    assert high > low


def test_row_0_is_at_the_bottom() -> None:
    features = torch.zeros(3, 10, 10)
    features[:, 0, 9] = 5.0
    features[:, 5, 5] = 1.0
    figure = draw_features({"map": features}, GRID, panel_px=200)
    dark = where(figure, ENERGY_COLORS[-1], 6)
    dark = dark[dark[:, 0] < TOP_PX + 200]
    row, column = dark.mean(axis=0)
    assert row == pytest.approx(TOP_PX + 190, abs=3)
    assert column == pytest.approx(LEFT_PX + 190, abs=3)


def test_annotations_are_outlined_in_the_colour_of_the_ground_truth() -> None:
    truth = boxes([0.0, 10.0, 0.0, 6.0, 3.0, 1.0, 0.0])
    green = ROLE_COLORS["ground_truth"]
    assert len(where(draw_features({"map": torch.rand(2, 4, 4)}, GRID, boxes=truth, panel_px=200), green, 60)) > 50
    assert len(where(draw_features({"map": torch.rand(2, 4, 4)}, GRID, boxes=Boxes.empty(), panel_px=200), green)) == 0


@pytest.mark.parametrize("shared", [True, False])
def test_panels_share_their_scale_on_request(shared: bool) -> None:
    maps = {"teacher": torch.rand(8, 5, 5) * 10, "student": torch.rand(4, 10, 10)}
    figure = draw_features(maps, GRID, shared_scale=shared, panel_px=200)
    limits = {axes.images[0].get_clim() for axes in figure.axes if axes.get_xlabel() == "x [m]"}
    assert len(limits) == (1 if shared else 2)


def test_heatmaps_have_a_fixed_scale_from_0_to_1() -> None:
    figure = draw_heatmaps({"a": torch.full((2, 4, 4), -9.0), "b": torch.full((2, 4, 4), 9.0)}, GRID, panel_px=200)
    views = [axes for axes in figure.axes if axes.get_xlabel() == "x [m]"]
    assert [view.images[0].get_clim() for view in views] == [(0.0, 1.0)] * 2
