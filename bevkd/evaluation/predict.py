"""Boxes of a detector on the frames of a data set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import distributed, nn
from torch.utils.data import DataLoader

from bevkd.data.collate import Sample, collate
from bevkd.data.join import FrameDataset
from bevkd.data.source import FrameSource
from bevkd.models.detector import Detector, channels_last, view_of
from bevkd.progress import Progress
from bevkd.types import Boxes


def predict(
    detector: Detector,
    source: FrameSource,
    tokens: Sequence[str],
    progress: Progress,
    batch_size: int = 4,
    workers: int = 0,
) -> dict[str, Boxes]:
    """Return the detector's boxes, on the CPU, for each of ``tokens``; the detector is used in eval mode.

    Processes that torch.distributed has joined share the frames batch by batch, so that one and several find the same,
    bit for bit: the first one returns all boxes, the others nothing. All of them must call it. Buffers, such as the
    statistics of batch norms, are those of the first one. Neither the modes of the detector's modules nor the process's
    random state change.

    Args:
        batch_size: frames per process and forward pass.
        workers: loader processes; 0 loads between the forward passes.
    """
    rank, processes = _place()
    view = view_of(detector.config)
    batches = [list(range(len(tokens)))[start : start + batch_size] for start in range(0, len(tokens), batch_size)]
    if processes > 1:
        with torch.no_grad():
            for buffer in detector.buffers():
                distributed.broadcast(buffer, 0)
    channels_last(detector)
    with _in_eval_mode(detector):
        found = _predict(detector, FrameDataset(source, tokens, view), batches[rank::processes], progress, workers)
    return found if processes == 1 else _gathered(found, tokens, rank, processes)


def _place() -> tuple[int, int]:
    """Return this process's number and how many there are."""
    if not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Give every module its own mode back: frozen stages of a model in training are in eval mode already."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.inference_mode()
def _predict(
    detector: Detector, frames: FrameDataset, batches: list[list[int]], progress: Progress, workers: int
) -> dict[str, Boxes]:
    device = next(detector.parameters()).device
    loader: DataLoader[Sample] = DataLoader(
        frames,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        # Its own, so that starting to load draws nothing from the random state of a training around it.
        generator=torch.Generator(),
        pin_memory=device.type == "cuda",
        worker_init_fn=_one_thread,
        multiprocessing_context="fork" if workers else None,
    )
    found: dict[str, Boxes] = {}
    with progress.task("predicting", sum(map(len, batches)), "frame") as task:
        for batch in loader:
            boxes = detector.head.decode(detector(batch.to(device)).head)
            found |= {token: each.to("cpu") for token, each in zip(batch.tokens, boxes, strict=True)}
            task.advance(len(batch.tokens))
    return found


def _gathered(found: Mapping[str, Boxes], tokens: Sequence[str], rank: int, processes: int) -> dict[str, Boxes]:
    """Return the boxes of all processes in the order of ``tokens`` at the first one, and nothing elsewhere."""
    packed = {token: boxes.pack().numpy() for token, boxes in found.items()}
    parts: list[dict[str, object]] | None = [{} for _ in range(processes)] if rank == 0 else None
    distributed.gather_object(packed, parts, dst=0)
    everything = {token: boxes for part in parts or () for token, boxes in part.items()}
    return {token: Boxes.unpack(torch.from_numpy(everything[token])) for token in tokens if token in everything}


def _one_thread(worker: int) -> None:
    """Keep a loader process from competing with the predicting one for cores."""
    del worker
    torch.set_num_threads(1)
