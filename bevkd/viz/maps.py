"""Maps on the BEV grid: feature energy and heatmaps, with the annotations outlined."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from bevkd.grid import BEVGrid
from bevkd.types import Boxes
from bevkd.viz.bev import panel_row, plot_boxes
from bevkd.viz.image import axes_at
from bevkd.viz.style import ENERGY_COLORS, MUTED, SMALL_PT

BAR_PX = 8
BOTTOM_PX = 92
PERCENTILES = (1.0, 99.5)


def feature_energy(features: Float[Tensor, "C Y X"]) -> Float[Tensor, "Y X"]:
    """Return the L2 norm over channels."""
    energy: Tensor = torch.linalg.vector_norm(features.detach().float().cpu(), dim=0)
    return energy


def class_peak(heatmap: Float[Tensor, "K Y X"]) -> Float[Tensor, "Y X"]:
    """Return the highest class probability of each cell from class logits."""
    return heatmap.detach().float().cpu().sigmoid().amax(dim=0)


def robust_range(*maps: Float[Tensor, "..."]) -> tuple[float, float]:
    """Return the 1st and the 99.5th percentile over all maps, a little apart even for constant maps."""
    values = torch.cat([one.flatten() for one in maps])
    values = values[values.isfinite()]
    if len(values) == 0:
        return 0.0, 1.0
    ordered = values.sort().values
    low, high = (float(ordered[round(share / 100 * (len(ordered) - 1))]) for share in PERCENTILES)
    return low, max(high, low + 1e-6 * max(1.0, abs(low)))


def draw_features(
    maps: Mapping[str, Float[Tensor, "C Y X"]],
    grid: BEVGrid,
    *,
    boxes: Boxes | None = None,
    shared_scale: bool = False,
    panel_px: int = 400,
) -> Figure:
    """Return the energy of BEV features side by side, one panel per title.

    Args:
        maps: features on the grid's range, of any channels and resolution.
        grid: the range to show.
        boxes: annotations to outline.
        shared_scale: one colour scale for all panels; teacher and student rarely share their magnitude.
        panel_px: width of one panel.
    """
    energies = {title: feature_energy(features) for title, features in maps.items()}
    shared = robust_range(*energies.values()) if shared_scale else None
    figure, views = panel_row(tuple(maps), grid, panel_px, BOTTOM_PX)
    for view, energy in zip(views, energies.values(), strict=True):
        low, high = shared or robust_range(energy)
        image = plot_map(view, energy, grid, Normalize(low, high), boxes)
        plot_scale(view, image, (low, high), "L2 norm over channels")
    return figure


def draw_heatmaps(
    maps: Mapping[str, Float[Tensor, "K Y X"]],
    grid: BEVGrid,
    *,
    boxes: Boxes | None = None,
    panel_px: int = 400,
) -> Figure:
    """Return the highest class probability of heatmap logits side by side; arguments as :func:`draw_features`."""
    figure, views = panel_row(tuple(maps), grid, panel_px, BOTTOM_PX)
    for view, heatmap in zip(views, maps.values(), strict=True):
        plot_heatmap(view, heatmap, grid, boxes)
    return figure


def plot_heatmap(axes: Axes, heatmap: Float[Tensor, "K Y X"], grid: BEVGrid, boxes: Boxes | None) -> None:
    """Draw the highest class probability with a square-root scale, which shows weak peaks."""
    image = plot_map(axes, class_peak(heatmap), grid, PowerNorm(0.5, 0.0, 1.0), boxes)
    plot_scale(axes, image, (0.0, 0.1, 0.5, 1.0), "highest class probability")


def plot_energy(axes: Axes, features: Float[Tensor, "C Y X"], grid: BEVGrid, boxes: Boxes | None) -> None:
    """Draw the energy of one map on its own scale."""
    energy = feature_energy(features)
    low, high = robust_range(energy)
    plot_scale(axes, plot_map(axes, energy, grid, Normalize(low, high), boxes), (low, high), "L2 norm over channels")


def plot_map(
    axes: Axes, values: Float[Tensor, "Y X"], grid: BEVGrid, scale: Normalize, boxes: Boxes | None
) -> AxesImage:
    """Draw a map with row 0 at ``y_min`` and annotations outlined."""
    colors = LinearSegmentedColormap.from_list("energy", ENERGY_COLORS)
    image = axes.imshow(
        values.numpy(),
        extent=(*grid.x_m, *grid.y_m),
        origin="lower",
        cmap=colors,
        norm=scale,
        interpolation="nearest",
        zorder=1,
    )
    if boxes is not None:
        plot_boxes(axes, {"ground_truth": boxes}, width_pt=0.8, filled=False)
    return image


def plot_scale(axes: Axes, image: AxesImage, ticks: tuple[float, ...], label: str) -> None:
    """Draw a thin colour scale below the axes."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    frame = axes.get_position()
    width, height = (side * figure.dpi for side in figure.get_size_inches())
    left, top = frame.x0 * width, (1 - frame.y0) * height
    bar_axes = axes_at(figure, left, top + 46, frame.width * width * 0.45, BAR_PX)
    bar = figure.colorbar(image, cax=bar_axes, orientation="horizontal", ticks=list(ticks))
    bar.ax.set_xticklabels([f"{tick:.3g}" for tick in ticks])
    bar.ax.tick_params(labelsize=SMALL_PT, colors=MUTED, length=2, width=0.5, pad=2)
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)
    figure.text(
        (left + frame.width * width) / width,
        1 - (top + 50) / height,
        label,
        fontsize=SMALL_PT,
        color=MUTED,
        ha="right",
        va="center",
    )
