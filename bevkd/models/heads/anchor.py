"""The anchor head of SECOND (Yan et al., Sensors 2018) and PointPillars (Lang et al., arXiv 1812.05784).

Shape letters: B batch, C channels, K classes, R rotations, A = K R anchors of a cell (class by class), Y rows, X
columns, n positive anchors of the whole batch. An output channel is anchor * values + value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from bevkd.config import PluginConfig, StrictModel
from bevkd.errors import ConfigError, report
from bevkd.geometry.boxes import wrap_angle
from bevkd.geometry.iou import rotated_nms
from bevkd.grid import BEVGrid
from bevkd.models.heads._anchors import (
    CODE_SIZE,
    IGNORED,
    POSITIVE,
    Anchors,
    assign,
    decode_anchors,
    direction_of,
    encode_anchors,
    nearest_overlap,
    turned_to,
)
from bevkd.types import Boxes

DIRECTIONS = 2
"""Half turns that the direction classifier tells apart."""

_PRIOR = 0.01
_ALPHA, _GAMMA = 0.25, 2.0
_BETA = 1 / 9


class AnchorConfig(StrictModel):
    """The anchors of one class.

    Attributes:
        size_m: length, width, height.
        bottom_m: height of their underside in the BEV frame.
        matched, unmatched: overlap from which an anchor is positive, and below which it is negative.
    """

    size_m: tuple[float, float, float]
    bottom_m: float
    matched: float = Field(gt=0, le=1)
    unmatched: float = Field(ge=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> AnchorConfig:
        if min(self.size_m) <= 0:
            raise ValueError(f"size_m must be positive, it is {list(self.size_m)}")
        if self.unmatched > self.matched:
            raise ValueError(f"unmatched ({self.unmatched}) must not be above matched ({self.matched})")
        return self


class Config(PluginConfig):
    """Config of the anchor head; defaults are those of the public KITTI models.

    Attributes:
        anchors: by class; every class of the data set has its own.
        rotations_rad: headings of the anchors of each class.
        class_weight, box_weight, direction_weight: loss weights.
        direction_offset_rad: where the first half turn begins, away from the headings of most cars.
        score_threshold: boxes must score above it.
        candidates: number of best boxes that suppression looks at.
        max_boxes: number of boxes kept.
        nms_iou: overlap seen from above from which a box is dropped, blind to the class.
    """

    name: Literal["anchor"] = "anchor"
    anchors: dict[str, AnchorConfig] = Field(min_length=1)
    rotations_rad: tuple[float, ...] = Field(default=(0.0, 1.57), min_length=1)
    class_weight: float = Field(default=1.0, ge=0)
    box_weight: float = Field(default=2.0, ge=0)
    direction_weight: float = Field(default=0.2, ge=0)
    direction_offset_rad: float = 0.78539
    score_threshold: float = Field(default=0.1, ge=0, lt=1)
    candidates: int = Field(default=4096, gt=0)
    max_boxes: int = Field(default=500, gt=0)
    nms_iou: float = Field(default=0.01, ge=0, le=1)

    def scaled(self, factor: float) -> Config:
        """Return the config itself: the head has no hidden channels that could be scaled."""
        del factor
        return self


@dataclass(frozen=True)
class AnchorOutput:
    """What the head says about every anchor; ``heatmap`` and ``box_code`` say it as other heads do.

    Attributes:
        logits: of each class.
        codes: anchor codes.
        directions: logits of the half turns.
        anchors: the anchors of the grid.
        grid: of the maps.
        direction_offset_rad: where the first half turn begins.
    """

    logits: Float[Tensor, "B A K Y X"]
    codes: Float[Tensor, "B A 7 Y X"]
    directions: Float[Tensor, "B A 2 Y X"]
    anchors: Anchors
    grid: BEVGrid
    direction_offset_rad: float

    @cached_property
    def heatmap(self) -> Float[Tensor, "B K Y X"]:
        """Logit of the best of each class's own anchors."""
        return self._own_logits.amax(dim=2)

    @cached_property
    def box_code(self) -> Float[Tensor, "B K 10 Y X"]:
        """Box of the best of each class's own anchors, as the CenterPoint head codes it; the velocity is 0."""
        batch, classes, rotations, rows, columns = self._own_logits.shape
        best = self._own_logits.argmax(dim=2, keepdim=True)

        def chosen(maps: Tensor) -> Tensor:
            split = maps.reshape(batch, classes, rotations, -1, rows, columns)
            index = best[:, :, :, None].expand(-1, -1, -1, maps.shape[2], -1, -1)
            return split.gather(2, index)[:, :, 0].movedim(2, -1)

        device = best.device
        own = torch.arange(classes, device=device)[:, None, None] * rotations + best.squeeze(2)
        row, column = torch.arange(rows, device=device), torch.arange(columns, device=device)
        anchors = self.anchors.at(own, row[:, None], column)
        boxes = decode_anchors(chosen(self.codes).float(), anchors)
        yaw = turned_to(boxes[..., 6], chosen(self.directions).argmax(-1), self.direction_offset_rad)
        corner = torch.stack(torch.meshgrid(column, row, indexing="xy"), dim=-1)
        parts = [
            self.grid.to_cells(boxes[..., 0:2]) - corner,
            boxes[..., 2:3],
            boxes[..., 3:6].log(),
            yaw.sin()[..., None],
            yaw.cos()[..., None],
            boxes.new_zeros(batch, classes, rows, columns, 2),
        ]
        return torch.cat(parts, dim=-1).movedim(-1, 2)

    @cached_property
    def _own_logits(self) -> Float[Tensor, "B K R Y X"]:
        batch, count, classes, rows, columns = self.logits.shape
        split = self.logits.reshape(batch, classes, count // classes, classes, rows, columns)
        return split.diagonal(dim1=1, dim2=3).movedim(-1, 1)


@dataclass(frozen=True)
class AnchorTargets:
    """What the head should say.

    Attributes:
        states: whether each anchor is positive (1, for its own class), negative (0) or ignored (-1).
        places: (frame, anchor, row, column) of each positive anchor.
        codes: of the box at each positive anchor.
        directions: half turn of that box's heading.
    """

    states: Int[Tensor, "B A Y X"]
    places: Int[Tensor, "n 4"]
    codes: Float[Tensor, "n 7"]
    directions: Int[Tensor, "n"]


class AnchorHead(nn.Module):
    """Maps a BEV map to class logits, codes and directions of anchors, and knows their targets, loss and decoding.

    Weights: ``cls``, ``box`` and ``direction``, each a 1x1 convolution.
    """

    anchor_x: Tensor
    anchor_y: Tensor
    anchor_shape: Tensor

    def __init__(self, config: Config, in_channels: int, grid: BEVGrid, classes: tuple[str, ...]) -> None:
        super().__init__()
        _check(config, classes)
        self.config, self.grid, self.classes = config, grid, classes
        self.tasks = tuple((name,) for name in classes)
        self.labels_of_task = tuple((label,) for label in range(len(classes)))
        self.rotations = len(config.rotations_rad)
        anchors = Anchors.on(grid, _shape(config, classes))
        self.register_buffer("anchor_x", anchors.x, persistent=False)
        self.register_buffer("anchor_y", anchors.y, persistent=False)
        self.register_buffer("anchor_shape", anchors.shape, persistent=False)
        count = len(anchors.shape)
        self.cls = nn.Conv2d(in_channels, count * len(classes), 1)
        self.box = nn.Conv2d(in_channels, count * CODE_SIZE, 1)
        self.direction = nn.Conv2d(in_channels, count * DIRECTIONS, 1)
        nn.init.constant_(self.cls.get_parameter("bias"), -math.log((1 - _PRIOR) / _PRIOR))
        nn.init.normal_(self.box.weight, std=0.001)

    @property
    def anchors(self) -> Anchors:
        """The anchors, on the device of the weights."""
        return Anchors(self.anchor_x, self.anchor_y, self.anchor_shape)

    def forward(self, bev_high: Float[Tensor, "B C Y X"]) -> AnchorOutput:
        """Return the head's maps.

        Args:
            bev_high: BEV encoder output on the head's grid.
        """
        count = len(self.anchor_shape)
        batch, _, rows, columns = bev_high.shape
        layers = (self.cls, self.box, self.direction)
        cls, box, direction = (layer(bev_high).reshape(batch, count, -1, rows, columns) for layer in layers)
        return AnchorOutput(cls, box, direction, self.anchors, self.grid, self.config.direction_offset_rad)

    def targets(self, boxes: Sequence[Boxes]) -> AnchorTargets:
        """Return the targets of a batch; boxes whose centre lies outside the grid, or without size, are dropped.

        Args:
            boxes: the boxes of each frame, on one device.
        """
        values = torch.cat([frame.values for frame in boxes])[:, :CODE_SIZE].float()
        label = torch.cat([frame.labels for frame in boxes])
        counts = torch.tensor([len(frame) for frame in boxes], device=values.device)
        frame = torch.arange(len(boxes), device=values.device).repeat_interleave(counts)
        kept = self.grid.contains(values[:, 0:2]) & (values[:, 3:6] > 0).all(1)
        values, label, frame = values[kept], label[kept], frame[kept]

        rows, columns = self.grid.shape
        states, places, codes = [], [], []
        for index, name in enumerate(self.classes):
            own = label == index
            shape = self.anchor_shape[index * self.rotations : (index + 1) * self.rotations].to(values.device)
            anchors = Anchors(self.anchor_x.to(values.device), self.anchor_y.to(values.device), shape)
            overlap = nearest_overlap(values[own], anchors).flatten(1)
            config = self.config.anchors[name]
            state, box = assign(overlap, frame[own], len(boxes), config.matched, config.unmatched)
            state = state.view(len(boxes), self.rotations, rows, columns)
            place = (state == POSITIVE).nonzero()
            nearest = values[own][box.view_as(state)[tuple(place.T)]]
            codes.append(encode_anchors(nearest, anchors.at(place[:, 1], place[:, 2], place[:, 3])))
            states.append(state)
            places.append(place + place.new_tensor([0, index * self.rotations, 0, 0]))
        where, code = torch.cat(places), torch.cat(codes)
        yaw = code[:, 6] + self.anchor_shape.to(code.device)[where[:, 1], 4]
        return AnchorTargets(torch.cat(states, dim=1), where, code, direction_of(yaw, self.config.direction_offset_rad))

    def loss(self, output: AnchorOutput, targets: AnchorTargets, labelled: Bool[Tensor, "B"]) -> dict[str, Tensor]:
        """Return the ``class``, ``box`` and ``direction`` losses in float32, means over frames.

        Within a frame each is a sum over anchors divided by the number of positive ones, at least 1. Frames that are
        not ``labelled`` add nothing: no loss, no gradient, no count.
        """
        frames = labelled.sum().clamp(min=1)
        positives = (targets.states == POSITIVE).flatten(1).sum(1).clamp(min=1)
        share = labelled / (positives * frames)  # of one anchor of each frame
        frame, anchor, row, column = targets.places.unbind(1)
        weight = share[frame]

        truth = torch.zeros_like(output.logits, dtype=torch.float32)
        truth[frame, anchor, anchor // self.rotations, row, column] = 1.0
        focal = sigmoid_focal_loss(output.logits.float(), truth)
        cls = (focal * (targets.states != IGNORED)[:, :, None] * share[:, None, None, None, None]).sum()

        predicted = output.codes[frame, anchor, :, row, column].float()
        box = (code_loss(predicted, targets.codes) * weight).sum()
        turns = output.directions[frame, anchor, :, row, column].float()
        direction = (nn.functional.cross_entropy(turns, targets.directions, reduction="none") * weight).sum()
        config = self.config
        return {
            "class": cls * config.class_weight,
            "box": box * config.box_weight,
            "direction": direction * config.direction_weight,
        }

    @torch.no_grad()
    def decode(self, output: AnchorOutput) -> list[Boxes]:
        """Return the boxes of each frame, best first; velocities are unknown (NaN)."""
        return [self._decode(output, frame) for frame in range(len(output.logits))]

    def _decode(self, output: AnchorOutput, frame: int) -> Boxes:
        config = self.config
        score, label = output.logits[frame].float().sigmoid().max(dim=1)  # over classes: [A, Y, X]
        place = (score > config.score_threshold).nonzero()
        scores = score[tuple(place.T)]
        if len(scores) > config.candidates:
            scores, best = scores.topk(config.candidates)
            place = place[best]
        anchor, row, column = place.unbind(1)
        boxes = decode_anchors(
            output.codes[frame, anchor, :, row, column].float(), self.anchors.at(anchor, row, column)
        )
        direction = output.directions[frame, anchor, :, row, column].argmax(dim=1)
        yaw = wrap_angle(turned_to(boxes[:, 6], direction, config.direction_offset_rad))
        values = torch.cat([boxes[:, :6], yaw[:, None], boxes.new_full((len(boxes), 2), math.nan)], dim=1)
        kept = rotated_nms(values[:, :CODE_SIZE], scores, config.nms_iou, config.candidates, config.max_boxes)
        return Boxes(values, label[tuple(place.T)], scores)[kept]


def sigmoid_focal_loss(logits: Float[Tensor, "*n"], truth: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Return RetinaNet's focal loss of each logit, alpha .25 and gamma 2 (arXiv 1708.02002, equation 5)."""
    p = logits.sigmoid()
    wrong = truth * (1 - p) + (1 - truth) * p
    balance = truth * _ALPHA + (1 - truth) * (1 - _ALPHA)
    return balance * wrong**_GAMMA * nn.functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")


def code_loss(predicted: Float[Tensor, "n 7"], codes: Float[Tensor, "n 7"]) -> Float[Tensor, "n"]:
    """Return each anchor's smooth L1 loss; that of the yaw is of a sine, blind to half turns (SECOND, 3.2.2)."""
    error = torch.cat([predicted[:, :6] - codes[:, :6], (predicted[:, 6:] - codes[:, 6:]).sin()], dim=1)
    return nn.functional.smooth_l1_loss(error, torch.zeros_like(error), beta=_BETA, reduction="none").sum(dim=1)


def _shape(config: Config, classes: tuple[str, ...]) -> Float[Tensor, "A 5"]:
    rows = []
    for name in classes:
        own = config.anchors[name]
        length, width, height = own.size_m
        rows += [[own.bottom_m + height / 2, length, width, height, yaw] for yaw in config.rotations_rad]
    return torch.tensor(rows)


def _check(config: Config, classes: tuple[str, ...]) -> None:
    faults = [f"class '{name}' has no anchors" for name in classes if name not in config.anchors]
    faults += [f"'{name}' is no class of the data set" for name in config.anchors if name not in classes]
    if faults:
        raise report(ConfigError, f"head.anchors does not fit the classes {', '.join(classes)}:", faults)


def build(config: Config, in_channels: int, grid: BEVGrid, classes: tuple[str, ...]) -> AnchorHead:
    """Return the head for ``bev_high`` maps of ``in_channels`` on ``grid``.

    Raises:
        ConfigError: lists every class without anchors, and anchors without a class.
    """
    return AnchorHead(config, in_channels, grid, classes)
