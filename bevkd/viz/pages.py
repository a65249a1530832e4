"""Whole pages: one frame of a cache, and the pictures of the demo."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from bevkd.grid import BEVGrid
from bevkd.types import Boxes, Frame, Signals
from bevkd.viz import bev, charts, maps
from bevkd.viz.camera import draw_cameras
from bevkd.viz.image import Picture, axes_at, new_figure, stack, text_at
from bevkd.viz.style import INK, MUTED, ROLE_NAMES, TEXT_PT, Role

PAGE_PX = 1692
MARGIN_PX = 20
HEADER_PX = 64
BEV_PX = 790
MAP_PX = 340
MAPS_LEFT_PX = 934


@dataclass(frozen=True)
class FrameHeader:
    """What stands above the picture of a frame.

    Attributes:
        dataset, teacher: names; the teacher is empty for frames without a cache.
        min_score: teacher boxes below this score are left out.
    """

    dataset: str
    teacher: str = ""
    min_score: float = 0.0


@dataclass(frozen=True)
class DemoResults:
    """What the demo shows.

    Attributes:
        frame: one validation frame; its images and points are optional.
        boxes: boxes of each role in this frame.
        features: ``bev_high`` of each role in this frame.
        ap: AP in [0, 1] by class, of each role.
        losses: ``(step, value)`` of each role's training.
        loss_title: what ``losses`` are.
        min_score: predicted boxes below this score are left out.
    """

    frame: Frame
    grid: BEVGrid
    classes: Sequence[str]
    boxes: Mapping[Role, Boxes]
    features: Mapping[Role, Float[Tensor, "C Y X"]] = field(default_factory=dict)
    ap: Mapping[Role, Mapping[str, float]] = field(default_factory=dict)
    losses: Mapping[Role, Sequence[tuple[int, float]]] = field(default_factory=dict)
    loss_title: str = "Training loss"
    min_score: float = 0.3


def frame_page(
    frame: Frame,
    grid: BEVGrid,
    classes: Sequence[str],
    header: FrameHeader,
    signals: Signals | None = None,
    row: int = 0,
) -> Image.Image:
    """Return one page with everything known about a frame.

    Cameras with LiDAR points, annotations and teacher boxes, or with the teacher's masks; bird's-eye view; energy of
    ``bev_low`` and ``bev_high``, the heatmap's highest class and boxes per class. What is absent is left out.

    Args:
        frame: images, rig, points and boxes are optional.
        signals: what the teacher knows about the frame.
        row: which frame of the batch ``signals`` is meant.
    """
    boxes: dict[Role, Boxes] = {}
    if frame.boxes is not None:
        boxes["ground_truth"] = frame.boxes
    if signals is not None and signals.boxes is not None:
        teacher = signals.boxes[row].to("cpu")
        boxes["teacher"] = teacher[teacher.scores >= header.min_score]
    parts: list[Picture] = [_header(frame, header, boxes)]
    if frame.images is not None and frame.rig is not None:
        if signals is not None and signals.instances is not None:
            # Boxes and points would hide the masks.
            masks = signals.instances[row]
            parts.append(draw_cameras(frame, {}, classes, instances=masks, min_score=header.min_score, legend=False))
        else:
            parts.append(draw_cameras(frame, boxes, classes, points=frame.points))
    parts.append(_ground(frame, grid, classes, boxes, signals, row))
    return stack(parts, gap_px=14, margin_px=MARGIN_PX)


def demo_pages(results: DemoResults) -> dict[str, Picture]:
    """Return the demo's pictures by name: ``cameras``, ``bev``, ``features`` and ``results``, each if there is input.

    ``cameras`` compares the annotations with the distilled student, ``bev`` has a panel per role with the annotations
    beneath, ``features`` the energy of each role's features, ``results`` AP per class and training curves.
    """
    frame, grid, boxes = results.frame, results.grid, results.boxes
    truth = boxes.get("ground_truth")
    pages: dict[str, Picture] = {}
    if frame.images is not None and frame.rig is not None:
        compared: dict[Role, Boxes] = {role: boxes[role] for role in ("ground_truth", "distilled") if role in boxes}
        pages["cameras"] = draw_cameras(frame, compared, results.classes, min_score=results.min_score)
    if boxes:
        below: dict[Role, Boxes] = {} if truth is None else {"ground_truth": truth}
        panels = {ROLE_NAMES[role]: {**below, role: boxes[role]} for role in boxes}
        pages["bev"] = bev.draw_bev_panels(frame.points, panels, grid, min_score=results.min_score)
    if results.features:
        named = {ROLE_NAMES[role]: features for role, features in results.features.items()}
        pages["features"] = maps.draw_features(named, grid, boxes=truth, panel_px=500)
    if results.ap or results.losses:
        pages["results"] = _results(results)
    return pages


def _header(frame: Frame, header: FrameHeader, boxes: Mapping[Role, Boxes]) -> Figure:
    figure = new_figure(PAGE_PX, HEADER_PX)
    text_at(figure, 0, 2, f"Frame {frame.token}", fontsize=11, color=INK, weight="bold")
    facts = [header.dataset]
    if header.teacher:
        facts.append(f"teacher {header.teacher}")
    facts.append("unlabelled" if frame.boxes is None else f"{len(frame.boxes)} annotated boxes")
    if "teacher" in boxes:
        facts.append(f"{len(boxes['teacher'])} teacher boxes with score ≥ {header.min_score:g}")
    text_at(figure, 0, 38, "   ·   ".join(facts), fontsize=TEXT_PT, color=MUTED)
    return figure


def _ground(
    frame: Frame,
    grid: BEVGrid,
    classes: Sequence[str],
    boxes: Mapping[Role, Boxes],
    signals: Signals | None,
    row: int,
) -> Figure:
    """Return the bird's-eye view with up to four smaller panels beside it."""
    rows, columns = grid.shape
    view_height, map_height = round(BEV_PX * rows / columns), round(MAP_PX * rows / columns)
    upper, lower = 30, 30 + map_height + maps.BOTTOM_PX + 34
    height = max(30 + view_height + 90, lower + map_height + maps.BOTTOM_PX)
    figure = new_figure(PAGE_PX, height)

    view = axes_at(figure, bev.LEFT_PX, upper, BEV_PX, view_height)
    bev.style_view(view, grid, "Bird's-eye view")
    bev.plot_points(view, frame.points, grid)
    bev.plot_boxes(view, boxes, velocity=True)
    bev.plot_ego(view, grid)
    bev.plot_legend(view, boxes)

    places = [(left, top) for top in (upper, lower) for left in (MAPS_LEFT_PX, MAPS_LEFT_PX + MAP_PX + 56)]
    panels = _panels(grid, frame.boxes, signals, row)
    for (title, draw), (left, top) in zip(panels, places, strict=False):
        axes = axes_at(figure, left, top, MAP_PX, map_height)
        bev.style_view(axes, grid, title, labelled=left == places[0][0])
        draw(axes)
    if boxes:
        left, top = places[len(panels)]
        counts = {role: some.labels.bincount(minlength=len(classes)).tolist() for role, some in boxes.items()}
        chart = axes_at(figure, left + 100, top, MAP_PX - 100, map_height)
        charts.plot_counts(chart, counts, classes)
    return figure


def _panels(
    grid: BEVGrid, truth: Boxes | None, signals: Signals | None, row: int
) -> list[tuple[str, Callable[[Axes], None]]]:
    """Return title and drawing function of each map that ``signals`` has."""
    if signals is None:
        return []
    panels: list[tuple[str, Callable[[Axes], None]]] = []
    for name, features in (("bev_low", signals.bev_low), ("bev_high", signals.bev_high)):
        if features is not None:
            title = f"{name}  ({features.shape[1]} channels)"
            panels.append((title, partial(maps.plot_energy, features=features[row], grid=grid, boxes=truth)))
    if signals.heatmap is not None:
        heatmap = signals.heatmap[row]
        panels.append(("heatmap", partial(maps.plot_heatmap, heatmap=heatmap, grid=grid, boxes=truth)))
    return panels


def _results(results: DemoResults) -> Figure:
    figure = new_figure(PAGE_PX, 500)
    left = 70.0
    if results.ap:
        width = 1010.0 if results.losses else PAGE_PX - 100.0
        charts.plot_ap(axes_at(figure, left, 44, width, 390), results.ap)
        left += width + 90
    if results.losses:
        charts.plot_curves(axes_at(figure, left, 44, PAGE_PX - left - 24, 390), results.losses, results.loss_title)
    return figure
