"""Whole pages."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from bevkd.types import Boxes, Frame, Signals
from bevkd.viz import DemoResults, FrameHeader, demo_pages, frame_page
from bevkd.viz.image import render
from bevkd.viz.style import ENERGY_COLORS, ROLE_COLORS
from tests.viz.pictures import CLASSES, GRID, boxes, frame, where

GREEN, BLUE = ROLE_COLORS["ground_truth"], ROLE_COLORS["teacher"]
TRUTH = boxes([0.0, 10.0, 0.0, 4.0, 2.0, 2.0, math.pi / 2], [-8.0, -5.0, 0.0, 4.0, 2.0, 2.0, 0.0])
HEADER = FrameHeader("world", "pillars", 0.3)


def full_frame() -> Frame:
    return frame(("CAM_FRONT", "CAM_BACK"), points=torch.rand(500, 5) * 20, boxes=TRUTH)


def ground_frame() -> Frame:
    """Return the frame without its images, which take half of a page's time."""
    return dataclasses.replace(full_frame(), images=None)


def signals(batch: int = 1, **changes: object) -> Signals:
    rand = torch.rand
    maps = {"bev_low": rand(batch, 4, 8, 8), "bev_high": rand(batch, 8, 8, 8), "heatmap": rand(batch, 2, 8, 8)}
    return Signals(**{**maps, "boxes": (TRUTH,) * batch, **changes})  # type: ignore[arg-type]


def test_the_page_of_a_frame_shows_annotations_and_teacher() -> None:
    page = frame_page(full_frame(), GRID, CLASSES, HEADER, signals())
    assert len(where(page, GREEN)) > 100
    assert len(where(page, BLUE)) > 100


def test_the_row_chooses_the_frame_of_the_batch() -> None:
    batch = signals(2, boxes=(Boxes.empty(), TRUTH))
    first, second = (frame_page(ground_frame(), GRID, CLASSES, HEADER, batch, row) for row in (0, 1))
    assert len(where(first, BLUE)) < len(where(second, BLUE))


def test_maps_follow_the_row_too() -> None:
    batch = Signals(bev_high=torch.stack([torch.zeros(1, 4, 4), torch.eye(4)[None]]))
    first, second = (frame_page(ground_frame(), GRID, CLASSES, HEADER, batch, row) for row in (0, 1))
    assert len(where(first, ENERGY_COLORS[-1], 4)) < len(where(second, ENERGY_COLORS[-1], 4)) - 1000


def test_teacher_boxes_below_the_score_are_left_out() -> None:
    weak = signals(boxes=(boxes([0.0, 10.0, 0.0, 4.0, 2.0, 2.0, 0.0], score=0.29),))
    shown, hidden = (
        frame_page(ground_frame(), GRID, CLASSES, FrameHeader("world", "pillars", score), weak) for score in (0.2, 0.3)
    )
    assert len(where(shown, BLUE)) > len(where(hidden, BLUE)) + 50


@pytest.mark.parametrize(
    "missing", [{"points": None}, {"boxes": None}, {"images": None, "points": None, "boxes": None}]
)
def test_a_page_leaves_out_what_the_frame_lacks(missing: dict[str, None]) -> None:
    page = frame_page(dataclasses.replace(full_frame(), **missing), GRID, CLASSES, HEADER, signals())  # type: ignore[arg-type]
    assert (len(where(page, GREEN)) > 0) == ("boxes" not in missing)
    assert page.width > 1600


@pytest.mark.parametrize("missing", ["bev_low", "bev_high", "heatmap", "boxes"])
def test_a_page_leaves_out_what_the_cache_lacks(missing: str) -> None:
    page = frame_page(ground_frame(), GRID, CLASSES, HEADER, signals(**{missing: None}))
    assert (len(where(page, BLUE)) > 0) == (missing != "boxes")


def test_a_page_needs_no_cache_and_takes_frames_without_boxes() -> None:
    empty = dataclasses.replace(ground_frame(), boxes=Boxes.empty())
    page = frame_page(empty, GRID, CLASSES, FrameHeader("world"), None)
    assert len(where(page, BLUE)) == 0


def demo(**changes: object) -> DemoResults:
    features = {"teacher": torch.rand(8, 8, 8), "distilled": torch.rand(4, 8, 8)}
    given = {
        "boxes": dict.fromkeys(ROLE_COLORS, TRUTH),
        "features": features,
        "ap": {"student": {"car": 0.2}, "distilled": {"car": 0.3}},
        "losses": {"student": [(0, 2.0), (1, 1.0)]},
    }
    return DemoResults(full_frame(), GRID, CLASSES, **{**given, **changes})  # type: ignore[arg-type]


def test_the_demo_has_cameras_views_features_and_results() -> None:
    pages = demo_pages(demo())
    assert list(pages) == ["cameras", "bev", "features", "results"]
    magenta = ROLE_COLORS["distilled"]
    assert all(len(where(page, magenta)) > 50 for name, page in pages.items() if name != "features")
    assert len(where(pages["cameras"], BLUE)) == 0  # cameras compare annotations and the distilled student alone


def test_the_demo_has_a_view_per_role_with_the_annotations_beneath() -> None:
    bev = demo_pages(demo())["bev"]
    titles = [axes.get_title(loc="left") for axes in bev.axes]  # type: ignore[union-attr]
    assert titles == ["Ground truth", "Teacher", "Plain student", "Distilled student"]


def test_the_demo_leaves_out_pictures_without_input() -> None:
    blind = dataclasses.replace(demo(features={}, ap={}, losses={}), frame=frame(images=None))
    assert list(demo_pages(blind)) == ["bev"]
    for only in ({"ap": {}}, {"losses": {}}):
        assert render(demo_pages(demo(**only))["results"]).width > 1600
