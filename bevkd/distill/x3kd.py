"""X3KD (arXiv 2303.02203): cross-modal output distillation, X-OD.

The paper has no public code and states no weights: every constant is a setting, the defaults are ours.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bevkd.data.collate import Batch
from bevkd.distill.base import DistillContext, DistillLoss, DistillLossConfig, TeacherBatch
from bevkd.models.detector import DetectorOutput
from bevkd.models.heads.center import CenterHead, gather_codes, gaussian_focal_loss


class Config(DistillLossConfig):
    """Which terms of X3KD to use, and how strongly.

    Attributes:
        output: weight of X-OD.
        score: the teacher's boxes above it are targets.
        box: weight of the box term beside the heatmap term.
    """

    name: Literal["x3kd"] = "x3kd"
    output: float = Field(1.0, ge=0)
    score: float = Field(0.3, ge=0, lt=1)
    box: float = Field(0.25, ge=0)

    def signals(self) -> tuple[str, ...]:
        """Return the signals that the terms with a weight read."""
        return ("boxes",) if self.output > 0 else ()

    def misfits(self, context: DistillContext) -> list[str]:
        """Return why this student cannot learn from teacher boxes by heatmaps."""
        if self.output == 0 or isinstance(context.student.head, CenterHead):
            return []
        return ["X-OD turns teacher boxes into heatmaps: give the student the head 'center', or set output: 0"]


class OutputDistillation(nn.Module):
    """X-OD: the teacher's confident boxes as targets, on every frame, labelled or not.

    Gaussian focal loss on heatmaps drawn from the boxes, plus a smooth-L1 loss on the box codes that weighs each box
    with the teacher's confidence.
    """

    def __init__(self, config: Config, head: CenterHead) -> None:
        super().__init__()
        self.config = config
        # In a tuple, so that the head's parameters do not become this module's.
        self._head = (head,)

    def forward(self, student: DetectorOutput, teacher: TeacherBatch, batch: Batch) -> dict[str, Tensor]:
        """Return ``output_heatmap`` and ``output_box``, weighted."""
        del batch
        head, config = self._head[0], self.config
        boxes = tuple(each[each.scores > config.score] for each in teacher.boxes)
        targets = head.targets(boxes, weights=[each.scores for each in boxes])
        heatmap = student.head.heatmap.new_zeros((), dtype=torch.float32)
        for labels in head.labels_of_task:
            heatmap = heatmap + gaussian_focal_loss(student.head.heatmap[:, labels], targets.heatmap[:, labels])
        codes = gather_codes(student.head.box_code, targets.cells).float()
        known = ~targets.codes.isnan()
        error = nn.functional.smooth_l1_loss(codes, torch.where(known, targets.codes, codes.detach()), reduction="none")
        per_box = (error * codes.new_tensor(head.config.code_weights)).sum(dim=1)
        box = (per_box * targets.weights).sum() / targets.weights.sum().clamp(min=1e-6)
        return {"output_heatmap": config.output * heatmap, "output_box": config.output * config.box * box}


def build(config: Config, context: DistillContext) -> DistillLoss:
    """Return the loss for a student and a cache."""
    return OutputDistillation(config, context.student.head)
