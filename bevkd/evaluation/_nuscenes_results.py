"""Result files of nuScenes detection: written from boxes, read and checked from users."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bevkd.data.source import Sensor
from bevkd.data.sources.nuscenes import CLASSES, NuScenesSource
from bevkd.errors import ContractError, report
from bevkd.evaluation.score import scored_frames, shortened
from bevkd.types import Boxes

MAX_BOXES = 500
"""Boxes per frame that the benchmark allows."""

MOVING_M_PER_S = 0.2
"""Speed from which a box is called moving; slower ones are within the jitter of standing boxes."""

_ATTRIBUTES = {
    # class: (attribute when moving, attribute when not)
    **dict.fromkeys(("car", "truck", "trailer", "construction_vehicle"), ("vehicle.moving", "vehicle.parked")),
    "bus": ("vehicle.moving", "vehicle.stopped"),
    "pedestrian": ("pedestrian.moving", "pedestrian.standing"),
    **dict.fromkeys(("motorcycle", "bicycle"), ("cycle.with_rider", "cycle.without_rider")),
    **dict.fromkeys(("traffic_cone", "barrier"), ("", "")),
}
_KNOWN_ATTRIBUTES = {
    "",
    "pedestrian.sitting_lying_down",
    *("vehicle.stopped", *(name for pair in _ATTRIBUTES.values() for name in pair)),
}
_LENGTHS = {"translation": 3, "size": 3, "rotation": 4, "velocity": 2}


def to_results(
    source: NuScenesSource, predictions: Mapping[str, Boxes], sensors: frozenset[Sensor] = frozenset()
) -> dict[str, Any]:
    """Return boxes as a nuScenes submission.

    The ``MAX_BOXES`` highest scores of each frame are kept. Attributes, which no head predicts, are guessed from class
    and speed.

    Args:
        source: gives classes and poses.
        predictions: boxes in the BEV frame by sample token.
        sensors: what the detector sees, for the submission's ``meta``.

    Raises:
        ContractError: lists every frame with a value that is not finite, a size that is not positive, or a label
            outside the source's classes.
        DataError: a token is unknown.
    """
    faults = [f"{token}: {fault}" for token, boxes in predictions.items() for fault in _box_faults(source, boxes)]
    if faults:
        raise report(ContractError, "these predictions cannot be scored:", shortened(faults))
    meta = {f"use_{sensor}": sensor in sensors for sensor in ("camera", "lidar", "radar")}
    return {
        "meta": {**meta, "use_map": False, "use_external": False},
        "results": {token: _records(source, token, boxes) for token, boxes in predictions.items()},
    }


def to_boxes(source: NuScenesSource, detections: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Boxes]:
    """Return what :func:`load_detections` has of ``tokens`` as boxes in the BEV frame; the inverse of `to_results`.

    Boxes of classes that ``source`` does not have are left out.
    """
    return {token: _boxes(source, token, detections["results"][token]) for token in tokens}


def read_results(path: Path) -> dict[str, Any]:
    """Return a result file's content, its form unchecked.

    Raises:
        ContractError: the file is missing or holds no JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ContractError(f"no such result file: {path}. Correct the path.") from error
    except (OSError, ValueError) as error:
        raise ContractError(f"{path} is no JSON file: {error}. Write it again.") from error
    if not isinstance(content, dict):
        raise ContractError(f"{path} must hold {{'meta': ..., 'results': {{sample token: boxes}}}}.")
    return content


def load_detections(path: Path, source: NuScenesSource) -> dict[str, Any]:
    """Return a user's result file after checking that it answers for the annotated frames of ``source``.

    Raises:
        ContractError: lists all faults: see :func:`check_results`.
    """
    content = read_results(path)
    faults = check_results(content, source, scored_frames(source))
    if faults:
        raise report(ContractError, f"{path} cannot be scored:", shortened(faults))
    return content


def check_results(content: Mapping[str, Any], source: NuScenesSource, tokens: Collection[str]) -> list[str]:
    """Return what is wrong with a submission: keys, unknown tokens, frames of ``tokens`` without an entry, boxes.

    Frames of the same data set beyond ``tokens`` are allowed, so that a file for a split can be scored on part of it.
    """
    faults = []
    if not isinstance(content.get("meta"), dict):
        faults.append("no key 'meta' with an object; a submission says there which sensors were used")
    results = content.get("results")
    if not isinstance(results, dict):
        return [*faults, "no key 'results' with an object of sample tokens; is this a file of an older format?"]
    unknown = [token for token in results if source.index.row(token) is None]
    missing = [token for token in tokens if token not in results]
    where = f"{source.config.root / source.config.version}"
    if unknown:
        faults.append(f"{len(unknown)} tokens are not in {where}, first '{unknown[0]}'")
    if missing:
        faults.append(f"{len(missing)} of {len(tokens)} frames have no entry, first '{missing[0]}'; give [] for none")
    for token in results.keys() & set(tokens):
        faults += [f"{token}: {fault}" for fault in _frame_faults(token, results[token])]
    return faults


def _box_faults(source: NuScenesSource, boxes: Boxes) -> Iterator[str]:
    values, labels = boxes.pack()[:, :10], boxes.labels
    unknown = values.isnan()
    unknown[:, :7] = unknown[:, 9:] = False  # of a velocity, NaN is a value: some heads predict none
    broken = (~values.isfinite() & ~unknown).any(dim=1).sum()
    if broken:
        yield f"{broken} of {len(boxes)} boxes have values that are not finite"
    flat = (boxes.size <= 0).any(dim=1).sum()
    if flat:
        yield f"{flat} of {len(boxes)} boxes have a size that is not positive"
    foreign = ((labels < 0) | (labels >= len(source.classes))).sum()
    if foreign:
        yield f"{foreign} of {len(boxes)} boxes have a label outside the {len(source.classes)} classes"


def _records(source: NuScenesSource, token: str, boxes: Boxes) -> list[dict[str, Any]]:
    """Return the boxes of one frame in the map frame.

    There boxes stand upright and move in the plane, as annotations do, and one of unknown velocity stands still. The
    source looks at their heading and velocity from above the leaning LiDAR frame; this is the exact inverse, so that
    annotations come back as they were.
    """
    best = boxes.scores.argsort(descending=True, stable=True)[:MAX_BOXES]
    values = boxes.values[best].double().nan_to_num(nan=0.0).numpy()
    pose = source.global_from_lidar(token).numpy()
    center = values[:, :3] @ pose[:3, :3].T + pose[:3, 3]
    global_from_bev = np.linalg.inv(pose[:2, :2].T)
    velocity = values[:, 7:9] @ global_from_bev.T
    heading = np.stack([np.cos(values[:, 6]), np.sin(values[:, 6])], axis=1) @ global_from_bev.T
    half_yaw = np.arctan2(heading[:, 1], heading[:, 0]) / 2
    moving = np.linalg.norm(values[:, 7:9], axis=1) > MOVING_M_PER_S
    names = [source.classes[label] for label in boxes.labels[best].tolist()]
    return [
        {
            "sample_token": token,
            "translation": center[row].tolist(),
            "size": values[row, [4, 3, 5]].tolist(),
            "rotation": [float(np.cos(half_yaw[row])), 0.0, 0.0, float(np.sin(half_yaw[row]))],
            "velocity": velocity[row].tolist(),
            "detection_name": name,
            "detection_score": float(boxes.scores[best[row]]),
            "attribute_name": _ATTRIBUTES[name][0 if moving[row] else 1],
        }
        for row, name in enumerate(names)
    ]


def _boxes(source: NuScenesSource, token: str, records: Sequence[Mapping[str, Any]]) -> Boxes:
    known = [record for record in records if record["detection_name"] in source.classes]
    if not known:
        return Boxes.empty()
    lidar_from_global = np.linalg.inv(source.global_from_lidar(token).numpy())
    bev_from_global = source.global_from_lidar(token).numpy()[:2, :2].T
    center = np.array([record["translation"] for record in known])
    width, length, height = np.array([record["size"] for record in known]).T
    w, x, y, z = np.array([record["rotation"] for record in known]).T
    # The quaternion's turn of the x axis, seen from above; quaternions of users need not have length one.
    heading = np.stack([w * w + x * x - y * y - z * z, 2 * (x * y + w * z)], axis=1) @ bev_from_global.T
    velocity = np.array([record["velocity"] for record in known]) @ bev_from_global.T
    values = np.column_stack(
        [
            center @ lidar_from_global[:3, :3].T + lidar_from_global[:3, 3],
            *(length, width, height, np.arctan2(heading[:, 1], heading[:, 0])),
            velocity,
        ]
    )
    labels = [source.classes.index(record["detection_name"]) for record in known]
    scores = [float(record["detection_score"]) for record in known]
    return Boxes(torch.from_numpy(values).float(), torch.tensor(labels), torch.tensor(scores))


def _frame_faults(token: str, boxes: Any) -> Iterator[str]:
    if not isinstance(boxes, list):
        yield "must be a list of boxes"
        return
    if len(boxes) > MAX_BOXES:
        yield f"{len(boxes)} boxes, at most {MAX_BOXES} are allowed"
    for number, box in enumerate(boxes):
        if not isinstance(box, dict):
            yield f"box {number} is not an object"
            continue
        for fault in _record_faults(token, box):
            yield f"box {number}: {fault}"


def _record_faults(token: str, box: Mapping[str, Any]) -> Iterator[str]:
    named = ("sample_token", "detection_name", "detection_score", "attribute_name")
    lacking = [key for key in (*_LENGTHS, *named) if key not in box]
    if lacking:
        yield f"no key {', '.join(lacking)}"
        return
    if box["sample_token"] != token:
        yield f"sample_token is '{box['sample_token']}', it stands under another"
    for key, length in _LENGTHS.items():
        if not isinstance(box[key], list) or len(box[key]) != length or not all(map(_finite, box[key])):
            yield f"{key} must be {length} finite numbers, it is {box[key]}"
        elif key == "size" and min(box[key]) <= 0:
            yield f"size must be positive, it is {box[key]}"
        elif key == "rotation" and not any(box[key]):
            yield "rotation is no quaternion, it is all zero"
    if not _finite(box["detection_score"]):
        yield f"detection_score must be a finite number, it is {box['detection_score']}"
    if box["detection_name"] not in CLASSES:
        yield f"detection_name '{box['detection_name']}' is none of {', '.join(CLASSES)}"
    if box["attribute_name"] not in _KNOWN_ATTRIBUTES:
        yield f"attribute_name '{box['attribute_name']}' is none of {', '.join(sorted(_KNOWN_ATTRIBUTES - {''}))}"


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
