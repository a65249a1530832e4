"""BEVDistill (arXiv 2211.09386): features around objects, and objects told apart from each other across modalities.

The paper contrasts the queries of set predictors. Heads with a heatmap have none: here each annotated box is one.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from bevkd.data.collate import Batch
from bevkd.distill.base import DistillContext, DistillLoss, DistillLossConfig, TeacherBatch, sample_at
from bevkd.distill.labeldistill import feature_loss
from bevkd.geometry.sampling import object_gaussians
from bevkd.models.detector import DetectorOutput

_OVERLAP, _RADIUS = 0.1, 1
"""Of the Gaussians around objects, as published."""


class Config(DistillLossConfig):
    """Weights as published; zero switches a term off.

    Attributes:
        dense: weight of the squared distance of features, weighted by the Gaussians of the annotated boxes.
        contrast: weight of the contrast between objects.
        temperature: of the contrast.
        width: of the vectors that are contrasted.
    """

    weights: ClassVar[tuple[str, ...]] = ("dense", "contrast")
    name: Literal["bevdistill"] = "bevdistill"
    dense: float = Field(default=0.01, ge=0)
    contrast: float = Field(default=0.2, ge=0)
    temperature: float = Field(default=0.07, gt=0)
    width: int = Field(default=128, gt=0)

    def signals(self) -> tuple[str, ...]:
        """Return the signal that both terms read."""
        return ("bev_high",) if self.dense > 0 or self.contrast > 0 else ()


def contrast_loss(
    student: Float[Tensor, "n C"], teacher: Float[Tensor, "n C"], kept: Bool[Tensor, "n"], temperature: float
) -> Float[Tensor, ""]:
    """Return InfoNCE: the cross entropy of finding each teacher vector's own student vector among all of them.

    Args:
        kept: objects that take part.
    """
    own, theirs = (functional.normalize(vectors, dim=1) for vectors in (student, teacher))
    logits = (theirs @ own.mT / temperature).masked_fill(~kept, -1e4)
    right = torch.where(kept, torch.arange(len(kept), device=kept.device), -100)
    # The mean of no object is 0.
    return functional.cross_entropy(logits, right, reduction="sum") / kept.sum().clamp(min=1)


def _projector(channels: int, width: int) -> nn.Sequential:
    """Return what brings vectors of one side to the space in which they are contrasted."""
    return nn.Sequential(
        nn.Linear(channels, width), nn.LayerNorm(width), nn.ReLU(inplace=True), nn.Linear(width, width)
    )


class BEVDistill(nn.Module):
    """The weighted sum of both terms over annotated boxes."""

    def __init__(self, config: Config, context: DistillContext) -> None:
        super().__init__()
        self.config, self.grid = config, context.grid
        if config.dense > 0:
            self.adapter = context.adapter("bev_high")
        if config.contrast > 0:
            self.own = _projector(context.channels("bev_high"), config.width)
            self.theirs = _projector(context.teacher_channels("bev_high"), config.width)

    def forward(self, student: DetectorOutput, teacher: TeacherBatch, batch: Batch) -> dict[str, Tensor]:
        """Return ``dense`` and ``contrast``, weighted."""
        config, terms = self.config, {}
        if config.dense > 0:
            theirs, covered = teacher.warped("bev_high")
            mask = object_gaussians(batch.boxes, self.grid, _OVERLAP, _RADIUS)[:, None] * covered
            terms["dense"] = config.dense * feature_loss(self.adapter(student.bev_high.float()), theirs.float(), mask)
        if config.contrast > 0:
            terms["contrast"] = config.contrast * self._contrast(student, teacher, batch)
        return terms

    def _contrast(self, student: DetectorOutput, teacher: TeacherBatch, batch: Batch) -> Tensor:
        centers = [each.values[:, None, :2] for each in batch.boxes]
        canonical = [teacher.to_canonical(xy_m, frame) for frame, xy_m in enumerate(centers)]
        own = sample_at(student.bev_high, centers, self.grid)[:, 0]
        theirs = sample_at(teacher.canonical.need("bev_high"), canonical, self.grid)[:, 0]
        kept = (self.grid.contains(torch.cat(centers)) & self.grid.contains(torch.cat(canonical)))[:, 0]
        return contrast_loss(self.own(own), self.theirs(theirs), kept, self.config.temperature)


def build(config: Config, context: DistillContext) -> DistillLoss:
    """Return the loss for a student and a cache."""
    return BEVDistill(config, context)
