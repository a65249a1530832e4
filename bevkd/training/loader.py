"""Batches of a run: loaded ahead by processes of their own, and copied to the device while it computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from bevkd.data.collate import Batch
from bevkd.data.instances import ImageBatch, InstanceDataset
from bevkd.data.join import TrainingDataset
from bevkd.data.sampler import PositionSampler
from bevkd.training.config import TrainingConfig
from bevkd.training.objective import Objective, SegmenterObjective


def batches(
    dataset: TrainingDataset | InstanceDataset,
    objective: Objective | SegmenterObjective,
    config: TrainingConfig,
    step: int,
    device: torch.device,
    process: int,
    processes: int,
) -> Iterator[Batch | ImageBatch]:
    """Return the batches of one process from ``step`` to the end of the run, on ``device``."""
    per_step = config.batch_size * config.accumulation * processes
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=config.batch_size,
        sampler=PositionSampler(step * per_step, config.steps * per_step, config.batch_size, process, processes),
        num_workers=config.workers,
        collate_fn=objective.collate,
        # Its own, so that starting to load draws nothing from the random state that a checkpoint restores.
        generator=torch.Generator(),
        pin_memory=device.type == "cuda",
        worker_init_fn=_one_thread,
        multiprocessing_context=_start_method(dataset) if config.workers else None,
    )
    return _copied_ahead(iter(loader), device) if device.type == "cuda" else _moved(iter(loader), device)


def _start_method(dataset: TrainingDataset | InstanceDataset) -> str:
    """Return how loader processes start: clients of object stores do not survive a fork, which is faster."""
    return "forkserver" if getattr(dataset, "remote", False) else "fork"


def _moved(loaded: Iterator[Any], device: torch.device) -> Iterator[Batch | ImageBatch]:
    for batch in loaded:
        yield batch.to(device)


def _copied_ahead(loaded: Iterator[Any], device: torch.device) -> Iterator[Batch | ImageBatch]:
    """Yield batches on a GPU, each copied on a stream of its own while the one before is in use."""
    copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    ahead: tuple[Batch | ImageBatch, torch.cuda.Event] | None = None
    for batch in loaded:
        # Memory of an earlier batch may be given to this one only when all work on that batch is done.
        copying.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(copying):
            moved = batch.to(device)
        copied = copying.record_event()
        if ahead is not None:
            yield _usable(*ahead, device)
        ahead = moved, copied
    if ahead is not None:
        yield _usable(*ahead, device)


def _usable(batch: Batch | ImageBatch, copied: torch.cuda.Event, device: torch.device) -> Batch | ImageBatch:
    torch.cuda.current_stream(device).wait_event(copied)
    return batch


def _one_thread(worker: int) -> None:
    """Keep a loader process from competing with the training process for cores."""
    del worker
    torch.set_num_threads(1)
