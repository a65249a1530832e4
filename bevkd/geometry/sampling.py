"""Values of maps at points, and the cells around boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bevkd.geometry.boxes import nine_points
from bevkd.geometry.gaussian import draw_gaussians, gaussian_radius
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
    together = torch.cat(list(points))
    counts = torch.tensor([len(each) for each in points])
    frame = torch.arange(len(points)).repeat_interleave(counts).to(together.device)
    if swap_xy:
        rows, columns = grid.shape
        together = grid.to_metres(
            grid.to_cells(together).flip(-1) * together.new_tensor([columns / rows, rows / columns])
        )
    owner = frame[:, None].expand(together.shape[:2])
    sampled = mean_at(maps, together.flatten(0, 1)[:, None], owner.flatten(), grid)
    return sampled.view(*together.shape[:2], maps.shape[1])


def mean_at(
    maps: Float[Tensor, "B C Y X"], points: Float[Tensor, "n k 2"], frame: Int[Tensor, "n"], grid: BEVGrid
) -> Float[Tensor, "n C"]:
    """Return the mean of the bilinear samples at each ``k`` points, in metres, of the map of their frame.

    Zeros outside the map. Per cell a row of all channels is read, which on a CPU is twenty times as fast as
    ``grid_sample``, that goes over the map channel by channel; and torch has a deterministic gradient of it on GPUs.
    """
    B, C, rows, columns = maps.shape
    place = grid.to_cells(points.float()) - 0.5
    corner = place.floor()
    share = place - corner
    step = corner.new_tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    cells = corner[:, :, None] + step
    weights = (step * share[:, :, None] + (1 - step) * (1 - share[:, :, None])).prod(dim=-1)
    column, row = cells.unbind(-1)
    inside = (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
    row, column = row.clamp(0, rows - 1).long(), column.clamp(0, columns - 1).long()
    index = (frame[:, None, None] * rows + row) * columns + column
    # Rows whose values lie apart in memory would be read ten times as slowly.
    table = maps.float().permute(0, 2, 3, 1).contiguous().view(B * rows * columns, C)
    shares = torch.where(inside, weights, 0.0).flatten(1) / points.shape[1]
    return nn.functional.embedding_bag(index.flatten(1), table, per_sample_weights=shares, mode="sum")


def points_of(feature: Float[Tensor, "C Y X"], boxes: Boxes, grid: BEVGrid) -> BoxPoints:
    """Return a map's values at the nine points of each box, on the map's device."""
    values = boxes.values[:, :7].to(feature.device, torch.float32)
    return BoxPoints(values, sample_at(feature[None], [nine_points(values)], grid))


def object_gaussians(
    boxes: Sequence[Boxes], grid: BEVGrid, min_overlap: float, min_radius: int = 0
) -> Float[Tensor, "B Y X"]:
    """Return of each frame the maximum of a Gaussian per box, whatever its class, drawn as a head's targets are.

    Args:
        min_overlap: IoU that sets the radius.
        min_radius: smallest radius in cells.
    """
    values = torch.cat([each.values for each in boxes])
    frame = torch.cat([torch.full_like(each.labels, index) for index, each in enumerate(boxes)])
    length, width = (values[:, 3:5] / grid.cell_m).unbind(1)
    radius = gaussian_radius(length, width, min_overlap).long().clamp(min=min_radius)
    cells = grid.to_cells(values[:, :2]).floor().long().flip(-1)
    return draw_gaussians((len(boxes), *grid.shape), frame, cells, radius)


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
