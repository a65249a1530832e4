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

from bevkd.cache.reader import CacheReader
from bevkd.cache.spec import CacheSpec, SignalSpec
from bevkd.cache.writer import CacheWriter
from bevkd.progress import Progress
from bevkd.types import Instances
from pipeline.bench import peers
from pipeline.cache_teacher import Stage, load_batches, prepare, stored_of
from pipeline.recipe import CacheRecipe

SAMPLES = 24
_BLOCK = 8
_CAMERAS, _INSTANCES = 6, 40


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


def write_samples(folder: Path, recipe: CacheRecipe, frames: int, progress: Progress) -> None:
    """Write a cache of all that X3KD reads of the recipe's teacher, and the same arrays in the format of each peer.

    The masks of X-IS, which come from another teacher, are ellipses.

    Args:
        frames: of the data set; they are repeated until there are ``SAMPLES``.
    """
    stage = prepare(recipe, frames, progress)
    distinct = list(_distinct(stage))
    signals = {**stage.header.spec.signals, "instances": SignalSpec(encoding="masks")}
    tokens = tuple(f"sample-{index}" for index in range(SAMPLES))
    spec = CacheSpec(name=stage.header.spec.name, block=_BLOCK, signals=signals)
    header = stage.header.model_copy(update={"spec": spec, "tokens": tokens})
    writer = CacheWriter.open(folder / "cache", header, {**stage.teacher.shapes, "instances": ()})
    rng = np.random.default_rng(0)
    for block in writer.pending():
        numbers = range(block * _BLOCK, block * _BLOCK + len(writer.header.block_tokens(block)))
        known = ({**distinct[number % len(distinct)], "instances": _instances(rng)} for number in numbers)
        writer.write_block(block, known)
    writer.seal()
    peers.write_copies(folder)


def _distinct(stage: Stage) -> Iterator[dict[str, Any]]:
    """Yield the signals of each frame of a recipe."""
    for batch in load_batches(stage, stage.header, range(stage.header.blocks)):
        signals = stage.teacher.infer(batch)
        yield from (dict(stored_of(stage, batch, signals, index)) for index in range(len(batch.tokens)))


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
        torch.from_numpy(rng.integers(0, 10, _INSTANCES)),
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
