"""What a cache of the size of nuScenes costs to open, to list, and in the memory of a loader process."""

from __future__ import annotations

import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bevkd.cache.catalogue import listing
from bevkd.cache.manifest import Header, TeacherIdentity
from bevkd.cache.reader import CacheReader
from bevkd.cache.spec import CacheSpec
from bevkd.cache.writer import CacheWriter
from bevkd.data.identity import DatasetIdentity
from bevkd.grid import BEVGrid
from bevkd.progress import Progress
from bevkd.types import Boxes
from pipeline.caches import info

FRAMES = 28_130
"""Training key frames of nuScenes."""

_GRID = BEVGrid(x_m=(-4, 4), y_m=(-4, 4), cell_m=2.0)
_SHAPES = {"bev_low": (2, 4, 4), "bev_high": (2, 4, 4), "heatmap": (2, 4, 4), "box_code": (1, 10, 4, 4)}
_ROUNDS = 5


@dataclass(frozen=True)
class Opening:
    """Seconds to open, list and describe the cache; the two commands with the start of their process.

    Attributes:
        worker_mb: memory of a process that has read a sample of every block, above one that only imports bevkd.
    """

    frames: int
    open_seconds: float
    ls_seconds: float
    info_seconds: float
    ls_command_seconds: float
    info_command_seconds: float
    worker_mb: float


def write_large_cache(path: Path, frames: int, progress: Progress) -> None:
    """Write a cache of many frames with tiny arrays."""
    signals: dict[str, Any] = {
        "bev_low": {"encoding": "uint8"},
        "bev_high": {"encoding": "uint8"},
        "heatmap": {"encoding": "float16"},
        "box_code": {"encoding": "float16"},
        "boxes": {"encoding": "boxes", "capacity": 4},
    }
    header = Header(
        spec=CacheSpec.model_validate({"name": "tiny", "block": 32, "signals": signals}),
        teacher=TeacherIdentity(name="bench", architecture={}, weights_sha256="0" * 64),
        dataset=DatasetIdentity(name="bench", version="1", split="train", frames=frames, annotation_digest="0"),
        grid=_GRID,
        classes=("car", "pedestrian"),
        tokens=tuple(f"{index:032x}" for index in range(frames)),
    )
    writer = CacheWriter.open(path, header, _SHAPES)
    pending = writer.pending()
    with progress.task("large cache", header.blocks, "block", header.blocks - len(pending)) as task:
        for block in pending:
            writer.write_block(block, _samples(block, len(writer.header.block_tokens(block))))
            task.advance()
    writer.seal()


def _samples(block: int, count: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(block)
    for _ in range(count):
        maps: dict[str, Any] = {name: rng.random(shape, np.float32) for name, shape in _SHAPES.items()}
        yield {**maps, "boxes": Boxes(torch.ones(2, 9), torch.tensor([0, 1]), torch.tensor([0.9, 0.5]))}


def measure(path: Path) -> Opening:
    """Return what the cache at ``path`` costs; the median of five times each."""
    return Opening(
        frames=len(CacheReader.open(path)),
        open_seconds=_median(lambda: CacheReader.open(path)),
        ls_seconds=_median(lambda: listing(path.parent)),
        info_seconds=_median(lambda: info(str(path))),
        ls_command_seconds=_median(lambda: _command("ls", str(path.parent))),
        info_command_seconds=_median(lambda: _command("info", str(path))),
        worker_mb=(_in_new_process(path) - _in_new_process(None)) / 1e6,
    )


def _median(call: Callable[[], object]) -> float:
    times = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _command(*arguments: str) -> None:
    code = "import sys; from cli import main; sys.argv = ['bevkd', 'cache', *sys.argv[1:]]; main()"
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)


def _in_new_process(path: Path | None) -> int:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_memory, (path,))


def _memory(path: Path | None) -> int:
    """Return the resident bytes of this process after reading a sample of every block of the cache, if there is one."""
    if path is not None:
        reader = CacheReader.open(path)
        for token in reader.tokens[:: reader.manifest.spec.block]:
            reader.read(token, tuple(reader.manifest.spec.signals))
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096
