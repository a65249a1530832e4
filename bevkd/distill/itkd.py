"""itKD (arXiv 2205.15531): interchange transfer through a shared channel auto-encoder, attention over head channels.

Shape letters: B batch, C and D channels of student and teacher, Y rows, X columns, n objects, S slots of a frame,
V values that the head says about an object.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from bevkd.data.collate import Batch
from bevkd.distill.base import DistillContext, DistillLoss, DistillLossConfig, TeacherBatch
from bevkd.grid import BEVGrid
from bevkd.models.detector import DetectorOutput
from bevkd.models.heads.base import HeadMaps
from bevkd.models.heads.center import BRANCHES, CODE_SIZE
from bevkd.types import Boxes

_EPS = 1e-4


class Config(DistillLossConfig):
    """Which terms to use, and how strongly; weights are relative to the detection loss, as published.

    Attributes:
        feature: weight of the auto-encoder's three terms. The released code adds them once per task of the head: 1 is
            its Waymo setting, 6 its nuScenes one.
        attention: weight of the head attention, summed over tasks.
        variant: ``code`` decodes to the student's channels and compares codes everywhere; ``paper`` decodes to the
            teacher's channels and compares codes at the objects alone.
        standardise: the teacher's map at mean 0 and standard deviation 1 per channel, by the statistics of the cache,
            for the auto-encoder and whatever is compared with the teacher. The term in the student's own channels
            keeps the student's scale.
        hidden: widths of the encoder's two hidden layers; the decoder has them in reverse.
        code: channels of the compressed map.
        slots: objects of a frame that are looked at. Sums over objects are divided by all slots, filled or not.
    """

    weights: ClassVar[tuple[str, ...]] = ("feature", "attention")
    name: Literal["itkd"] = "itkd"
    feature: float = Field(default=1.0, ge=0)
    attention: float = Field(default=1.0, ge=0)
    variant: Literal["code", "paper"] = "code"
    standardise: bool = False
    hidden: tuple[int, int] = (128, 64)
    code: int = Field(default=32, gt=0)
    slots: int = Field(default=500, gt=0)

    def signals(self) -> tuple[str, ...]:
        """Return the signals that the terms with a weight read."""
        maps = ("bev_high",) if self.feature > 0 else ()
        return (*maps, "heatmap", "box_code") if self.attention > 0 else maps

    def misfits(self, context: DistillContext) -> list[str]:
        """Return why the student cannot be compared with the cached teacher."""
        faults = context.no_statistics("bev_high") if self.feature > 0 and self.standardise else []
        return faults + (context.other_tasks("set attention: 0") if self.attention > 0 else [])


class ChannelAutoencoder(nn.Module):
    """Compresses the channels of teacher and student alike, and brings each to the other's (section 3.2).

    Args:
        student, teacher: channels of their maps.
        config: widths, and which map the decoder returns to.
    """

    def __init__(self, student: int, teacher: int, config: Config) -> None:
        super().__init__()
        wide, narrow = config.hidden
        self.buffer = nn.Conv2d(student, teacher, 1)
        self.encoder = _layers(teacher, wide, narrow, config.code)
        self.decoder = _layers(config.code, narrow, wide, student if config.variant == "code" else teacher)


def _layers(*widths: int) -> nn.Sequential:
    """Return 1x1 convolutions between ``widths`` with ReLU between them."""
    convs = [nn.Conv2d(before, after, 1) for before, after in pairwise(widths)]
    return nn.Sequential(*[layer for conv in convs for layer in (conv, nn.ReLU(inplace=True))][:-1])


def interchange_losses(
    networks: ChannelAutoencoder,
    student: Float[Tensor, "B C Y X"],
    teacher: Float[Tensor, "B D Y X"],
    covered: Bool[Tensor, "B 1 Y X"],
    cells: Int[Tensor, "n 3"],
    config: Config,
) -> dict[str, Float[Tensor, ""]]:
    """Return the interchange losses in both directions and the one of the compressed maps (equations 1 to 4).

    Args:
        covered: where the teacher's map has values.
        cells: (frame, row, column) of the objects, all of them covered.
    """
    lifted = networks.buffer(student)
    student_code, teacher_code = networks.encoder(lifted), networks.encoder(teacher)
    from_student, from_teacher = networks.decoder(student_code), networks.decoder(teacher_code)
    own = student if config.variant == "code" else lifted
    to_teacher = networks.buffer(from_student) if config.variant == "code" else from_student
    slots = len(student) * config.slots
    at_objects = covered if config.variant == "code" else _marked(cells, covered)
    return {
        "feature_to_teacher": _mean_over(to_teacher - teacher, covered)
        + _at_objects(to_teacher, teacher, cells, slots),
        "feature_to_student": _mean_over(from_teacher - own, covered) + _at_objects(from_teacher, own, cells, slots),
        "feature_compressed": _mean_over(student_code - teacher_code, at_objects),
    }


def _mean_over(error: Float[Tensor, "B C Y X"], cells: Bool[Tensor, "B 1 Y X"]) -> Float[Tensor, ""]:
    """Return the mean absolute error over the marked cells and all channels, 0 without any."""
    total = torch.where(cells, error.abs(), 0.0).sum()
    return total / (cells.sum() * error.shape[1]).clamp(min=1)


def _at_objects(
    one: Float[Tensor, "B C Y X"], other: Float[Tensor, "B C Y X"], cells: Int[Tensor, "n 3"], slots: int
) -> Float[Tensor, ""]:
    """Return the squared error at the objects' cells, over all slots and channels."""
    frame, row, column = cells.unbind(1)
    error = (one - other)[frame, :, row, column]
    return error.square().sum() / (slots * one.shape[1])


def _marked(cells: Int[Tensor, "n 3"], like: Bool[Tensor, "B 1 Y X"]) -> Bool[Tensor, "B 1 Y X"]:
    marked = torch.zeros_like(like)
    marked[cells[:, 0], 0, cells[:, 1], cells[:, 2]] = True
    return marked


def channel_attention(objects: Float[Tensor, "B S V"], slots: int) -> Float[Tensor, "B S V"]:
    """Return self-attention over channels, whose features are the objects: ``X softmax(X^T X / sqrt(slots))``."""
    weights = (objects.transpose(1, 2) @ objects / slots**0.5).softmax(dim=-2)
    attended: Tensor = objects @ weights
    return attended


class HeadAttention(nn.Module):
    """Relations between the values that one task's head says about objects (section 3.3).

    Args:
        groups: values of each branch; attention runs over all of them together and within each.
        slots: objects that a frame has room for.
    """

    def __init__(self, groups: Sequence[int], slots: int) -> None:
        super().__init__()
        self.groups, self.slots = tuple(groups), slots
        self.fuse = nn.Conv1d(2 * sum(groups), sum(groups), 1)

    def forward(self, objects: Float[Tensor, "B S V"]) -> Float[Tensor, "B V S"]:
        """Return what the fusing convolution makes of both attentions."""
        across = channel_attention(objects, self.slots)
        within = [channel_attention(group, self.slots) for group in torch.split(objects, list(self.groups), dim=2)]
        fused: Tensor = self.fuse(torch.cat([across, *within], dim=2).transpose(1, 2))
        return fused

    def loss(self, student: Float[Tensor, "B S V"], teacher: Float[Tensor, "B S V"], objects: int) -> Float[Tensor, ""]:
        """Return the absolute difference of both relations over the number of ``objects``; empty slots are zero."""
        error: Tensor = self(student) - self(teacher)
        return error.abs().sum() / (objects + _EPS)


class ITKD(nn.Module):
    """The weighted sum of interchange transfer, compressed representation and head attention."""

    def __init__(self, config: Config, context: DistillContext) -> None:
        super().__init__()
        self.config, self.grid = config, context.grid
        self.labels_of_task: tuple[tuple[int, ...], ...] = context.student.head.labels_of_task
        if config.feature > 0:
            own, theirs = context.channels("bev_high"), context.teacher_channels("bev_high")
            self.networks = ChannelAutoencoder(own, theirs, config)
            self.standardise = context.standardise("bev_high") if config.standardise else nn.Identity()
        if config.attention > 0:
            groups = [(len(labels), *BRANCHES.values()) for labels in self.labels_of_task]
            self.attentions = nn.ModuleList(HeadAttention(each, config.slots) for each in groups)

    def forward(self, student: DetectorOutput, teacher: TeacherBatch, batch: Batch) -> dict[str, Tensor]:
        """Return ``feature_to_teacher``, ``feature_to_student``, ``feature_compressed`` and ``attention``, weighted."""
        terms = {}
        cells, labels = object_cells(batch.boxes, self.grid)
        if self.config.feature > 0:
            theirs, covered = teacher.warped("bev_high")
            seen = covered[cells[:, 0], 0, cells[:, 1], cells[:, 2]]
            own = student.bev_high.float()
            target = self.standardise(theirs.float())
            losses = interchange_losses(self.networks, own, target, covered, cells[seen], self.config)
            terms = {name: self.config.feature * value for name, value in losses.items()}
        if self.config.attention > 0:
            terms["attention"] = self.config.attention * self._attention(student.head, teacher, cells, labels)
        return terms

    def _attention(
        self, head: HeadMaps, teacher: TeacherBatch, cells: Int[Tensor, "n 3"], labels: Int[Tensor, "n"]
    ) -> Tensor:
        heatmap, covered = teacher.warped("heatmap")
        code, known = teacher.warped("box_code")
        frame, row, column = cells.unbind(1)
        seen = (covered & known)[frame, 0, row, column]
        loss = heatmap.new_zeros((), dtype=torch.float32)
        for task, own in enumerate(self.labels_of_task):
            chosen = seen & torch.isin(labels, labels.new_tensor(own))
            where, within = self._slots(cells[chosen], len(heatmap))
            attention: HeadAttention = self.attentions[task]  # type: ignore[assignment]
            slots = self.config.slots
            ours = _objects(head.heatmap, head.box_code, task, own, where, within, slots)
            theirs = _objects(heatmap, code, task, own, where, within, slots)
            loss = loss + attention.loss(ours, theirs, len(where))
        return loss

    def _slots(self, cells: Int[Tensor, "n 3"], frames: int) -> tuple[Int[Tensor, "m 3"], Int[Tensor, "m"]]:
        """Return the cells that have a slot, and its number within the frame; cells come frame by frame."""
        counts = torch.bincount(cells[:, 0], minlength=frames)
        slot = torch.arange(len(cells), device=cells.device) - (counts.cumsum(0) - counts)[cells[:, 0]]
        kept = slot < self.config.slots
        return cells[kept], slot[kept]


def object_cells(boxes: Sequence[Boxes], grid: BEVGrid) -> tuple[Int[Tensor, "n 3"], Int[Tensor, "n"]]:
    """Return (frame, row, column) and label of all boxes inside the grid, frame by frame."""
    values = torch.cat([each.values for each in boxes])
    labels = torch.cat([each.labels for each in boxes])
    frame = torch.cat([torch.full_like(each.labels, index) for index, each in enumerate(boxes)])
    cell = grid.to_cells(values[:, :2]).floor().long().flip(-1)
    inside = ((cell >= 0) & (cell < cell.new_tensor(grid.shape))).all(dim=1)
    return torch.cat([frame[:, None], cell], dim=1)[inside], labels[inside]


def _objects(
    heatmap: Float[Tensor, "B K Y X"],
    box_code: Float[Tensor, "B T 10 Y X"],
    task: int,
    labels: Sequence[int],
    cells: Int[Tensor, "m 3"],
    slot: Int[Tensor, "m"],
    slots: int,
) -> Float[Tensor, "B S V"]:
    """Return what a head says about each object of a task: class probabilities and box code; empty slots are zero."""
    frame, row, column = cells.unbind(1)
    scores = heatmap[:, list(labels)][frame, :, row, column].float().sigmoid()
    values = torch.cat([scores, box_code[:, task][frame, :, row, column].float()], dim=1)
    empty = values.new_zeros(len(heatmap), slots, len(labels) + CODE_SIZE)
    return empty.index_put((frame, slot), values)


def build(config: Config, context: DistillContext) -> DistillLoss:
    """Return the loss for a student and a cache."""
    return ITKD(config, context)
