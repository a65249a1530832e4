"""Stage 1: run the teacher once over a data set and store what it knows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader

from bevkd import registry
from bevkd.cache.blocks import tokens_of
from bevkd.cache.manifest import Header, Manifest
from bevkd.cache.spec import CacheSpec, load_spec
from bevkd.cache.writer import CacheWriter
from bevkd.data.collate import Batch, Sample, collate
from bevkd.data.join import FrameDataset
from bevkd.errors import CacheSpecError, report
from bevkd.progress import Progress, Task
from bevkd.teachers.base import Teacher
from bevkd.types import Boxes, Signals
from pipeline.parts import check_files, choose_device, open_source
from pipeline.recipe import CacheRecipe

# Where things lie, how fast they are read and which labels were hidden says nothing about a cache.
_NOT_OF_THE_CACHE = {
    "device": True,
    "workers": True,
    "spec": True,  # the header holds what it says, the recipe where it lies
    "data": {"root", "index_dir", "labels", "labels_seed", "skip_missing"},
    "teacher": {"run", "weights"},
}


@dataclass(frozen=True)
class CacheSummary:
    """What a run of stage 1 did.

    Attributes:
        frames: in the cache.
        written: of them in this run; the others were there already.
        bytes_per_frame: on disk.
    """

    path: str
    name: str
    frames: int
    written: int
    bytes_per_frame: float


def cache_teacher(recipe: CacheRecipe, out: str, limit: int | None, progress: Progress) -> CacheSummary:
    """Write the cache of ``recipe`` to ``out``; blocks that are already there stay as they are.

    Args:
        limit: cache only the first frames of the data set.
    """
    device = choose_device(recipe.device)
    classes = tuple(recipe.data.classes)
    spec = load_spec(recipe.spec)
    teacher: Teacher = registry.load("bevkd.teachers", recipe.teacher.name).build(recipe.teacher, classes, device)
    _check_spec(spec, teacher)
    source = open_source(recipe.data, teacher.view.sensors, progress)
    tokens = source.tokens[:limit]
    check_files(source, tokens, teacher.view.sensors)

    header = Header(
        spec=spec,
        teacher=teacher.identity,
        dataset=source.identity,
        grid=teacher.grid,
        classes=classes,
        tokens=tokens,
        config=recipe.model_dump(mode="json", exclude=_NOT_OF_THE_CACHE),
        licence=recipe.licence,
    )
    writer = CacheWriter.open(out, header, {name: teacher.shapes[name] for name in spec.signals if name != "boxes"})
    pending = writer.pending()
    blocks = [tokens_of(tokens, spec.block, block) for block in pending]
    written = sum(len(block) for block in blocks)
    batches = _loader(FrameDataset(source, tokens, teacher.view), blocks, recipe)
    with progress.task("caching", len(tokens), "frame", done=len(tokens) - written) as task:
        samples = _infer(teacher, spec, iter(batches), task)
        for block, block_tokens in zip(pending, blocks, strict=True):
            writer.write_block(block, (next(samples) for _ in block_tokens))
    manifest = writer.seal()
    return CacheSummary(out, manifest.name, len(tokens), written, bytes_per_frame(manifest))


def bytes_per_frame(manifest: Manifest) -> float:
    """Return the mean size of a frame in a cache, in bytes on disk."""
    stored = sum(shard.bytes for record in manifest.records for shard in record.arrays.values())
    return stored / len(manifest.tokens)


def _check_spec(spec: CacheSpec, teacher: Teacher) -> None:
    """Refuse a spec that asks for signals that the teacher does not write."""
    written = [*teacher.shapes, "boxes"]
    faults = [f"signals.{name}: not written" for name in spec.signals if name not in written]
    if faults:
        raise report(
            CacheSpecError,
            f"teacher '{teacher.identity.name}' does not fit spec '{spec.name}'. It writes "
            f"{', '.join(written)}; remove the other signals from the spec:",
            faults,
        )


def _loader(dataset: FrameDataset, blocks: list[tuple[str, ...]], recipe: CacheRecipe) -> DataLoader[Sample]:
    """Return the pending blocks' batches in order; none spans two blocks, so a resumed cache has the same bytes."""
    index = {token: position for position, token in enumerate(dataset.tokens)}
    batches = [
        [index[token] for token in block[start : start + recipe.batch_size]]
        for block in blocks
        for start in range(0, len(block), recipe.batch_size)
    ]
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=recipe.workers if batches else 0,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
    )


def _infer(
    teacher: Teacher, spec: CacheSpec, batches: Iterator[Batch], task: Task
) -> Iterator[dict[str, torch.Tensor | Boxes]]:
    """Yield each frame's signals, on the CPU."""
    started, waited = time.perf_counter(), 0.0
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        waited += time.perf_counter() - asked
        signals = teacher.infer(batch)
        for index in range(len(batch.tokens)):
            task.advance(data_wait=waited / (time.perf_counter() - started))
            yield _sample(signals, spec, index)


def _sample(signals: Signals, spec: CacheSpec, index: int) -> dict[str, torch.Tensor | Boxes]:
    sample: dict[str, torch.Tensor | Boxes] = {}
    for name in spec.signals:
        value = getattr(signals, name)
        sample[name] = value[index].to("cpu")
    return sample
