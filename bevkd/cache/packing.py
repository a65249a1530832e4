"""One sample as it goes to the shards of a cache.

Statistics are made from what is stored, not from what the teacher wrote: equal shards have equal statistics.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bevkd.cache import ragged, shard
from bevkd.cache.encoding import Encoded, Value, decode, encode, shape_of, sums_over
from bevkd.cache.manifest import Header
from bevkd.cache.quantise import Array
from bevkd.cache.spec import SignalSpec
from bevkd.cache.statistics import ChannelSums
from bevkd.errors import CacheError, CacheSpecError
from bevkd.geometry.boxes import nine_points
from bevkd.grid import BEVGrid
from bevkd.signals import POINTS
from bevkd.types import Boxes

ANNOTATED = "annotated"
"""Beside its signals a sample may hold the annotated boxes of its frame under this name."""


class Packed(NamedTuple):
    """A sample in bytes.

    Attributes:
        arrays: compressed, by name.
        stats: what encoding cost, by signal.
        sums: for the statistics, by signal.
    """

    arrays: dict[str, bytes]
    stats: dict[str, Encoded]
    sums: dict[str, ChannelSums]


def pack(header: Header, sample: Mapping[str, Value], token: str) -> Packed:
    """Return a sample as the shards of its cache hold it.

    Args:
        sample: the signals of the spec; others are ignored. :data:`ANNOTATED` may hold the annotated boxes, so that the
            statistics know maps at the points of boxes.

    Raises:
        CacheError: it does not fit the header or its encoding.
    """
    arrays: dict[str, bytes] = {}
    stats, sums = {}, {}
    for signal in sorted(header.spec.signals):
        encoded = _encoded(header, signal, sample, token)
        arrays |= {name: shard.compress(stored) for name, stored in encoded.arrays.items()}
        stats[signal] = dataclasses.replace(encoded, arrays={})
        if encoded.sums:
            sums[signal] = encoded.sums
        points = _at_boxes(header, signal, encoded.arrays, sample.get(ANNOTATED))
        if points is not None:
            name, values = points
            wide = values.reshape(-1, values.shape[-1]).astype(np.float64)
            sums[name] = sums_over((wide != 0).any(axis=1), wide.sum(axis=0), np.square(wide).sum(axis=0))
    return Packed(arrays, stats, sums)


def _at_boxes(
    header: Header, signal: str, arrays: Mapping[str, Array], annotated: Value | None
) -> tuple[str, Array] | None:
    """Return the signal that has what is stored of ``signal`` at the points of boxes, and these values [...,C]."""
    spec = header.spec.signals[signal]
    if signal in POINTS:
        (points,) = ragged.decode_points(signal, _batch(arrays))
        return signal, points.values.numpy()
    name = next((name for name, source in POINTS.items() if source == signal), None)
    if name is None or name in header.spec.signals or not isinstance(annotated, Boxes):
        return None
    xy_m = nine_points(annotated.values[:, :7].cpu().float()).flatten(0, 1)
    return name, sampled(signal, spec, arrays, xy_m, header.grid)


def sampled(
    signal: str, spec: SignalSpec, arrays: Mapping[str, Array], xy_m: Float[Tensor, "m 2"], grid: BEVGrid
) -> Array:
    """Return a stored map at points [m,C] as ``sample_at`` would; no cells but those around them are decoded."""
    position = grid.to_cells(xy_m) - 0.5
    steps = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]])
    cell = position.floor().long()[:, None] + steps
    away = (position[:, None] - cell).abs()
    rows, columns = grid.shape
    inside = ((cell >= 0) & (cell < torch.tensor([columns, rows]))).all(dim=-1)
    column, row = torch.where(inside[..., None], cell, 0).unbind(-1)
    around = arrays[signal][:, row.numpy(), column.numpy()]
    values = decode(signal, spec, _batch({**arrays, signal: around}))
    assert isinstance(values, Tensor)
    mixed: Array = (values[0] * ((1 - away).prod(dim=-1) * inside)).sum(dim=-1).T.numpy()
    return mixed


def _batch(arrays: Mapping[str, Array]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array)[None] for name, array in arrays.items()}


def _encoded(header: Header, signal: str, sample: Mapping[str, Value], token: str) -> Encoded:
    value = sample.get(signal)
    if value is None:
        raise CacheSpecError(
            f"sample '{token}' has no {signal}, only {', '.join(sorted(sample)) or 'nothing'}. Remove "
            f"signals.{signal} from the cache spec, or use a teacher that writes it."
        )
    shape, found = header.sample_shapes.get(signal), shape_of(value)
    if found is not None and found != shape:
        raise CacheError(
            f"{signal} of sample '{token}' is {list(found)}, the cache was begun with {list(shape or ())}. "
            "Write to a new folder if the teacher was changed."
        )
    if isinstance(value, Boxes) and len(value):
        low, high = int(value.labels.min()), int(value.labels.max())
        if low < 0 or high >= len(header.classes):
            raise CacheError(
                f"{signal} of sample '{token}' has labels from {low} to {high} for {len(header.classes)} "
                "classes. Check the class list of the teacher."
            )
    return encode(signal, header.spec.signals[signal], value, token)
