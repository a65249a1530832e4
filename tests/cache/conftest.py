from __future__ import annotations

import multiprocessing
import os
import secrets
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from pipeline.bench.local_s3 import LocalS3
from tests.cache import kit


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync, which only matters when the power fails, and costs most of the time of these tests."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="session")
def context() -> Iterator[ForkServerContext]:
    """Processes forked from a server that has imported everything, so that each starts in milliseconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "PYTHONPATH", os.pathsep.join([str(Path(kit.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        )
        forkserver = multiprocessing.get_context("forkserver")
        forkserver.set_forkserver_preload(["tests.cache.kit"])
        process = forkserver.Process(target=kit.nothing)
        process.start()
        process.join()
        yield forkserver


@pytest.fixture(scope="session")
def server() -> Iterator[LocalS3]:
    """A running S3 server."""
    with LocalS3() as running:
        yield running


@pytest.fixture
def s3(server: LocalS3, monkeypatch: pytest.MonkeyPatch) -> LocalS3:
    """The S3 server without faults or counts; the environment leads to it, and asks for little patience."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "BEVKD_STORE_"))]:
        monkeypatch.delenv(name)
    patience = {"BEVKD_STORE_TIMEOUT_S": "0.5", "BEVKD_STORE_RETRY_S": "5"}
    for name, value in (server.environment | patience).items():
        monkeypatch.setenv(name, value)
    server.reset()
    return server


@pytest.fixture
def bucket(s3: LocalS3) -> str:
    """The address of a new bucket."""
    address = s3.bucket(f"bucket-{secrets.token_hex(6)}")
    s3.reset()
    return address
