"""Numbers to few bits and back, row by row, with a fixed order of summation: the same input gives the same bytes.

Imports no torch. M values per row, R rows: a row is a channel of a map, or the points of a box.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bevkd.cache.arrays import LOGIT_CUT, LOGIT_FLOOR, LOGIT_LIMIT, LOGIT_STEP
from bevkd.cache.statistics import ChannelSums

Array = npt.NDArray[Any]

_TINY = float(np.finfo(np.float32).tiny)
_DTYPES = {"float16": "f2", "sparse": "f2", "int8": "i1", "root8": "i1"}


@dataclass(frozen=True)
class Encoded:
    """One sample of one signal as it is stored.

    Attributes:
        arrays: stored array per array name.
        error: see ``SignalSpec.max_error``.
        cosine: cosine similarity of input and stored values; 1 if both are all zero, 0 if one is.
        sums: of a feature map's channels, for the statistics.
    """

    arrays: dict[str, Array]
    error: float
    cosine: float
    sums: ChannelSums | None = None


@dataclass(frozen=True)
class Quantised:
    """Rows as they are stored.

    Attributes:
        levels: [R,M]; what restores a value is said in ``bevkd.cache.arrays``.
        scales, offsets: [R] float32.
        error: relative L2 norm of the difference; of logits the largest difference of a probability.
        cosine: cosine similarity of input and stored values; 1 if both are all zero, 0 if one is.
        sums, squares: [R] of each row's stored values and of their squares; of logits those of the probabilities.
    """

    levels: Array
    scales: Array
    offsets: Array
    error: float
    cosine: float
    sums: Array
    squares: Array


@dataclass(frozen=True)
class _Row:
    levels: Array
    restored: Array
    scale: float = 1.0
    offset: float = 0.0


def quantise(encoding: str, rows: Array, levels: int = 127) -> Quantised:
    """Return float32 ``rows`` [R,M] in ``encoding``, one after the other: a row fits the processor's cache.

    Args:
        levels: see ``SignalSpec.levels``.
    """
    stored = np.empty(rows.shape, _DTYPES.get(encoding, "u1"))
    scales, offsets = np.ones(len(rows), np.float32), np.zeros(len(rows), np.float32)
    sums, products = np.zeros(len(rows)), np.zeros((len(rows), 4))
    worst = 0.0
    for index, values in enumerate(rows):
        row = _ENCODERS[encoding](values, levels)
        stored[index], scales[index], offsets[index] = row.levels, row.scale, row.offset
        before, after = values.astype(np.float64), row.restored.astype(np.float64)
        if encoding in ("logit8", "logits"):
            worst = max(worst, _largest(_sigmoid(before / 2), _sigmoid(after / 2)) if encoding == "logits" else 0.0)
            before, after = _sigmoid(before), _sigmoid(after)
            worst = max(worst, _largest(before, after))
        difference = after - before
        sums[index] = after.sum()
        pairs = ((before, before), (after, after), (difference, difference), (before, after))
        products[index] = [(one * other).sum() for one, other in pairs]
    input2, stored2, difference2, product = (sum(column) for column in products.T.tolist())
    norm = math.sqrt(input2) * math.sqrt(stored2)
    cosine = product / norm if norm > 0 else float(input2 == stored2)
    relative = math.sqrt(difference2 / input2) if input2 > 0 else 0.0
    error = worst if encoding in ("logit8", "logits") else relative
    return Quantised(stored, scales, offsets, error, cosine, sums, products[:, 1])


def _largest(before: Array, after: Array) -> float:
    return float(np.abs(after - before).max(initial=0.0))


def _sigmoid(logits: Array) -> Array:
    probability: Array = 1 / (1 + np.exp(-np.clip(logits, -30, 30)))
    return probability


def _float16(values: Array, levels: int) -> _Row:
    del levels
    with np.errstate(over="ignore"):  # overflow becomes an infinite error, which is refused
        stored = values.astype(np.float16)
    return _Row(stored, stored.astype(np.float32))


def _scaled(top: int) -> Callable[[Array, int], _Row]:
    """Return the encoder to steps of one width up to level ``top``; no value other than zero becomes zero."""

    def encode_row(values: Array, levels: int) -> _Row:
        del levels
        peak: float = np.abs(values).max(initial=0.0).item()
        if peak == 0:
            return _Row(values, values, 0.0)
        scale = np.float32(max(peak / top, _TINY))
        level = _lift(np.rint(values / scale), values)
        return _Row(level, level * scale, float(scale))

    return encode_row


def _root(values: Array, levels: int) -> _Row:
    """Encode to ``level * abs(level) * scale``: steps are narrow where values are small.

    Channels of a teacher have heavy tails. Steps of one width, set by the peak, are too wide for most of their values;
    and compressed by zstd they take more bytes for the same error.
    """
    size = np.abs(values)
    peak: float = size.max(initial=0.0).item()
    if peak == 0:
        return _Row(values, values, 0.0)
    scale = np.float32(max(peak / levels**2, _TINY))
    level = _lift(np.copysign(np.rint(np.sqrt(size / scale)), values), values)
    return _Row(level, level * np.abs(level) * scale, float(scale))


def _lift(level: Array, values: Array) -> Array:
    """Move values that rounding would turn into zero to the lowest level: a mask of empty cells stays exact."""
    lost = (level == 0) & (values != 0)
    level[lost] = np.sign(values[lost])
    return level


def _logits(values: Array, levels: int) -> _Row:
    """Spread 256 levels over the logits of a class, cut to where no loss tells them apart."""
    del levels
    cut = np.clip(values, -LOGIT_CUT, LOGIT_CUT)
    low, high = cut.min(initial=LOGIT_CUT).item(), cut.max(initial=-LOGIT_CUT).item()
    scale, offset = np.float32(max((high - low) / 255, _TINY)), np.float32(low)
    level = np.clip(np.rint((cut - offset) / scale), 0, 255)
    return _Row(level, level * scale + offset, float(scale), float(offset))


def _logit8(values: Array, levels: int) -> _Row:
    del levels
    level = np.rint((np.minimum(values, np.float32(LOGIT_LIMIT)) - LOGIT_FLOOR) / LOGIT_STEP) + 1
    level[values < LOGIT_FLOOR] = 0
    return _Row(level, np.where(level == 0, np.float32(-LOGIT_LIMIT), (level - 1) * LOGIT_STEP + LOGIT_FLOOR))


_ENCODERS: dict[str, Callable[[Array, int], _Row]] = {
    "float16": _float16,
    "uint8": _scaled(255),
    "int8": _scaled(127),
    "root8": _root,
    "sparse": _float16,
    "logits": _logits,
    "logit8": _logit8,
}
