"""What a cache stores of one frame, picked from what its teacher wrote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from bevkd.cache.encoding import Value
from bevkd.cache.spec import CacheSpec
from bevkd.errors import CacheSpecError
from bevkd.geometry.sampling import foreground_cells, points_of
from bevkd.grid import BEVGrid
from bevkd.signals import POINTS
from bevkd.types import Boxes, Signals, SparseMap


def stored_signals(
    signals: Signals,
    boxes: Sequence[Boxes | None],
    spec: CacheSpec,
    grid: BEVGrid,
    index: int,
    device: torch.device | str = "cpu",
) -> dict[str, Value]:
    """Return the signals of ``spec`` of one frame of a batch, on ``device``, as ``CacheWriter.write_block`` takes them.

    Args:
        signals: of the whole batch, as the teacher wrote them.
        boxes: annotations of each frame, in the frame that the teacher saw; None where it has none, which stores no
            points.
        index: the frame in the batch.

    Raises:
        CacheSpecError: the teacher did not write what a signal of ``spec`` is made from.
    """
    annotated = boxes[index] or Boxes.empty()
    sample: dict[str, Value] = {}
    for name, stored in spec.signals.items():
        value: Any = _written(signals, POINTS.get(name, name), name)[index]
        if name in POINTS:
            sample[name] = points_of(value, annotated, grid).to(device)
        elif stored.encoding == "sparse":
            known = _known(signals, annotated, stored.threshold, grid, index)
            sample[name] = SparseMap(torch.where(known, value, value.new_zeros(())).to(device), known.to(device))
        else:
            sample[name] = value.to(device)
    return sample


def _written(signals: Signals, source: str, name: str) -> Any:
    """Return what signal ``name`` is made from, of the whole batch."""
    value = getattr(signals, source)
    if value is None:
        raise CacheSpecError(
            f"the teacher wrote no {source}, which {name} is stored from. Remove signals.{name} from the cache spec, "
            "or use a teacher that writes it."
        )
    return value


def _known(signals: Signals, annotated: Boxes, threshold: float, grid: BEVGrid, index: int) -> Bool[Tensor, "Y X"]:
    """Return the cells whose box codes a loss may read: likely objects, and around every box."""
    heatmap = signals.need("heatmap")[index]
    known = heatmap.amax(dim=0).float().sigmoid() >= threshold
    around = [annotated.to(heatmap.device)]
    if signals.boxes is not None:
        own = signals.boxes[index]
        around.append(own[own.scores >= threshold].to(heatmap.device))
    for boxes in around:
        known = known | foreground_cells(boxes, grid)
    return known
