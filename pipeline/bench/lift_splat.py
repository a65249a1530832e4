"""Lift-splat beside its naive form, which holds a vector for each pixel at each depth."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bevkd.data.images import ImageView
from bevkd.grid import BEVGrid
from bevkd.models.splat import splat
from bevkd.testing.frames import MadeUpFrames
from pipeline.bench.memory import in_new_process, peak_mb

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Size:
    """Of one frame: cameras with views of so many pixels at a stride, depth bins, channels, and cells along an axis."""

    cameras: int = 6
    height: int = 256
    width: int = 704
    stride: int = 16
    bins: int = 112
    channels: int = 80
    cells: int = 128


FULL_SIZE = Size()
"""BEVDepth's."""

_DEPTH_M, _REACH_M, _Z_M = (2.0, 58.0), 51.2, (-5.0, 3.0)


def naive_splat(
    depth: Float[Tensor, "B P D"], context: Float[Tensor, "B P C"], cells: Int[Tensor, "B P D"], shape: tuple[int, int]
) -> Float[Tensor, "B C Y X"]:
    """Return what ``bevkd.models.splat.splat`` returns, by way of the frustum: outer product, then scatter."""
    B, _, C = context.shape
    per_frame = shape[0] * shape[1]
    frustum = depth[..., None] * context[:, :, None]
    rows = torch.where(
        cells >= 0, cells + torch.arange(B, device=cells.device)[:, None, None] * per_frame, B * per_frame
    )
    # One more row receives what lies outside the grid.
    bev = frustum.new_zeros(B * per_frame + 1, C).index_add(0, rows.flatten(), frustum.flatten(0, 2))
    return bev[:-1].view(B, *shape, C).permute(0, 3, 1, 2).contiguous()


FORMS = {"bevkd": splat, "naive": naive_splat}


class Problem:
    """Depth distributions and contexts with gradients, the cells of a rig, and the gradient of the map."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.shape = (size.cells, size.cells)
        cells = _cells(size)
        chance = torch.Generator().manual_seed(0)
        pixels = cells.shape[1]
        logits = torch.randn(1, pixels, size.bins, generator=chance)
        self.cells = cells.to(device)
        self.depth = logits.softmax(dim=-1).to(device).requires_grad_()
        self.context = torch.randn(1, pixels, size.channels, generator=chance).to(device).requires_grad_()
        self.gradient = torch.randn(1, size.channels, *self.shape, generator=chance).to(device)

    def run(self, form: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return the map and the gradients of depth and context."""
        bev = FORMS[form](self.depth, self.context, self.cells, self.shape)
        to_depth, to_context = torch.autograd.grad(bev, (self.depth, self.context), self.gradient)
        return bev.detach(), to_depth, to_context


def _cells(size: Size) -> Int[Tensor, "1 P D"]:
    """Return the flat cell of each pixel at each depth, negative outside of the grid."""
    grid = BEVGrid(x_m=(-_REACH_M, _REACH_M), y_m=(-_REACH_M, _REACH_M), z_m=_Z_M, cell_m=2 * _REACH_M / size.cells)
    source = MadeUpFrames(("car",), grid, frames=1, cameras=size.cameras, image_size=(900, 1600))
    original = source.image_sizes("frame-0")
    views = {name: ImageView.cover(each, size.height, size.width) for name, each in original.items()}
    rig = source.load("frame-0", frozenset({"camera"}), views).rig
    assert rig is not None
    columns = size.stride * (torch.arange(size.width // size.stride) + 0.5)
    rows = size.stride * (torch.arange(size.height // size.stride) + 0.5)
    v, u = torch.meshgrid(rows, columns, indexing="ij")
    pixels = torch.stack([u, v, torch.ones_like(u)], dim=-1).flatten(0, 1)
    rays = torch.einsum("nij,pj->npi", rig.lidar_from_camera[:, :3, :3] @ rig.intrinsics.inverse(), pixels)
    depths = torch.linspace(*_DEPTH_M, size.bins + 1)[:-1]
    xyz = rays[:, :, None] * depths[:, None] + rig.lidar_from_camera[:, None, None, :3, 3]
    cell = grid.to_cells(xyz[..., :2]).floor().long()
    inside = grid.contains(xyz[..., :2]) & (xyz[..., 2] >= _Z_M[0]) & (xyz[..., 2] < _Z_M[1])
    return torch.where(inside, cell[..., 1] * size.cells + cell[..., 0], -1).flatten(0, 1)[None]


def compare(size: Size, rounds: int, device: torch.device) -> dict[str, Any]:
    """Return memory and time of forward and backward pass over those of the naive form, as plain values.

    Memory is measured in a process for each form. Times are taken in turns in one process, and the ratio is the median
    over the rounds.
    """
    memory = {form: in_new_process(_memory, form, size, str(device)) for form in FORMS}
    times, difference = in_new_process(_times, size, rounds, str(device))
    ours, naive = memory["bevkd"], memory["naive"]
    return {
        "memory_over_naive": None if ours is None or naive is None else ours / naive,
        "time_over_naive": statistics.median(
            mine / other for mine, other in zip(times["bevkd"], times["naive"], strict=True)
        ),
        "peak_mb": memory,
        "ms": {form: statistics.median(values) for form, values in times.items()},
        "relative_difference": difference,
        "size": asdict(size),
        "device": str(device),
    }


def _memory(form: str, size: Size, device: str) -> float | None:
    problem = Problem(size, torch.device(device))
    return peak_mb(lambda: problem.run(form), torch.device(device))


def _times(size: Size, rounds: int, device: str) -> tuple[dict[str, list[float]], float]:
    """Return the milliseconds of each form, round by round, and how far their results are apart."""
    problem = Problem(size, torch.device(device))
    results = {form: problem.run(form) for form in FORMS}
    pairs = zip(results["bevkd"], results["naive"], strict=True)
    difference = max(float((ours - naive).norm() / naive.norm()) for ours, naive in pairs)
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    for turn in range(rounds):
        for form in list(FORMS)[:: 1 if turn % 2 else -1]:
            started = time.perf_counter()
            problem.run(form)
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)
            times[form].append(1e3 * (time.perf_counter() - started))
    return times, difference


def table(result: dict[str, Any]) -> Table:
    """Return the comparison as a table."""
    from rich.table import Table

    size = result["size"]
    title = (
        f"\nlift-splat, forward and backward: {size['cameras']} x {size['height']} x {size['width']}, {size['bins']} "
        f"bins, {size['channels']} channels"
    )
    rows = Table("form", "ms", "peak MB", box=None, padding=(0, 2, 0, 0), header_style="bold", title=title)
    rows.title_justify = "left"
    for form in FORMS:
        peak = result["peak_mb"][form]
        rows.add_row(form, f"{result['ms'][form]:.1f}", "-" if peak is None else f"{peak:.1f}")
    memory = result["memory_over_naive"]
    rows.add_row("ratio", f"{result['time_over_naive']:.3f}", "-" if memory is None else f"{memory:.3f}")
    return rows
