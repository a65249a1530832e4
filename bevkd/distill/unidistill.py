"""UniDistill (arXiv 2303.15083): feature, relation and response distillation around the objects."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from bevkd.data.collate import Batch
from bevkd.distill.base import DistillContext, DistillLoss, DistillLossConfig, TeacherBatch, sample_at
from bevkd.geometry.boxes import nine_points
from bevkd.geometry.gaussian import draw_gaussians, gaussian_radius
from bevkd.grid import BEVGrid
from bevkd.models.detector import DetectorOutput
from bevkd.types import Boxes

_EPS = 1e-4


class Config(DistillLossConfig):
    """Weights as published for LiDAR to camera; zero switches a term off and drops its signals from what is read.

    Attributes:
        feature, relation, response: weights of the three terms.
        adapter: a 1x1 convolution on the student's maps; needed when its channels differ from the teacher's.
        pseudo_score: on frames without labels, teacher boxes above this score stand in for the annotations; None
            leaves those frames to the other losses.
        legacy_xy_swap: sample as the released code does, with x and y exchanged. For comparison only.
    """

    name: Literal["unidistill"] = "unidistill"
    feature: float = Field(100.0, ge=0)
    relation: float = Field(40.0, ge=0)
    response: float = Field(10.0, ge=0)
    adapter: bool = False
    pseudo_score: float | None = None
    legacy_xy_swap: bool = False

    def signals(self) -> tuple[str, ...]:
        """Return the signals that the terms with a weight read."""
        needed = {
            "bev_low": self.feature > 0,
            "bev_high": self.relation > 0,
            "heatmap": self.response > 0,
            "box_code": self.response > 0,
            "boxes": self.pseudo_score is not None,
        }
        return tuple(name for name, wanted in needed.items() if wanted)

    def misfits(self, context: DistillContext) -> list[str]:
        """Return where the student's maps cannot be compared with the cached ones."""
        faults = []
        own, shapes = context.channels("bev_low"), context.teacher_shapes
        if self.feature > 0 and not self.adapter and own != shapes["bev_low"][0]:
            faults.append(
                f"bev_low has {shapes['bev_low'][0]} channels in the cache and {own} in the student: set adapter: true"
            )
        tasks = len(context.student.head.tasks)
        if self.response > 0 and tasks != shapes["box_code"][0]:
            faults.append(
                f"box_code has {shapes['box_code'][0]} tasks in the cache and {tasks} in the student: give the student "
                "the teacher's detector.head.tasks, or set response: 0"
            )
        return faults


def feature_loss(student: Float[Tensor, "n 9 C"], teacher: Float[Tensor, "n 9 C"]) -> Float[Tensor, ""]:
    """Return the mean absolute difference at the nine points of each box, averaged over boxes."""
    return (student - teacher).abs().mean(dim=(1, 2)).sum() / (student.shape[0] + _EPS)


def relation_loss(student: Float[Tensor, "n 9 C"], teacher: Float[Tensor, "n 9 C"]) -> Float[Tensor, ""]:
    """Return the difference of the nine points' cosine similarity matrices, averaged over boxes."""
    return (_similarity(student) - _similarity(teacher)).abs().mean(dim=(1, 2)).sum() / (student.shape[0] + _EPS)


def _similarity(points: Float[Tensor, "n 9 C"]) -> Float[Tensor, "n 9 9"]:
    unit: Tensor = points / (points.norm(dim=-1, keepdim=True) + _EPS)
    return unit @ unit.transpose(1, 2)


def response_losses(
    student_heatmap: Float[Tensor, "B K Y X"],
    teacher_heatmap: Float[Tensor, "B K Y X"],
    student_box: Float[Tensor, "B R Y X"],
    teacher_box: Float[Tensor, "B R Y X"],
    mask: Float[Tensor, "B Y X"],
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the class and the box term of response distillation, as released.

    Args:
        student_heatmap, teacher_heatmap: logits; the teacher's are divided by a temperature of 2.
        student_box, teacher_box: the regression maps of all tasks, concatenated.
        mask: object Gaussians, see :func:`foreground_mask`.
    """
    student_peak = student_heatmap.sigmoid().clamp(_EPS, 1 - _EPS).amax(dim=1)
    teacher_peak = (teacher_heatmap / 2).sigmoid().clamp(_EPS, 1 - _EPS).amax(dim=1)
    total = mask.sum() + _EPS
    box = (student_box - teacher_box).abs().mean(dim=1)
    return (mask * (student_peak - teacher_peak).abs()).sum() / total, (mask * box).sum() / total


def foreground_mask(boxes: tuple[Boxes, ...], grid: BEVGrid) -> Float[Tensor, "B Y X"]:
    """Return the maximum of a Gaussian per box, with the radius of overlap 0.7, which is zero for small objects."""
    values = torch.cat([each.values for each in boxes])
    frame = torch.cat([torch.full_like(each.labels, index) for index, each in enumerate(boxes)])
    size = values[:, 3:5] / grid.cell_m
    radius = gaussian_radius(size[:, 0], size[:, 1], 0.7).long().clamp(min=0)
    cells = grid.to_cells(values[:, :2]).floor().long().flip(-1)
    return draw_gaussians((len(boxes), *grid.shape), frame, cells, radius)


class UniDistill(nn.Module):
    """The weighted sum of the three terms over annotated boxes."""

    def __init__(self, config: Config, context: DistillContext) -> None:
        super().__init__()
        self.config, self.grid = config, context.grid
        stages = {"bev_low": config.feature, "bev_high": config.relation}
        self.adapters = nn.ModuleDict(
            {stage: context.adapter(stage) for stage, weight in stages.items() if config.adapter and weight > 0}
        )

    def forward(self, student: DetectorOutput, teacher: TeacherBatch, batch: Batch) -> dict[str, Tensor]:
        """Return ``feature``, ``relation``, ``response_class`` and ``response_box``, weighted."""
        config = self.config
        boxes = self._foreground(teacher, batch)
        points = [nine_points(each.values[:, :7]) for each in boxes]
        canonical = [teacher.to_canonical(xy_m, frame) for frame, xy_m in enumerate(points)]
        terms = {}
        if config.feature > 0:
            terms["feature"] = config.feature * feature_loss(
                *self._sampled("bev_low", student.bev_low, teacher, points, canonical)
            )
        if config.relation > 0:
            terms["relation"] = config.relation * relation_loss(
                *self._sampled("bev_high", student.bev_high, teacher, points, canonical)
            )
        if config.response > 0:
            heatmap, valid = teacher.warped("heatmap")
            code, _ = teacher.warped("box_code")
            mask = foreground_mask(boxes, self.grid) * valid[:, 0]
            class_term, box_term = response_losses(
                student.head.heatmap, heatmap, student.head.box_code.flatten(1, 2), code.flatten(1, 2), mask
            )
            terms["response_class"] = config.response * class_term
            terms["response_box"] = config.response * box_term
        return terms

    def _foreground(self, teacher: TeacherBatch, batch: Batch) -> tuple[Boxes, ...]:
        score = self.config.pseudo_score
        if score is None:
            return batch.boxes
        return tuple(
            boxes if labelled else pseudo[pseudo.scores > score]
            for boxes, labelled, pseudo in zip(batch.boxes, batch.labelled.tolist(), teacher.boxes, strict=True)
        )

    def _sampled(
        self, stage: str, own: Tensor, teacher: TeacherBatch, points: list[Tensor], canonical: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return student and teacher vectors at the nine points of every box."""
        swap = self.config.legacy_xy_swap
        # Losses run outside autocast, so a half-precision map has to be widened for the adapter's weights.
        own = self.adapters[stage](own.float()) if stage in self.adapters else own
        theirs = teacher.canonical.need(stage)
        return sample_at(own, points, self.grid, swap), sample_at(theirs, canonical, self.grid, swap)


def build(config: Config, context: DistillContext) -> DistillLoss:
    """Return the loss for a student and a cache."""
    return UniDistill(config, context)
