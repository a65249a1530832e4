"""Bird's-eye views: points as grey density, boxes as rotated rectangles.

Pictures show the BEV frame with x to the right and y up. In the LiDAR frame of nuScenes y is forward, so the vehicle
drives up the page.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MultipleLocator
from torch import Tensor

from bevkd.geometry.boxes import bev_corners
from bevkd.grid import BEVGrid
from bevkd.types import Boxes
from bevkd.viz.image import axes_at, new_figure
from bevkd.viz.style import HAIRLINE, INK, MUTED, PAPER, ROLE_COLORS, ROLE_NAMES, SMALL_PT, TEXT_PT, TITLE_PT, Role, rgb

NOSE_M = 0.8
"""How far the heading line reaches beyond the front of a box."""

MIN_SPEED_M_S = 0.5
"""Slower boxes get no velocity arrow."""

POINT_SHADE = (0.30, 0.75)
"""Darkness of one and of very many points in a pixel."""

LEFT_PX, TOP_PX, BOTTOM_PX, LEGEND_PX, GAP_PX = 62, 30, 52, 28, 16


def draw_bev(
    points: Float[Tensor, "P c"] | None,
    boxes: Mapping[Role, Boxes],
    grid: BEVGrid,
    *,
    title: str = "",
    min_score: float = 0.0,
    velocity: bool = False,
    panel_px: int = 720,
) -> Figure:
    """Return one bird's-eye view with a legend of its roles below it.

    Args:
        points: x, y, z in the BEV frame (m), further columns ignored.
        boxes: boxes of each role; later roles are drawn over earlier ones, the ground truth is filled.
        grid: the range to show.
        title: stands above the view.
        min_score: boxes below this score are left out.
        velocity: whether to draw how far a box moves in one second.
        panel_px: width of the view without its labels.
    """
    return draw_bev_panels(points, {title: boxes}, grid, min_score=min_score, velocity=velocity, panel_px=panel_px)


def draw_bev_panels(
    points: Float[Tensor, "P c"] | None,
    panels: Mapping[str, Mapping[Role, Boxes]],
    grid: BEVGrid,
    *,
    min_score: float = 0.0,
    velocity: bool = False,
    panel_px: int = 400,
) -> Figure:
    """Return bird's-eye views of the same points side by side, one per title; arguments as :func:`draw_bev`."""
    figure, axes = panel_row(tuple(panels), grid, panel_px, BOTTOM_PX + LEGEND_PX)
    for view, boxes in zip(axes, panels.values(), strict=True):
        plot_points(view, points, grid)
        plot_boxes(view, boxes, min_score=min_score, velocity=velocity)
        plot_ego(view, grid)
    if axes:
        plot_legend(axes[0], dict.fromkeys(role for boxes in panels.values() for role in boxes))
    return figure


def panel_row(titles: tuple[str, ...], grid: BEVGrid, panel_px: int, bottom_px: int) -> tuple[Figure, list[Axes]]:
    """Return a figure with one empty view of ``grid`` per title, ``bottom_px`` of room below them."""
    rows, columns = grid.shape
    height_px = round(panel_px * rows / columns)
    count = max(1, len(titles))
    width = LEFT_PX + count * (panel_px + GAP_PX)
    figure = new_figure(width, TOP_PX + height_px + bottom_px)
    views = []
    for index, title in enumerate(titles):
        view = axes_at(figure, LEFT_PX + index * (panel_px + GAP_PX), TOP_PX, panel_px, height_px)
        style_view(view, grid, title, labelled=index == 0)
        views.append(view)
    return figure, views


def style_view(axes: Axes, grid: BEVGrid, title: str, labelled: bool = True) -> None:
    """Set range, metre ticks and title of a bird's-eye view; ``labelled`` adds the y labels."""
    axes.set_xlim(*grid.x_m)
    axes.set_ylim(*grid.y_m)
    axes.set_aspect("equal", adjustable="box")
    axes.set_facecolor(PAPER)
    span = max(grid.x_m[1] - grid.x_m[0], grid.y_m[1] - grid.y_m[0])
    step = 20.0 if span > 70 else 10.0
    axes.xaxis.set_major_locator(MultipleLocator(step))
    axes.yaxis.set_major_locator(MultipleLocator(step))
    axes.tick_params(labelsize=SMALL_PT, colors=MUTED, length=3, width=0.6, labelleft=labelled)
    axes.set_xlabel("x [m]", fontsize=SMALL_PT, color=MUTED, labelpad=1)
    if labelled:
        axes.set_ylabel("y [m]", fontsize=SMALL_PT, color=MUTED, labelpad=0)
    for spine in axes.spines.values():
        spine.set_color(HAIRLINE)
        spine.set_linewidth(0.8)
    axes.set_title(title, fontsize=TITLE_PT, color=INK, loc="left", pad=5)


def point_shade(points: Float[Tensor, "P c"], grid: BEVGrid, columns: int) -> Float[Tensor, "R columns"]:
    """Return how dark each pixel of a view is, 0 where no point fell and then growing with the logarithm of the count.

    Row 0 is at ``y_min``; the pixels are square.
    """
    cells_y, cells_x = grid.shape
    rows = max(1, round(columns * cells_y / cells_x))
    xy = points[:, :2].float().cpu()
    xy = xy[grid.contains(xy)]
    pixel = grid.to_cells(xy) / torch.tensor([cells_x / columns, cells_y / rows])
    column, row = pixel[:, 0].long().clamp(0, columns - 1), pixel[:, 1].long().clamp(0, rows - 1)
    count = torch.bincount(row * columns + column, minlength=rows * columns).view(rows, columns).float()
    low, high = POINT_SHADE
    return torch.where(count > 0, (low + (high - low) * count.log() / 4).clamp(max=high), torch.zeros(()))


def plot_points(axes: Axes, points: Float[Tensor, "P c"] | None, grid: BEVGrid) -> None:
    """Draw points as grey density."""
    if points is None:
        return
    columns = max(1, round(axes.get_window_extent().width))
    shade = point_shade(points, grid, columns).numpy()[..., None]
    ink, paper = np.array(rgb(INK)), np.array(rgb(PAPER))
    pixels = (paper + (ink - paper) * shade).round().astype(np.uint8)
    axes.imshow(pixels, extent=(*grid.x_m, *grid.y_m), origin="lower", interpolation="nearest", zorder=1)


def plot_boxes(
    axes: Axes,
    boxes: Mapping[Role, Boxes],
    *,
    min_score: float = 0.0,
    velocity: bool = False,
    filled: bool = True,
    width_pt: float = 0.9,
) -> None:
    """Draw boxes as rectangles with a line from the centre through the front; the ground truth is filled."""
    for order, (role, all_boxes) in enumerate(boxes.items()):
        shown = all_boxes.to("cpu")[all_boxes.scores.cpu() >= min_score]
        if len(shown) == 0:
            continue
        color = ROLE_COLORS[role]
        corners = list(bev_corners(shown.values).numpy())
        if filled and role == "ground_truth":
            axes.add_collection(PolyCollection(corners, facecolors=color, alpha=0.22, linewidths=0, zorder=2))
        axes.add_collection(
            PolyCollection(corners, facecolors="none", edgecolors=color, linewidths=width_pt, zorder=3 + order)
        )
        noses = np.stack([shown.center[:, :2].numpy(), _noses(shown).numpy()], axis=1)
        axes.add_collection(LineCollection(list(noses), colors=color, linewidths=width_pt, zorder=3 + order))
        if velocity:
            _plot_velocity(axes, shown, color)


def _noses(boxes: Boxes) -> Float[Tensor, "n 2"]:
    """Return the ends of the heading lines."""
    reach = boxes.size[:, 0] / 2 + NOSE_M
    return boxes.center[:, :2] + reach[:, None] * torch.stack([boxes.yaw.cos(), boxes.yaw.sin()], dim=1)


def _plot_velocity(axes: Axes, boxes: Boxes, color: str) -> None:
    """Draw arrows as long as the way of one second; unknown and slow boxes have none."""
    moving = boxes[boxes.velocity.norm(dim=1) > MIN_SPEED_M_S]  # NaN compares false
    for (x, y), (vx, vy) in zip(moving.center[:, :2].tolist(), moving.velocity.tolist(), strict=True):
        axes.annotate(
            "",
            (x + vx, y + vy),
            (x, y),
            arrowprops={
                "arrowstyle": "-|>",
                "color": color,
                "lw": 0.7,
                "mutation_scale": 5,
                "shrinkA": 0,
                "shrinkB": 0,
            },
            annotation_clip=True,
            zorder=8,
        )


def plot_ego(axes: Axes, grid: BEVGrid) -> None:
    """Mark the origin of the BEV frame, the vehicle, with a wedge that points up (+y)."""
    if bool(grid.contains(torch.zeros(2))):
        axes.plot(
            [0], [0], marker=(3, 0, 0), markersize=6, color=INK, markeredgecolor=PAPER, markeredgewidth=0.6, zorder=9
        )


def plot_legend(axes: Axes, roles: Iterable[Role]) -> None:
    """Write the roles with their colours below the axes' labels."""
    handles = [Line2D([], [], color=ROLE_COLORS[role], linewidth=3, label=ROLE_NAMES[role]) for role in roles]
    if handles:
        axes.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(0, -BOTTOM_PX / axes.get_window_extent().height),
            ncols=len(handles),
            fontsize=TEXT_PT,
            frameon=False,
            labelcolor=INK,
            handlelength=1.4,
            borderpad=0,
            borderaxespad=0,
        )
