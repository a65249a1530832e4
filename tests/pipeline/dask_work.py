"""What dask workers do in tests of the schedule; imports nothing heavy, as workers that died start anew."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any


def count(block: int) -> dict[str, Any]:
    """Succeed."""
    return {"block": block, "frames": 1}


def die(block: int) -> dict[str, Any]:
    """End the worker at block 1."""
    if block == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return count(block)


def fail(block: int) -> dict[str, Any]:
    """Fail at every block."""
    raise OSError(f"no way to write {block}")


def fail_once(block: int, marks: str) -> dict[str, Any]:
    """Fail at the first try of each block, which leaves a mark in a folder."""
    mark = Path(marks) / str(block)
    if not mark.exists():
        mark.touch()
        raise OSError("the network hiccuped")
    return count(block)
