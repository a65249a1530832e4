"""Evaluation in the loop: the score by which a run keeps its best weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from bevkd.evaluation.score import Report
from bevkd.training.result import Validation


def spread(tokens: Sequence[str], count: int | None) -> tuple[str, ...]:
    """Return ``count`` of ``tokens``, evenly spaced; None, or more than there are, returns all."""
    total = len(tokens)
    if count is None or count >= total:
        return tuple(tokens)
    return tuple(tokens[index * total // count] for index in range(count))


def validation_of(report: Report) -> Validation:
    """Return the headline of a report, and as score its NDS or, where there is none, the mean of the headline."""
    headline = report.headline
    score = headline.get("NDS", fmean(headline.values())) if headline else None
    return Validation(score, {f"validation/{name}": value for name, value in headline.items()})


@dataclass
class InLoop:
    """Evaluates a model while it trains, and remembers what it found last.

    Attributes:
        evaluate: returns metrics, None in all but the first of several processes.
        last: step and metrics of the last evaluation of this process.
    """

    evaluate: Callable[[], Report | None]
    last: tuple[int, Report | None] = field(default=(0, None))

    def __call__(self, step: int) -> Validation | None:
        """Return what evaluation finds at ``step``; see ``Trainer.validate``."""
        report = self.evaluate()
        self.last = (step, report)
        return validation_of(report) if report else None
