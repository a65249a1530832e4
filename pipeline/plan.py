"""What stage 1 will cost, measured on a few frames before anything is spent, and what it costs beside the teacher."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from bevkd.cache.manifest import BlockRecord, Header, to_json
from bevkd.cache.shard import metadata_files
from bevkd.cache.store import open_store
from bevkd.cache.variants import variants_in
from bevkd.cache.writer import CacheWriter
from bevkd.data.collate import Batch, collate
from bevkd.data.images import ImageView
from bevkd.data.source import FrameSource, Sensor
from bevkd.progress import Progress, Silent, Task
from bevkd.types import Boxes, Frame, Signals
from pipeline.cache_teacher import Share, Stage, load_batches, prepare, stored_of, write_blocks
from pipeline.overlap import Stored, encoding_threads
from pipeline.recipe import CacheRecipe

Result = TypeVar("Result")


@dataclass(frozen=True)
class StageSeconds:
    """Seconds per frame of the parts of stage 1, each alone.

    Attributes:
        teacher: one device, in the recipe's batches.
        loading: one loader.
        encoding: one thread, with compression and writing.
    """

    teacher: float
    loading: float
    encoding: float


@dataclass(frozen=True)
class CachePlan:
    """What a cache will take.

    Attributes:
        frames: in the cache; each variant of a frame counts.
        variants: how many there are of each frame, the frame as it is among them.
        files: in the cache when it is sealed.
        bytes: on disk, all files.
        array_bytes: per frame, by stored array.
        block_bytes: of one block, which every writing process holds on its local disk before it is uploaded.
        trial_frames: that were really cached to know this.
        loaders, encoders: processes and threads that work beside each teacher.
        free_bytes: where the cache goes; None if that is unknown or without bound.
    """

    frames: int
    blocks: int
    files: int
    bytes: int
    array_bytes: dict[str, int]
    block_bytes: int
    trial_frames: int
    seconds_per_frame: StageSeconds
    devices: int
    loaders: int
    encoders: int
    free_bytes: int | None
    variants: int = 1

    @property
    def device_hours(self) -> float:
        """Hours of teacher time, summed over the devices."""
        return self.frames * self.seconds_per_frame.teacher / 3600

    @property
    def paces(self) -> dict[str, float]:
        """Seconds per frame and device of each part, with as many loaders and encoders as there are."""
        seconds = self.seconds_per_frame
        return {
            "teacher": seconds.teacher,
            "loading": seconds.loading / max(1, self.loaders),
            "encoding": seconds.encoding / self.encoders,
        }

    @property
    def slowest(self) -> str:
        """The part that the others wait for."""
        return max(self.paces, key=lambda part: self.paces[part])

    @property
    def hours(self) -> float:
        """Hours until the cache is there: parts work side by side, the slowest sets the pace."""
        pace = self.paces[self.slowest] + (self.paces["loading"] if not self.loaders else 0.0)
        return self.frames * pace / self.devices / 3600

    @property
    def fits(self) -> bool:
        """Whether there is room, as far as that is known."""
        return self.free_bytes is None or self.bytes <= self.free_bytes

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        return asdict(self) | {
            "device_hours": self.device_hours,
            "hours": self.hours,
            "slowest": self.slowest,
            "fits": self.fits,
        }

    def rows(self, size: Callable[[float], str]) -> list[tuple[str, str]]:
        """Return the plan as names and values for people; ``size`` says a number of bytes."""
        seconds, room = self.seconds_per_frame, "no bound known"
        if self.free_bytes is not None:
            room = f"{size(self.free_bytes)}, enough" if self.fits else f"{size(self.free_bytes)}, NOT ENOUGH"
        arrays = ", ".join(f"{name} {size(count)}" for name, count in self.array_bytes.items())
        frames = f"{self.frames:,} in {self.blocks:,} blocks"
        if self.variants > 1:
            frames += (
                f": {self.variants} variants of {self.frames // self.variants:,}, so {self.variants} times the space"
            )
        return [
            ("frames", frames),
            ("files", f"{self.files:,}"),
            ("space needed", f"{size(self.bytes)}, {size(self.bytes / self.frames)} per frame"),
            ("free at --out", room),
            ("per frame", arrays),
            ("per block", f"{size(self.block_bytes)}; on each machine's own disk too, if --out is an object store"),
            ("teacher", f"{seconds.teacher:.3g} s per frame, {self.device_hours:.3g} device hours"),
            ("loading", f"{seconds.loading:.3g} s per frame and loader, {self.loaders} of them per device"),
            ("encoding", f"{seconds.encoding:.3g} s per frame and thread, {self.encoders} of them per device"),
            ("time", f"{self.hours:.3g} hours on {self.devices} device(s); the slowest part is {self.slowest}"),
            ("measured on", f"{self.trial_frames} frames"),
        ]


def plan_cache(
    recipe: CacheRecipe, out: str | None, limit: int | None, devices: int, trial: int, progress: Progress
) -> CachePlan:
    """Return what the cache of a recipe will take, from really caching ``trial`` frames spread over the data set.

    The trial writes to a temporary folder, which it removes.

    Args:
        out: where the cache would go; nothing is written there.
        limit: plan for the first frames of the data set only.
        devices: that work at the same time.
    """
    stage = prepare(recipe, limit, progress)
    stage.check_files(Share())
    tokens, spec = stage.header.tokens, stage.header.spec
    count = min(trial, len(tokens))
    chosen = tuple(tokens[index * len(tokens) // count] for index in range(count))
    one_block = {"tokens": chosen, "spec": spec.model_copy(update={"block": count})}
    tried = replace(stage, header=stage.header.model_copy(update=one_block))
    with tempfile.TemporaryDirectory(prefix="bevkd-plan-") as folder, progress.task("trial", count, "frame") as task:
        writer = tried.open_writer(str(Path(folder) / "cache"))
        seconds, record = _try(tried, writer, task)
    full = writer.header.model_copy(update={"tokens": tokens, "spec": spec})
    stored = {name: (shard.bytes - _index_bytes(count)) / count for name, shard in record.arrays.items()}
    blocks, frame_bytes = stage.header.blocks, sum(stored.values())
    indices = blocks * len(stored) * _index_bytes(spec.block)
    return CachePlan(
        frames=len(tokens),
        blocks=blocks,
        files=blocks * (len(stored) + 1) + len(stored) + 2,
        bytes=round(frame_bytes * len(tokens)) + indices + _text_bytes(record, full),
        array_bytes={name: round(value) for name, value in stored.items()},
        block_bytes=round(frame_bytes * min(spec.block, len(tokens))),
        trial_frames=count,
        seconds_per_frame=seconds,
        devices=devices,
        loaders=recipe.loaders,
        encoders=encoding_threads(),
        free_bytes=open_store(out).free_bytes() if out else None,
        variants=len(variants_in(tokens)),
    )


def _try(stage: Stage, writer: CacheWriter, task: Task) -> tuple[StageSeconds, BlockRecord]:
    """Cache the stage's frames as one block, part after part, and return the seconds per frame of each part."""
    dataset = stage.dataset(stage.header.tokens)
    size, count = stage.recipe.batch_size, len(dataset)
    spent = {"loading": 0.0, "teacher": 0.0, "warm-up": 0.0}

    def timed(part: str, work: Callable[[], Result]) -> Result:
        started = time.perf_counter()
        result = work()
        _finish_kernels(stage.device)
        spent[part] += time.perf_counter() - started
        return result

    def load(indices: Sequence[int]) -> Batch:
        return collate([dataset[index] for index in indices])

    def samples() -> Iterator[Stored]:
        for start in range(0, count, size):
            batch = timed("loading", partial(load, range(start, min(start + size, count))))
            if start == 0:  # the first pass also chooses kernels
                timed("warm-up", partial(stage.teacher.infer, batch))
            signals = timed("teacher", partial(stage.teacher.infer, batch))
            for index in range(len(batch)):
                yield stored_of(stage, batch, signals, index)
                task.advance()

    started = time.perf_counter()
    record = writer.write_block(0, samples())
    encoding = time.perf_counter() - started - sum(spent.values())
    return StageSeconds(spent["teacher"] / count, spent["loading"] / count, encoding / count), record


def _finish_kernels(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _index_bytes(block: int) -> int:
    return 16 * block + 4


def _text_bytes(record: BlockRecord, header: Header) -> int:
    """Return the size of all JSON files; the manifest repeats the header and, but for sums, the commit records."""
    metadata = sum(len(data) for data in metadata_files(header).values())
    token = len(record.tokens[0]) + len('  "",\n')
    of_block = len(to_json(record)) + len(to_json(record.sealed)) - 2 * len(record.tokens) * token
    return metadata + len(to_json(header)) + header.blocks * of_block + 2 * len(header.tokens) * token


# ---------------------------------------------------------------------------------------------- beside the teacher


@dataclass(frozen=True)
class Stage1Cost:
    """Stage 1 beside the teacher alone, round by round.

    Attributes:
        frames: of a round.
        forward_seconds: of the teacher's passes over all batches, which were in memory.
        stage1_seconds: until the cache of the same batches was sealed.
        within_seconds: of the same passes while stage 1 was at work. What they take longer than alone is rivalry for
            the machine; what stage 1 takes beyond them does not overlap.
    """

    frames: int
    forward_seconds: tuple[float, ...]
    stage1_seconds: tuple[float, ...]
    within_seconds: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Wall time of stage 1 over that of the teacher's passes alone, the median over the rounds."""
        pairs = zip(self.stage1_seconds, self.forward_seconds, strict=True)
        return statistics.median(stage1 / forward for stage1, forward in pairs)


def stage1_over_forward(
    recipe: CacheRecipe, out: str, frames: int, progress: Progress | None = None, rounds: int = 1
) -> Stage1Cost:
    """Return the time that stage 1 takes for ``frames`` frames, and that of the teacher's passes alone.

    The recipe's frames are repeated under other tokens until there are enough. Both parts run in this process with the
    same batches and precision; half of the passes are timed before and half after stage 1, so that a machine that
    slows down harms both. Building the teacher and its first pass are left out; starting the loaders, the last
    block's commit and the seal are not. Other work on the machine falsifies the result: stage 1 uses the cores that
    the teacher leaves, the passes alone do not.

    Args:
        out: a new folder, for a cache per round.
    """
    progress = progress or Silent()
    stage = prepare(recipe, frames, progress)
    stage.check_files(Share())
    source = RepeatedFrames(stage.source, frames)
    stage = replace(stage, source=source, header=stage.header.model_copy(update={"tokens": source.tokens}))
    blocks = range(stage.header.blocks)
    batches = list(load_batches(stage, stage.header, blocks))
    stage.teacher.infer(batches[0])

    def passes(chosen: Sequence[Batch]) -> float:
        started = time.perf_counter()
        for batch in chosen:
            stage.teacher.infer(batch)
        _finish_kernels(stage.device)
        return time.perf_counter() - started

    half, alone, together, within = len(batches) // 2, [], [], []
    with progress.task("caching", rounds * frames, "frame") as task:
        for turn in range(rounds):
            before = passes(batches[:half])
            started = time.perf_counter()
            teacher = _TimedTeacher(stage)
            writer = stage.open_writer(f"{out}/{turn}")
            write_blocks(replace(stage, teacher=teacher), writer, blocks, task)
            writer.seal()
            together.append(time.perf_counter() - started)
            within.append(teacher.seconds)
            alone.append(before + passes(batches[half:]))
    return Stage1Cost(frames, tuple(alone), tuple(together), tuple(within))


class _TimedTeacher:
    """The teacher of a stage, which counts the seconds of its passes."""

    def __init__(self, stage: Stage) -> None:
        teacher = stage.teacher
        self.identity, self.view, self.grid = teacher.identity, teacher.view, teacher.grid
        self.classes, self.shapes = teacher.classes, teacher.shapes
        self.seconds = 0.0
        self._teacher = teacher

    def infer(self, batch: Batch) -> Signals:
        started = time.perf_counter()
        signals = self._teacher.infer(batch)
        self.seconds += time.perf_counter() - started
        return signals


class RepeatedFrames:
    """The frames of a source again and again, ``count`` of them, each time under a token of its own."""

    def __init__(self, source: FrameSource, count: int) -> None:
        self.identity, self.classes = source.identity, source.classes
        self.metrics: str | None = None  # tokens of its own have no ground truth that metrics would find
        self._source = source
        self._original = {f"{source.tokens[k % len(source.tokens)]}#{k}": k % len(source.tokens) for k in range(count)}
        self.tokens = tuple(self._original)
        self.annotated = frozenset(token for token in self.tokens if self._name(token) in source.annotated)
        self.labelled = frozenset(token for token in self.tokens if self._name(token) in source.labelled)

    def _name(self, token: str) -> str:
        return self._source.tokens[self._original[token]]

    def load(self, token: str, sensors: frozenset[Sensor], views: Mapping[str, ImageView] | None = None) -> Frame:
        """Return the original frame under its new token."""
        return replace(self._source.load(self._name(token), sensors, views), token=token)

    def image_sizes(self, token: str) -> dict[str, tuple[int, int]]:
        """Return those of the original frame."""
        return self._source.image_sizes(self._name(token))

    def annotations(self, token: str) -> Boxes:
        """Return those of the original frame."""
        return self._source.annotations(self._name(token))

    def global_from_lidar(self, token: str) -> Float[Tensor, "4 4"]:
        """Return that of the original frame."""
        return self._source.global_from_lidar(self._name(token))

    def check(self, tokens: Sequence[str], sensors: frozenset[Sensor]) -> list[str]:
        """Return the faults of the original frames."""
        return self._source.check([self._name(token) for token in tokens], sensors)
