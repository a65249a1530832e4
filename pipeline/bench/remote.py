"""What an epoch over a cache in an object store costs: requests, and the time of the second one from local copies."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bevkd.cache.local_copy import LocalCopies
from bevkd.cache.reader import CacheReader
from bevkd.cache.transfer import copy
from bevkd.data.sampler import BlockShuffle, FrameOrder
from bevkd.progress import Silent
from pipeline.bench.local_s3 import LocalS3

LATENCY_S = 0.02
_ROUNDS = 7


@dataclass(frozen=True)
class Remote:
    """Reading a cache over S3 with 20 ms of latency per request.

    Attributes:
        requests_per_read: requests of the first epoch per sample and signal, opening the cache included.
        requests_again: of all later epochs.
        direct_requests_per_read: per sample and signal without local copies, once the shards' indices are known.
        second_over_disk: time of a later epoch over that of reading the cache on disk, median over rounds.
    """

    requests_per_read: float
    requests_again: int
    direct_requests_per_read: float
    first_epoch_ms: float
    later_epoch_ms: float
    disk_ms: float
    second_over_disk: float


def measure(cache: Path, scratch: Path) -> Remote:
    """Return what reading ``cache`` over S3 costs; all of its signals, every sample once per epoch."""
    with LocalS3(LATENCY_S) as server, _environment(server.environment):
        uri = f"{server.bucket('bench')}/cache"
        copy(cache, uri, Silent())
        server.reset()
        remote = CacheReader.open(uri, LocalCopies(scratch / "copies", 10**12))
        reads = len(remote) * len(remote.manifest.spec.signals)
        first = _epoch(remote, 0)
        requests = len(server.requests())
        server.reset()
        disk, pairs = CacheReader.open(cache), []
        for epoch in range(1, _ROUNDS + 1):
            pairs.append((_epoch(remote, epoch), _epoch(disk, epoch)))
        again = len(server.requests())
        direct = CacheReader.open(uri)
        _epoch(direct, 0)
        server.reset()
        _epoch(direct, 1)
        return Remote(
            requests_per_read=requests / reads,
            requests_again=again,
            direct_requests_per_read=len(server.requests()) / reads,
            first_epoch_ms=first * 1e3,
            later_epoch_ms=statistics.median(one for one, _ in pairs) * 1e3,
            disk_ms=statistics.median(other for _, other in pairs) * 1e3,
            second_over_disk=statistics.median(one / other for one, other in pairs),
        )


def _epoch(reader: CacheReader, epoch: int) -> float:
    """Read every sample once, shuffled by blocks; return seconds per sample."""
    size, signals = reader.manifest.spec.block, tuple(reader.manifest.spec.signals)
    blocks = BlockShuffle({token: index // size for index, token in enumerate(reader.tokens)}, window=2)
    order = FrameOrder(reader.tokens, (), None, 0, blocks)
    started = time.perf_counter()
    for position in range(epoch * len(reader), (epoch + 1) * len(reader)):
        reader.read(order[position], signals)
    return (time.perf_counter() - started) / len(reader)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
