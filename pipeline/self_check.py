"""How the boxes of a finished cache score against ground truth, before it is sealed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from bevkd.cache.reader import CacheReader
from bevkd.cache.self_check import SelfCheck
from bevkd.data.source import FrameSource
from bevkd.errors import BevkdError
from bevkd.evaluation.score import evaluate
from bevkd.grid import BEVGrid
from bevkd.progress import Progress
from bevkd.types import Boxes

MOST_FRAMES = 2000
"""Frames that are scored, spread evenly over the annotated ones, so that large caches take no more than minutes."""

MOST_BY_CHANCE = 250
"""Of these, frames that are scored again with the boxes of others."""

_DIGITS = 4
"""Of the scores, so that they are the same on every machine that may seal the cache."""


def check_boxes(source: FrameSource, progress: Progress, reader: CacheReader) -> SelfCheck:
    """Return how the cached boxes, read as a student reads them, score against ground truth.

    All annotated frames count, labelled or not: what is hidden from a run says nothing about the cache.

    Args:
        source: of the run.
        reader: of the finished cache.
    """
    held = reader.manifest
    if "boxes" not in held.spec.signals:
        return SelfCheck(not_scored="the cache holds no boxes")
    if source.metrics is None:
        return SelfCheck(not_scored=f"the data set '{held.dataset.name}' has no metrics")
    tokens = _spread([token for token in reader.tokens if token in source.annotated], MOST_FRAMES)
    if not tokens:
        return SelfCheck(not_scored="no frame of the cache is annotated")
    progress.note(f"self-check: scoring the boxes of {len(tokens)} frames")
    boxes = {token: reader.boxes(token) for token in tokens}
    reach = reach_m(held.grid)
    try:
        scores = _score(source, boxes, reach)
        others = _exchanged({token: boxes[token] for token in _spread(tokens, MOST_BY_CHANCE)})
        chance = _score(source, others, reach) if len(others) > 1 else {}
    except BevkdError as error:
        progress.note(f"self-check: {error}")
        return SelfCheck(not_scored="the metrics refuse its boxes, 'bevkd evaluate --cache' says why")
    if not scores:
        return SelfCheck(not_scored="no box of these frames counts for the metrics")
    return SelfCheck(scores=scores, by_chance=chance, frames=len(tokens), max_distance_m=reach)


def reach_m(grid: BEVGrid) -> float | None:
    """Return how far from the ego all directions lie in the grid, metres; None if the ego is not inside of it.

    Boxes beyond are out of the teacher's sight and would only lower its scores. A grid that lies ahead of the ego is
    made for a benchmark that looks ahead.
    """
    reach = min(-grid.x_m[0], grid.x_m[1], -grid.y_m[0], grid.y_m[1])
    return reach if reach > 0 else None


def _spread(tokens: Sequence[str], most: int) -> list[str]:
    count = min(most, len(tokens))
    return [tokens[index * len(tokens) // count] for index in range(count)]


def _exchanged(boxes: Mapping[str, Boxes]) -> dict[str, Boxes]:
    """Return for each frame the boxes of the one half of the frames away, which as a rule is of another drive."""
    tokens = list(boxes)
    half = len(tokens) // 2
    return {token: boxes[other] for token, other in zip(tokens, tokens[half:] + tokens[:half], strict=True)}


def _score(source: FrameSource, boxes: Mapping[str, Boxes], reach: float | None) -> dict[str, float]:
    """Return the headline numbers that are defined on these frames."""
    headline = evaluate(source, boxes, tuple(boxes), reach).headline
    return {name: round(value, _DIGITS) for name, value in headline.items() if not math.isnan(value)}
