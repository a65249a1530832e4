"""A whole session, from the first block to the last sample, with a fault at every request."""

from __future__ import annotations

import time

import pytest

from bevkd.cache.reader import CacheReader
from bevkd.errors import BevkdError
from pipeline.bench.local_s3 import FAULT_KINDS, Fault, FaultKind, LocalS3
from tests.cache import kit
from tests.cache import s3 as caches

HEADER = kit.header(2, block=2, signals={"bev_low": kit.SIGNALS["bev_low"]})

Samples = dict[str, dict[str, bytes]]


def session(uri: str) -> Samples:
    """Write and seal a cache, open it, and return all that it holds."""
    kit.write(uri, HEADER)
    return read(uri)


def read(uri: str) -> Samples:
    reader = CacheReader.open(uri)
    return {
        token: {name: array.tobytes() for name, array in reader.read(token, ["bev_low"]).items()}
        for token in reader.tokens
    }


@pytest.fixture
def whole(bucket: str, s3: LocalS3) -> tuple[Samples, dict[str, bytes], int]:
    """What an undisturbed session reads and leaves, and how many requests it takes."""
    s3.reset()
    samples = session(f"{bucket}/whole")
    requests = len(s3.requests())
    return samples, caches.content(f"{bucket}/whole"), requests


def kinds_at(request: int, every: bool) -> tuple[FaultKind, ...]:
    """Return the faults to try at a request: all, or one in turn."""
    return FAULT_KINDS if every else (FAULT_KINDS[request % len(FAULT_KINDS)],)


EVERY = [False, pytest.param(True, marks=pytest.mark.slow)]


@pytest.mark.parametrize("every", EVERY)
def test_a_session_survives_a_fault_at_any_request(
    bucket: str, s3: LocalS3, whole: tuple[Samples, dict[str, bytes], int], every: bool
) -> None:
    samples, content, requests = whole
    assert requests > 25
    for request in range(requests):
        for kind in kinds_at(request, every):
            uri = f"{bucket}/{request}-{kind}"
            s3.fail(Fault(kind, at=request, stall_s=1.0))
            assert session(uri) == samples, (kind, request)
            assert len(s3.requests()) > requests, "the fault did not happen"
            assert caches.content(uri) == content, (kind, request)


@pytest.mark.parametrize("every", EVERY)
def test_a_store_that_fails_for_good_at_any_request_leaves_what_a_rerun_completes(
    bucket: str,
    s3: LocalS3,
    whole: tuple[Samples, dict[str, bytes], int],
    monkeypatch: pytest.MonkeyPatch,
    every: bool,
) -> None:
    samples, content, requests = whole
    for request in range(requests):
        for kind in kinds_at(request, every):
            uri = f"{bucket}/{request}-{kind}"
            s3.fail(Fault(kind, at=request, times=None, stall_s=1.0))
            monkeypatch.setenv("BEVKD_STORE_RETRY_S", "0.05")
            begin = time.monotonic()
            with pytest.raises(BevkdError, match=r"s3://bucket-[^ ]+ ?.*(answers 50|was cut|not answer)"):
                session(uri)
            assert time.monotonic() - begin < 10
            monkeypatch.setenv("BEVKD_STORE_RETRY_S", "5")
            s3.reset()
            assert session(uri) == samples, (kind, request)
            assert caches.content(uri) == content, (kind, request)
