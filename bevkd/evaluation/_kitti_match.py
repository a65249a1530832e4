"""KITTI's matching of detections with labels, and its average precision, vectorised over frames and thresholds.

The rules are those of the benchmark's ``evaluate_object``. Objects of all frames stand in one list. A state says what
an object does for one class and difficulty: it counts, it is ignored (a match with it is neither right nor wrong), or
it is not there. Labels choose their detections one after another, in the order of the file; only labels of one frame
depend on each other, so the k-th labels of all frames choose at once, at all score thresholds at once.

Letters: G labels, D detections, p pairs, T score thresholds, n labels that choose at once, c detections to choose from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

COUNTS, IGNORED, ABSENT = 0, 1, -1

POSITIONS = 41
"""Recall positions 0, 1/40, ..., 1 at which precision is read."""


@dataclass(frozen=True)
class Pairs:
    """Label and detection of the same frame that overlap enough to match, in the order of labels, then detections.

    Attributes:
        truth, found: index of label and detection.
        overlap: their IoU.
    """

    truth: Ints
    found: Ints
    overlap: Floats

    def __getitem__(self, kept: Bools) -> Pairs:
        return Pairs(self.truth[kept], self.found[kept], self.overlap[kept])


@dataclass(frozen=True)
class Matching:
    """What stands for one class, difficulty and metric.

    Attributes:
        truth_frame: frame of each label.
        truth_state, found_state: COUNTS, IGNORED or ABSENT.
        scores: of the detections.
        pairs: those whose overlap exceeds the class's threshold.
        excused: detections that are no false positives though nothing matches them.
        turn: angle between label and detection of each pair, rad.
    """

    truth_frame: Ints
    truth_state: Ints
    found_state: Ints
    scores: Floats
    pairs: Pairs
    excused: Bools
    turn: Floats

    @cached_property
    def objects(self) -> int:
        """Number of labels that count."""
        return int((self.truth_state == COUNTS).sum())

    def curves(self) -> tuple[Floats, Floats]:
        """Return precision and orientation similarity at the 41 recall positions, as far as recall gets."""
        thresholds = score_thresholds(self._true_scores(), self.objects)
        true, false, similar = self._count(thresholds)
        total = np.maximum(true + false, 1)
        curves = np.zeros((2, POSITIONS))
        curves[:, : len(thresholds)] = np.stack([true / total, similar / total])
        precision, similarity = np.maximum.accumulate(curves[:, ::-1], axis=1)[:, ::-1]
        return precision, similarity

    def _true_scores(self) -> Floats:
        """Return the scores of true positives when each label takes its best-scored detection."""
        taken = np.zeros(len(self.scores) + 1, dtype=np.bool_)
        true = []
        for truth, found, _ in self._rounds():
            free = (found < len(self.scores)) & ~taken[found]
            score = np.where(free, np.append(self.scores, -np.inf)[found], -np.inf)
            best = found[np.arange(len(found)), score.argmax(axis=1)][free.any(axis=1)]
            taken[best] = True
            counted = self.truth_state[truth][free.any(axis=1)] == COUNTS
            true.append(self.scores[best[counted & (self.found_state[best] == COUNTS)]])
        return np.concatenate(true) if true else np.zeros(0)

    def _count(self, thresholds: Floats) -> tuple[Floats, Floats, Floats]:
        """Return true positives, false positives and summed orientation similarity at each threshold."""
        count = len(thresholds)
        live = self.scores[None] >= thresholds[:, None]
        live = np.concatenate([live, np.zeros((count, 1), dtype=np.bool_)], axis=1)  # the last is no detection
        state = np.append(self.found_state, ABSENT)
        taken = np.zeros_like(live)
        true, similar = np.zeros(count), np.zeros(count)
        for truth, found, pair in self._rounds():
            free = live[:, found] & ~taken[:, found]  # [T, n, c]
            counted, ignored = free & (state[found] == COUNTS), free & (state[found] == IGNORED)
            overlap = np.where(counted, np.append(self.pairs.overlap, 0.0)[pair], -1.0)
            hit = counted.any(axis=2)
            pick = np.where(hit, overlap.argmax(axis=2), ignored.argmax(axis=2))
            row = np.arange(len(found))[None]
            step, label = (hit | ignored.any(axis=2)).nonzero()
            taken[step, found[row, pick][step, label]] = True
            right = hit & (self.truth_state[truth] == COUNTS)
            true += right.sum(axis=1)
            turn = np.append(self.turn, 0.0)[pair[row, pick]]
            similar += np.where(right, (1 + np.cos(turn)) / 2, 0.0).sum(axis=1)
        wrong = live & ~taken & (state == COUNTS) & ~np.append(self.excused, False)
        return true, wrong.sum(axis=1).astype(np.float64), similar

    def _rounds(self) -> Iterator[tuple[Ints, Ints, Ints]]:
        """Yield labels of different frames, ``[n]``, with the detections and pairs that each may choose, ``[n, c]``.

        Detections stand in their order; the rows are filled up with one more than the last index.
        """
        pairs = self.pairs
        truth, start, size = np.unique(pairs.truth, return_index=True, return_counts=True)
        if not len(truth):
            return
        _, first = np.unique(self.truth_frame[truth], return_index=True)
        turn = np.arange(len(truth)) - np.repeat(first, np.diff(np.append(first, len(truth))))
        for number in range(int(turn.max()) + 1):
            now = turn == number
            column = np.arange(size[now].max())
            pair = np.where(column < size[now, None], start[now, None] + column, len(pairs.found))
            yield truth[now], np.append(pairs.found, len(self.scores))[pair], pair


def score_thresholds(scores: Floats, objects: int) -> Floats:
    """Return the scores at which recall comes closest to each of the 41 positions, as the benchmark picks them.

    Args:
        scores: of all true positives.
        objects: labels that count.
    """
    picked: list[float] = []
    position = 0.0
    ordered = np.sort(scores)[::-1].tolist()
    for index, score in enumerate(ordered):
        last = index == len(ordered) - 1
        left = (index + 1) / objects
        right = left if last else (index + 2) / objects
        if last or right - position >= position - left:
            picked.append(score)
            position += 1 / (POSITIONS - 1)  # added up as the benchmark does, which decides ties
    return np.array(picked[:POSITIONS])


def average_precision(curve: Floats) -> tuple[float, float]:
    """Return the mean of a curve over the last 40 recall positions (R40) and over every fourth of 41 (R11)."""
    return float(curve[1:].mean()), float(curve[::4].mean())
