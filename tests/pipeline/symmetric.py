"""A teacher that sees the same however its frame is turned by quarters or mirrored: a plug-in for tests.

Statistics of the points of each cell, and convolutions whose kernels are averaged over the eight symmetries of a
square; what has a direction is made from the mean position of the points in their cell. All signals are rounded to
half precision, so that a float16 cache holds them exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from bevkd.cache.manifest import TeacherIdentity
from bevkd.config import PluginConfig
from bevkd.data.collate import Batch
from bevkd.data.join import View
from bevkd.grid import BEVGrid
from bevkd.teachers.base import Teacher
from bevkd.types import Boxes, Signals

CHANNELS, TASKS, BOXES = 8, 2, 10
_EMPTY_LOGIT = -8.0


class Config(PluginConfig):
    """Where it looks."""

    name: Literal["symmetric"] = "symmetric"
    grid: BEVGrid


class SymmetricTeacher:
    def __init__(self, grid: BEVGrid, classes: tuple[str, ...]) -> None:
        self.grid, self.classes = grid, classes
        self.view = View(frozenset({"lidar"}))
        self.identity = TeacherIdentity(
            name="symmetric", architecture={}, weights_sha256=hashlib.sha256(b"of seed 0").hexdigest()
        )
        self.shapes: Mapping[str, tuple[int, ...]] = {
            "bev_low": (CHANNELS, *grid.shape),
            "bev_high": (CHANNELS, *grid.shape),
            "heatmap": (len(classes), *grid.shape),
            "box_code": (TASKS, 10, *grid.shape),
        }
        chance = torch.Generator().manual_seed(0)
        self._low, self._high, self._heat, self._box = (
            _symmetric(torch.randn(wide, narrow, 3, 3, generator=chance, dtype=torch.float64) / (3 * narrow**0.5))
            for wide, narrow in ((CHANNELS, 4), (CHANNELS, CHANNELS), (len(classes), CHANNELS), (4, CHANNELS))
        )

    @torch.inference_mode()
    def infer(self, batch: Batch) -> Signals:
        counts, scalars, offset = self._cells(batch)
        low = functional.conv2d(scalars, self._low, padding=1).relu()
        high = functional.conv2d(low, self._high, padding=1).relu()
        heatmap = torch.where(counts > 0, functional.conv2d(high, self._heat, padding=1) - 1, _EMPTY_LOGIT)
        z_and_size = functional.conv2d(high, self._box, padding=1).clamp(-1, 1)
        code = torch.cat([0.5 + 0.5 * offset, z_and_size, 2 * offset.flip(1), 3 * offset], dim=1)
        maps = [low, high, heatmap, code[:, None].expand(-1, TASKS, -1, -1, -1)]
        low, high, rounded, code = (each.half().float() for each in maps)
        # The best cells by exact logits: equal ones have no order that turns keep.
        boxes = tuple(self._boxes(*each) for each in zip(heatmap, code, strict=True))
        return Signals(low, high, rounded, code, boxes)

    def _cells(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return of each cell the count of its points, four statistics, and their mean position beside its centre."""
        assert batch.points is not None
        assert batch.point_frame is not None
        points, (rows, columns) = batch.points.double(), self.grid.shape
        position = self.grid.to_cells(points[:, :2])
        cell = position.floor().long()
        # Of points on an edge no choice of a cell is the same after a turn.
        off_edge = (position - position.round()).abs() > 1e-4
        inside = ((cell >= 0) & (cell < torch.tensor([columns, rows])) & off_edge).all(dim=1)
        points, position, cell, frame = points[inside], position[inside], cell[inside], batch.point_frame[inside]
        values = torch.cat([torch.ones(len(points), 1), points[:, 2:4], position - cell - 0.5], dim=1)
        sums = torch.zeros(len(batch), rows, columns, 5, dtype=torch.float64)
        sums.index_put_((frame, cell[:, 1], cell[:, 0]), values, accumulate=True)
        counts, sums = sums[..., :1].permute(0, 3, 1, 2), sums[..., 1:].permute(0, 3, 1, 2)
        mean = sums / counts.clamp(min=1)
        # In steps that half precision holds on either side of the centre.
        offset = (mean[:, 2:] * 128).round() / 128
        return (
            counts,
            torch.cat([counts.log1p(), mean[:, :1], mean[:, 1:2] / 255, offset.norm(dim=1, keepdim=True)], 1),
            offset,
        )

    def _boxes(self, heatmap: Tensor, code: Tensor) -> Boxes:
        """Return a box at each of the cells with the highest logits."""
        logits, labels = heatmap.max(dim=0)
        best = logits.flatten().topk(BOXES).indices
        row, column = best // self.grid.shape[1], best % self.grid.shape[1]
        at = code[0, :, row, column].T
        center = self.grid.to_metres(torch.stack([column, row], dim=1) + at[:, :2])
        yaw = torch.atan2(at[:, 6], at[:, 7])
        values = torch.cat([center, at[:, 2:3], at[:, 3:6].exp(), yaw[:, None], at[:, 8:]], dim=1)
        return Boxes(values.float(), labels[row, column], logits[row, column].sigmoid().float())


def _symmetric(kernel: Tensor) -> Tensor:
    turned = [kernel.rot90(quarter, (-1, -2)) for quarter in range(4)]
    return torch.stack([each for turn in turned for each in (turn, turn.flip(-1))]).mean(dim=0)


def build(config: Config, classes: tuple[str, ...], device: torch.device) -> Teacher:
    assert device.type == "cpu"
    return SymmetricTeacher(config.grid, classes)
