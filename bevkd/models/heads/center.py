"""The CenterPoint head (Yin et al., arXiv 2006.11275): a heatmap per class and one box per cell and task.

Shape letters: B batch, C channels, K classes, T tasks, Y rows, X columns, n boxes of the whole batch.
Box code (10 values): offset 2 (x, y within the cell, in cells), z 1 (m), log size 3 (length, width, height),
(sin, cos) of yaw 2, velocity 2 (m/s).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from bevkd.config import PluginConfig, StrictModel
from bevkd.errors import ConfigError, report
from bevkd.geometry.gaussian import draw_gaussians, gaussian_radius
from bevkd.geometry.iou import circle_nms, rotated_nms
from bevkd.grid import BEVGrid
from bevkd.models.widths import scaled
from bevkd.types import Boxes

BRANCHES = {"reg": 2, "height": 1, "dim": 3, "rot": 2, "vel": 2}
"""Box branches of one task and their channels, in the order of the box code."""

CODE_SIZE = sum(BRANCHES.values())

LOG_SIZE_LIMIT = 5.0
"""Decoded log sizes are cut to this (148 m), so that an untrained head yields finite boxes."""


class NoNMS(StrictModel):
    """Keep every candidate."""

    type: Literal["none"] = "none"


class CircleNMS(StrictModel):
    """Drop a box whose centre is close to a better one of its task.

    Attributes:
        squared_distance: threshold per task in m^2; CenterPoint's nuScenes values are 4, 12, 10, 1, .85, .175.
    """

    type: Literal["circle"] = "circle"
    squared_distance: tuple[float, ...]


class RotatedNMS(StrictModel):
    """Drop a box that overlaps a better one of its task, seen from above.

    Attributes:
        iou: overlap from which a box is dropped.
        pre: number of best boxes looked at per task.
    """

    type: Literal["rotated"] = "rotated"
    iou: float = Field(default=0.2, ge=0, le=1)
    pre: int = Field(default=1000, gt=0)


class Config(PluginConfig):
    """Config of the CenterPoint head; defaults are those of the public nuScenes models.

    Attributes:
        tasks: classes of each task; every class of the data set stands in exactly one.
        channels: width of the shared convolution and of the branches.
        min_overlap: IoU that sets the Gaussian radius of a target.
        min_radius: smallest Gaussian radius in cells.
        code_weights: loss weights of the box code's values.
        box_weight: weight of the box loss beside the heatmap loss.
        heatmap_bias: initial bias of the class logits.
        score_threshold: boxes must score above it.
        candidates: number of best cells per task that are decoded.
        max_boxes: number of boxes kept per task.
        center_margin_m: decoded centres may lie this far outside the grid.
        center_z_m: height range of decoded centres.
        nms: suppression per task, blind to the class.
    """

    name: Literal["center"] = "center"
    tasks: tuple[tuple[str, ...], ...] = Field(min_length=1)
    channels: int = Field(default=64, gt=0)
    min_overlap: float = Field(default=0.1, gt=0, lt=1)
    min_radius: int = Field(default=2, ge=0)
    code_weights: tuple[float, ...] = Field(default=(1.0,) * 8 + (0.2,) * 2, min_length=CODE_SIZE, max_length=CODE_SIZE)
    box_weight: float = Field(default=0.25, ge=0)
    heatmap_bias: float = -2.19
    score_threshold: float = Field(default=0.1, ge=0, lt=1)
    candidates: int = Field(default=500, gt=0)
    max_boxes: int = Field(default=83, gt=0)
    center_margin_m: float = Field(default=10.0, ge=0)
    center_z_m: tuple[float, float] = (-10.0, 10.0)
    nms: Annotated[NoNMS | CircleNMS | RotatedNMS, Field(discriminator="type")] = RotatedNMS()

    def scaled(self, factor: float) -> Config:
        """Return the config with the width multiplied by ``factor``."""
        return self.model_copy(update={"channels": scaled(self.channels, factor)})


@dataclass(frozen=True)
class HeadOutput:
    """What the head says about every cell.

    Attributes:
        heatmap: class logits in the class order of the data set.
        box_code: one box code per task.
    """

    heatmap: Float[Tensor, "B K Y X"]
    box_code: Float[Tensor, "B T 10 Y X"]


@dataclass(frozen=True)
class CenterTargets:
    """What the head should say.

    Attributes:
        heatmap: Gaussians; exactly 1 at the cell of a box.
        cells: (frame, task, row, column) of each box.
        codes: box code of each box; NaN velocity where unknown.
        weights: weight of each box in the box loss.
    """

    heatmap: Float[Tensor, "B K Y X"]
    cells: Int[Tensor, "n 4"]
    codes: Float[Tensor, "n 10"]
    weights: Float[Tensor, "n"]


def encode_boxes(values: Float[Tensor, "n 9"], grid: BEVGrid) -> tuple[Int[Tensor, "n 2"], Float[Tensor, "n 10"]]:
    """Return the (row, column) cell and the box code of each box; the inverse of :func:`decode_boxes`."""
    position = grid.to_cells(values[:, 0:2])
    column_row = position.floor()
    yaw = values[:, 6:7]
    parts = [position - column_row, values[:, 2:3], values[:, 3:6].log(), yaw.sin(), yaw.cos(), values[:, 7:9]]
    return column_row.long().flip(-1), torch.cat(parts, dim=1)


def decode_boxes(codes: Float[Tensor, "n 10"], cells: Int[Tensor, "n 2"], grid: BEVGrid) -> Float[Tensor, "n 9"]:
    """Return the box values of box codes that stand at (row, column) cells."""
    xy = grid.to_metres(cells.flip(-1) + codes[:, 0:2])
    size = codes[:, 3:6].clamp(-LOG_SIZE_LIMIT, LOG_SIZE_LIMIT).exp()
    yaw = torch.atan2(codes[:, 6:7], codes[:, 7:8])
    return torch.cat([xy, codes[:, 2:3], size, yaw, codes[:, 8:10]], dim=1)


def gather_codes(box_code: Float[Tensor, "B T 10 Y X"], cells: Int[Tensor, "n 4"]) -> Float[Tensor, "n 10"]:
    """Return the box codes that stand at (frame, task, row, column) cells."""
    frame, task, row, column = cells.unbind(1)
    return box_code[frame, task, :, row, column]


def gaussian_focal_loss(logits: Float[Tensor, "B K Y X"], target: Float[Tensor, "B K Y X"]) -> Float[Tensor, ""]:
    """Return CenterNet's focal loss (arXiv 1904.07850, equation 1) over the number of peaks, at least 1.

    Args:
        logits: class logits; their probabilities are cut to [1e-4, 1 - 1e-4].
        target: Gaussians in [0, 1]; a peak is a cell that is exactly 1.
    """
    p = logits.float().sigmoid().clamp(1e-4, 1 - 1e-4)
    peak = target == 1
    at_peaks = torch.where(peak, (1 - p) ** 2 * p.log(), 0.0)
    elsewhere = torch.where(peak, 0.0, (1 - target) ** 4 * p**2 * (1 - p).log())
    return -(at_peaks + elsewhere).sum() / peak.sum().clamp(min=1)


def quality_focal_loss(
    logits: Float[Tensor, "*n"], target: Float[Tensor, "*n"], beta: float = 2.0
) -> Float[Tensor, "*n"]:
    """Return ``|p - q|^beta BCE(p, q)`` of each value (arXiv 2006.04388, equation 6), in float32.

    Args:
        logits: of the probabilities p.
        target: any probabilities q, such as a teacher's.
    """
    logits, target = logits.float(), target.float()
    entropy = nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (logits.sigmoid() - target).abs() ** beta * entropy


def box_code_loss(
    predicted: Float[Tensor, "n 10"], codes: Float[Tensor, "n 10"], weights: Float[Tensor, "n"]
) -> Float[Tensor, "10"]:
    """Return the weighted mean over boxes of the absolute error of each value of the box code.

    Unknown values (NaN in ``codes``) add nothing; no boxes give zeros. Scaling all weights changes nothing.
    """
    known = ~codes.isnan()
    error = torch.where(known, predicted.float() - codes.nan_to_num(), 0.0).abs()
    total = weights.sum()
    return (error * weights[:, None]).sum(0) / torch.where(total > 0, total, torch.ones_like(total))


def _branch(channels: int, out: int) -> nn.Sequential:
    """Return 3x3 conv, BN, ReLU, 3x3 conv."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, out, 3, padding=1),
    )


def _task(channels: int, classes: int, heatmap_bias: float) -> nn.ModuleDict:
    """Return the branches of one task, initialised as CenterPoint does."""
    branches = {name: _branch(channels, out) for name, out in BRANCHES.items()}
    for layer in (layer for branch in branches.values() for layer in branch if isinstance(layer, nn.Conv2d)):
        nn.init.kaiming_normal_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    heatmap = _branch(channels, classes)
    # Small weights leave the bias to say it: whatever the scale of the map, training starts from rare objects.
    nn.init.normal_(heatmap.get_parameter("3.weight"), std=0.01)
    nn.init.constant_(heatmap.get_parameter("3.bias"), heatmap_bias)
    return nn.ModuleDict({**branches, "heatmap": heatmap})


class CenterHead(nn.Module):
    """Maps a BEV map to a heatmap and box codes, and knows their targets, loss and decoding.

    Weights: ``shared.{0,1}`` (conv, BN) and ``tasks.T.{reg,height,dim,rot,vel,heatmap}.{0,1,3}`` (conv, BN, conv).
    """

    task_of_class: Tensor
    heatmap_order: Tensor

    def __init__(self, config: Config, in_channels: int, grid: BEVGrid, classes: tuple[str, ...]) -> None:
        super().__init__()
        _check(config, classes)
        self.config, self.grid, self.classes = config, grid, classes
        self.shared = nn.Sequential(
            nn.Conv2d(in_channels, config.channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(config.channels),
            nn.ReLU(inplace=True),
        )
        self.tasks = nn.ModuleList(_task(config.channels, len(task), config.heatmap_bias) for task in config.tasks)
        self.labels_of_task = tuple(tuple(classes.index(name) for name in task) for task in config.tasks)
        by_task = [label for labels in self.labels_of_task for label in labels]
        owner = {label: task for task, labels in enumerate(self.labels_of_task) for label in labels}
        self.register_buffer("task_of_class", torch.tensor([owner[k] for k in range(len(classes))]), persistent=False)
        self.register_buffer("heatmap_order", torch.tensor(by_task).argsort(), persistent=False)

    def forward(self, bev_high: Float[Tensor, "B C Y X"]) -> HeadOutput:
        """Return the head's maps.

        Args:
            bev_high: BEV encoder output on the head's grid.
        """
        shared = self.shared(bev_high)
        heatmap = torch.cat([task["heatmap"](shared) for task in self.tasks], dim=1)  # type: ignore[index]
        codes = [torch.cat([task[name](shared) for name in BRANCHES], dim=1) for task in self.tasks]  # type: ignore[index]
        return HeadOutput(heatmap[:, self.heatmap_order], torch.stack(codes, dim=1))

    def targets(self, boxes: Sequence[Boxes], weights: Sequence[Float[Tensor, "_"]] | None = None) -> CenterTargets:
        """Return the targets of a batch; boxes whose centre lies outside the grid, or without size, are dropped.

        Args:
            boxes: the boxes of each frame, on one device.
            weights: weight of each box in the box loss, e.g. a teacher's scores; None means 1.
        """
        values = torch.cat([frame.values for frame in boxes]).float()
        label = torch.cat([frame.labels for frame in boxes])
        weight = values.new_ones(len(values)) if weights is None else torch.cat(list(weights)).to(values)
        counts = torch.tensor([len(frame) for frame in boxes], device=values.device)
        frame = torch.arange(len(boxes), device=values.device).repeat_interleave(counts)

        cell, code = encode_boxes(values, self.grid)
        rows, columns = self.grid.shape
        # Rounding may put a point just inside the range into the cell beyond it, so both are asked.
        kept = self.grid.contains(values[:, 0:2]) & (cell < cell.new_tensor([rows, columns])).all(1)
        kept &= (values[:, 3:6] > 0).all(1)
        values, label, weight, frame, cell, code = (x[kept] for x in (values, label, weight, frame, cell, code))

        size = values[:, 3:5] / self.grid.cell_m
        radius = gaussian_radius(size[:, 0], size[:, 1], self.config.min_overlap)
        heatmap = draw_gaussians(
            (len(boxes) * len(self.classes), rows, columns),
            frame * len(self.classes) + label,
            cell,
            radius.long().clamp(min=self.config.min_radius),
        )
        where = torch.cat([frame[:, None], self.task_of_class.to(label.device)[label][:, None], cell], dim=1)
        return CenterTargets(heatmap.view(len(boxes), len(self.classes), rows, columns), where, code, weight)

    def loss(self, output: HeadOutput, targets: CenterTargets, labelled: Bool[Tensor, "B"]) -> dict[str, Tensor]:
        """Return the ``heatmap`` and ``box`` losses, each summed over tasks, in float32.

        Frames that are not ``labelled`` add nothing: no loss, no gradient, no count.
        """
        logits, drawn = output.heatmap[labelled], targets.heatmap[labelled]
        seen = labelled[targets.cells[:, 0]]
        cells, codes, weights = targets.cells[seen], targets.codes[seen], targets.weights[seen]
        predicted = gather_codes(output.box_code, cells)
        code_weights = predicted.new_tensor(self.config.code_weights, dtype=torch.float32)

        heatmap = box = torch.zeros((), device=predicted.device)
        for task, labels in enumerate(self.labels_of_task):
            heatmap = heatmap + gaussian_focal_loss(logits[:, labels], drawn[:, labels])
            own = cells[:, 1] == task
            box = box + (box_code_loss(predicted[own], codes[own], weights[own]) * code_weights).sum()
        return {"heatmap": heatmap, "box": box * self.config.box_weight}

    @torch.no_grad()
    def decode(self, output: HeadOutput) -> list[Boxes]:
        """Return the boxes of each frame, task by task, best first within a task."""
        frames = []
        for logits, box_code in zip(output.heatmap.float(), output.box_code.float(), strict=True):
            tasks = [self._decode_task(task, logits, box_code[task]) for task in range(len(self.tasks))]
            frames.append(
                Boxes(
                    torch.cat([boxes.values for boxes in tasks]),
                    torch.cat([boxes.labels for boxes in tasks]),
                    torch.cat([boxes.scores for boxes in tasks]),
                )
            )
        return frames

    def _decode_task(self, task: int, logits: Float[Tensor, "K Y X"], code: Float[Tensor, "10 Y X"]) -> Boxes:
        rows, columns = self.grid.shape
        labels = torch.tensor(self.labels_of_task[task], device=logits.device)
        scores = logits[labels].sigmoid().flatten()
        candidates = (scores > self.config.score_threshold).nonzero().squeeze(1)
        if len(candidates) > self.config.candidates:
            candidates = candidates[scores[candidates].topk(self.config.candidates).indices]
        scores, cell = scores[candidates], candidates % (rows * columns)
        values = decode_boxes(
            code.flatten(1)[:, cell].T, torch.stack([cell // columns, cell % columns], dim=1), self.grid
        )
        boxes = Boxes(values, labels[candidates // (rows * columns)], scores)
        boxes = boxes[self._in_range(values)]
        return boxes[self._suppress(task, boxes)]

    def _in_range(self, values: Float[Tensor, "n 9"]) -> Bool[Tensor, "n"]:
        margin, grid = self.config.center_margin_m, self.grid
        low = values.new_tensor([grid.x_m[0] - margin, grid.y_m[0] - margin, self.config.center_z_m[0]])
        high = values.new_tensor([grid.x_m[1] + margin, grid.y_m[1] + margin, self.config.center_z_m[1]])
        return ((values[:, 0:3] >= low) & (values[:, 0:3] <= high)).all(dim=1)

    def _suppress(self, task: int, boxes: Boxes) -> Int[Tensor, "k"]:
        nms, post = self.config.nms, self.config.max_boxes
        if isinstance(nms, RotatedNMS):
            return rotated_nms(boxes.values[:, 0:7], boxes.scores, nms.iou, nms.pre, post)
        if isinstance(nms, CircleNMS):
            return circle_nms(boxes.center[:, 0:2], boxes.scores, nms.squared_distance[task], post)
        return boxes.scores.argsort(descending=True, stable=True)[:post]


def _check(config: Config, classes: tuple[str, ...]) -> None:
    named = [name for task in config.tasks for name in task]
    faults = [f"class '{name}' stands in no task" for name in classes if name not in named]
    faults += [f"class '{name}' stands in {named.count(name)} tasks" for name in classes if named.count(name) > 1]
    faults += [f"'{name}' is no class of the data set" for name in dict.fromkeys(named) if name not in classes]
    faults += [f"task {index} is empty" for index, task in enumerate(config.tasks) if not task]
    nms = config.nms
    if isinstance(nms, CircleNMS) and len(nms.squared_distance) != len(config.tasks):
        faults.append(f"nms.squared_distance has {len(nms.squared_distance)} values for {len(config.tasks)} tasks")
    if faults:
        raise report(ConfigError, f"head.tasks does not fit the classes {', '.join(classes)}:", faults)


def build(config: Config, in_channels: int, grid: BEVGrid, classes: tuple[str, ...]) -> CenterHead:
    """Return the head for ``bev_high`` maps of ``in_channels`` on ``grid``.

    Raises:
        ConfigError: lists every class that is not in exactly one task.
    """
    return CenterHead(config, in_channels, grid, classes)
