"""The local S3 server of tests and benchmarks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bevkd.cache.store import Store, open_store
from bevkd.errors import BevkdError
from pipeline.bench.local_s3 import Fault, LocalS3


@pytest.fixture(scope="module")
def server() -> Iterator[LocalS3]:
    with LocalS3(latency_s=0.02) as running:
        yield running


@pytest.fixture
def store(server: LocalS3, monkeypatch: pytest.MonkeyPatch) -> Store:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    made = open_store(f"{server.bucket(f'bucket-{time.monotonic_ns()}')}/cache")
    server.reset()
    return made


def test_requests_are_counted_by_method_and_kind(server: LocalS3, store: Store) -> None:
    store.create("zarr.json", b"text")
    store.create("commits/0.json", b"text")
    store.read("zarr.json", 10)
    store.sizes("commits")
    store.exists("bev_low/c.0.0")
    wanted = {"PUT metadata": 1, "PUT record": 1, "GET metadata": 1, "LIST list": 1, "HEAD shard": 1}
    assert server.counts() == wanted
    assert [request.status for request in server.requests()] == [200, 200, 200, 200, 404]
    server.reset()
    assert server.counts() == {}


def test_every_request_takes_the_latency(server: LocalS3, store: Store) -> None:
    store.create("zarr.json", b"text")
    begin = time.monotonic()
    for _ in range(5):
        store.read("zarr.json", 10)
    assert time.monotonic() - begin >= 5 * server.latency_s


def test_faults_hit_the_requests_they_are_meant_for(server: LocalS3, store: Store) -> None:
    store.create("zarr.json", b"text")
    store.create("manifest.json", b"text")
    server.fail(Fault("slow_down", at=1, times=2, method="GET", key="manifest"))
    for _ in range(2):
        assert store.exists("manifest.json")
        store.read("zarr.json", 10)
        store.read("manifest.json", 10)
    assert server.counts() == {"HEAD manifest": 2, "GET metadata": 2, "GET manifest": 4}


def test_a_bucket_that_cannot_be_made_is_told(server: LocalS3) -> None:
    with pytest.raises(BevkdError, match=r"the bucket 'b' cannot be made: InvalidBucketName\. Give another"):
        server.bucket("b")


def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "moto").mkdir()
    (tmp_path / "moto" / "__init__.py").write_text("raise ModuleNotFoundError('none', name='moto')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    with pytest.raises(BevkdError, match=r"needs the package 'moto'\. Install it with: pip install 'bevkd\[bench\]'"):
        LocalS3().__enter__()
