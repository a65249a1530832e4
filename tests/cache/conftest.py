from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync, which only matters when the power fails, and costs most of the time of these tests."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
