"""Points to voxels: which points share a voxel, and the mean of the first few of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

_INT32 = torch.iinfo(torch.int32).max


@dataclass(frozen=True)
class VoxelGroups:
    """Points by the voxel that they lie in; voxels are sorted by index.

    Attributes:
        points: positions of the points that count, voxel by voxel, in the order given within each.
        counts: how many of them each voxel has, at least one.
        indices: (frame, z, y, x) of each voxel.
    """

    points: Int[Tensor, "N"]
    counts: Int[Tensor, "V"]
    indices: Int[Tensor, "V 4"]

    @property
    def starts(self) -> Int[Tensor, "V"]:
        """Position of each voxel's first point in ``points``."""
        return self.counts.cumsum(0) - self.counts

    @property
    def voxel_of_point(self) -> Int[Tensor, "N"]:
        """Voxel of each entry of ``points``."""
        return _repeated(torch.arange(len(self.counts), device=self.counts.device), self.counts, len(self.points))


def group_points(
    points: Float[Tensor, "P C"],
    frame: Int[Tensor, "P"],
    low_m: tuple[float, float, float],
    voxel_m: tuple[float, float, float],
    shape: tuple[int, int, int],
    max_points: int,
    max_voxels: int | None = None,
) -> VoxelGroups:
    """Return which points share a voxel, as spconv's ``PointToVoxel`` finds them.

    Args:
        points: x, y, z in metres first.
        frame: which frame of the batch each point belongs to.
        low_m: lower corner of the range; points outside the range are dropped.
        voxel_m: edges along x, y, z.
        shape: number of voxels along z, y, x.
        max_points: points per voxel that count; later ones, in the order given, are dropped.
        max_voxels: voxels per frame that count; those whose first point comes later are dropped. None keeps all.
    """
    flat, outside = _flat_index(points, frame, low_m, voxel_m, shape)
    # Stable, so that the points of a voxel stay in their order; what lies outside comes last.
    flat, order = flat.sort(stable=True)
    inside = int((flat < outside).sum())
    voxels, counts = torch.unique_consecutive(flat[:inside], return_counts=True)
    first = counts.cumsum(0) - counts
    limited = counts.clamp(max=max_points)
    if max_voxels is not None and len(voxels) > max_voxels:
        early = _early(voxels // (shape[0] * shape[1] * shape[2]), order[first], max_voxels).nonzero().squeeze(1)
        voxels, first, limited = (each.index_select(0, early) for each in (voxels, first, limited))
    # The first few entries of each voxel's run in the sorted order.
    total = int(limited.sum())
    position = torch.arange(total, device=order.device)
    position += _repeated(first - (limited.cumsum(0) - limited), limited, total)
    return VoxelGroups(order.index_select(0, position), limited, _unflatten(voxels, shape))


def voxelize(
    points: Float[Tensor, "P C"],
    frame: Int[Tensor, "P"],
    low_m: tuple[float, float, float],
    voxel_m: tuple[float, float, float],
    shape: tuple[int, int, int],
    max_points: int,
    max_voxels: int | None = None,
) -> tuple[Float[Tensor, "V C"], Int[Tensor, "V 4"]]:
    """Return the mean features of the occupied voxels and their indices (frame, z, y, x), sorted by index.

    Arguments are those of :func:`group_points`.
    """
    groups = group_points(points, frame, low_m, voxel_m, shape, max_points, max_voxels)
    if len(groups.counts) == 0:
        return points.new_zeros(0, points.shape[1]), groups.indices
    sums = functional.embedding_bag(groups.points, points.contiguous(), groups.starts, mode="sum")
    return sums / groups.counts[:, None], groups.indices


def _flat_index(
    points: Float[Tensor, "P C"],
    frame: Int[Tensor, "P"],
    low_m: tuple[float, float, float],
    voxel_m: tuple[float, float, float],
    shape: tuple[int, int, int],
) -> tuple[Int[Tensor, "P"], int]:
    """Return the flat voxel of each point over all frames, and the number that stands for outside."""
    frames = int(frame.max()) + 1 if len(frame) else 0
    outside = frames * shape[0] * shape[1] * shape[2]
    flat = frame.to(torch.int32 if outside < _INT32 else torch.int64)  # the former sorts twice as fast
    # Tensors, not numbers: a GPU multiplies by the inverse of a number, which moves points on faces.
    low, edges = points.new_tensor(low_m), points.new_tensor(voxel_m)
    inside = torch.ones_like(frame, dtype=torch.bool)
    for axis, cells in zip((2, 1, 0), shape, strict=True):
        cell = ((points[:, axis] - low[axis]) / edges[axis]).floor_()
        inside &= cell == cell.clamp(0, cells - 1)
        flat = flat * cells + cell.to(flat.dtype)
    return torch.where(inside, flat, outside), outside


def _unflatten(voxels: Int[Tensor, "V"], shape: tuple[int, int, int]) -> Int[Tensor, "V 4"]:
    rest, columns = voxels, []
    for cells in reversed(shape):
        above = torch.div(rest, cells, rounding_mode="trunc")
        columns.append(rest - above * cells)
        rest = above
    return torch.stack([rest, *reversed(columns)], dim=1)


def _early(frame: Int[Tensor, "V"], first_point: Int[Tensor, "V"], limit: int) -> Bool[Tensor, "V"]:
    """Return whether each voxel is among the ``limit`` voxels of its frame that got a point first."""
    # The voxels of a frame stand side by side.
    firsts = torch.split(first_point, torch.bincount(frame).tolist())
    last = torch.stack([own.kthvalue(limit).values if len(own) > limit else own.new_tensor(_INT32) for own in firsts])
    return first_point <= last[frame]


def _repeated(values: Tensor, counts: Int[Tensor, "V"], total: int) -> Tensor:
    return values.repeat_interleave(counts, output_size=total)
