"""What a training step minimises: of detectors their own losses and those of distillation, of segmenters their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bevkd.cache.spec import CacheSpec
from bevkd.data.collate import Batch, collate
from bevkd.data.instances import ImageBatch, collate_images
from bevkd.distill.base import DistillLoss, TeacherBatch
from bevkd.grid import BEVGrid
from bevkd.models.detector import Detector
from bevkd.models.segmenter import Segmenter

TeacherSource = Callable[[Batch], TeacherBatch]
"""Where the teacher's signals of a batch come from."""


@dataclass(frozen=True)
class Cached:
    """The source that decodes what the loader read of a cache.

    Attributes:
        name: of the cache, as losses call it.
    """

    name: str
    spec: CacheSpec
    grid: BEVGrid

    def __call__(self, batch: Batch) -> TeacherBatch:
        """Return the signals of a batch, on its device."""
        stored, affines = (batch.stored or {})[self.name], (batch.left or {}).get(self.name, batch.affines)
        return TeacherBatch.decode(self.spec, stored, affines, self.grid, (batch.instances or {}).get(self.name))


class Objective(nn.Module):
    """Detector and distillation losses as one module, so that one wrapper serves both in multi-process training.

    Args:
        losses: per entry its label in the log, the name of the teacher that it reads and the loss.
        teachers: source of each teacher's signals, by that name; no parameter of theirs is trained or saved.
    """

    collate = staticmethod(collate)

    def __init__(
        self, detector: Detector, losses: list[tuple[str, str, DistillLoss]], teachers: Mapping[str, TeacherSource]
    ) -> None:
        super().__init__()
        self.detector = detector
        self.losses = losses
        self.adapters = nn.ModuleList(loss for _, _, loss in losses if isinstance(loss, nn.Module))
        self._teachers = dict(teachers)

    @property
    def model(self) -> nn.Module:
        """What a run leaves: the detector, without what only distillation needs."""
        return self.detector

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return every weighted term by name; the loss is their sum."""
        output = self.detector(batch)
        terms = {f"detection/{name}": value for name, value in self.detector.loss(output, batch).items()}
        with torch.autocast(output.bev_low.device.type, enabled=False):
            taught = {name: source(batch) for name, source in self._teachers.items()}
            for label, teacher, loss in self.losses:
                terms |= {f"{label}/{name}": value for name, value in loss(output, taught[teacher], batch).items()}
        return terms


class SegmenterObjective(nn.Module):
    """A segmenter and the losses of its head."""

    collate = staticmethod(collate_images)

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        self.segmenter = segmenter

    @property
    def model(self) -> nn.Module:
        """What a run leaves: the segmenter."""
        return self.segmenter

    def forward(self, batch: ImageBatch) -> dict[str, Tensor]:
        """Return every weighted term by name; the loss is their sum."""
        head, (height, width) = self.segmenter.head, batch.images.shape[-2:]
        targets = head.targets(batch.instances, len(batch), height, width)
        losses = head.loss(self.segmenter(batch.images), targets)
        return {f"segmentation/{name}": value for name, value in losses.items()}
