"""DistillBEV (arXiv 2309.15109): features of objects, of the teacher's other finds and of the background apart.

Shape letters: B batch, C channels, Y rows, X columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from bevkd.data.collate import Batch
from bevkd.distill.base import DistillContext, DistillLoss, DistillLossConfig, TeacherBatch
from bevkd.geometry.boxes import rotate
from bevkd.geometry.sampling import object_gaussians
from bevkd.grid import BEVGrid
from bevkd.models.detector import DetectorOutput
from bevkd.types import Boxes

_OVERLAP, _RADIUS = 0.1, 2
"""Of the annotations' Gaussians, beyond which a find of the teacher's is no annotation."""


class Config(DistillLossConfig):
    """Weights as released for BEVDepth; zero switches a term off.

    Attributes:
        foreground: weight of the cells of annotated boxes, each by the root of the share that a cell has of its box.
        background: weight of the mean over the other cells.
        false_positive: weight of the mean over the cells where the teacher sees objects that nobody annotated; released
            settings differ, this one is that of the background.
        spatial: weight of the difference between the mean of all channels in a cell.
        channel: weight of the difference between the means over all cells.
        score: probability from which the teacher sees an object.
        temperature: of the teacher's attention over cells and over channels.
    """

    weights: ClassVar[tuple[str, ...]] = ("foreground", "background", "false_positive", "spatial", "channel")
    name: Literal["distillbev"] = "distillbev"
    foreground: float = Field(default=1.5e-3, ge=0)
    background: float = Field(default=4e-2, ge=0)
    false_positive: float = Field(default=4e-2, ge=0)
    spatial: float = Field(default=2.5e-3, ge=0)
    channel: float = Field(default=0.25, ge=0)
    score: float = Field(default=0.1, gt=0, lt=1)
    temperature: float = Field(default=0.5, gt=0)

    def signals(self) -> tuple[str, ...]:
        """Return the signals that the terms with a weight read."""
        maps = ("bev_high",) if any(getattr(self, name) > 0 for name in self.weights) else ()
        return (*maps, "heatmap") if self.false_positive > 0 else maps


def foreground_scale(boxes: Sequence[Boxes], grid: BEVGrid) -> Float[Tensor, "B Y X"]:
    """Return ``sqrt(cell area / box area)`` in the cells whose centre a box of their frame holds, and 0 elsewhere.

    Where boxes overlap the smaller counts. A box always holds the cell of its own centre, however small it is.
    """
    values = torch.cat([each.values for each in boxes])
    rows, columns = grid.shape
    scales = values.new_zeros(len(boxes) * rows * columns)
    if len(values) == 0:
        return scales.view(len(boxes), rows, columns)
    frame = torch.cat([torch.full_like(each.labels, index) for index, each in enumerate(boxes)])
    reach = math.ceil(float(values[:, 3:5].norm(dim=1).max()) / 2 / grid.cell_m)
    steps = torch.arange(-reach, reach + 1, device=values.device)
    offsets = torch.cartesian_prod(steps, steps)
    center = grid.to_cells(values[:, None, :2])
    cells = center.floor().long() + offsets
    local = rotate((cells + 0.5 - center) * grid.cell_m, -values[:, None, 6])
    held = (local.abs() <= values[:, None, 3:5] / 2).all(dim=2) | (offsets == 0).all(dim=1)
    held = held & ((cells >= 0) & (cells < cells.new_tensor([columns, rows]))).all(dim=2)
    scale = grid.cell_m / (values[:, 3] * values[:, 4]).clamp(min=1e-6).sqrt()
    index = (frame[:, None] * rows + cells[..., 1]) * columns + cells[..., 0]
    # Cells that are not held write a zero somewhere, which changes no maximum.
    drawn = torch.where(held, scale[:, None], 0.0)
    scales.scatter_reduce_(0, index.clamp(0, len(scales) - 1).flatten(), drawn.flatten(), "amax")
    return scales.view(len(boxes), rows, columns)


def attention(
    teacher: Float[Tensor, "B C Y X"], covered: Bool[Tensor, "B 1 Y X"], temperature: float
) -> tuple[Float[Tensor, "B Y X"], Float[Tensor, "B C"]]:
    """Return how much the teacher looks at each covered cell and at each channel; both have the mean 1.

    Args:
        teacher: zero where it is not covered.
    """
    strength = teacher.abs()
    cells = torch.where(covered[:, 0], strength.mean(dim=1) / temperature, -torch.inf).flatten(1)
    counts = covered.flatten(1).sum(dim=1)
    # A frame of which nothing is covered has no softmax.
    spatial = cells.softmax(dim=1).nan_to_num() * counts[:, None]
    channels = (strength.sum(dim=(2, 3)) / counts[:, None].clamp(min=1) / temperature).softmax(dim=1)
    return spatial.view_as(teacher[:, 0]), channels * teacher.shape[1]


def _mean_over(errors: Float[Tensor, "B Y X"], cells: Bool[Tensor, "B Y X"]) -> Float[Tensor, ""]:
    """Return the mean over frames of each frame's mean over the marked cells, 0 where there are none."""
    return (torch.where(cells, errors, 0.0).sum(dim=(1, 2)) / cells.sum(dim=(1, 2)).clamp(min=1)).mean()


class DistillBEV(nn.Module):
    """The weighted sum of the terms; on frames without labels the teacher's finds are apart from the background."""

    def __init__(self, config: Config, context: DistillContext) -> None:
        super().__init__()
        self.config, self.grid = config, context.grid
        self.adapter = context.adapter("bev_high")
        if config.spatial > 0:
            self.spatial = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, student: DetectorOutput, teacher: TeacherBatch, batch: Batch) -> dict[str, Tensor]:
        """Return ``foreground``, ``background``, ``false_positive``, ``spatial`` and ``channel``, weighted."""
        config = self.config
        theirs, covered = teacher.warped("bev_high")
        theirs = torch.where(covered, theirs.float(), 0.0)
        own = torch.where(covered, self.adapter(student.bev_high.float()), 0.0)
        terms = {}
        if config.foreground > 0 or config.background > 0 or config.false_positive > 0:
            spatial, channels = attention(theirs, covered, config.temperature)
            errors = torch.einsum("bcyx,bc->byx", (own - theirs).square(), channels) * spatial
            scale = foreground_scale(batch.boxes, self.grid)
            others = self._false_positives(teacher, batch, scale) & covered[:, 0]
            rest = covered[:, 0] & (scale == 0) & ~others
            found = {
                "foreground": (errors * scale).sum() / len(batch),
                "background": _mean_over(errors, rest),
                "false_positive": _mean_over(errors, others),
            }
            terms = {name: value for name, value in found.items() if getattr(config, name) > 0}
        if config.spatial > 0:
            cells = self.spatial(own.mean(dim=1, keepdim=True)) - theirs.mean(dim=1, keepdim=True)
            terms["spatial"] = torch.where(covered, cells, 0.0).abs().sum() / len(batch)
        if config.channel > 0:
            counts = covered.sum(dim=(2, 3)).clamp(min=1)
            terms["channel"] = ((own - theirs).sum(dim=(2, 3)) / counts).abs().sum() / len(batch)
        return {name: getattr(config, name) * value for name, value in terms.items()}

    def _false_positives(
        self, teacher: TeacherBatch, batch: Batch, scale: Float[Tensor, "B Y X"]
    ) -> Bool[Tensor, "B Y X"]:
        """Return the cells where the teacher sees what no annotation explains; without the term none."""
        if self.config.false_positive == 0:
            return torch.zeros_like(scale, dtype=torch.bool)
        heatmap, covered = teacher.warped("heatmap")
        sees = (heatmap.float().sigmoid().amax(dim=1) > self.config.score) & covered[:, 0]
        annotated = object_gaussians(batch.boxes, self.grid, _OVERLAP, _RADIUS) >= self.config.score
        return sees & ~annotated & (scale == 0)


def build(config: Config, context: DistillContext) -> DistillLoss:
    """Return the loss for a student and a cache."""
    return DistillBEV(config, context)
