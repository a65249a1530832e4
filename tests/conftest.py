"""Fixtures that several test folders share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

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
