"""CRKD (arXiv 2403.19104): how alike the cells of a map are to each other, at four resolutions.

Its response distillation by quality focal loss is the loss ``soft``.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from bevkd.data.collate import Batch
from bevkd.distill.base import DistillContext, DistillLoss, DistillLossConfig, TeacherBatch
from bevkd.models.detector import DetectorOutput


class Config(DistillLossConfig):
    """Constants as published.

    Attributes:
        affinity: weight of the term. The released code divides its mean by the batch size once more; this one does not.
        stage: map that is compared: the paper's is what fusion gives.
        sizes: rows and columns of the smaller maps.
    """

    weights: ClassVar[tuple[str, ...]] = ("affinity",)
    name: Literal["crkd"] = "crkd"
    affinity: float = Field(default=0.25, ge=0)
    stage: Literal["bev_low", "bev_high"] = "bev_low"
    sizes: tuple[int, ...] = Field(default=(32, 16, 8, 4), min_length=1)

    def signals(self) -> tuple[str, ...]:
        """Return the signal that the term reads."""
        return (self.stage,) if self.affinity > 0 else ()

    def misfits(self, context: DistillContext) -> list[str]:
        """Return why the student's map cannot be compared with the cached one."""
        return context.finer_low("set stage: bev_high") if self.signals() == ("bev_low",) else []


def affinity_loss(student: Float[Tensor, "B C Y X"], teacher: Float[Tensor, "B D Y X"]) -> Float[Tensor, ""]:
    """Return the mean absolute difference between the scalar products of every two cells."""
    own, theirs = (maps.flatten(2).mT @ maps.flatten(2) for maps in (student, teacher))
    return (own - theirs).abs().mean()


class CRKD(nn.Module):
    """The term, summed over resolutions, each with layers of its own on the student's side."""

    def __init__(self, config: Config, context: DistillContext) -> None:
        super().__init__()
        self.config = config
        width = context.channels(config.stage)
        self.adapters = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(width, width, 1))
            for _ in config.sizes
        )

    def forward(self, student: DetectorOutput, teacher: TeacherBatch, batch: Batch) -> dict[str, Tensor]:
        """Return ``affinity``, weighted."""
        del batch
        if self.config.affinity == 0:
            return {}
        theirs, covered = teacher.warped(self.config.stage)
        # A smaller map mixes cells: what the teacher does not cover must be the same on both sides.
        own = torch.where(covered, getattr(student, self.config.stage).float(), 0.0)
        theirs = torch.where(covered, theirs.float(), 0.0)
        total = own.new_zeros(())
        for size, adapter in zip(self.config.sizes, self.adapters, strict=True):
            small, target = (functional.interpolate(maps, (size, size), mode="bilinear") for maps in (own, theirs))
            total = total + affinity_loss(adapter(small), target)
        return {"affinity": self.config.affinity * total}


def build(config: Config, context: DistillContext) -> DistillLoss:
    """Return the loss for a student and a cache."""
    return CRKD(config, context)
