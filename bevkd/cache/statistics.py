"""Mean and spread of a teacher's features, channel by channel, by which losses bring them to one scale.

A cell or point whose vector is all zero holds nothing, as where a LiDAR saw no point, and does not count. Imports
nothing heavy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Annotated

from pydantic import Field, model_validator

from bevkd.config import StrictModel
from bevkd.signals import POINTS

FEATURES = ("bev_low", "bev_high", *POINTS)
"""Signals that statistics are kept of: maps, and what lies at the points of annotated boxes."""

_DIGITS = 7

Count = Annotated[int, Field(ge=0, lt=2**63)]


class ChannelSums(StrictModel):
    """What statistics are made from; those of several samples add up.

    Attributes:
        positions: cells or points.
        filled: of them those that hold something.
        sums, squares: of each channel's values and of their squares, over ``filled``.
    """

    positions: Count
    filled: Count
    sums: tuple[float, ...]
    squares: tuple[float, ...]

    def plus(self, other: ChannelSums) -> ChannelSums:
        """Return the sums over both."""
        return ChannelSums(
            positions=self.positions + other.positions,
            filled=self.filled + other.filled,
            sums=tuple(one + more for one, more in zip(self.sums, other.sums, strict=True)),
            squares=tuple(one + more for one, more in zip(self.squares, other.squares, strict=True)),
        )


class ChannelStatistics(StrictModel):
    """Of the vectors that hold something, over all samples of a cache.

    Attributes:
        vectors: how many there are.
        share: of all cells or points.
        mean, std: of each channel.
    """

    vectors: Count
    share: float = Field(gt=0, le=1)
    mean: tuple[float, ...] = Field(min_length=1)
    std: tuple[Annotated[float, Field(ge=0)], ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> ChannelStatistics:
        if len(self.mean) != len(self.std):
            raise ValueError(f"has {len(self.mean)} means and {len(self.std)} standard deviations")
        return self


def added(sums: Mapping[str, ChannelSums], more: Mapping[str, ChannelSums]) -> dict[str, ChannelSums]:
    """Return the sums over both, of the signals that both have."""
    return {name: own.plus(more[name]) for name, own in sums.items() if name in more}


def statistics_of(blocks: Iterable[Mapping[str, ChannelSums]]) -> dict[str, ChannelStatistics]:
    """Return the statistics of each signal of which every block has sums and some hold anything."""
    every = list(blocks)
    names = [name for name in FEATURES if all(name in block for block in every)]
    totals = {name: reduce(ChannelSums.plus, [block[name] for block in every]) for name in names if every}
    return {name: _statistics(total) for name, total in totals.items() if total.filled}


def _statistics(total: ChannelSums) -> ChannelStatistics:
    means = [value / total.filled for value in total.sums]
    variances = [value / total.filled - mean**2 for value, mean in zip(total.squares, means, strict=True)]
    return ChannelStatistics(
        vectors=total.filled,
        share=_rounded(total.filled / total.positions),
        mean=tuple(map(_rounded, means)),
        std=tuple(_rounded(math.sqrt(max(variance, 0.0))) for variance in variances),
    )


def _rounded(value: float) -> float:
    """Return ``value`` without the digits in which processors may differ."""
    return float(f"{value:.{_DIGITS}g}")
