"""What the command line shows: progress, tables, JSON. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from rich.table import Table

    from bevkd.cache.catalogue import Entry

out = Console()
err = Console(stderr=True)


class Bars:
    """Progress on stderr: a live bar on a terminal, a line now and then elsewhere, nothing with ``--json``.

    Of the processes that torchrun started only the first one shows anything.
    """

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet or os.environ.get("RANK", "0") != "0"

    @contextlib.contextmanager
    def task(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[_Bar]:
        """Show a task; see ``bevkd.progress.Progress``."""
        bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[figures]}[/dim]"),
            console=err,
            transient=True,
            disable=self._quiet or not err.is_terminal,
        )
        with bars:
            bar = _Bar(bars, bars.add_task(name, total=total, completed=done, speed="", figures=""), unit, self._quiet)
            yield bar
        if not self._quiet:
            err.print(bar.summary(), highlight=False)

    def note(self, message: str) -> None:
        """Show one line that stays."""
        if not self._quiet:
            err.print(f"[dim]{escape(message)}[/dim]", highlight=False, soft_wrap=True)


class _Bar:
    """One task: count, throughput, time left and the figures that the work reports."""

    _PAUSE_S = 20.0

    def __init__(self, bars: Progress, identity: TaskID, unit: str, quiet: bool) -> None:
        self._bars, self._id, self._unit = bars, identity, unit
        self._lines = bars.disable and not quiet
        self._task = bars.tasks[0]
        self._first = self._task.completed
        self._started = self._shown = time.monotonic()

    def advance(self, steps: int = 1, **figures: float) -> None:
        """Count steps and show figures; see ``bevkd.progress.Task``."""
        text = "  ".join(
            f"{name.replace('_', ' ')} {value:.0%}"
            if name.endswith("_wait")
            else f"{name.replace('_', ' ')} {value:.3g}"
            for name, value in figures.items()
        )
        self._bars.update(self._id, advance=steps, speed=self._speed(), figures=text)
        if self._lines and time.monotonic() - self._shown >= self._PAUSE_S:
            self._shown = time.monotonic()
            left = (self._task.total or 0) - self._task.completed
            rate = self._rate()
            eta = f"{left / rate:.0f} s left" if rate else ""
            err.print(f"{self.summary()}  {eta}  {text}", highlight=False, soft_wrap=True)

    def summary(self) -> str:
        """Return count and throughput in one line."""
        speed = f", {self._speed()}" if self._rate() else ""
        return f"{self._task.description}: {self._task.completed:.0f} of {self._task.total:.0f} {self._unit}s{speed}"

    def _rate(self) -> float:
        done = self._task.completed - self._first
        return done / max(time.monotonic() - self._started, 1e-9)

    def _speed(self) -> str:
        return f"{self._rate():.1f} {self._unit}/s"


def print_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


def say(text: str) -> None:
    """Print text as it is, however long its lines."""
    out.print(escape(text), highlight=False, soft_wrap=True)


def size_text(count: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} TB"


def facts_table(facts: Mapping[str, Any]) -> Table:
    """Return names and values side by side; a value that is a mapping itself has a line per entry."""
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # a name is worth nothing cut short
    for name, value in facts.items():
        lines = [f"{key}: {text}" for key, text in value.items()] if isinstance(value, dict) else [str(value)]
        table.add_row(f"[bold]{name}[/bold]", escape("\n".join(lines)))
    return table


def cache_table(entries: Sequence[Entry]) -> Table:
    """Return a listing of caches; a single one with its whole address."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("cache", "state", "frames", "size", "spec", "teacher", "data set", "name"):
        table.add_column(column, justify="right" if column in ("frames", "size") else "left", overflow="fold")
    for entry in entries:
        where = entry.uri if len(entries) == 1 else entry.uri.rpartition("/")[2]
        state = entry.state if entry.state == "sealed" else f"[yellow]{escape(entry.state)}[/yellow]"
        figures = (str(entry.frames), size_text(entry.bytes)) if entry.frames else ("", "")
        words = (escape(text) for text in (entry.spec, entry.teacher, entry.dataset))
        table.add_row(escape(where), state, *figures, *words, entry.name[:8])
    return table
