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

from bevkd.errors import CheckpointError


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run: one folder per step, and the newest ``keep`` of them stay.

    A folder is filled under a temporary name and renamed when complete, so any ``step_*`` folder is whole.
    """

    folder: Path
    keep: int

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write ``state`` (tensors, numbers, strings and containers of them) as the checkpoint of ``step``."""
        final = self.folder / f"step_{step:08d}"
        temporary = self.folder / f".{final.name}.{os.getpid()}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        # Through memory, because torch turns a full disk into an error of its own that does not say so.
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        write_atomic(temporary / "state.pt", buffer.getvalue())
        write_atomic(temporary / "checkpoint.json", json.dumps({"step": step}).encode())
        shutil.rmtree(final, ignore_errors=True)
        temporary.replace(final)
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.folder / f"step_{old:08d}")
        return final

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, oldest first, and remove what a killed run left behind."""
        for leftover in self.folder.glob(".step_*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        return sorted(int(path.name.removeprefix("step_")) for path in self.folder.glob("step_*"))

    def load_latest(self, device: torch.device) -> tuple[int, dict[str, Any]] | None:
        """Return step and state of the newest checkpoint, or None if there is none."""
        steps = self.steps()
        if not steps:
            return None
        path = self.folder / f"step_{steps[-1]:08d}" / "state.pt"
        try:
            state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            # torch's own text advises to load without weights_only, which would execute what the file holds.
            raise CheckpointError(
                f"checkpoint {path} is damaged or not one of bevkd ({type(error).__name__}). "
                "Delete its folder to resume from the one before."
            ) from error
        return steps[-1], state
