"""RDD (arXiv 2308.10308): representation disparity-aware distillation of regions that teacher or student propose.

Every region is looked at in both maps. Where they disagree the student learns; where they agree nothing is asked of it.

Shape letters: B batch, C and D channels of student and teacher, K classes, T tasks, Y rows, X columns, P regions of a
frame, S cells along a side of a region.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from bevkd.data.collate import Batch
from bevkd.distill.base import DistillContext, DistillLoss, DistillLossConfig, TeacherBatch
from bevkd.geometry.gaussian import gaussian_radius
from bevkd.geometry.sampling import mean_at
from bevkd.grid import BEVGrid
from bevkd.models.detector import DetectorOutput
from bevkd.models.heads.center import LOG_SIZE_LIMIT

_SAMPLES = 2
"""Bilinear samples along each axis of a region's cell (RoIAlign's sampling ratio)."""


class Config(DistillLossConfig):
    """Weights and constants as published; what the paper leaves open is said where it is chosen.

    Attributes:
        feature, logit: weights of the two terms.
        temperature: of the softmax over channels (equation 2).
        rule: which regions count. ``hard``: disparity above ``disparity``. ``soft``: growing from 0 there to 1 at
            ``softness`` more. ``topk``: the ``share`` with the greatest disparity. ``published``: equation 5 to the
            letter, which no region satisfies; for comparison only.
        disparity: the paper's lambda, 0.1.
        proposals: peaks that teacher and student each propose in a frame.
        score: peaks must be above it. Caches with sparse box codes have to know them from this score on.
        region: of a peak: ``gaussian``, the square of its Gaussian's radius; ``box``, the rotated rectangle of its box.
        min_overlap, min_radius: of the Gaussian, as in the head.
        side: cells along a region's side.
        logit_region: ``area`` compares class probabilities all over a region, ``peak`` at its centre.
        box: compare box codes in regions too, as the paper does for anchor heads only.
    """

    weights: ClassVar[tuple[str, ...]] = ("feature", "logit")
    negatives: ClassVar[tuple[str, ...]] = ("logit",)
    name: Literal["rdd"] = "rdd"
    feature: float = Field(default=0.2, ge=0)
    logit: float = Field(default=0.2, ge=0)
    temperature: float = Field(default=4.0, gt=0)
    rule: Literal["hard", "soft", "topk", "published"] = "hard"
    disparity: float = Field(default=0.1, ge=0)
    softness: float = Field(default=0.1, gt=0)
    share: float = Field(default=0.5, gt=0, le=1)
    proposals: int = Field(default=100, gt=0)
    score: float = Field(default=0.1, ge=0, lt=1)
    region: Literal["gaussian", "box"] = "gaussian"
    min_overlap: float = Field(default=0.1, gt=0, lt=1)
    min_radius: int = Field(default=2, ge=0)
    side: int = Field(default=7, gt=0)
    logit_region: Literal["area", "peak"] = "area"
    box: bool = False

    def signals(self) -> tuple[str, ...]:
        """Return the signals that the terms with a weight read: both need regions, and the disparity of features."""
        return ("bev_high", "heatmap", "box_code") if self.feature > 0 or self.logit > 0 else ()

    def misfits(self, context: DistillContext) -> list[str]:
        """Return why the student's head cannot be compared with the cached one."""
        return context.other_tasks("set feature: 0 and logit: 0") if self.signals() else []


@dataclass(frozen=True)
class Regions:
    """Rectangles on the ground; each frame has room for the same number of them.

    Attributes:
        center: x, y in metres.
        half: half of length and width, metres.
        yaw: heading of the length, radians.
        task: of the peak.
        found: which of them are regions at all.
    """

    center: Float[Tensor, "B P 2"]
    half: Float[Tensor, "B P 2"]
    yaw: Float[Tensor, "B P"]
    task: Int[Tensor, "B P"]
    found: Bool[Tensor, "B P"]

    def joined(self, other: Regions) -> Regions:
        """Return the regions of both, frame by frame."""
        pairs = [(getattr(self, name), getattr(other, name)) for name in ("center", "half", "yaw", "task", "found")]
        return Regions(*(torch.cat(pair, dim=1) for pair in pairs))

    def moved(self, matrices: Float[Tensor, "B 4 4"]) -> Regions:
        """Return the same rectangles in another frame, which may be turned, mirrored and scaled."""
        center = _moved(self.center, matrices)
        ahead = _moved(self.center + torch.stack([self.yaw.cos(), self.yaw.sin()], dim=-1), matrices) - center
        yaw = torch.atan2(ahead[..., 1], ahead[..., 0])
        return Regions(center, self.half * ahead.norm(dim=-1, keepdim=True), yaw, self.task, self.found)

    def positions(self, side: int) -> Float[Tensor, "B P s s 2"]:
        """Return the centres of ``side`` x ``side`` cells of each region, metres."""
        steps = (torch.arange(side, device=self.center.device) + 0.5) / side * 2 - 1
        across = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1)
        local = across * self.half[:, :, None, None]
        cos, sin = self.yaw.cos()[..., None, None], self.yaw.sin()[..., None, None]
        x, y = local.unbind(-1)
        turned = torch.stack([x * cos - y * sin, x * sin + y * cos], dim=-1)
        return turned + self.center[:, :, None, None]


def _moved(xy_m: Float[Tensor, "B *n 2"], matrices: Float[Tensor, "B 4 4"]) -> Float[Tensor, "B *n 2"]:
    """Return each frame's points in another frame."""
    flat = xy_m.flatten(1, -2)
    return (flat @ matrices[:, :2, :2].transpose(1, 2) + matrices[:, None, :2, 3]).view_as(xy_m)


@torch.no_grad()
def proposals(
    heatmap: Float[Tensor, "B K Y X"],
    box_code: Float[Tensor, "B T 10 Y X"],
    task_of_class: Tensor,
    grid: BEVGrid,
    config: Config,
    known: Bool[Tensor, "B Y X"] | None = None,
) -> Regions:
    """Return the regions around the best peaks of each frame, by 3 x 3 maximum suppression, over all classes.

    Args:
        known: cells whose box code a cache has kept; peaks elsewhere are no proposals. None keeps all.
    """
    batch, _, rows, columns = heatmap.shape
    scores = heatmap.float().sigmoid()
    peaks = torch.where(scores == functional.max_pool2d(scores, 3, stride=1, padding=1), scores, 0.0)
    best = peaks.flatten(1).topk(min(config.proposals, peaks[0].numel()), dim=1)
    label, cell = best.indices // (rows * columns), best.indices % (rows * columns)
    task, row, column = task_of_class[label], cell // columns, cell % columns
    frame = torch.arange(batch, device=heatmap.device)[:, None]
    code = box_code[frame, task, :, row, column].float()
    size = code[..., 3:5].clamp(-LOG_SIZE_LIMIT, LOG_SIZE_LIMIT).exp()
    position = torch.stack([column, row], dim=-1)
    if config.region == "gaussian":
        length, width = (size / grid.cell_m).flatten(0, 1).unbind(-1)
        radius = gaussian_radius(length, width, config.min_overlap).floor().clamp(min=config.min_radius)
        half = ((radius + 0.5) * grid.cell_m).view(batch, -1, 1).expand(-1, -1, 2)
        center, yaw = grid.to_metres(position + 0.5), torch.zeros_like(size[..., 0])
    else:
        half = (size / 2).clamp(min=grid.cell_m / 2)
        center, yaw = grid.to_metres(position + code[..., :2]), torch.atan2(code[..., 6], code[..., 7])
    found = best.values > config.score
    return Regions(center.float(), half, yaw, task, found if known is None else found & known[frame, row, column])


def pooled(
    maps: Float[Tensor, "B C Y X"], positions: Float[Tensor, "B P s s 2"], grid: BEVGrid
) -> Float[Tensor, "B C P S S"]:
    """Return maps aligned to regions: the mean of 2 x 2 bilinear samples per cell, as RoIAlign's, rotated or not.

    Args:
        positions: of the samples, in the frame of the maps, metres.
    """
    batch, regions, side = positions.shape[:3]
    cells = side // _SAMPLES
    apart = positions.view(batch, regions, cells, _SAMPLES, cells, _SAMPLES, 2).transpose(3, 4)
    samples = apart.reshape(batch * regions * cells**2, _SAMPLES**2, 2)
    frame = torch.arange(batch, device=maps.device).repeat_interleave(regions * cells**2)
    return mean_at(maps, samples, frame, grid).view(batch, regions, cells, cells, -1).movedim(-1, 1)


def disparities(
    student: Float[Tensor, "B C P S S"],
    teacher: Float[Tensor, "B C P S S"],
    inside: Float[Tensor, "B P S S"],
    tau: float,
) -> Float[Tensor, "B P"]:
    """Return the distance of each region's channel distributions (equations 2 and 7); cells outside add nothing."""
    # Channels lie side by side in memory.
    own, theirs = ((regions.movedim(1, -1) / tau).softmax(dim=-1) for regions in (student, teacher))
    distance: Tensor = torch.linalg.vector_norm((own - theirs) * inside[..., None], dim=(2, 3, 4))
    return distance


@torch.no_grad()
def selection(disparity: Float[Tensor, "B P"], found: Bool[Tensor, "B P"], config: Config) -> Float[Tensor, "B P"]:
    """Return the mask of equation 5, without gradient.

    Information and disparity differ by a constant and the sign (text after equation 7), so the minimum of equation 5
    selects the regions whose disparity exceeds lambda. Taken to the letter, with an information that is never
    negative, it selects none.
    """
    if config.rule == "published":
        return torch.zeros_like(disparity)
    if config.rule == "hard":
        chosen = (disparity > config.disparity).to(disparity)
    elif config.rule == "soft":
        chosen = ((disparity - config.disparity) / config.softness).clamp(0, 1)
    else:
        rank = torch.where(found, -disparity, torch.inf).flatten().argsort().argsort().view_as(disparity)
        chosen = (rank < (config.share * found.sum()).ceil()).to(disparity)
    return chosen * found


class RDD(nn.Module):
    """The weighted sum of feature and logit distillation over the regions of both proposers."""

    task_of_class: Tensor

    def __init__(self, config: Config, context: DistillContext) -> None:
        super().__init__()
        self.config, self.grid = config, context.grid
        owner = {label: task for task, labels in enumerate(context.student.head.labels_of_task) for label in labels}
        self.register_buffer("task_of_class", torch.tensor([owner[k] for k in sorted(owner)]), persistent=False)
        own, theirs = context.channels("bev_high"), context.teacher_channels("bev_high")
        self.adapter = nn.Sequential(
            nn.Conv2d(own, theirs, 1, bias=False), nn.BatchNorm2d(theirs), nn.ReLU(inplace=True)
        )
        # Without the feature term nothing trains it: regions are chosen without gradient.
        self.adapter.requires_grad_(config.feature > 0)

    def forward(self, student: DetectorOutput, teacher: TeacherBatch, batch: Batch) -> dict[str, Tensor]:
        """Return ``feature`` and ``logit``, weighted."""
        del batch
        config = self.config
        regions, to_canonical = self._regions(student, teacher)
        positions = regions.positions(_SAMPLES * config.side)
        theirs = _moved(positions, to_canonical)
        inside = self._inside(positions) * self._inside(theirs)
        own_map = self.adapter(student.bev_high.float())
        own = pooled(own_map, positions, self.grid)
        disparity = disparities(
            own, pooled(teacher.canonical.need("bev_high"), theirs, self.grid), inside, config.temperature
        )
        chosen = selection(disparity, regions.found, config)
        pairs = regions.found.sum().clamp(min=1)
        terms = {}
        if config.feature > 0:
            terms["feature"] = config.feature * (chosen * disparity).sum() / pairs
        if config.logit > 0:
            difference = self._class_difference(student, teacher, positions, theirs, inside)
            if config.box:
                difference = difference + self._box_difference(student, teacher, regions, inside)
            terms["logit"] = config.logit * (chosen * difference).sum() / pairs
        return terms

    def _regions(self, student: DetectorOutput, teacher: TeacherBatch) -> tuple[Regions, Float[Tensor, "B 4 4"]]:
        """Return the regions of both in the student's frame, and what brings them to the teacher's."""
        matrices = torch.stack([affine.matrix() for affine in teacher.affines])
        canonical = teacher.canonical
        heatmap, code = canonical.need("heatmap"), canonical.need("box_code")
        own = proposals(student.head.heatmap, student.head.box_code, self.task_of_class, self.grid, self.config)
        theirs = proposals(heatmap, code, self.task_of_class, self.grid, self.config, canonical.box_code_known).moved(
            matrices.to(heatmap)
        )
        return theirs.joined(own), matrices.inverse().to(heatmap)

    def _inside(self, positions: Float[Tensor, "B P s s 2"]) -> Float[Tensor, "B P S S"]:
        """Return 1 for cells of regions whose samples all lie on the grid, 0 for the others."""
        inside = self.grid.contains(positions.flatten(0, 3)).view(positions.shape[:4]).to(positions)
        return -functional.max_pool2d(-inside, _SAMPLES)

    def _class_difference(
        self,
        student: DetectorOutput,
        teacher: TeacherBatch,
        positions: Float[Tensor, "B P s s 2"],
        theirs: Float[Tensor, "B P s s 2"],
        inside: Float[Tensor, "B P S S"],
    ) -> Float[Tensor, "B P"]:
        """Return the absolute difference of class probabilities, summed over classes, its mean over each region."""
        if self.config.logit_region == "peak":
            positions, theirs = (
                each.mean(dim=(2, 3), keepdim=True).expand(-1, -1, _SAMPLES, _SAMPLES, -1)
                for each in (positions, theirs)
            )
            inside = self._inside(positions) * self._inside(theirs)
        own = pooled(student.head.heatmap.float().sigmoid(), positions, self.grid)
        known = pooled(teacher.canonical.need("heatmap").float().sigmoid(), theirs, self.grid)
        error = (own - known).abs().sum(dim=1) * inside
        return error.sum(dim=(2, 3)) / inside.sum(dim=(2, 3)).clamp(min=1)

    def _box_difference(
        self, student: DetectorOutput, teacher: TeacherBatch, regions: Regions, inside: Float[Tensor, "B P S S"]
    ) -> Float[Tensor, "B P"]:
        """Return the absolute difference of a region's own box codes, summed over values, its mean over the region.

        Codes are compared cell by cell: between two cells lies no box.
        """
        codes, known = teacher.warped("box_code")
        where = self.grid.to_cells(regions.positions(self.config.side)).floor().long()
        rows, columns = self.grid.shape
        column, row = where[..., 0].clamp(0, columns - 1), where[..., 1].clamp(0, rows - 1)
        frame = torch.arange(len(codes), device=codes.device)[:, None, None, None]
        task = regions.task[:, :, None, None].expand_as(row)
        own = student.head.box_code[frame, task, :, row, column].float()
        error = (own - codes[frame, task, :, row, column].float()).abs().sum(dim=-1)
        seen = inside * known[frame, 0, row, column]
        error = torch.where(seen > 0, error, 0.0)
        return error.sum(dim=(2, 3)) / seen.sum(dim=(2, 3)).clamp(min=1)


def build(config: Config, context: DistillContext) -> DistillLoss:
    """Return the loss for a student and a cache."""
    return RDD(config, context)
