"""What a run found and what it cost."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Validation:
    """What an evaluation in the loop found.

    Attributes:
        score: the higher, the better; None if there is none, e.g. on frames without objects.
        figures: for the log, by name.
    """

    score: float | None
    figures: Mapping[str, float]


@dataclass(frozen=True)
class TrainingResult:
    """What a run cost, over the steps that this process ran (medians, so a slow first step does not count).

    Attributes:
        step_seconds: wall time per optimizer step.
        data_wait_fraction: share of it spent waiting for the loader.
        peak_memory_bytes: of the device; on a CPU the process's largest resident set.
        best_step, best_score: of the evaluations in the loop; ``best.safetensors`` holds these weights.
        warnings: what the run had to say about its terms, since its beginning.
    """

    steps: int
    step_seconds: float
    data_wait_fraction: float
    peak_memory_bytes: int
    best_step: int | None = None
    best_score: float | None = None
    warnings: tuple[str, ...] = ()


def peak_memory(device: torch.device) -> int:
    """Return the bytes that the device has held at most; on a CPU the process's largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
