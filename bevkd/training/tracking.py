"""What a run leaves to read: one JSON object per line, and the same for TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bevkd.training.checkpoint import write_atomic


class Tracker:
    """Appends to ``log.jsonl`` and to ``tensorboard/`` in a run's folder.

    Resuming at step ``start`` first drops the lines that a killed run wrote after its last checkpoint.
    """

    def __init__(self, run: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = run / "log.jsonl"
        if self._path.exists():
            write_atomic(self._path, b"".join(_lines_until(self._path, start)))
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1 if start else None)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Record ``figures`` of ``step``."""
        self._file.write(json.dumps({"step": step, **figures}) + "\n")
        self._file.flush()
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        self._board.close()


def _lines_until(path: Path, step: int) -> list[bytes]:
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    return kept


def read_log(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's ``log.jsonl``."""
    path = run / "log.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
