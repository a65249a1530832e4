"""Stops for runs that learn nothing any more."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WINDOW, PATIENCE = 100, 20


class LossWatch:
    """Says when the loss stays above ``factor`` times its median.

    The median is that of the last :data:`WINDOW` steps, once there are :data:`PATIENCE`; the loss diverges if it is
    above for :data:`PATIENCE` steps in a row.

    Attributes:
        recent: losses of the last steps, oldest first.
        above: how many of them, to the last, were too high.
    """

    def __init__(self, factor: float | None) -> None:
        self.factor = factor
        self.recent: deque[float] = deque(maxlen=WINDOW)
        self.above = 0

    def diverges(self, loss: float) -> bool:
        """Take the loss of the next step, and return whether the run diverges."""
        if self.factor is None:
            return False
        usual = statistics.median(self.recent) if len(self.recent) >= PATIENCE else math.inf
        self.above = self.above + 1 if 0 < self.factor * usual < loss else 0
        self.recent.append(loss)
        return self.above >= PATIENCE


@dataclass(frozen=True)
class Reading:
    """What the forward passes of one step said, on every process.

    Attributes:
        names: of the loss terms.
        values: of each term, by process and forward pass.
        gradient_norm: before clipping; the same on every process.
    """

    names: tuple[str, ...]
    values: Sequence[Sequence[Sequence[float]]]
    gradient_norm: float

    def means(self) -> dict[str, float]:
        """Return each term's mean over forward passes and processes."""
        means = dict.fromkeys(self.names, 0.0)
        for passes in self.values:
            own = dict.fromkeys(self.names, 0.0)
            for terms in passes:
                for name, value in zip(self.names, terms, strict=True):
                    own[name] += value / len(passes)
            for name, value in own.items():
                means[name] += value / len(self.values)
        return means

    def not_finite(self) -> Mapping[tuple[int, int], tuple[str, ...]]:
        """Return the terms that are not finite, by process and forward pass."""
        found = {
            (process, number): tuple(
                name for name, value in zip(self.names, terms, strict=True) if not math.isfinite(value)
            )
            for process, passes in enumerate(self.values)
            for number, terms in enumerate(passes)
        }
        return {place: names for place, names in found.items() if names}
