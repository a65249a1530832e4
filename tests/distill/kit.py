"""A student, a teacher and a batch of losses that look at maps, small enough to be checked by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from bevkd.data.collate import Batch
from bevkd.distill.base import DistillContext, TeacherBatch
from bevkd.geometry.affine import BEVAffine
from bevkd.grid import BEVGrid
from bevkd.models.detector import Detector, DetectorOutput
from bevkd.models.heads import center
from bevkd.models.heads.center import HeadOutput
from bevkd.types import Boxes, Signals

GRID = BEVGrid(x_m=(-8, 8), y_m=(-8, 8), cell_m=1.0)
CLASSES = ("car", "pedestrian", "cone")
TASKS = (("car",), ("pedestrian", "cone"))
CHANNELS, THEIRS = 4, 6
IDENTITY = BEVAffine.identity()


def context() -> DistillContext:
    """Return a student of 4 channels with a centre head, and a teacher of 6."""
    head = center.build(center.Config(tasks=TASKS, channels=8), CHANNELS, GRID, CLASSES)
    part = SimpleNamespace(out_channels=CHANNELS)
    student = SimpleNamespace(head=head, config=SimpleNamespace(grid=GRID), encoder=part, bev_encoder=part)
    shapes = {"bev_low": (THEIRS, 16, 16), "bev_high": (THEIRS, 16, 16), "box_code": (2, 10, 16, 16)}
    return DistillContext(cast("Detector", student), shapes)


def boxes(*rows: tuple[float, float, float, float, float, int]) -> Boxes:
    """Return boxes of x, y, length, width, yaw and label."""
    values = torch.zeros(len(rows), 9)
    for index, (x, y, length, width, yaw, _) in enumerate(rows):
        values[index, :7] = torch.tensor([x, y, 0.0, length, width, 1.5, yaw])
    return Boxes(values, torch.tensor([row[5] for row in rows], dtype=torch.int64), torch.ones(len(rows)))


def maps(seed: int, channels: int, batch: int = 2) -> dict[str, Tensor]:
    """Return random maps of one side."""
    chance = torch.Generator().manual_seed(seed)
    shapes = {
        "bev_low": (batch, channels, 16, 16),
        "bev_high": (batch, channels, 16, 16),
        "heatmap": (batch, 3, 16, 16),
        "box_code": (batch, 2, 10, 16, 16),
    }
    return {name: torch.randn(*shape, generator=chance) for name, shape in shapes.items()}


def output(held: dict[str, Tensor]) -> DetectorOutput:
    """Return what a student says."""
    return DetectorOutput(held["bev_low"], held["bev_high"], HeadOutput(held["heatmap"], held["box_code"]))


def teacher(held: dict[str, Tensor], affine: BEVAffine = IDENTITY) -> TeacherBatch:
    """Return what a teacher has said."""
    return TeacherBatch(Signals(**held), (affine,) * len(held["bev_low"]), GRID)


def batch_of(*annotated: Boxes, labelled: bool = True, affine: BEVAffine = IDENTITY) -> Batch:
    """Return a batch of annotations."""
    tokens = tuple(f"frame-{index}" for index in range(len(annotated)))
    return Batch(tokens, annotated, torch.full((len(annotated),), labelled), (affine,) * len(annotated))


def floats(terms: dict[str, Any]) -> dict[str, float]:
    """Return terms as numbers."""
    return {name: value.item() for name, value in terms.items()}
