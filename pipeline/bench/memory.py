"""Peak memory of a piece of work, and processes of their own to measure it in."""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def in_new_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Return what ``function``, of a module's top level, returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_mb(work: Callable[[], object], device: torch.device) -> float | None:
    """Return how far memory rises above what is held while ``work`` runs, in MB; None where that cannot be told.

    On a CPU it is the resident set of the process, whoever allocates in it, which only Linux can tell. ``work`` runs
    twice: what libraries load at its first run is not its own.
    """
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - held) / 1e6
    _return_freed()
    try:
        _RESET.write_text(_RESET_PEAK, encoding="ascii")
        before = _resident("VmRSS")
        work()
        return (_resident("VmHWM") - before) / 1e6
    except OSError:
        return None


def _resident(field: str) -> int:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _return_freed() -> None:
    """Give memory that was freed back to the system, so that its next use counts."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
