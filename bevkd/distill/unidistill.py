"""UniDistill (arXiv 2303.15083): feature, relation and response distillation around the objects."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from bevkd.data.collate import Batch
from bevkd.distill.base import DistillContext, DistillLoss, DistillLossConfig, TeacherBatch, sample_at
from bevkd.errors import ContractError
from bevkd.geometry.boxes import nine_points
from bevkd.geometry.sampling import FOREGROUND_OVERLAP, object_gaussians
from bevkd.grid import BEVGrid
from bevkd.models.bev_encoder import conv_bn_relu
from bevkd.models.detector import DetectorOutput
from bevkd.types import Boxes, BoxPoints

_EPS = 1e-4


class Config(DistillLossConfig):
    """Weights as published for LiDAR to camera; zero switches a term off and drops its signals from what is read.

    Attributes:
        feature, relation, response: weights of the three terms.
        adapter: a 1x1 convolution on the student's maps; needed when its channels differ from the teacher's. ``conv``
            is the published one for a teacher that is weaker than its student: 3x3 convolution, batch norm, ReLU.
        standardise: the feature term looks at the teacher's features at mean 0 and standard deviation 1 per channel, by
            the statistics of annotated boxes' points in the cache. The relation term has no scale.
        pseudo_score: on frames without labels, teacher boxes above this score stand in for the annotations; None
            leaves those frames to the other losses.
        source: where feature and relation find the teacher: ``maps`` samples ``bev_low`` and ``bev_high``; ``points``
            reads ``points_low`` and ``points_high``, which give the same loss from a hundredth of the bytes.
        legacy_xy_swap: sample as the released code does, with x and y exchanged. For comparison only.
    """

    weights: ClassVar[tuple[str, ...]] = ("feature", "relation", "response")
    name: Literal["unidistill"] = "unidistill"
    feature: float = Field(100.0, ge=0)
    relation: float = Field(40.0, ge=0)
    response: float = Field(10.0, ge=0)
    adapter: bool | Literal["conv"] = False
    standardise: bool = False
    pseudo_score: float | None = None
    source: Literal["maps", "points"] = "maps"
    legacy_xy_swap: bool = False

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.source == "points" and self.pseudo_score is not None:
            raise ValueError(
                "source: points has annotated boxes only, so no teacher box can stand in: set pseudo_score: null or "
                "source: maps"
            )
        if self.source == "points" and self.legacy_xy_swap:
            raise ValueError("points are sampled without the exchange of x and y: set legacy_xy_swap: false")
        if self.standardise and self.adapter == "conv":
            raise ValueError(
                "adapter: conv ends in a ReLU, but standardised features are negative as often as not: set adapter: "
                "true"
            )
        return self

    def signals(self) -> tuple[str, ...]:
        """Return the signals that the terms with a weight read."""
        low, high = ("points_low", "points_high") if self.source == "points" else ("bev_low", "bev_high")
        used = self.feature > 0 or self.relation > 0 or self.response > 0
        needed = {
            low: self.feature > 0,
            high: self.relation > 0,
            "heatmap": self.response > 0,
            "box_code": self.response > 0,
            "boxes": used and self.pseudo_score is not None,
        }
        return tuple(name for name, wanted in needed.items() if wanted)

    def misfits(self, context: DistillContext) -> list[str]:
        """Return where the student's maps cannot be compared with the cached ones."""
        faults = []
        own = context.channels("bev_low")
        if self.feature > 0 and not self.adapter and own != (theirs := context.teacher_channels("bev_low")):
            faults.append(f"bev_low has {theirs} channels in the cache and {own} in the student: set adapter: true")
        if self.feature > 0:
            faults += context.finer_low("set feature: 0")
            faults += context.no_statistics("points_low") if self.standardise else []
        if self.response > 0:
            faults += context.other_tasks("set response: 0")
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
    return object_gaussians(boxes, grid, FOREGROUND_OVERLAP)


class UniDistill(nn.Module):
    """The weighted sum of the three terms over annotated boxes."""

    def __init__(self, config: Config, context: DistillContext) -> None:
        super().__init__()
        self.config, self.grid = config, context.grid
        if config.standardise and config.feature > 0:
            self.standardise = context.standardise("points_low")
        stages = {"bev_low": config.feature, "bev_high": config.relation}
        self.adapters = nn.ModuleDict(
            {
                stage: _adapter(config, context, stage)
                for stage, weight in stages.items()
                if config.adapter and weight > 0
            }
        )

    def forward(self, student: DetectorOutput, teacher: TeacherBatch, batch: Batch) -> dict[str, Tensor]:
        """Return ``feature``, ``relation``, ``response_class`` and ``response_box``, weighted."""
        config = self.config
        boxes = self._foreground(teacher, batch)
        terms = {}
        if config.feature > 0:
            own, theirs, inside = self._sampled("low", student.bev_low, teacher, boxes, batch)
            if config.standardise:
                # Beyond the edge both are zero, which standardised would be a distance that nobody can lessen.
                theirs = torch.where(inside[..., None], self.standardise(theirs), own.detach())
            terms["feature"] = config.feature * feature_loss(own, theirs)
        if config.relation > 0:
            own, theirs, _ = self._sampled("high", student.bev_high, teacher, boxes, batch)
            terms["relation"] = config.relation * relation_loss(own, theirs)
        if config.response > 0:
            heatmap, covered = teacher.warped("heatmap")
            code, known = teacher.warped("box_code")
            mask = foreground_mask(boxes, self.grid) * (covered & known)[:, 0]
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
        self, level: str, own: Tensor, teacher: TeacherBatch, boxes: tuple[Boxes, ...], batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return student and teacher vectors at the nine points of every box, and which points lie on both maps.

        Args:
            level: ``low`` or ``high``.
            own: the student's map.
        """
        swap, stage = self.config.legacy_xy_swap, f"bev_{level}"
        # Losses run outside autocast, so a half-precision map has to be widened for the adapter's weights.
        own = self.adapters[stage](own.float()) if stage in self.adapters else own
        if self.config.source == "points":
            held = _labelled(teacher.points(f"points_{level}"), batch)
            canonical = [nine_points(each.boxes) for each in held]
            points = [teacher.to_augmented(xy_m, frame) for frame, xy_m in enumerate(canonical)]
            theirs = torch.cat([each.values for each in held])
        else:
            points = [nine_points(each.values[:, :7]) for each in boxes]
            canonical = [teacher.to_canonical(xy_m, frame) for frame, xy_m in enumerate(points)]
            theirs = sample_at(teacher.canonical.need(stage), canonical, self.grid, swap)
        inside = self.grid.contains(torch.cat(points)) & self.grid.contains(torch.cat(canonical))
        return sample_at(own, points, self.grid, swap), theirs, inside


def _adapter(config: Config, context: DistillContext, stage: str) -> nn.Module:
    """Return the layers on the student's map of a stage."""
    if config.adapter == "conv":
        return nn.Sequential(*conv_bn_relu(context.channels(stage), context.teacher_channels(stage), 3))
    return context.adapter(stage)


def _labelled(points: tuple[BoxPoints, ...], batch: Batch) -> tuple[BoxPoints, ...]:
    """Return the points of the frames whose labels the student may use; of the others none.

    Raises:
        ContractError: a frame has more or fewer boxes than when the cache was written.
    """
    kept = []
    for token, boxes, each, labelled in zip(batch.tokens, batch.boxes, points, batch.labelled.tolist(), strict=True):
        if labelled and len(each) != len(boxes):
            raise ContractError(
                f"sample '{token}' has {len(boxes)} annotated boxes and points of {len(each)} in the cache. Write the "
                "cache with the student's data.classes and data.min_points, and with data.labels: 1: which labels a "
                "student may use is for its own recipe to say."
            )
        kept.append(each if labelled else BoxPoints(each.boxes[:0], each.values[:0]))
    return tuple(kept)


def build(config: Config, context: DistillContext) -> DistillLoss:
    """Return the loss for a student and a cache."""
    return UniDistill(config, context)
