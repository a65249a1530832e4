"""Gaussian heatmap targets of centre-based detectors."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def gaussian_radius(
    length_cells: Float[Tensor, "*n"], width_cells: Float[Tensor, "*n"], min_overlap: float
) -> Float[Tensor, "*n"]:
    """Return the radius, in cells and not rounded, within which a shifted box still overlaps its original.

    The three cases of CornerNet (arXiv 1808.01244, section 3.2.1) in the form its code and every CenterPoint use:
    the roots are divided by 2 instead of 2a, which public checkpoints were trained with.

    Args:
        length_cells, width_cells: box size in cells.
        min_overlap: smallest IoU that a shifted box may have, in (0, 1).
    """
    perimeter, area = length_cells + width_cells, length_cells * width_cells
    inner = (perimeter + (perimeter**2 - 4 * area * (1 - min_overlap) / (1 + min_overlap)).sqrt()) / 2
    outer = (2 * perimeter + (4 * perimeter**2 - 16 * (1 - min_overlap) * area).sqrt()) / 2
    both = -2 * min_overlap * perimeter
    both = (both + (both**2 + 16 * min_overlap * (1 - min_overlap) * area).sqrt()) / 2
    return torch.minimum(torch.minimum(inner, outer), both)


def draw_gaussians(
    shape: tuple[int, int, int],
    channels: Int[Tensor, "n"],
    cells: Int[Tensor, "n 2"],
    radii: Int[Tensor, "n"],
) -> Float[Tensor, "K Y X"]:
    """Return maps holding, per channel, the maximum of the Gaussians drawn into it.

    A Gaussian is 1 at its cell, has sigma ``(2 r + 1) / 6`` and is cut to the square window of radius ``r``
    (CenterPoint, arXiv 2006.11275); parts outside the map are dropped.

    Args:
        shape: ``(K, Y, X)``; a batch is drawn at once as ``B * K`` channels.
        channels: map that each Gaussian goes into.
        cells: ``(row, column)`` of each centre, which may lie outside the map.
        radii: window radius in cells, at least 0.
    """
    n_channels, rows, columns = shape
    maps = torch.zeros(n_channels * rows * columns, device=cells.device)
    if len(radii) == 0:
        return maps.view(shape)
    reach = int(radii.max())
    step = torch.arange(-reach, reach + 1, device=cells.device)
    sigma = (2 * radii[:, None] + 1) / 6
    # A Gaussian over a square window is an outer product, so only its two profiles need the exponential.
    profile = torch.exp(-(step**2) / (2 * sigma**2))
    values = profile[:, :, None] * profile[:, None, :]
    values = values.masked_fill(values < torch.finfo(values.dtype).eps, 0.0)
    row, column = cells[:, :1] + step, cells[:, 1:] + step
    reached = step.abs() <= radii[:, None]
    row_in = reached & (row >= 0) & (row < rows)
    column_in = reached & (column >= 0) & (column < columns)
    drawn = row_in[:, :, None] & column_in[:, None, :]
    index = (channels[:, None, None] * rows + row[:, :, None]) * columns + column[:, None, :]
    return maps.scatter_reduce_(0, index[drawn], values[drawn], "amax").view(shape)
