"""Dense output distillation: all of the teacher's probabilities, background included, and its boxes where it is sure.

Terms that look at objects alone never say where nothing is. On frames without labels that leaves a student free to
invent objects; here every cell of every class is a target (quality focal loss as in CRKD, arXiv 2403.19104).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from bevkd.data.collate import Batch
from bevkd.distill.base import DistillContext, DistillLoss, DistillLossConfig, TeacherBatch
from bevkd.models.detector import DetectorOutput
from bevkd.models.heads.center import CODE_SIZE, quality_focal_loss


class Config(DistillLossConfig):
    """Weights of both terms; zero switches a term off and drops its signals.

    Attributes:
        heatmap: weight of the probabilities' term. Start with 1 if all frames are labelled, with 2 if few are.
        box: weight of the box codes' term.
        beta: power of the quality focal loss.
        score: cells where the teacher's probability is above it count as sure: their number divides the first term, and
            their box codes are the second's.
        code_weights: of the box code's values.
    """

    weights: ClassVar[tuple[str, ...]] = ("heatmap", "box")
    negatives: ClassVar[tuple[str, ...]] = ("heatmap",)
    name: Literal["soft"] = "soft"
    heatmap: float = Field(default=1.0, ge=0)
    box: float = Field(default=2.0, ge=0)
    beta: float = Field(default=2.0, ge=0)
    score: float = Field(default=0.2, gt=0, lt=1)
    code_weights: tuple[float, ...] = Field(default=(1.0,) * 8 + (0.2,) * 2, min_length=CODE_SIZE, max_length=CODE_SIZE)

    def signals(self) -> tuple[str, ...]:
        """Return the signals that the terms with a weight read."""
        needed = {"heatmap": self.heatmap > 0 or self.box > 0, "box_code": self.box > 0}
        return tuple(name for name, wanted in needed.items() if wanted)

    def misfits(self, context: DistillContext) -> list[str]:
        """Return why the student's box codes cannot be compared with the cached ones."""
        return context.other_tasks("set box: 0") if self.box > 0 else []


class SoftOutputs(nn.Module):
    """The weighted sum of both terms, on every frame, labelled or not."""

    def __init__(self, config: Config, context: DistillContext) -> None:
        super().__init__()
        self.config = config
        self.labels_of_task: tuple[tuple[int, ...], ...] = context.student.head.labels_of_task

    def forward(self, student: DetectorOutput, teacher: TeacherBatch, batch: Batch) -> dict[str, Tensor]:
        """Return ``heatmap`` and ``box``, weighted."""
        del batch
        config = self.config
        logits, covered = teacher.warped("heatmap")
        target = logits.float().sigmoid()
        terms = {}
        if config.heatmap > 0:
            errors = torch.where(covered, quality_focal_loss(student.head.heatmap, target, config.beta), 0.0)
            sure = ((target.amax(dim=1, keepdim=True) > config.score) & covered).sum()
            terms["heatmap"] = config.heatmap * errors.sum() / sure.clamp(min=1)
        if config.box > 0:
            code, known = teacher.warped("box_code")
            best = torch.stack([target[:, list(labels)].amax(dim=1) for labels in self.labels_of_task], dim=1)
            sure = (best > config.score) & covered & known
            weights = student.head.box_code.new_tensor(config.code_weights, dtype=torch.float32)
            terms["box"] = config.box * sure_box_loss(student.head.box_code, code, best, sure, weights)
        return terms


def sure_box_loss(
    student: Float[Tensor, "B T 10 Y X"],
    teacher: Float[Tensor, "B T 10 Y X"],
    score: Float[Tensor, "B T Y X"],
    sure: Bool[Tensor, "B T Y X"],
    code_weights: Float[Tensor, "10"],
) -> Float[Tensor, ""]:
    """Return the absolute error of box codes, weighted, meaned over the sure cells by the teacher's score."""
    teacher = torch.where(sure[:, :, None], teacher.float(), 0.0)
    error = torch.where(sure[:, :, None], student.float() - teacher, 0.0).abs()
    per_cell = (error * code_weights[:, None, None]).sum(dim=2)
    share = torch.where(sure, score, 0.0)
    return (per_cell * share).sum() / share.sum().clamp(min=1e-6)


def build(config: Config, context: DistillContext) -> DistillLoss:
    """Return the loss for a student and a cache."""
    return SoftOutputs(config, context)
