"""KITTI's average precision in the image, from above and in 3-D (Geiger et al., CVPR 2012), by the benchmark's rules.

Labels count from a height in the image on, up to a degree of occlusion and truncation, by difficulty. Vans beside cars,
sitting people beside pedestrians, labels beyond the difficulty and detections that are too low are ignored.
``DontCare`` regions excuse false positives in the image only, as in the official code, since they have no 3-D box.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from bevkd.data.source import Sensor
from bevkd.data.sources._kitti_files import DONT_CARE, Objects
from bevkd.data.sources.kitti import KittiSource
from bevkd.errors import ContractError
from bevkd.evaluation._kitti_match import ABSENT, COUNTS, IGNORED, Bools, Floats, Ints, Matching, Pairs
from bevkd.evaluation._kitti_match import average_precision as _average_precision
from bevkd.evaluation._kitti_results import load_detections, to_boxes, to_results, write_results
from bevkd.evaluation.score import scored_frames
from bevkd.geometry.iou import bev_iou, iou_3d
from bevkd.types import Boxes

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "DIFFICULTIES",
    "METRICS",
    "Report",
    "evaluate",
    "load_detections",
    "save_detections",
    "to_boxes",
    "to_results",
]

METRICS = ("3D", "BEV", "2D", "AOS")
"""Overlap of volumes, seen from above, in the image, and the last weighted with the orientation's similarity."""

DIFFICULTIES = ("easy", "moderate", "hard")

MIN_OVERLAP = {"Pedestrian": 0.5, "Cyclist": 0.5, "Person_sitting": 0.5}
"""IoU that a match must exceed; 0.7 for all other classes, of which the benchmark scores only Car."""

_NEIGHBOURS = {"Car": "Van", "Pedestrian": "Person_sitting"}
_MIN_HEIGHT_PX = (40.0, 25.0, 25.0)
_MAX_OCCLUSION = (0, 1, 2)
_MAX_TRUNCATION = (0.15, 0.3, 0.5)


@dataclass(frozen=True)
class Report:
    """KITTI's detection metrics, from 0 to 1.

    The benchmark reads precision at 40 recall positions, each of which needs a true positive of its own: where fewer
    than 41 objects count, even perfect detections stay below 1.

    Attributes:
        ap: of each class, metric and difficulty at 40 recall positions (R40); NaN where no object counts.
        ap_r11: the same at 11 positions, as papers before 2020 have it.
        objects: of each class, how many objects count at each difficulty.
        frames: how many frames were scored.
    """

    ap: dict[str, dict[str, tuple[float, ...]]]
    ap_r11: dict[str, dict[str, tuple[float, ...]]]
    objects: dict[str, tuple[int, ...]]
    frames: int

    @property
    def headline(self) -> dict[str, float]:
        """AP in 3-D of the moderate difficulty, by which the benchmark ranks, for each class with objects."""
        scores = {f"{name} 3D moderate": by_metric["3D"][1] for name, by_metric in self.ap.items()}
        return {name: score for name, score in scores.items() if not math.isnan(score)}

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values; NaN becomes null."""
        return {
            "ap_r40": _plain(self.ap),
            "ap_r11": _plain(self.ap_r11),
            "objects": {name: dict(zip(DIFFICULTIES, counts, strict=True)) for name, counts in self.objects.items()},
            "frames": self.frames,
        }

    def table(self) -> Table:
        """Return AP in percent by class and metric."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        headline = "   ".join(f"{name} {100 * score:.2f}" for name, score in self.headline.items())
        table = Table(
            title=f"{headline or 'no object counts'}   {self.frames} frames",
            title_justify="left",
            caption="AP in percent at 40 recall positions; objects that count",
            caption_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
        )
        table.add_column("class")
        table.add_column("difficulty")
        for heading in (*METRICS, "objects"):
            table.add_column(heading, justify="right")
        for name, scores in self.ap.items():
            for level, difficulty in enumerate(DIFFICULTIES):
                cells = (scores[metric][level] for metric in METRICS)
                shown = ("-" if math.isnan(ap) else f"{100 * ap:.2f}" for ap in cells)
                table.add_row(name if level == 0 else "", difficulty, *shown, str(self.objects[name][level]))
        return table


def evaluate(
    source: KittiSource,
    detections: Mapping[str, Boxes] | Mapping[str, Objects],
    tokens: Sequence[str] | None = None,
    max_distance_m: float | None = None,
) -> Report:
    """Return the metrics of ``detections`` on ``tokens``, or on all frames of ``source`` if None.

    Args:
        source: gives ground truth; all its labels count, labelled frame or not, whatever its ``min_points``.
        detections: boxes in the BEV frame by token, or what :func:`load_detections` returns.
        tokens: frames to score; every one of them needs an entry in ``detections``.
        max_distance_m: score only objects this near to the camera, on the ground; None is the benchmark itself.

    Raises:
        ContractError: names frames without an entry, unknown tokens and boxes that cannot be scored; or the split has
            no labels.
    """
    frames = scored_frames(source, tokens)
    missing = [token for token in frames if token not in detections]
    unknown = [token for token in detections if token not in source.tokens]
    if missing or unknown:
        raise ContractError(
            f"these detections cannot be scored: {len(missing)} of {len(frames)} frames have no entry"
            f"{f', first {missing[0]}' if missing else ''}; {len(unknown)} tokens are not in split "
            f"'{source.config.split}'{f', first {unknown[0]}' if unknown else ''}."
        )
    boxes = {token: each for token in frames if isinstance(each := detections[token], Boxes)}
    results = {**detections, **to_results(source, boxes)}
    found = [cast(Objects, results[token]) for token in frames]
    truth = [source.objects(token) for token in frames]
    limit_m = math.inf if max_distance_m is None else max_distance_m
    return _score(source.classes, [_near(each, limit_m) for each in truth], [_near(each, limit_m) for each in found])


def save_detections(
    path: Path, source: KittiSource, found: Mapping[str, Boxes], sensors: frozenset[Sensor] = frozenset()
) -> Path:
    """Write boxes as a folder of KITTI result files in place of what was there, and return it.

    Args:
        sensors: not looked at; the files do not say what was seen.

    Raises:
        ContractError: see :func:`to_results`.
    """
    del sensors
    write_results(path, to_results(source, found))
    return path


@dataclass(frozen=True)
class _Frames:
    """Labels and detections of all frames, one after another, and what is between them.

    Attributes:
        pairs: by metric, labels and detections of the same frame that overlap.
        excused: share of each detection that the ``DontCare`` region that covers it best covers.
    """

    truth: Objects
    truth_frame: Ints
    found: Objects
    pairs: dict[str, Pairs]
    excused: Floats


def _score(classes: Sequence[str], truth: Sequence[Objects], found: Sequence[Objects]) -> Report:
    frames = _joined(truth, found)
    ap: dict[str, dict[str, tuple[float, ...]]] = {}
    ap_r11: dict[str, dict[str, tuple[float, ...]]] = {}
    objects: dict[str, tuple[int, ...]] = {}
    for name in classes:
        columns = [_scores(frames, name, level) for level in range(len(DIFFICULTIES))]
        ap[name] = {metric: tuple(r40[metric][0] for _, r40 in columns) for metric in METRICS}
        ap_r11[name] = {metric: tuple(each[metric][1] for _, each in columns) for metric in METRICS}
        objects[name] = tuple(count for count, _ in columns)
    return Report(ap, ap_r11, objects, len(truth))


def _scores(frames: _Frames, name: str, level: int) -> tuple[int, dict[str, tuple[float, float]]]:
    """Return how many objects of a class count at a difficulty, and AP (R40, R11) by metric."""
    truth_state, found_state = _truth_state(frames.truth, name, level), _found_state(frames.found, name, level)
    count = int((truth_state == COUNTS).sum())
    if not count:
        return 0, dict.fromkeys(METRICS, (math.nan, math.nan))
    overlap = MIN_OVERLAP.get(name, 0.7)
    scores = {}
    for metric, pairs in frames.pairs.items():
        there = (truth_state[pairs.truth] != ABSENT) & (found_state[pairs.found] != ABSENT)
        matched = pairs[(pairs.overlap > overlap) & there]
        matching = Matching(
            truth_frame=frames.truth_frame,
            truth_state=truth_state,
            found_state=found_state,
            scores=frames.found.scores,
            pairs=matched,
            excused=frames.excused > overlap if metric == "2D" else np.zeros(len(frames.found), dtype=np.bool_),
            turn=frames.truth.alpha[matched.truth] - frames.found.alpha[matched.found],
        )
        precision, similarity = matching.curves()
        scores[metric] = _average_precision(precision)
        if metric == "2D":
            scores["AOS"] = _average_precision(similarity)
    return count, scores


def _truth_state(truth: Objects, name: str, level: int) -> Ints:
    names = np.array(truth.names, dtype=np.str_)
    height = truth.rectangles[:, 3] - truth.rectangles[:, 1]
    hard = (truth.occluded > _MAX_OCCLUSION[level]) | (truth.truncated > _MAX_TRUNCATION[level])
    hard |= height <= _MIN_HEIGHT_PX[level]
    beside = names == _NEIGHBOURS.get(name, "")
    return np.where((names == name) & ~hard, COUNTS, np.where((names == name) | beside, IGNORED, ABSENT))


def _found_state(found: Objects, name: str, level: int) -> Ints:
    names = np.array(found.names, dtype=np.str_)
    # Low detections of any class may be matched and ignored: an oddity of the benchmark.
    low = np.abs(found.rectangles[:, 3] - found.rectangles[:, 1]) < _MIN_HEIGHT_PX[level]
    return np.where(low, IGNORED, np.where(names == name, COUNTS, ABSENT))


def _joined(truth: Sequence[Objects], found: Sequence[Objects]) -> _Frames:
    truth_all, truth_frame = _concatenated(truth)
    found_all, found_frame = _concatenated(found)
    first = np.searchsorted(found_frame, truth_frame)
    count = np.searchsorted(found_frame, truth_frame, side="right") - first
    of_truth = np.repeat(np.arange(len(truth_all)), count)
    of_found = np.arange(len(of_truth)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
    region = np.array([name == DONT_CARE for name in truth_all.names], dtype=np.bool_)[of_truth]

    shared, area_truth, area_found = _rectangles(truth_all.rectangles[of_truth], found_all.rectangles[of_found])
    excused = np.zeros(len(found_all))
    covered = np.divide(shared, area_found, out=np.zeros_like(shared), where=area_found > 0)
    np.maximum.at(excused, of_found[region], covered[region])

    pairs = Pairs(of_truth[~region], of_found[~region], (shared / (area_truth + area_found - shared))[~region])
    a, b = _upright(truth_all), _upright(found_all)
    apart = torch.linalg.vector_norm(a[pairs.truth, :2] - b[pairs.found, :2], dim=1)
    reach = (
        torch.linalg.vector_norm(a[:, 3:5], dim=1)[pairs.truth]
        + torch.linalg.vector_norm(b[:, 3:5], dim=1)[pairs.found]
    ) / 2
    near = (apart < reach).numpy()
    i, j = pairs.truth[near], pairs.found[near]
    overlaps = {"3D": iou_3d(a[i], b[j]).numpy(), "BEV": bev_iou(a[i], b[j]).numpy()}
    return _Frames(
        truth_all,
        truth_frame,
        found_all,
        {**{metric: Pairs(i, j, overlap) for metric, overlap in overlaps.items()}, "2D": pairs},
        excused,
    )


def _concatenated(frames: Sequence[Objects]) -> tuple[Objects, Ints]:
    names = [name for each in frames for name in each.names]
    table = np.concatenate([each.table() for each in frames]) if frames else np.zeros((0, 15))
    return Objects.from_table(names, table), np.repeat(np.arange(len(frames)), [len(each) for each in frames])


def _rectangles(a: Floats, b: Floats) -> tuple[Floats, Floats, Floats]:
    """Return the area that rectangles share, and that of each."""
    shared = (np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])).clip(min=0).prod(axis=1)
    return shared, (a[:, 2:] - a[:, :2]).prod(axis=1), (b[:, 2:] - b[:, :2]).prod(axis=1)


def _upright(objects: Objects) -> torch.Tensor:
    """Return boxes in axes (z, -x, -y) of the rectified frame, ``[n, 7]``: forward, left, up."""
    x, y, z = objects.locations.T
    height, width, length = objects.sizes.T
    yaw = -objects.rotations - math.pi / 2
    return torch.from_numpy(np.stack([z, -x, height / 2 - y, length, width, height, yaw], axis=1))


def _near(objects: Objects, limit_m: float) -> Objects:
    distance = np.hypot(objects.locations[:, 0], objects.locations[:, 2])
    kept: Bools = (distance <= limit_m) | np.array([name == DONT_CARE for name in objects.names], dtype=np.bool_)
    return objects[kept]


def _plain(scores: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    return {
        name: {
            metric: {level: None if math.isnan(ap) else ap for level, ap in zip(DIFFICULTIES, aps, strict=True)}
            for metric, aps in by_metric.items()
        }
        for name, by_metric in scores.items()
    }
