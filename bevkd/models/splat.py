"""Lift-splat as a sparse matrix product: the frustum feature tensor never exists.

Lift, splat, shoot places ``depth[p, d] * context[p]`` into the BEV cell of pixel ``p`` at depth bin ``d``. That is
``bev = S context`` with the sparse ``S[cell, p] = sum of depth[p, d] over the bins d that fall into cell``. The naive
form holds a tensor of pixels x depths x channels; this one holds pixels x depths numbers, forward and backward.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


class _Splat(torch.autograd.Function):
    """``bev[cells[p, d]] += depth[p, d] * context[p]``, with ``cells == rows`` meaning "outside the grid"."""

    @staticmethod
    def forward(ctx: Any, depth: Tensor, context: Tensor, cells: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(depth, context, cells)
        ctx.rows = rows
        flat, order = cells.flatten().sort()
        starts = torch.searchsorted(flat, torch.arange(rows + 1, device=cells.device))
        inside = int(starts[-1])
        order = order[:inside]
        matrix = _csr(starts, order // depth.shape[1], depth.flatten()[order], (rows, context.shape[0]))
        return matrix @ context

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        depth, context, cells = ctx.saved_tensors
        pixels, bins = depth.shape
        # One more row, always zero, receives what lies outside the grid.
        gradient = torch.cat([gradients[0], gradients[0].new_zeros(1, context.shape[1])])
        starts = torch.arange(0, pixels * bins + 1, bins, device=cells.device)
        matrix = _csr(starts, cells.flatten(), depth.flatten(), (pixels, ctx.rows + 1))
        to_depth = torch.empty_like(depth)
        for index in range(bins):
            to_depth[:, index] = (gradient[cells[:, index]] * context).sum(dim=1)
        return to_depth, matrix @ gradient, None, None


def _csr(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta", category=UserWarning)
        return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)


def splat(
    depth: Float[Tensor, "B P D"],
    context: Float[Tensor, "B P C"],
    cells: Int[Tensor, "B P D"],
    shape: tuple[int, int],
) -> Float[Tensor, "B C Y X"]:
    """Return the BEV map of pixels lifted along their depth distribution.

    Args:
        depth: probability of each depth bin of each pixel.
        context: feature of each pixel.
        cells: flat cell index ``row * X + column`` of each pixel at each depth, negative where outside the grid.
        shape: ``(Y, X)`` of the grid.

    Works in float32 whatever the precision around it: a cell sums over hundreds of pixels.
    """
    if torch.onnx.is_in_onnx_export():
        return _dense_splat(depth, context, cells, shape)
    B, _, C = context.shape
    per_frame = shape[0] * shape[1]
    offset = torch.arange(B, device=cells.device)[:, None, None] * per_frame
    rows = torch.where(cells >= 0, cells + offset, B * per_frame)
    with torch.autocast(context.device.type, enabled=False):
        bev: Tensor = _Splat.apply(  # type: ignore[no-untyped-call]
            depth.float().flatten(0, 1).contiguous(),
            context.float().flatten(0, 1).contiguous(),
            rows.flatten(0, 1),
            B * per_frame,
        )
    return bev.view(B, *shape, C).permute(0, 3, 1, 2).contiguous()


def scatter(
    points: Float[Tensor, "B P D C"], cells: Int[Tensor, "B P D"], shape: tuple[int, int]
) -> Float[Tensor, "B C Y X"]:
    """Return the BEV map of lifted features that are there as a tensor: the sum of those in each cell.

    Args:
        points: feature of each pixel at each depth.
        cells, shape: as in :func:`splat`.
    """
    B, C = points.shape[0], points.shape[-1]
    per_frame = shape[0] * shape[1]
    if torch.onnx.is_in_onnx_export():
        return _element_scatter(points, cells, shape)
    inside = cells >= 0
    offset = torch.arange(B, device=cells.device)[:, None, None] * per_frame
    bev = points.new_zeros(B * per_frame, C, dtype=torch.float32)
    bev = bev.index_add(0, (cells + offset)[inside], points.float()[inside])
    return bev.view(B, *shape, C).permute(0, 3, 1, 2).contiguous()


_EXPORTED_PIXELS = 1024
"""Most pixels whose part of the matrix is written out at once in an exported graph: 67 MB on a grid of 128 x 128."""


def _dense_splat(depth: Tensor, context: Tensor, cells: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return what :func:`splat` returns in operations that ONNX has, some pixels at a time.

    ONNX knows no sparse matrices. Written out densely the matrix is multiplied faster than the frustum is scattered:
    scattering with a sum goes element by element in onnxruntime (ScatterElements), or loses summands of cells that
    several threads add to (ScatterND).
    """
    B, P, C = context.shape
    last = shape[0] * shape[1]
    index = torch.where(cells >= 0, cells, last)
    bev = context.new_zeros(B, C, last)
    for start in range(0, P, _EXPORTED_PIXELS):
        part = slice(start, min(start + _EXPORTED_PIXELS, P))
        matrix = depth.new_zeros(B, part.stop - part.start, last + 1).scatter_add(2, index[:, part], depth[:, part])
        bev = bev + context[:, part].mT @ matrix[..., :last]
    return bev.view(B, C, *shape)


def _element_scatter(points: Tensor, cells: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return what :func:`scatter` returns in operations that ONNX has."""
    B, C = points.shape[0], points.shape[-1]
    last = shape[0] * shape[1]
    index = torch.where(cells >= 0, cells, last).flatten(1)[..., None].expand(-1, -1, C)
    bev = points.new_zeros(B, last + 1, C).scatter_add(1, index, points.flatten(1, 2))
    return bev[:, :last].mT.reshape(B, C, *shape)
