"""Writers in an object store that are killed, and writers that work at the same time."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess

import pytest

from bevkd.cache import writer
from bevkd.cache.manifest import MANIFEST
from bevkd.cache.store import open_store, record_of
from bevkd.cache.verify import verify
from pipeline.bench.local_s3 import LocalS3
from tests.cache import kit
from tests.cache import s3 as caches

HEADER = kit.header(12, block=4, signals={name: kit.SIGNALS[name] for name in ("bev_low", "boxes")})
SMALL = kit.header(4, block=2, signals={"bev_low": kit.SIGNALS["bev_low"]})


@pytest.fixture
def whole(bucket: str) -> dict[str, bytes]:
    kit.write(f"{bucket}/whole", HEADER)
    return caches.content(f"{bucket}/whole")


def start(context: ForkServerContext, target: Callable[..., object], *arguments: object) -> ForkServerProcess:
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


@pytest.mark.parametrize("kills", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_a_writer_killed_at_random_moments_leaves_what_a_rerun_completes(
    bucket: str, s3: LocalS3, context: ForkServerContext, whole: dict[str, bytes], kills: int
) -> None:
    begin = time.monotonic()
    start(context, caches.write, f"{bucket}/timing", s3.environment, HEADER).join()
    duration = time.monotonic() - begin
    chance, interrupted = random.Random(5), 0
    for turn in range(6 * kills):
        uri = f"{bucket}/{turn}"
        process = start(context, caches.write, uri, s3.environment, HEADER)
        time.sleep(chance.uniform(0, duration))
        process.kill()
        process.join()
        store = open_store(uri)
        interrupted += process.exitcode == -signal.SIGKILL and not store.empty() and not store.exists(MANIFEST)
        kit.write(uri, HEADER)
        assert caches.content(uri) == whole
        if interrupted == kills:
            break
    assert interrupted == kills


@pytest.mark.parametrize("orders", [(1, -1), (1, 1)])
def test_two_writers_at_the_same_time_write_the_same_cache(
    bucket: str, s3: LocalS3, context: ForkServerContext, whole: dict[str, bytes], orders: tuple[int, int]
) -> None:
    for turn in range(5):
        uri = f"{bucket}/{turn}"
        processes = [start(context, caches.write, uri, s3.environment, HEADER, order) for order in orders]
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0, 0]
        assert caches.content(uri) == whole


def publish_some(uri: str, shards: int) -> None:
    """Publish the first shards of the first block as an attempt with another outcome, which then dies."""
    cache = writer.CacheWriter.open(uri, SMALL, kit.SHAPES)
    for array in cache.header.arrays[:shards]:
        key = f"{array.name}/c.0" + ".0" * len(array.shape)
        path = cache.store.stage(key)
        path.write_bytes(b"of another attempt")
        assert cache.store.publish({key: path}, {key: record_of(path.read_bytes())})
        cache.store.discard({key: path}, committed=False)


@pytest.mark.parametrize("shards", [1, 2])
def test_what_a_dead_attempt_with_another_outcome_has_published_is_replaced(
    bucket: str, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    monkeypatch.setattr(writer, "REMOTE_PATIENCE_S", 0.2)
    kit.write(f"{bucket}/whole", SMALL)
    publish_some(f"{bucket}/cache", shards)
    kit.write(f"{bucket}/cache", SMALL)
    assert caches.content(f"{bucket}/cache") == caches.content(f"{bucket}/whole")
    assert verify(f"{bucket}/cache", deep=True) == []


@pytest.mark.parametrize("rounds", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_attempts_with_different_outcomes_at_the_same_time_leave_one_of_them(
    bucket: str, s3: LocalS3, context: ForkServerContext, rounds: int
) -> None:
    for turn in range(rounds):
        uri = f"{bucket}/{turn}"
        arguments = (uri, s3.environment, SMALL)
        processes = [start(context, caches.write_noisily, *arguments, seed) for seed in range(3)]
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * 3
        assert verify(uri, deep=True) == []
