"""Checkpoints that are either complete or not there."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bevkd.errors import CheckpointError
from bevkd.models.weights import save_weights

BEST = "best"


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds.

    Attributes:
        weights: of the model as evaluation takes them, for ``model.safetensors``.
        metadata: for the header of that file.
        state: all that resuming needs (tensors, numbers, strings and containers of them), for ``state.pt``.
        facts: what a person wants to know of the run, as JSON values, for ``checkpoint.json``.
    """

    weights: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    state: Mapping[str, Any]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run: one folder per step, of which the newest ``keep`` stay, and that of the best one.

    A folder is filled under a temporary name and renamed when complete, so any that has its name is whole.
    """

    folder: Path
    keep: int

    def save(self, step: int, snapshot: Snapshot, best: bool = False) -> Path:
        """Write the checkpoint of ``step``; the ``best`` one has a place of its own and replaces the one before."""
        final = self.folder / (BEST if best else _name(step))
        temporary = self.folder / f".{final.name}.{os.getpid()}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_weights(temporary / "model.safetensors", snapshot.weights, snapshot.metadata)
        # Through memory, because torch turns a full disk into an error of its own that does not say so.
        buffer = io.BytesIO()
        torch.save(dict(snapshot.state), buffer)
        write_atomic(temporary / "state.pt", buffer.getvalue())
        facts = {"step": step, **snapshot.facts}
        write_atomic(temporary / "checkpoint.json", json.dumps(facts, indent=1).encode())
        shutil.rmtree(final, ignore_errors=True)
        temporary.replace(final)
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.folder / _name(old))
        return final

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, oldest first."""
        return sorted(int(path.name.removeprefix("step_")) for path in self.folder.glob("step_*"))

    def clear(self) -> None:
        """Remove what a killed run left half-written; for the one process that writes, before it does."""
        for leftover in self.folder.glob(".*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)

    def path(self, step: int) -> Path:
        """Return where the state of the checkpoint of ``step`` lies."""
        return self.folder / _name(step) / "state.pt"

    def load_latest(self) -> tuple[int, dict[str, Any]] | None:
        """Return step and state, on the CPU, of the newest checkpoint, or None if there is none.

        Raises:
            CheckpointError: it is damaged.
        """
        steps = self.steps()
        if not steps:
            return None
        path = self.path(steps[-1])
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            # torch's own text advises to load without weights_only, which would execute what the file holds.
            raise CheckpointError(
                f"checkpoint {path} is damaged or not one of bevkd ({type(error).__name__}). "
                "Delete its folder to resume from the one before."
            ) from error
        return steps[-1], state


def _name(step: int) -> str:
    return f"step_{step:08d}"
