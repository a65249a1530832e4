"""Values of maps at points, and the cells around boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from bevkd.geometry.boxes import nine_points
from bevkd.geometry.gaussian import gaussian_radius
from bevkd.grid import BEVGrid
from bevkd.types import Boxes, BoxPoints

FOREGROUND_OVERLAP = 0.7
"""IoU that sets the radius of an object's Gaussian in UniDistill (arXiv 2303.15083)."""

MIN_SCALE = 2 / 3
"""Smallest scale of an augmentation under which :func:`foreground_cells` still covers every Gaussian."""


def sample_at(
    maps: Float[Tensor, "B C Y X"], points: Sequence[Float[Tensor, "_ p 2"]], grid: BEVGrid, swap_xy: bool = False
) -> Float[Tensor, "m p C"]:
    """Return map values bilinearly sampled at points in metres, all frames' points one after the other.

    Zeros outside the map, ``align_corners=False``. ``swap_xy`` reads x as row and y as column, the defect of
    UniDistill's released code, kept for numerical comparison with it.
    """
    sampled = []
    for feature, xy_m in zip(maps, points, strict=True):
        position = grid.to_sampling(xy_m)
        if swap_xy:
            position = position.flip(-1)
        values = nn.functional.grid_sample(feature[None].float(), position[None], align_corners=False)
        sampled.append(values[0].permute(1, 2, 0))
    return torch.cat(sampled)


def points_of(feature: Float[Tensor, "C Y X"], boxes: Boxes, grid: BEVGrid) -> BoxPoints:
    """Return a map's values at the nine points of each box, on the map's device."""
    values = boxes.values[:, :7].to(feature.device, torch.float32)
    return BoxPoints(values, sample_at(feature[None], [nine_points(values)], grid))


def foreground_radius(size_m: Float[Tensor, "n d"], grid: BEVGrid) -> Float[Tensor, "n"]:
    """Return the radius of each object's Gaussian in cells, not rounded, from its length and width."""
    size = size_m / grid.cell_m
    return gaussian_radius(size[:, 0], size[:, 1], FOREGROUND_OVERLAP)


def foreground_cells(boxes: Boxes, grid: BEVGrid) -> Bool[Tensor, "Y X"]:
    """Return the cells that the Gaussian of a box can reach, however flipped, turned and scaled (``MIN_SCALE``).

    A Gaussian fills a square of cells around the cell of its box, after augmentation. A cell of that square lies
    within ``sqrt(2) (r + 1/2)`` of the box's centre there, ``r`` the rounded-down radius; seen from the un-augmented
    map that is at most ``sqrt(2) (radius + 1 / (2 scale))``, and the nearest cell half a diagonal further.
    """
    device = boxes.values.device
    reached = torch.zeros(grid.shape, dtype=torch.bool, device=device)
    reach = math.sqrt(2) * (foreground_radius(boxes.size, grid).clamp(min=0) + 0.5 / MIN_SCALE + 0.5)
    if not len(boxes):
        return reached
    steps = torch.arange(-math.ceil(reach.max().item()), math.ceil(reach.max().item()) + 1, device=device)
    offset = torch.cartesian_prod(steps, steps)
    center = grid.to_cells(boxes.values[:, None, :2])
    cell = center.floor().long() + offset
    near = (cell + 0.5 - center).norm(dim=-1) <= reach[:, None] + 1e-3
    rows, columns = grid.shape
    inside = ((cell >= 0) & (cell < cell.new_tensor([columns, rows]))).all(dim=-1)
    column, row = cell[near & inside].unbind(-1)
    reached[row, column] = True
    return reached
