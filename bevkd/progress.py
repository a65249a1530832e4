"""How long work reports where it is; the command line draws it, tests and workers stay silent."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator


class Task(Protocol):
    """One long piece of work."""

    def advance(self, steps: int = 1, **figures: float) -> None:
        """Count ``steps`` more as done; ``figures`` are shown beside the bar (loss, data wait, MB/s)."""
        ...


class Progress(Protocol):
    """Where tasks are shown."""

    def task(self, name: str, total: int, unit: str, done: int = 0) -> AbstractContextManager[Task]:
        """Show a task of ``total`` units, ``done`` of which were finished earlier."""
        ...

    def note(self, message: str) -> None:
        """Show one line that stays."""
        ...


class Silent:
    """Shows nothing."""

    @contextmanager
    def task(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        """Yield a task that shows nothing."""
        del name, total, unit, done
        yield self

    def advance(self, steps: int = 1, **figures: float) -> None:
        """Do nothing."""

    def note(self, message: str) -> None:
        """Do nothing."""
