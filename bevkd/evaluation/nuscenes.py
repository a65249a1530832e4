"""nuScenes detection metrics on exactly the frames asked for, by the devkit's own algorithms.

The devkit's ``DetectionEval`` wants all tables in memory and a whole official split. Here ground truth comes from the
frame index, and the devkit contributes what defines the metrics: matching, precision, errors and the score.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

import numpy as np

from bevkd.data.source import Sensor
from bevkd.data.sources.nuscenes import CLASSES, GlobalBoxes, NuScenesSource
from bevkd.errors import ContractError, report
from bevkd.evaluation._nuscenes_results import (
    MAX_BOXES,
    check_results,
    load_detections,
    read_results,
    to_boxes,
    to_results,
)
from bevkd.evaluation.score import scored_frames, shortened
from bevkd.training.checkpoint import write_atomic
from bevkd.types import Boxes

if TYPE_CHECKING:
    from nuscenes.eval.common.data_classes import EvalBoxes
    from nuscenes.eval.detection.data_classes import DetectionConfig
    from rich.table import Table

__all__ = [
    "MAX_BOXES",
    "ClassScore",
    "Report",
    "benchmark",
    "evaluate",
    "load_detections",
    "read_results",
    "save_detections",
    "scored_boxes",
    "to_boxes",
    "to_results",
]

CONFIG = "detection_cvpr_2019"
"""The devkit's configuration of the detection benchmark."""

_RACK = "static_object.bicycle_rack"
_RACKED = ("bicycle", "motorcycle")
_UNDEFINED = {"traffic_cone": ("attr_err", "vel_err", "orient_err"), "barrier": ("attr_err", "vel_err")}
_LIMITS = (0.5, 1.0, 2.0, 4.0)
_ERRORS = {"trans_err": "ATE", "scale_err": "ASE", "orient_err": "AOE", "vel_err": "AVE", "attr_err": "AAE"}


class ClassScore(TypedDict):
    """Scores of one class: ``ap``, the same by matching distance in metres, and the five errors (NaN: undefined)."""

    ap: float
    ap_by_distance: dict[float, float]
    errors: dict[str, float]


@dataclass(frozen=True)
class Report:
    """nuScenes detection metrics.

    Attributes:
        mAP, NDS: the official scores, over all ten classes; a class without ground truth counts as 0.
        tp_errors: mean error of true positives: ``trans_err`` m, ``scale_err`` 1 - IoU, ``orient_err`` rad,
            ``vel_err`` m/s, ``attr_err`` 1 - accuracy.
        per_class: scores of each of the ten classes.
        classes_present: classes of the data source that have ground truth in these frames after the benchmark's
            filters.
        mean_ap_present: mean AP over ``classes_present``, NaN if there are none: the number to compare on few frames.
        frames: how many frames were scored.
    """

    mAP: float  # noqa: N815 (the field's name for it)
    NDS: float
    tp_errors: dict[str, float]
    per_class: dict[str, ClassScore]
    classes_present: tuple[str, ...]
    mean_ap_present: float
    frames: int

    @property
    def headline(self) -> dict[str, float]:
        """The benchmark's two scores, and the mean AP to compare on few frames."""
        scores = {"mAP": self.mAP, "NDS": self.NDS, "mean AP": self.mean_ap_present}
        return {name: score for name, score in scores.items() if not math.isnan(score)}

    def table(self) -> Table:
        """Return the table by class: AP in percent, errors in the devkit's units."""
        return _table(self)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values; NaN becomes null."""
        return {
            "mAP": self.mAP,
            "NDS": self.NDS,
            "tp_errors": self.tp_errors,
            "per_class": {
                name: {
                    "ap": score["ap"],
                    "ap_by_distance": {str(distance): ap for distance, ap in score["ap_by_distance"].items()},
                    "errors": {key: _number(error) for key, error in score["errors"].items()},
                }
                for name, score in self.per_class.items()
            },
            "classes_present": list(self.classes_present),
            "mean_ap_present": _number(self.mean_ap_present),
            "frames": self.frames,
        }


def evaluate(
    source: NuScenesSource,
    detections: Mapping[str, Boxes] | Mapping[str, Any],
    tokens: Sequence[str] | None = None,
    max_distance_m: float | None = None,
) -> Report:
    """Return the metrics of ``detections`` on ``tokens``, or on all annotated frames of ``source`` if None.

    Args:
        source: gives ground truth; all its boxes count, labelled frame or not, whatever its ``min_points``.
        detections: boxes in the BEV frame by sample token, or the content of a nuScenes result file.
        tokens: frames to score; every one of them needs an entry in ``detections``.
        max_distance_m: score only boxes this near to the ego, where that is less than the benchmark's range of
            their class; None is the benchmark itself.

    Raises:
        ContractError: lists every frame without an entry, every unknown token and every box that cannot be scored; or
            frames have no annotations, as sweeps between key frames and those of the official test split.
    """
    frames = scored_frames(source, tokens)
    return _score(source, *scored_boxes(source, detections, frames, max_distance_m), len(frames))


def benchmark() -> DetectionConfig:
    """Return the devkit's settings of the benchmark: ranges, matching distances, least recall and precision."""
    from nuscenes.eval.detection.config import config_factory

    return config_factory(CONFIG)


def scored_boxes(
    source: NuScenesSource,
    detections: Mapping[str, Boxes] | Mapping[str, Any],
    frames: Sequence[str],
    max_distance_m: float | None = None,
) -> tuple[EvalBoxes, EvalBoxes]:
    """Return ground truth and detections of ``frames`` after the benchmark's filters; see :func:`evaluate`."""
    results = _as_results(source, detections, frames)
    faults = check_results(results, source, frames)
    if faults:
        raise report(ContractError, "these detections cannot be scored:", shortened(faults))
    limit_m = math.inf if max_distance_m is None else max_distance_m
    class_range = {name: min(distance, limit_m) for name, distance in benchmark().class_range.items()}
    return _eval_boxes(source, results["results"], frames, class_range)


def save_detections(
    path: Path, source: NuScenesSource, found: Mapping[str, Boxes], sensors: frozenset[Sensor] = frozenset()
) -> Path:
    """Write boxes as a nuScenes submission and return its path: ``path``, with the suffix .json if it has none.

    Raises:
        ContractError: see :func:`to_results`.
    """
    path = path if path.suffix else path.with_suffix(".json")
    write_atomic(path, json.dumps(to_results(source, found, sensors)).encode())
    return path


def _as_results(
    source: NuScenesSource, detections: Mapping[str, Boxes] | Mapping[str, Any], frames: Sequence[str]
) -> Mapping[str, Any]:
    if "results" in detections or not all(isinstance(value, Boxes) for value in detections.values()):
        return detections
    boxes = cast(Mapping[str, Boxes], detections)
    unknown = [token for token in boxes if source.index.row(token) is None]
    if unknown:
        raise ContractError(
            f"detections name {len(unknown)} frames that are not in {source.config.root / source.config.version}, "
            f"first '{unknown[0]}'. Score them with the source they were made from."
        )
    asked = set(frames)
    return to_results(source, {token: each for token, each in boxes.items() if token in asked})


def _score(source: NuScenesSource, truth: EvalBoxes, found: EvalBoxes, frames: int) -> Report:
    from nuscenes.eval.detection.algo import accumulate, calc_ap, calc_tp
    from nuscenes.eval.detection.constants import TP_METRICS
    from nuscenes.eval.detection.data_classes import DetectionMetrics

    config = benchmark()
    metrics = DetectionMetrics(config)
    for name in config.class_names:
        for distance in config.dist_ths:
            curve = accumulate(truth, found, name, config.dist_fcn_callable, distance)
            metrics.add_label_ap(name, distance, calc_ap(curve, config.min_recall, config.min_precision))
            if distance == config.dist_th_tp:
                for error in TP_METRICS:
                    undefined = error in _UNDEFINED.get(name, ())
                    metrics.add_label_tp(name, error, np.nan if undefined else calc_tp(curve, config.min_recall, error))
    aps = {name: float(ap) for name, ap in metrics.mean_dist_aps.items()}
    named = {box.detection_name for box in truth.all}
    present = tuple(name for name in source.classes if name in named)
    return Report(
        mAP=float(metrics.mean_ap),
        NDS=float(metrics.nd_score),
        tp_errors={error: float(value) for error, value in metrics.tp_errors.items()},
        per_class={
            name: ClassScore(
                ap=aps[name],
                ap_by_distance={float(limit): float(metrics.get_label_ap(name, limit)) for limit in config.dist_ths},
                errors={error: float(metrics.get_label_tp(name, error)) for error in TP_METRICS},
            )
            for name in CLASSES
        },
        classes_present=present,
        mean_ap_present=float(np.mean([aps[name] for name in present])) if present else math.nan,
        frames=frames,
    )


def _eval_boxes(
    source: NuScenesSource,
    results: Mapping[str, list[dict[str, Any]]],
    frames: Sequence[str],
    class_range: Mapping[str, float],
) -> tuple[EvalBoxes, EvalBoxes]:
    """Return ground truth and detections of ``frames`` after the benchmark's filters."""
    from nuscenes.eval.common.data_classes import EvalBoxes
    from nuscenes.eval.detection.data_classes import DetectionBox

    truth, found = EvalBoxes(), EvalBoxes()
    asked = set(frames)
    # In the order of the file: boxes of equal score are ranked by it, here as in the devkit.
    for token in (token for token in results if token in asked):
        annotations, ego = source.global_annotations(token), source.ego_position(token)
        labels = _truth(token, annotations)
        detected = [DetectionBox.deserialize(box) for box in results[token]]
        truth.add_boxes(token, _filtered(labels, annotations, ego, class_range))
        found.add_boxes(token, _filtered(detected, annotations, ego, class_range))
    return truth, found


def _truth(token: str, boxes: GlobalBoxes) -> list[Any]:
    from nuscenes.eval.detection.data_classes import DetectionBox

    return [
        DetectionBox(
            sample_token=token,
            translation=boxes.translation[row].tolist(),
            size=boxes.size[row].tolist(),
            rotation=boxes.rotation[row].tolist(),
            velocity=boxes.velocity[row].tolist(),
            num_pts=int(boxes.points[row]),
            detection_name=name,
            attribute_name=boxes.attributes[row],
        )
        for row, name in enumerate(boxes.names)
        if name is not None
    ]


def _filtered(
    boxes: list[Any], annotations: GlobalBoxes, ego: np.ndarray[Any, Any], class_range: Mapping[str, float]
) -> list[Any]:
    """Return boxes in their class's range, with returns inside (if counted), and no cycles parked in a rack."""
    from nuscenes.utils.data_classes import Box
    from nuscenes.utils.geometry_utils import points_in_box
    from pyquaternion import Quaternion

    for box in boxes:
        box.ego_translation = tuple(np.array(box.translation) - ego)
    boxes = [box for box in boxes if box.ego_dist < class_range[box.detection_name] and box.num_pts != 0]
    racks = [
        Box(annotations.translation[row], annotations.size[row], Quaternion(annotations.rotation[row]))
        for row, category in enumerate(annotations.categories)
        if category == _RACK
    ]

    def racked(box: Any) -> bool:
        center = np.array(box.translation)[:, None]
        return box.detection_name in _RACKED and any(points_in_box(rack, center).any() for rack in racks)

    return [box for box in boxes if not racked(box)]


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def _figure(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _table(report: Report) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title=f"mAP {_percent(report.mAP)}   NDS {_percent(report.NDS)}   mean AP over the "
        f"{len(report.classes_present)} classes present {_percent(report.mean_ap_present)}   {report.frames} frames",
        title_justify="left",
        caption="AP in percent, also by matching distance in metres; errors in m, 1 - IoU, rad, m/s, 1 - accuracy",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("class")
    for heading in ("AP", *(f"@{limit:g}" for limit in _LIMITS), *_ERRORS.values()):
        table.add_column(heading, justify="right")
    for name in report.classes_present:
        score = report.per_class[name]
        table.add_row(
            name,
            _percent(score["ap"]),
            *(_percent(score["ap_by_distance"][limit]) for limit in _LIMITS),
            *(_figure(score["errors"][error]) for error in _ERRORS),
        )
    return table
