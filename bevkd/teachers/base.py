"""What a teacher is: something that turns batches into signals, and says exactly what it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from bevkd.cache.manifest import TeacherIdentity
from bevkd.data.collate import Batch
from bevkd.data.join import View
from bevkd.grid import BEVGrid
from bevkd.types import Signals


class Teacher(Protocol):
    """An eval-mode model: running batch-norm statistics, no dropout, no gradient.

    Attributes:
        identity: what the manifest of its caches says about it.
        view: the sensors and image size that it reads.
        shapes: per-sample shape of each map that it writes; one that writes ``instances`` lists them with
            the shape (). Every other teacher writes ``boxes`` as well.

    It may also have ``absent``, a mapping that says why it does not write a map or ``boxes``, for the message that
    refuses a spec.
    """

    identity: TeacherIdentity
    view: View
    grid: BEVGrid
    classes: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]

    def infer(self, batch: Batch) -> Signals:
        """Return the signals of a batch that is not augmented."""
        ...
