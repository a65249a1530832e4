"""Boxes of a detector on the frames of a data set."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.data import DataLoader

from bevkd.data.collate import Sample, collate
from bevkd.data.join import FrameDataset
from bevkd.data.source import FrameSource
from bevkd.models.detector import Detector, channels_last, view_of
from bevkd.progress import Progress
from bevkd.types import Boxes


@torch.inference_mode()
def predict(
    detector: Detector,
    source: FrameSource,
    tokens: Sequence[str],
    progress: Progress,
    batch_size: int = 4,
    workers: int = 0,
) -> dict[str, Boxes]:
    """Return the detector's boxes, on the CPU, for each of ``tokens``; the detector is used in eval mode."""
    device = next(detector.parameters()).device
    loader: DataLoader[Sample] = DataLoader(
        FrameDataset(source, tokens, view_of(detector.config)),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate,
    )
    was_training = detector.training
    channels_last(detector)
    detector.eval()
    found: dict[str, Boxes] = {}
    with progress.task("predicting", len(tokens), "frame") as task:
        for batch in loader:
            boxes = detector.head.decode(detector(batch.to(device)).head)
            found |= {token: each.to("cpu") for token, each in zip(batch.tokens, boxes, strict=True)}
            task.advance(len(batch.tokens))
    detector.train(was_training)
    return found
