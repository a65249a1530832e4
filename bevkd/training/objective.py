"""What a training step minimises: of detectors their own losses and those of distillation, of segmenters their own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bevkd.cache.reader import CacheReader
from bevkd.data.collate import Batch, collate
from bevkd.data.instances import ImageBatch, collate_images
from bevkd.distill.base import DistillLoss, TeacherBatch
from bevkd.models.detector import Detector
from bevkd.models.segmenter import Segmenter


class Objective(nn.Module):
    """Detector and distillation losses as one module, so that one wrapper serves both in multi-process training.

    Args:
        losses: per entry its label in the log, the cache that it reads and the loss.
        caches: readers by cache name; only their specs are used here.
    """

    collate = staticmethod(collate)

    def __init__(
        self, detector: Detector, losses: list[tuple[str, str, DistillLoss]], caches: Mapping[str, CacheReader]
    ) -> None:
        super().__init__()
        self.detector = detector
        self.losses = losses
        self.adapters = nn.ModuleList(loss for _, _, loss in losses if isinstance(loss, nn.Module))
        self._specs = {name: reader.manifest.spec for name, reader in caches.items()}

    @property
    def model(self) -> nn.Module:
        """What a run leaves: the detector, without what only distillation needs."""
        return self.detector

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return every weighted term by name; the loss is their sum."""
        output = self.detector(batch)
        terms = {f"detection/{name}": value for name, value in self.detector.loss(output, batch).items()}
        teachers = {
            name: TeacherBatch.decode(self._specs[name], arrays, batch.affines, self.detector.config.grid)
            for name, arrays in (batch.stored or {}).items()
        }
        for label, cache, loss in self.losses:
            with torch.autocast(output.bev_low.device.type, enabled=False):
                terms |= {f"{label}/{name}": value for name, value in loss(output, teachers[cache], batch).items()}
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
