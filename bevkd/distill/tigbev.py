"""TiG-BEV (arXiv 2212.13979): the inner geometry of objects, as relations between points and between channels.

Of its three terms the two on BEV maps; the relative depth inside objects would need masks of objects in the images.

Shape letters: n boxes of the whole batch, P points of a box, C channels.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from bevkd.data.collate import Batch
from bevkd.distill.base import DistillContext, DistillLoss, DistillLossConfig, TeacherBatch, sample_at
from bevkd.geometry.boxes import rotate
from bevkd.models.detector import DetectorOutput


class Config(DistillLossConfig):
    """Weights as published; zero switches a term off.

    Attributes:
        keypoint: weight of the relations between points.
        channel: weight of the relations between channels.
        side: points along each side of a box. The paper has 24, many to a cell; 12 give the same loss to four digits
            and gradients that point the same way (cosine 0.99 and 0.97) for a third of the time.
        margin_m: by which a box is enlarged on each side.
    """

    weights: ClassVar[tuple[str, ...]] = ("keypoint", "channel")
    name: Literal["tigbev"] = "tigbev"
    keypoint: float = Field(default=100.0, ge=0)
    channel: float = Field(default=10.0, ge=0)
    side: int = Field(default=12, gt=1)
    margin_m: float = Field(default=1.6, ge=0)

    def signals(self) -> tuple[str, ...]:
        """Return the signal that both terms read."""
        return ("bev_high",) if self.keypoint > 0 or self.channel > 0 else ()


def inner_points(boxes: Float[Tensor, "n d"], side: int, margin_m: float) -> Float[Tensor, "n P 2"]:
    """Return ``side`` x ``side`` points of each box on the ground, edges included, metres."""
    steps = torch.linspace(-1, 1, side, device=boxes.device)
    across = torch.cartesian_prod(steps, steps)
    local = across * (boxes[:, None, 3:5] / 2 + margin_m)
    return rotate(local, boxes[:, None, 6]) + boxes[:, None, :2]


def relation_loss(student: Float[Tensor, "n r v"], teacher: Float[Tensor, "n r w"]) -> Float[Tensor, ""]:
    """Return how the scalar products between the rows of each box differ: 0 to 4, the mean over rows and boxes.

    The products of a row with all rows are brought to length 1 before the squared distance is taken.
    """
    own, theirs = (functional.normalize(rows @ rows.mT, dim=2) for rows in (student, teacher))
    return (own - theirs).square().sum() / max(student.shape[0] * student.shape[1], 1)


class TiGBEV(nn.Module):
    """The weighted sum of both terms over annotated boxes."""

    def __init__(self, config: Config, context: DistillContext) -> None:
        super().__init__()
        self.config, self.grid = config, context.grid
        if config.channel > 0:
            self.adapter = nn.Linear(context.channels("bev_high"), context.teacher_channels("bev_high"))

    def forward(self, student: DetectorOutput, teacher: TeacherBatch, batch: Batch) -> dict[str, Tensor]:
        """Return ``keypoint`` and ``channel``, weighted."""
        config, terms = self.config, {}
        points = [inner_points(each.values, config.side, config.margin_m) for each in batch.boxes]
        canonical = [teacher.to_canonical(xy_m, frame) for frame, xy_m in enumerate(points)]
        own = sample_at(student.bev_high, points, self.grid)
        theirs = sample_at(teacher.canonical.need("bev_high"), canonical, self.grid)
        if config.keypoint > 0:
            terms["keypoint"] = config.keypoint * relation_loss(own, theirs)
        if config.channel > 0:
            terms["channel"] = config.channel * relation_loss(self.adapter(own).mT, theirs.mT)
        return terms


def build(config: Config, context: DistillContext) -> DistillLoss:
    """Return the loss for a student and a cache."""
    return TiGBEV(config, context)
