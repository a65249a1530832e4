"""Stage 1: run the teacher once over a data set and store what it knows."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from torch.utils.data import DataLoader

from bevkd import registry
from bevkd.cache.arrays import sample_shapes_of
from bevkd.cache.catalogue import stored_bytes
from bevkd.cache.manifest import Header
from bevkd.cache.packing import ANNOTATED
from bevkd.cache.sample import stored_signals
from bevkd.cache.self_check import SelfCheck
from bevkd.cache.spec import CacheSpec, load_spec
from bevkd.cache.variants import split_token, variant_token, variants_in
from bevkd.cache.writer import CacheWriter
from bevkd.data.collate import Batch, collate
from bevkd.data.join import FrameDataset, VariantDataset, View
from bevkd.data.source import FrameSource, Sensor
from bevkd.errors import CacheError, ConfigError
from bevkd.geometry.symmetries import symmetries_of
from bevkd.grid import BEVGrid
from bevkd.progress import Progress, Task
from bevkd.teachers.base import Teacher
from bevkd.types import Boxes, Signals
from pipeline.overlap import Handover, SampleQueue, Stored, usable_cores, write_overlapped
from pipeline.parts import check_files, choose_device, open_source
from pipeline.recipe import CacheRecipe
from pipeline.self_check import check_boxes

# Where things lie, how fast they are read and which labels were hidden says nothing about a cache.
_OF_THE_READING = dict.fromkeys(("root", "index_dir", "labels", "labels_seed", "skip_missing"), True)
_NOT_OF_THE_CACHE = {
    "device": True,
    "loaders": True,
    "spec": True,  # the header holds what it says, the recipe where it lies
    "variants": True,  # the tokens name them
    "data": {**_OF_THE_READING, "sources": {"__all__": _OF_THE_READING}},
    "teacher": {"run", "weights", "checkpoint", "checkpoint_version", "checkpoint_kernels", "seconds_per_frame"},
}

_LEAST_QUEUE = 4


@dataclass(frozen=True)
class CacheSummary:
    """What a run of stage 1 did.

    Attributes:
        name: of the sealed cache; None while blocks are missing that other processes write.
        frames: in the cache when it is complete; each variant of a frame counts.
        written: of them in this run.
        missing: of them not there yet.
        bytes_per_frame: on disk; None while blocks are missing.
        self_check: how its boxes score; None while blocks are missing, and if it was sealed without.
        variants: how many there are of each frame, the frame as it is among them.
    """

    path: str
    name: str | None
    frames: int
    written: int
    missing: int
    bytes_per_frame: float | None
    self_check: SelfCheck | None
    variants: int = 1

    def to_json(self) -> dict[str, Any]:
        """Return the summary as plain values."""
        check = self.self_check.to_json() if self.self_check else None
        return asdict(replace(self, self_check=None)) | {"self_check": check}

    @property
    def text(self) -> str:
        """The summary in words."""
        unit, of_each = (
            ("frame", "") if self.variants == 1 else ("sample", f" ({self.variants} variants of each frame)")
        )
        there = (
            f"{self.frames - self.missing} of {self.frames} {unit}s{of_each} in {self.path}, {self.written} written now"
        )
        if self.name is None or self.bytes_per_frame is None:
            return f"{there}; the process that writes the last of the others seals the cache"
        check = f"\nself-check: {self.self_check.text}" if self.self_check else ""
        return f"{there}, {self.bytes_per_frame / 1e3:.1f} kB per {unit}\nname {self.name}{check}"


@dataclass(frozen=True)
class Share:
    """The blocks that one of several equal processes writes: every ``count``-th from ``index`` on.

    Attributes:
        index: of this process, from 0, as SLURM counts the tasks of an array.
        count: of all processes.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the share of ``--shard I/N``.

        Raises:
            ConfigError: not of that form, or I is not below N.
        """
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise ConfigError(
                f"--shard {text}: give I/N, where N processes share the blocks and I, from 0 to N - 1, is this one. "
                "In a SLURM array --array=0-7: --shard $SLURM_ARRAY_TASK_ID/8."
            )
        return cls(int(index), int(count))

    def of(self, blocks: Sequence[int]) -> list[int]:
        """Return those of ``blocks`` that this process writes."""
        return [block for block in blocks if block % self.count == self.index]


@dataclass(frozen=True)
class Stage:
    """The parts of a recipe, built and found to fit each other: whatever it takes to make the blocks of its cache."""

    recipe: CacheRecipe
    device: torch.device
    teacher: Teacher
    source: FrameSource
    header: Header

    @property
    def view(self) -> View:
        """What to load of a frame: what the teacher reads, and what the spec stores of the data set itself."""
        return view_for(self.teacher, self.header.spec)

    def check_files(self, share: Share) -> None:
        """Refuse missing and damaged sensor files of the blocks of ``share``, all of them at once."""
        own = share.of(range(self.header.blocks))
        tokens = [token for block in own for token in self.header.block_tokens(block)]
        if self.recipe.variants != "none":
            tokens = list(dict.fromkeys(split_token(token)[0] for token in tokens))
        check_files(self.source, tokens, self.view.sensors)

    def dataset(self, tokens: Sequence[str]) -> FrameDataset:
        """Return the samples of a cache with ``tokens``, as the teacher sees them."""
        kind = FrameDataset if self.recipe.variants == "none" else VariantDataset
        return kind(self.source, tokens, self.view)

    def open_writer(self, uri: str) -> CacheWriter:
        """Return a writer for the cache at ``uri``, which is begun if it is not there."""
        return CacheWriter.open(uri, self.header, dict(self.teacher.shapes))


def cache_teacher(
    recipe: CacheRecipe,
    out: str,
    limit: int | None,
    progress: Progress,
    share: Share = Share(),
    space_check: bool = True,
) -> CacheSummary:
    """Write the cache of ``recipe`` to ``out``; blocks that are already there stay as they are.

    Args:
        limit: cache only the first frames of the data set.
        share: write only this part of the blocks; whoever finds all blocks there seals the cache.
        space_check: refuse to begin what does not seem to fit on the disk.
    """
    stage = prepare(recipe, limit, progress)
    stage.check_files(share)
    writer = stage.open_writer(out)
    pending = share.of(writer.pending())
    if pending and space_check:
        check_space(writer, out)
    frames = frames_of(writer, share.of(range(writer.header.blocks)))
    written = frames_of(writer, pending)
    with progress.task("caching", frames, "frame", done=frames - written) as task:
        write_blocks(stage, writer, pending, task)
    return summarise(stage.source, writer, out, written, progress)


def prepare(recipe: CacheRecipe, limit: int | None, progress: Progress, device: torch.device | None = None) -> Stage:
    """Return the parts of a recipe, with every contract between them checked.

    Args:
        limit: cache only the first frames of the data set.
        device: of the teacher; None takes the recipe's.

    Raises:
        BevkdError: a part cannot be built, or parts do not fit each other.
    """
    device = device or choose_device(recipe.device)
    classes = tuple(recipe.data.classes)
    spec = load_spec(recipe.spec)
    teacher: Teacher = registry.load("bevkd.teachers", recipe.teacher.name).build(recipe.teacher, classes, device)
    # Refuses what the teacher does not write.
    sample_shapes_of(spec, teacher.shapes, teacher.identity.name, getattr(teacher, "absent", None))
    source = open_source(recipe.data, view_for(teacher, spec).sensors, progress)
    header = Header(
        spec=spec,
        teacher=teacher.identity,
        dataset=source.identity,
        grid=teacher.grid,
        classes=classes,
        tokens=_with_variants(source.tokens[:limit], recipe, teacher.grid),
        config=recipe.model_dump(mode="json", exclude=_NOT_OF_THE_CACHE),
        licence=recipe.licence,
    )
    return Stage(recipe, device, teacher, source, header)


def _with_variants(tokens: Sequence[str], recipe: CacheRecipe, grid: BEVGrid) -> tuple[str, ...]:
    """Return the tokens of all samples of a cache, those of a frame side by side.

    Raises:
        ConfigError: the grid has no such symmetry, or tokens of the data set look like those of variants.
    """
    if recipe.variants == "none":
        return tuple(tokens)
    names = symmetries_of(grid, quarter_turns=recipe.variants == "d4")
    if len(names) == 1:
        raise ConfigError(
            f"variants: {recipe.variants}: no flip or turn maps the teacher's grid, {grid}, onto itself. Set variants: "
            "none."
        )
    if taken := [token for token in tokens if split_token(token)[1]]:
        raise ConfigError(f"variants: the data set's own token '{taken[0]}' looks like a variant. Set variants: none.")
    return tuple(variant_token(token, name) for token in tokens for name in names)


def view_for(teacher: Teacher, spec: CacheSpec) -> View:
    """Return what to load of a frame for a cache."""
    from_data: frozenset[Sensor] = frozenset({"lidar_depth"}) if "lidar_depth" in spec.signals else frozenset()
    return replace(teacher.view, sensors=teacher.view.sensors | from_data)


def write_blocks(stage: Stage, writer: CacheWriter, blocks: Sequence[int], task: Task, processes: bool = True) -> None:
    """Write ``blocks`` with loading, teacher, encoding and writing side by side.

    Memory is bounded in samples, whatever the number of blocks: of b per batch and n loaders, (2 n + 1) b are loaded,
    b are in the teacher, and at most max(4, 2 b) wait to be encoded; see :func:`write_overlapped` for the rest.

    Args:
        processes: load in processes; otherwise in threads, as a process that itself is a worker has to.
    """
    queue = SampleQueue(max(_LEAST_QUEUE, 2 * stage.recipe.batch_size))
    # Loader processes are forked here, before there are threads that could hold a lock at that moment.
    batches = iter(load_batches(stage, writer.header, blocks, processes))
    write_overlapped(writer, blocks, _infer(stage, batches, queue, task), queue)


def frames_of(writer: CacheWriter, blocks: Sequence[int]) -> int:
    """Return the number of frames in ``blocks``."""
    return sum(len(writer.header.block_tokens(block)) for block in blocks)


def summarise(source: FrameSource, writer: CacheWriter, out: str, written: int, progress: Progress) -> CacheSummary:
    """Return what there is at ``out`` now; a cache that misses no block is sealed, by as many processes as find so.

    Its boxes are scored before, and the scores go into the seal.
    """
    frames, missing = len(writer.header.tokens), frames_of(writer, writer.pending())
    if missing:
        return CacheSummary(out, None, frames, written, missing, None, None, len(variants_in(writer.header.tokens)))
    manifest = writer.seal(partial(check_boxes, source, progress))
    size, variants = stored_bytes(manifest) / frames, len(variants_in(manifest.tokens))
    return CacheSummary(out, manifest.name, frames, written, 0, size, manifest.self_check, variants)


def check_space(writer: CacheWriter, uri: str) -> None:
    """Refuse to begin what does not seem to fit.

    Raises:
        CacheError: says how much is missing, and how much room there is.
    """
    needed, free = writer.missing_bytes(), writer.store.free_bytes()
    if free is not None and needed > free:
        raise CacheError(
            f"{uri} needs about {needed:,} more bytes, its disk has {free:,} free. Make room, or choose another "
            "--out or a smaller spec. The estimate is on the safe side until a block is there: 'bevkd cache plan' "
            "measures, and --no-space-check begins anyway."
        )


def load_batches(stage: Stage, header: Header, blocks: Sequence[int], processes: bool = True) -> Iterator[Batch]:
    """Return the batches of ``blocks`` in order; none spans two blocks, so a resumed cache has the same bytes.

    The first ones are being loaded when this returns.
    """
    dataset = stage.dataset(header.tokens)
    size, block = stage.recipe.batch_size, header.spec.block
    plan = [
        list(range(start, min(start + size, (each + 1) * block, len(header.tokens))))
        for each in blocks
        for start in range(each * block, min((each + 1) * block, len(header.tokens)), size)
    ]
    loaders = min(stage.recipe.loaders, usable_cores()) if plan else 0  # torch warns of more
    if not processes and loaders:
        return _load_in_threads(dataset, plan, loaders)
    return iter(
        DataLoader(
            dataset,
            batch_sampler=plan,
            num_workers=loaders,
            collate_fn=collate,
            pin_memory=stage.device.type == "cuda",
        )
    )


def _load_in_threads(dataset: FrameDataset, plan: Sequence[Sequence[int]], threads: int) -> Iterator[Batch]:
    def load(indices: Sequence[int]) -> Batch:
        return collate([dataset[index] for index in indices])

    with ThreadPoolExecutor(threads, thread_name_prefix="load") as pool:
        ahead: deque[Future[Batch]] = deque()
        for indices in plan:
            ahead.append(pool.submit(load, indices))
            if len(ahead) > 2 * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _infer(stage: Stage, batches: Iterator[Batch], queue: SampleQueue, task: Task) -> Iterator[Handover]:
    """Yield each frame as what the writer's thread calls to get its signals on the CPU.

    On a GPU that thread copies on a stream of its own, beside the work on the next batch.
    """
    cuda = stage.device.type == "cuda"
    stream = torch.cuda.Stream(stage.device) if cuda else None
    started, waited = time.perf_counter(), 0.0
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        waited += time.perf_counter() - asked
        queue.check()  # before seconds of teacher time are spent
        signals = stage.teacher.infer(batch)
        computed = torch.cuda.current_stream(stage.device).record_event() if cuda else None
        for index in range(len(batch.tokens)):
            elapsed = time.perf_counter() - started
            task.advance(data_wait=waited / elapsed, write_wait=queue.waited_s / elapsed)
            yield partial(_copied, stage, batch, signals, index, stream, computed)


def stored_of(stage: Stage, batch: Batch, signals: Signals, index: int) -> Stored:
    """Return what the cache stores of one frame of a batch, on the CPU, and its annotations for the statistics."""
    annotated = [boxes if known else None for boxes, known in zip(batch.boxes, batch.labelled.tolist(), strict=True)]
    signals = replace(signals, lidar_depth=batch.lidar_depth)
    with torch.inference_mode():
        stored = stored_signals(signals, annotated, stage.header.spec, stage.header.grid, index)
    return {**stored, ANNOTATED: annotated[index] or Boxes.empty()}


def _copied(
    stage: Stage,
    batch: Batch,
    signals: Signals,
    index: int,
    stream: torch.cuda.Stream | None,
    computed: torch.cuda.Event | None,
) -> Stored:
    with torch.cuda.stream(stream):
        if stream is not None and computed is not None:
            stream.wait_event(computed)
        return stored_of(stage, batch, signals, index)
