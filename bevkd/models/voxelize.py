"""Points to voxels: the mean of the first few points of each occupied voxel."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def voxelize(
    points: Float[Tensor, "P C"],
    frame: Int[Tensor, "P"],
    low_m: tuple[float, float, float],
    voxel_m: tuple[float, float, float],
    shape: tuple[int, int, int],
    max_points: int,
) -> tuple[Float[Tensor, "V C"], Int[Tensor, "V 4"]]:
    """Return the mean features of the occupied voxels and their indices (frame, z, y, x), sorted by index.

    Args:
        points: x, y, z in metres first.
        frame: which frame of the batch each point belongs to.
        low_m: lower corner of the range; points outside the range are dropped.
        voxel_m: edges along x, y, z.
        shape: number of voxels along z, y, x.
        max_points: points per voxel that count; later ones, in the order given, are dropped.
    """
    cell = ((points[:, :3] - points.new_tensor(low_m)) / points.new_tensor(voxel_m)).floor().long()
    limits = torch.tensor([shape[2], shape[1], shape[0]], device=points.device)
    inside = ((cell >= 0) & (cell < limits)).all(dim=1)
    cell, points, frame = cell[inside], points[inside], frame[inside].long()
    flat = ((frame * shape[0] + cell[:, 2]) * shape[1] + cell[:, 1]) * shape[2] + cell[:, 0]
    flat, order = flat.sort(stable=True)
    voxels, voxel_of_point, counts = torch.unique_consecutive(flat, return_inverse=True, return_counts=True)
    first = counts.cumsum(0) - counts
    keep = torch.arange(len(flat), device=points.device) - first[voxel_of_point] < max_points
    sums = points.new_zeros(len(voxels), points.shape[1])
    sums.index_add_(0, voxel_of_point[keep], points[order[keep]])
    mean = sums / counts.clamp(max=max_points)[:, None]
    indices = torch.stack(
        [
            voxels // (shape[0] * shape[1] * shape[2]),
            voxels // (shape[1] * shape[2]) % shape[0],
            voxels // shape[2] % shape[1],
            voxels % shape[2],
        ],
        dim=1,
    )
    return mean, indices
