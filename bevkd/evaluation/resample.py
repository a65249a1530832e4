"""How far nuScenes' average precision would move on other scenes: the bootstrap over scenes (Efron 1979).

The devkit matches the detections of all frames in the order of their scores, each with the nearest annotation of its
frame that is still free. Frames do not see each other, so matches stay what they are however often a scene is drawn:
detections are matched once, and only the curve of precision over recall is drawn anew for each resample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from bevkd.data.sources.nuscenes import NuScenesSource
from bevkd.errors import ContractError
from bevkd.evaluation.nuscenes import benchmark, scored_boxes
from bevkd.evaluation.score import scored_frames
from bevkd.types import Boxes

Floats = np.ndarray[Any, np.dtype[np.float64]]
Ints = np.ndarray[Any, np.dtype[np.int64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class ClassMatches:
    """Matches of one class's n detections, best score first, at each of D distances.

    Attributes:
        scene: number of the scene of each detection.
        hit: whether it found an annotation nearer than the distance.
        truths: annotations in each of S scenes.
    """

    scene: Int[Ints, " n"]
    hit: Bool[Bools, "D n"]
    truths: Int[Ints, " S"]


@dataclass(frozen=True)
class Matches:
    """Matches of all detections of a run.

    Attributes:
        scenes: names of the scenes that were scored, which the numbers in ``classes`` count.
        classes: by class name, in the order of the data source.
    """

    scenes: tuple[str, ...]
    classes: Mapping[str, ClassMatches]


def match(
    source: NuScenesSource,
    detections: Mapping[str, Boxes] | Mapping[str, Any],
    tokens: Sequence[str] | None = None,
    max_distance_m: float | None = None,
) -> Matches:
    """Return which detections find an annotation; arguments and errors as of ``bevkd.evaluation.nuscenes.evaluate``."""
    frames = scored_frames(source, tokens)
    truth, found = scored_boxes(source, detections, frames, max_distance_m)
    scene_of = {token: source.scene(token) for token in frames}
    scenes = tuple(dict.fromkeys(scene_of.values()))
    # As the devkit numbers detections: in the order of the file, by which equal scores are ranked.
    numbered = {token: scenes.index(scene_of[token]) for token in found.sample_tokens}
    distances = tuple(float(distance) for distance in benchmark().dist_ths)
    classes = {name: _match_class(name, truth, found, numbered, len(scenes), distances) for name in source.classes}
    return Matches(scenes, classes)


def _match_class(
    name: str,
    truth: Any,
    found: Any,
    scene_of: Mapping[str, int],
    scenes: int,
    distances: tuple[float, ...],
) -> ClassMatches:
    scores: list[float] = []
    scene: list[int] = []
    hits: list[Bools] = []
    truths = np.zeros(scenes, np.int64)
    for token, number in scene_of.items():
        wanted = [box.translation[:2] for box in truth[token] if box.detection_name == name]
        boxes = [box for box in found[token] if box.detection_name == name]
        truths[number] += len(wanted)
        ranks = [box.detection_score for box in boxes]
        places = np.array([box.translation[:2] for box in boxes]).reshape(-1, 2)
        hits.append(_match_frame(places, np.array(wanted).reshape(-1, 2), _ranking(ranks), distances))
        scores += ranks
        scene += [number] * len(boxes)
    order = _ranking(scores)
    return ClassMatches(np.array(scene, np.int64)[order], np.concatenate(hits, axis=1)[:, order], truths)


def _ranking(scores: Sequence[float]) -> Int[Ints, " n"]:
    """Return the order of detections from the best score on; of equal ones the last comes first, as in the devkit."""
    order: Ints = np.lexsort((np.arange(len(scores)), np.array(scores)))[::-1]
    return order


def _match_frame(
    found: Float[Floats, "n 2"], truth: Float[Floats, "m 2"], order: Int[Ints, " n"], distances: Sequence[float]
) -> Bool[Bools, "D n"]:
    """Return which detections of a frame are matched at each distance, the best first to the nearest that is free."""
    hit = np.zeros((len(distances), len(found)), bool)
    if not len(found) or not len(truth):
        return hit
    apart = np.linalg.norm(found[:, None] - truth, axis=-1)
    nearest = apart.min(axis=1)
    for level, distance in enumerate(distances):
        free = apart.copy()
        for row in order[nearest[order] < distance]:
            column = int(free[row].argmin())
            if free[row, column] < distance:
                hit[level, row] = True
                free[:, column] = np.inf
    return hit


def average_precisions(matches: Matches, draws: Int[Ints, "R S"]) -> Float[Floats, "R K D"]:
    """Return the average precision of each resample, class and matching distance, exactly as the devkit computes it.

    Args:
        draws: how often each scene of ``matches`` is drawn; all ones give the metric itself.

    Returns:
        NaN where no scene that was drawn has an annotation of the class.
    """
    config = benchmark()
    recalls = np.linspace(0, 1, 101)[round(100 * config.min_recall) + 1 :]
    found: Floats = np.full((len(draws), len(matches.classes), len(config.dist_ths)), np.nan)
    for column, each in enumerate(matches.classes.values()):
        truths = draws @ each.truths
        for level, hit in enumerate(each.hit):
            curve = _Curve.of(hit, each.scene, len(each.truths))
            for row in np.flatnonzero(truths):
                precision = curve.precision(draws[row], int(truths[row]), recalls)
                clipped = (precision - config.min_precision).clip(min=0)
                found[row, column, level] = clipped.mean() / (1.0 - config.min_precision)
    return found


@dataclass(frozen=True)
class _Curve:
    """What the precision of T true positives in S scenes depends on, the best score first.

    Between two true positives recall stands still, so of the false positives there only their number matters.

    Attributes:
        scene: of each true positive.
        misses: false positives of each scene before each true positive and after the one before, and after the last.
    """

    scene: Int[Ints, " T"]
    misses: Float[Floats, "T+1 S"]

    @classmethod
    def of(cls, hit: Bool[Bools, " n"], scene: Int[Ints, " n"], scenes: int) -> _Curve:
        misses = np.zeros((int(hit.sum()) + 1, scenes))
        np.add.at(misses, (hit.cumsum()[~hit], scene[~hit]), 1.0)
        return cls(scene[hit], misses)

    def precision(self, draw: Int[Ints, " S"], truths: int, recalls: Float[Floats, " r"]) -> Float[Floats, " r"]:
        """Return the interpolated precision at each recall, 0 beyond the greatest that is reached."""
        missed = (self.misses @ draw).cumsum()
        drawn = np.repeat(np.arange(len(self.scene)), draw[self.scene])
        if not len(drawn):
            return np.zeros(len(recalls))
        right = np.arange(1, len(drawn) + 1)
        # Each true positive gives two points of one recall: as it is met, and after the false positives that follow.
        wrong = np.stack([missed[drawn], np.append(missed[drawn][1:], missed[-1])], axis=1)
        precision = (right[:, None] / (right[:, None] + wrong)).ravel()
        recall = np.repeat(right / truths, 2)
        if wrong[0, 0]:
            recall, precision = np.insert(recall, 0, 0.0), np.insert(precision, 0, 0.0)
        return np.interp(recalls, recall, precision, right=0)


def mean_ap(precisions: Float[Floats, "R K D"]) -> Float[Floats, " R"]:
    """Return the mean over distances and over the classes that have annotations: ``mean_ap_present`` of a report."""
    of_class = precisions.mean(axis=2)
    known = ~np.isnan(of_class)
    # A draw without any annotation has no mean: 0 / 0.
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, of_class, 0.0).sum(axis=1) / known.sum(axis=1))


def draw_scenes(scenes: int, count: int, seed: int = 0) -> Int[Ints, "R S"]:
    """Return how often each scene occurs in each of ``count`` draws of as many scenes, with replacement.

    Raises:
        ContractError: there is one scene only, so that every resample would be the same.
    """
    if scenes < 2:
        raise ContractError(
            "a bootstrap draws scenes, but the evaluation has one only. Evaluate on several, or leave out --bootstrap."
        )
    draws: Ints = np.random.default_rng(seed).multinomial(scenes, np.full(scenes, 1 / scenes), count)
    return draws


def interval(values: Float[Floats, " R"]) -> tuple[float, float]:
    """Return between which values the middle 95 % lie; draws without any annotation (NaN) do not count."""
    low, high = np.nanquantile(values, (0.025, 0.975))
    return float(low), float(high)
