"""What a few independent values say about their mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True)
class Estimate:
    """Mean and spread of a figure over runs.

    Attributes:
        spread: sample standard deviation; None of a single value.
        interval: two-sided 95 % interval of the mean by Student's t; None of a single value.
    """

    mean: float
    spread: float | None = None
    interval: tuple[float, float] | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Return the estimate from independent values, at least one."""
        mean = fmean(values)
        if len(values) < 2:
            return cls(mean)
        spread = stdev(values)
        reach = t_quantile(0.975, len(values) - 1) * spread / math.sqrt(len(values))
        return cls(mean, spread, (mean - reach, mean + reach))


def t_quantile(share: float, freedom: int) -> float:
    """Return the value below which ``share`` (from 0.5) of Student's t with so many degrees of freedom lies."""
    low, high = 0.0, 1.0
    while _t_below(high, freedom) < share:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_below(middle, freedom) < share else (low, middle)
    return (low + high) / 2


def _t_below(value: float, freedom: int) -> float:
    """Return the share below ``value`` >= 0, by the finite sums 26.7.3 and 26.7.4 of Abramowitz and Stegun."""
    angle = math.atan(value / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = total = cosine if odd else 1.0
    for step in range(3 if odd else 2, freedom, 2):
        term *= cosine**2 * (step - 1) / step
        total += term
    inner = (angle + (sine * total if freedom > 1 else 0.0)) * 2 / math.pi if odd else sine * total
    return (1 + inner) / 2
