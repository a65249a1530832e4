"""What a detector finds by distance from the ego: average precision and recall, on any data set.

Matching is that of nuScenes: a detection of a class takes the nearest annotation of its frame that is still free, by
distance between centres from above, the best scores first. It is done once on all boxes; only then is the outcome
divided into ranges, a hit by the distance of the annotation, a false alarm by its own. So an object near the border of
two ranges is not missed in one and a false alarm in the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bevkd.types import Boxes

DISTANCES_M = (0.5, 1.0, 2.0, 4.0)
"""Matching distances of nuScenes, over which average precision is averaged."""

TP_DISTANCE_M = 2.0
"""The one at which objects count as found."""

_MIN_RECALL, _MIN_PRECISION = 0.1, 0.1
_FRAMES_AT_ONCE = 256


@dataclass(frozen=True)
class ClassOutcome:
    """Detections and annotations of one class in all frames; n detections, m annotations.

    Attributes:
        frame, row: of each detection: number of its frame, and its place among the frame's boxes.
        match: at each of D distances the annotation that it took, -1 for a false alarm.
        range_m: of each detection from the ego.
        truth_frame, truth_row, truth_range_m: the same of annotations.
    """

    frame: Int[Tensor, "n"]
    row: Int[Tensor, "n"]
    scores: Float[Tensor, "n"]
    range_m: Float[Tensor, "n"]
    match: Int[Tensor, "D n"]
    truth_frame: Int[Tensor, "m"]
    truth_row: Int[Tensor, "m"]
    truth_range_m: Float[Tensor, "m"]

    @property
    def hit(self) -> Bool[Tensor, "n"]:
        """Whether each detection took an annotation at :data:`TP_DISTANCE_M`."""
        return self.match[DISTANCES_M.index(TP_DISTANCE_M)] >= 0

    def found(self, min_score: float) -> Bool[Tensor, "m"]:
        """Return whether each annotation is taken by a detection of at least ``min_score``."""
        match = self.match[DISTANCES_M.index(TP_DISTANCE_M)]
        taken = torch.zeros(len(self.truth_range_m), dtype=torch.bool)
        taken[match[(match >= 0) & (self.scores >= min_score)]] = True
        return taken


@dataclass(frozen=True)
class Outcome:
    """What became of the boxes of a run, by class.

    Attributes:
        frames: how many were matched.
    """

    classes: tuple[ClassOutcome, ...]
    frames: int

    def average_precision(self, low_m: float = 0.0, high_m: float = math.inf) -> list[float]:
        """Return the average precision of each class within a range, NaN where nothing is annotated."""
        return [_average_precision(each, low_m, high_m) for each in self.classes]

    def mean_ap(self, low_m: float = 0.0, high_m: float = math.inf) -> float:
        """Return the mean over the classes that are annotated within a range, NaN if none is."""
        known = [value for value in self.average_precision(low_m, high_m) if not math.isnan(value)]
        return sum(known) / len(known) if known else math.nan

    def recall(self, min_score: float, low_m: float = 0.0, high_m: float = math.inf) -> float:
        """Return the share of annotated objects within a range that are found, NaN if there are none."""
        inside = [_within(each.truth_range_m, low_m, high_m) for each in self.classes]
        found = [each.found(min_score) & kept for each, kept in zip(self.classes, inside, strict=True)]
        total = sum(int(kept.sum()) for kept in inside)
        return sum(int(each.sum()) for each in found) / total if total else math.nan

    def objects(self, low_m: float = 0.0, high_m: float = math.inf) -> int:
        """Return how many annotated objects there are within a range."""
        return sum(int(_within(each.truth_range_m, low_m, high_m).sum()) for each in self.classes)

    def best_score(self) -> float:
        """Return the score from which on detections reach their best F1 over all classes, 0 without any detection.

        Detectors differ in how sure they are; each is judged at the threshold that suits it.
        """
        scores = torch.cat([each.scores for each in self.classes])
        if not len(scores):
            return 0.0
        order = scores.argsort(descending=True, stable=True)
        hits = torch.cat([each.hit for each in self.classes])[order].double().cumsum(0)
        ranked = scores[order]
        f1 = 2 * hits / (torch.arange(1, len(hits) + 1) + self.objects())
        # Detections of equal score come together or not at all.
        f1[:-1][ranked[:-1] == ranked[1:]] = -1
        return float(ranked[int(f1.argmax())])

    def frame_counts(self, min_score: float) -> Int[Tensor, "F 3"]:
        """Return the annotations that are found, those that are not, and the false alarms of each frame."""
        counts = torch.zeros(self.frames, 3, dtype=torch.int64)
        for each in self.classes:
            found, sure = each.found(min_score), each.scores >= min_score
            for column, frames in enumerate(
                (each.truth_frame[found], each.truth_frame[~found], each.frame[sure & ~each.hit])
            ):
                counts[:, column] += frames.bincount(minlength=self.frames)
        return counts


def match(truth: Sequence[Boxes], found: Sequence[Boxes], classes: int, limit_m: float = math.inf) -> Outcome:
    """Return which detections take which annotations.

    Args:
        truth, found: boxes of each frame in the BEV frame, in the same order.
        classes: how many there are; labels count them.
        limit_m: boxes beyond this distance from the ego are left out.
    """
    outcomes = [
        _match_class(
            [_of_class(each, label, limit_m) for each in truth], [_of_class(each, label, limit_m) for each in found]
        )
        for label in range(classes)
    ]
    return Outcome(tuple(outcomes), len(truth))


@dataclass(frozen=True)
class _Places:
    """Boxes of one class in one frame, the best score first; ``row`` is their place among all boxes of the frame."""

    xy: Float[Tensor, "n 2"]
    scores: Float[Tensor, "n"]
    row: Int[Tensor, "n"]


def _of_class(boxes: Boxes, label: int, limit_m: float) -> _Places:
    row = ((boxes.labels == label) & (boxes.center[:, :2].norm(dim=1) < limit_m)).nonzero().squeeze(1)
    row = row[boxes.scores[row].argsort(descending=True, stable=True)]
    return _Places(boxes.center[row, :2], boxes.scores[row], row)


def _match_class(truth: Sequence[_Places], found: Sequence[_Places]) -> ClassOutcome:
    xy, truth_xy = (torch.cat([each.xy for each in places]) for places in (found, truth))
    counts, truth_counts = (torch.tensor([len(each.row) for each in places]) for places in (found, truth))
    offsets = truth_counts.cumsum(0) - truth_counts
    matches = []
    for start in range(0, len(truth), _FRAMES_AT_ONCE):
        part = slice(start, start + _FRAMES_AT_ONCE)
        padded = _match_frames([each.xy for each in truth[part]], [each.xy for each in found[part]])
        numbers = torch.where(padded >= 0, padded + offsets[part, None], -1)
        kept = torch.arange(padded.shape[2]) < counts[part, None]
        matches.append(numbers[:, kept])
    return ClassOutcome(
        frame=torch.arange(len(found)).repeat_interleave(counts),
        row=torch.cat([each.row for each in found]),
        scores=torch.cat([each.scores for each in found]),
        range_m=xy.norm(dim=1),
        match=torch.cat(matches, dim=1),
        truth_frame=torch.arange(len(truth)).repeat_interleave(truth_counts),
        truth_row=torch.cat([each.row for each in truth]),
        truth_range_m=truth_xy.norm(dim=1),
    )


def _match_frames(truth: Sequence[Tensor], found: Sequence[Tensor]) -> Int[Tensor, "D F n"]:
    """Return the annotation that each detection takes, -1 for none; all frames take their i-th detection at once."""
    wanted = pad_sequence(list(truth), batch_first=True, padding_value=math.inf)
    boxes = pad_sequence(list(found), batch_first=True, padding_value=-math.inf)
    limits = torch.tensor(DISTANCES_M)[:, None]
    taken = torch.full((len(DISTANCES_M), len(boxes), boxes.shape[1]), -1, dtype=torch.int64)
    if wanted.shape[1] == 0:
        return taken
    free = torch.zeros(len(DISTANCES_M), len(boxes), wanted.shape[1])
    for rank in range(boxes.shape[1]):
        apart = (wanted - boxes[:, rank, None]).norm(dim=-1)
        nearest, column = (apart + free).min(dim=-1)
        hit = nearest < limits
        taken[:, :, rank] = torch.where(hit, column, -1)
        free.scatter_add_(2, column[..., None], torch.where(hit, math.inf, 0.0)[..., None])
    return taken


def _within(range_m: Float[Tensor, "n"], low_m: float, high_m: float) -> Bool[Tensor, "n"]:
    return (range_m >= low_m) & (range_m < high_m)


def _average_precision(outcome: ClassOutcome, low_m: float, high_m: float) -> float:
    """Return the mean over distances of nuScenes' average precision within a range."""
    objects = int(_within(outcome.truth_range_m, low_m, high_m).sum())
    if objects == 0:
        return math.nan
    found = []
    for match in outcome.match:
        hit = match >= 0
        place = outcome.range_m.clone()
        place[hit] = outcome.truth_range_m[match[hit]]
        kept = _within(place, low_m, high_m)
        order = outcome.scores[kept].argsort(descending=True, stable=True)
        found.append(_area(hit[kept][order].numpy(), objects))
    return sum(found) / len(found)


def _area(hit: Bool[np.ndarray, "n"], objects: int) -> float:  # type: ignore[type-arg]
    """Return the area under precision over recall as the devkit has it: above a recall and a precision of 0.1."""
    if not len(hit):
        return 0.0
    right = hit.cumsum()
    recalls = np.linspace(0, 1, 101)
    precision = np.interp(recalls, right / objects, right / np.arange(1, len(hit) + 1), right=0)
    beyond = precision[round(100 * _MIN_RECALL) + 1 :] - _MIN_PRECISION
    return float(beyond.clip(min=0).mean() / (1 - _MIN_PRECISION))
