"""LabelDistill (arXiv 2407.10164): features weighted by the annotations' heatmaps, and outputs, of a LiDAR teacher.

The paper's second teacher, which encodes the annotations themselves, is not here: it would be another cache.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from bevkd.data.collate import Batch
from bevkd.distill.base import DistillContext, DistillLoss, DistillLossConfig, TeacherBatch
from bevkd.models.bev_resnet import BasicBlock
from bevkd.models.detector import DetectorOutput
from bevkd.models.heads.center import CenterHead, CenterTargets, gather_codes

_EPS = 1e-4


class Config(DistillLossConfig):
    """Weights as published; zero switches a term off and drops its signals.

    Attributes:
        feature: weight of the features' term.
        response: weight of the outputs' term; its boxes are weighted as those of the student's head are.
        stages: maps that the features' term compares. The paper compares what lies between the two, inside the BEV
            encoders, which caches do not hold.
        stride: cells along each side that are compared as one, as in the paper's level of 256 channels.
    """

    weights: ClassVar[tuple[str, ...]] = ("feature", "response")
    name: Literal["labeldistill"] = "labeldistill"
    feature: float = Field(default=0.3, ge=0)
    response: float = Field(default=1.0, ge=0)
    stages: tuple[Literal["bev_low", "bev_high"], ...] = Field(default=("bev_low",), min_length=1)
    stride: int = Field(default=2, ge=1)

    def signals(self) -> tuple[str, ...]:
        """Return the signals that the terms with a weight read."""
        features = self.stages if self.feature > 0 else ()
        return (*features, "heatmap", "box_code") if self.response > 0 else features

    def misfits(self, context: DistillContext) -> list[str]:
        """Return why the student cannot be compared with the cached teacher."""
        faults = []
        if not isinstance(context.student.head, CenterHead):
            faults.append("labeldistill draws heatmaps of the annotations: give the student the head 'center'")
        if self.feature > 0 and "bev_low" in self.stages:
            faults += context.finer_low("leave it out of stages")
        return faults + (context.other_tasks("set response: 0") if self.response > 0 else [])


def _adapter(own: int, theirs: int, stride: int) -> nn.Sequential:
    """Return what brings the student's channels to the teacher's, of so many cells to one."""
    conv = nn.Conv2d(own, theirs, 3, stride, padding=1, padding_mode="replicate")
    return nn.Sequential(conv, nn.BatchNorm2d(theirs), nn.ReLU(inplace=True), BasicBlock(theirs, theirs))


def feature_loss(
    student: Float[Tensor, "B C Y X"], teacher: Float[Tensor, "B C Y X"], mask: Float[Tensor, "B 1 Y X"]
) -> Float[Tensor, ""]:
    """Return the squared distance of both maps' vectors, its mean over cells weighted by ``mask``.

    Args:
        mask: the annotations' heatmaps, summed over classes, zero where the teacher has no value.
    """
    distance = (student - torch.where(mask > 0, teacher, 0.0)).square().sum(dim=1, keepdim=True)
    return (distance * mask).sum() / mask.sum().clamp(min=1)


def response_heatmap_loss(
    student: Float[Tensor, "B K Y X"],
    teacher: Float[Tensor, "B K Y X"],
    drawn: Float[Tensor, "B K Y X"],
    mask: Float[Tensor, "B 1 Y X"],
    objects: Float[Tensor, "K"],
) -> Float[Tensor, ""]:
    """Return the focal loss towards the teacher's probabilities times the annotations' Gaussians, as released.

    No such product is exactly 1, so of the focal loss only the part of cells without a peak is left.

    Args:
        student, teacher: class logits.
        drawn: the Gaussians.
        mask: cells that count.
        objects: what the sum of each class is divided by: the annotations of its task.
    """
    p = student.float().sigmoid().clamp(_EPS, 1 - _EPS)
    target = teacher.float().sigmoid().clamp(_EPS, 1 - _EPS) * drawn
    error = -((1 - target) ** 4) * p**2 * (1 - p).log()
    return (torch.where(mask > 0, error, 0.0).sum(dim=(0, 2, 3)) / objects).sum()


class LabelDistill(nn.Module):
    """The weighted sum of both terms over labelled frames."""

    task_of_class: Tensor

    def __init__(self, config: Config, context: DistillContext) -> None:
        super().__init__()
        self.config = config
        # In a tuple, so that the head's parameters do not become this module's.
        self._head: tuple[CenterHead] = (context.student.head,)
        self.adapters = nn.ModuleDict(
            {
                stage: _adapter(context.channels(stage), context.teacher_channels(stage), config.stride)
                for stage in config.stages
                if config.feature > 0
            }
        )

    def forward(self, student: DetectorOutput, teacher: TeacherBatch, batch: Batch) -> dict[str, Tensor]:
        """Return ``feature``, and ``response_heatmap`` and ``response_box``, weighted."""
        targets, terms = self._head[0].targets(batch.boxes), {}
        if self.config.feature > 0:
            labels = targets.heatmap.sum(dim=1, keepdim=True)
            total = labels.new_zeros(())
            for stage, adapter in self.adapters.items():
                theirs, covered = teacher.warped(stage)
                own = adapter(getattr(student, stage).float())
                total = total + feature_loss(own, *self._coarse(theirs.float(), labels, covered))
            terms["feature"] = self.config.feature * total
        if self.config.response > 0:
            terms |= self._response(student, teacher, targets, batch)
        return terms

    def _coarse(
        self, theirs: Float[Tensor, "B C Y X"], labels: Float[Tensor, "B 1 Y X"], covered: Bool[Tensor, "B 1 Y X"]
    ) -> tuple[Tensor, Tensor]:
        """Return the teacher's map and the mask of its cells, of ``stride`` cells along a side to one."""
        stride = self.config.stride
        if stride == 1:
            return theirs, labels * covered
        means = functional.avg_pool2d(torch.where(covered, theirs, 0.0), stride, ceil_mode=True)
        whole = -functional.max_pool2d(-covered.float(), stride, ceil_mode=True)
        smaller = functional.interpolate(labels, means.shape[-2:], mode="bilinear", align_corners=True)
        return means, smaller * whole

    def _response(
        self, student: DetectorOutput, teacher: TeacherBatch, targets: CenterTargets, batch: Batch
    ) -> dict[str, Tensor]:
        head = self._head[0]
        heatmap, covered = teacher.warped("heatmap")
        code, known = teacher.warped("box_code")
        objects = torch.bincount(targets.cells[:, 1], minlength=len(head.labels_of_task)).clamp(min=1).float()
        seen = (covered & batch.labelled[:, None, None, None]).float()
        of_class = objects[head.task_of_class.to(objects.device)]
        peaks = response_heatmap_loss(student.head.heatmap, heatmap, targets.heatmap, seen, of_class)
        frame, task, row, column = targets.cells.unbind(1)
        counts = (covered & known)[frame, 0, row, column]
        theirs = torch.where(counts[:, None], gather_codes(code, targets.cells).float(), 0.0)
        own = torch.where(counts[:, None], gather_codes(student.head.box_code, targets.cells).float(), 0.0)
        per_box = (own - theirs).abs() @ own.new_tensor(head.config.code_weights)
        boxes = head.config.box_weight * (per_box / objects[task]).sum()
        return {
            "response_heatmap": self.config.response * peaks,
            "response_box": self.config.response * boxes,
        }


def build(config: Config, context: DistillContext) -> DistillLoss:
    """Return the loss for a student and a cache."""
    return LabelDistill(config, context)
