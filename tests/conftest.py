"""Fixtures that several test folders share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from playwright.sync_api import Browser, sync_playwright

import tests.typecheck  # noqa: F401  the import hook of pyproject.toml finds it only once it is loaded

# The same examples in every run, and no deadline: a shared runner may stall for longer than any useful one.
settings.register_profile("bevkd", derandomize=True, deadline=None)
settings.load_profile("bevkd")

# One thread gives the same sums on every machine, and is the fastest for tensors of this size.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of real nuScenes and KITTI samples; it may not be passed on, so it is not in the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "real_data"
    folder = Path(os.environ.get("BEVKD_REAL_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no real sensor data in {folder}; set BEVKD_REAL_DATA to run this test")
    return folder


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Return a headless Chromium that is installed on this machine; playwright's own browsers are not downloaded."""
    places = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    program = next((place for place in places if place), None)
    if program is None:
        pytest.skip("no Chromium; install it (Debian: apt-get install chromium) to run this test")
    quiet = ("background-networking", "component-update", "gpu", "quic", "sync")
    arguments = ["--no-sandbox", "--no-first-run", *(f"--disable-{each}" for each in quiet)]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=arguments)
        yield started
        started.close()
