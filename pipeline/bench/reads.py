"""How long it takes to read one training sample, beside the limit and beside other stores."""

from __future__ import annotations

import math
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bevkd.cache.manifest import Header, TeacherIdentity
from bevkd.cache.reader import CacheReader
from bevkd.cache.spec import CacheSpec, SignalSpec, load_spec
from bevkd.cache.writer import CacheWriter
from bevkd.data.identity import DatasetIdentity
from bevkd.grid import BEVGrid
from bevkd.types import Boxes, Instances
from pipeline.bench import peers

GRID = BEVGrid(x_m=(-54, 54), y_m=(-54, 54), cell_m=0.6)
CLASSES = tuple(f"class-{index}" for index in range(10))
SAMPLES = 24
CHANNELS = {"bev_low": 256, "bev_high": 512}
_BLOCK = 8
_CAMERAS, _INSTANCES, _BOXES = 6, 40, 60


@dataclass(frozen=True)
class Reading:
    """One way to read samples in one setting.

    Attributes:
        pages: ``warm`` or ``cold`` page cache.
        cpu_ms, wall_ms: per sample, medians over rounds.
        cpu_over_limit, wall_over_limit: medians over rounds of the ratio to the limit in the same round and setting.
    """

    name: str
    pages: str
    processes: int
    cpu_ms: float
    wall_ms: float
    cpu_over_limit: float
    wall_over_limit: float


def write_samples(folder: Path) -> None:
    """Write a cache of all that X3KD reads, with full-size maps, and the same arrays in the format of each peer."""
    signals = {**load_spec("x3kd").signals, "instances": SignalSpec(encoding="masks")}
    spec = CacheSpec(name="x3kd", block=_BLOCK, signals=signals)
    header = Header(
        spec=spec,
        teacher=TeacherIdentity(name="bench", architecture={}, weights_sha256="0" * 64),
        dataset=DatasetIdentity(name="bench", version="1", split="all", frames=SAMPLES, annotation_digest="0"),
        grid=GRID,
        classes=CLASSES,
        tokens=tuple(f"sample-{index}" for index in range(SAMPLES)),
    )
    shapes: dict[str, tuple[int, ...]] = {name: (channels, *GRID.shape) for name, channels in CHANNELS.items()}
    writer = CacheWriter.open(folder / "cache", header, {**shapes, "instances": ()})
    rng = np.random.default_rng(0)
    for block in writer.pending():
        writer.write_block(block, (_sample(rng) for _ in writer.header.block_tokens(block)))
    writer.seal()
    peers.write_copies(folder)


def _sample(rng: np.random.Generator) -> dict[str, Any]:
    """Return a frame like those of a sparse encoder and a BEV encoder: objects in clusters, ReLU, heavy tails."""
    return {
        "bev_low": _map(rng, CHANNELS["bev_low"], 0.2),
        "bev_high": _map(rng, CHANNELS["bev_high"], 0.5),
        "boxes": Boxes(
            torch.from_numpy(rng.normal(size=(_BOXES, 9)).astype(np.float32)),
            torch.from_numpy(rng.integers(0, len(CLASSES), _BOXES)),
            torch.from_numpy(rng.uniform(0.1, 1, _BOXES).astype(np.float32)),
        ),
        "instances": _instances(rng),
    }


def _map(rng: np.random.Generator, channels: int, occupied: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    rows, columns = GRID.shape
    coarse = rng.random((rows // 6, columns // 6)).repeat(6, 0).repeat(6, 1) < occupied
    scale = rng.gamma(2.0, 0.2, (channels, 1, 1)).astype(np.float32)
    values = rng.standard_normal((channels, rows, columns), np.float32)
    return np.maximum(values * scale, 0) * coarse


def _instances(rng: np.random.Generator) -> Instances:
    corner = rng.uniform(0, 700, (_INSTANCES, 2))
    size = rng.integers(20, 160, (_INSTANCES, 2))
    masks = []
    for width, height in size.tolist():
        y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
        masks.append(torch.from_numpy(x**2 + y**2 < 1 + 0.2 * rng.random()))
    return Instances(
        torch.from_numpy(rng.integers(0, _CAMERAS, _INSTANCES)),
        torch.from_numpy(np.concatenate([corner, corner + size], axis=1).astype(np.float32)),
        torch.from_numpy(rng.integers(0, len(CLASSES), _INSTANCES)),
        torch.from_numpy(rng.uniform(0.2, 1, _INSTANCES).astype(np.float32)),
        tuple(masks),
    )


def measure(folder: Path, rounds: int, reads: int) -> list[Reading]:
    """Return what reading costs each peer: warm and cold, and warm in two processes at once.

    In each round every peer reads the same random samples, in an order of peers that changes from round to round, so
    that a busy machine hits all of them alike.
    """
    found = _readings(_rounds(folder, "warm", rounds, reads, seed=0), "warm", 1)
    found += _readings(_rounds(folder, "cold", rounds, reads, seed=1), "cold", 1)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pairs = pool.starmap(_rounds, [(folder, "warm", rounds, reads, seed) for seed in (2, 3)])
    return found + _readings([one for pair in pairs for one in pair], "warm", 2)


Times = dict[str, tuple[float, float]]
"""CPU and wall time of a round in seconds per sample, by peer."""


def _rounds(folder: Path, pages: str, rounds: int, reads: int, seed: int) -> list[Times]:
    rng, count = np.random.default_rng(seed), len(CacheReader.open(folder / "cache"))
    opened = {name: peers.open_peer(name, folder) for name in peers.names()}
    files = {name: peers.files_of(name, folder) for name in opened}
    for read in opened.values():
        read(0)
    times = []
    for _ in range(rounds):
        samples = rng.integers(0, count, reads).tolist()
        round_times: Times = {}
        for name in rng.permutation(list(opened)).tolist():
            round_times[name] = _time(opened[name], samples, files[name] if pages == "cold" else [])
        times.append(round_times)
    return times


def _time(read: peers.Read, samples: list[int], drop: list[Path]) -> tuple[float, float]:
    cpu = wall = 0.0
    for sample in samples:
        peers.drop_from_page_cache(drop)
        started = time.process_time(), time.perf_counter()
        read(sample)
        cpu += time.process_time() - started[0]
        wall += time.perf_counter() - started[1]
    return cpu / len(samples), wall / len(samples)


def _readings(rounds: list[Times], pages: str, processes: int) -> list[Reading]:
    return [
        Reading(
            name,
            pages,
            processes,
            cpu_ms=_median(times[name][0] * 1e3 for times in rounds),
            wall_ms=_median(times[name][1] * 1e3 for times in rounds),
            cpu_over_limit=_median(times[name][0] / times["limit"][0] for times in rounds),
            wall_over_limit=_median(times[name][1] / times["limit"][1] for times in rounds),
        )
        for name in peers.names()
    ]


def _median(values: Iterator[float]) -> float:
    found = statistics.median(values)
    assert math.isfinite(found)
    return found
