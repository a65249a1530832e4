"""What is found by distance from the ego: the devkit's matching and average precision, divided into ranges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from nuscenes.eval.common.data_classes import EvalBoxes
from nuscenes.eval.common.utils import center_distance
from nuscenes.eval.detection.algo import accumulate, calc_ap
from nuscenes.eval.detection.data_classes import DetectionBox

from bevkd.evaluation.ranges import DISTANCES_M, Outcome, match
from bevkd.types import Boxes

CLASSES = ("car", "pedestrian")


def boxes(*rows: tuple[float, float, int, float]) -> Boxes:
    """Return boxes from x, y, label and score."""
    values = torch.zeros(len(rows), 9)
    values[:, :2] = torch.tensor([row[:2] for row in rows]).reshape(-1, 2)
    values[:, 3:6] = 1.0
    labels = torch.tensor([row[2] for row in rows], dtype=torch.int64)
    return Boxes(values, labels, torch.tensor([row[3] for row in rows], dtype=torch.float32))


def made_up(frames: int, seed: int) -> tuple[list[Boxes], list[Boxes]]:
    """Return annotations, and detections of which many lie near one."""
    chance = np.random.default_rng(seed)
    truth, found = [], []
    for _ in range(frames):
        rows = [(*chance.uniform(-45, 45, 2), int(chance.integers(2)), 1.0) for _ in range(chance.integers(0, 9))]
        near = [(x + chance.normal(0, 1), y + chance.normal(0, 1), label, chance.uniform()) for x, y, label, _ in rows]
        wrong = [(*chance.uniform(-45, 45, 2), int(chance.integers(2)), chance.uniform()) for _ in range(6)]
        truth.append(boxes(*rows))
        found.append(boxes(*near, *near[:2], *wrong))
    return truth, found


def devkit_ap(truth: list[Boxes], found: list[Boxes], label: int) -> float:
    """Return the average precision of a class by the devkit's own functions."""

    def given(frames: list[Boxes]) -> EvalBoxes:
        result = EvalBoxes()
        for number, each in enumerate(frames):
            rows = zip(each.center.double().tolist(), each.labels.tolist(), each.scores.tolist(), strict=True)
            named = [
                DetectionBox(
                    str(number), place, (1, 1, 1), detection_name=CLASSES[own], detection_score=score, attribute_name=""
                )
                for place, own, score in rows
            ]
            result.add_boxes(str(number), named)
        return result

    truth_boxes, found_boxes = given(truth), given(found)
    curves = [accumulate(truth_boxes, found_boxes, CLASSES[label], center_distance, d) for d in DISTANCES_M]
    return float(np.mean([calc_ap(curve, 0.1, 0.1) for curve in curves]))


@pytest.mark.parametrize("seed", range(5))
def test_over_all_ranges_the_average_precision_is_the_devkits(seed: int) -> None:
    truth, found = made_up(40, seed)
    outcome = match(truth, found, len(CLASSES))
    expected = [devkit_ap(truth, found, label) for label in range(len(CLASSES))]
    assert outcome.average_precision() == pytest.approx(expected, abs=1e-6)
    assert outcome.mean_ap() == pytest.approx(np.mean(expected), abs=1e-6)


def test_hundreds_of_frames_are_matched_as_each_alone() -> None:
    truth, found = made_up(600, 1)
    together = match(truth, found, len(CLASSES)).frame_counts(0.5)
    alone = [match([a], [b], len(CLASSES)).frame_counts(0.5)[0] for a, b in zip(truth, found, strict=True)]
    assert torch.equal(together, torch.stack(alone))


def test_a_hit_across_a_border_counts_where_the_object_is() -> None:
    outcome = match([boxes((19.8, 0, 0, 1))], [boxes((20.2, 0, 0, 0.9))], 2)
    assert outcome.recall(0.5, 10, 20) == 1
    assert outcome.mean_ap(10, 20) == pytest.approx(1)
    assert math.isnan(outcome.mean_ap(20, 30)), "nothing is annotated there"


def test_a_false_alarm_counts_at_its_own_distance() -> None:
    truth = [boxes((5, 0, 0, 1), (25, 0, 0, 1))]
    found = [boxes((5, 0, 0, 0.8), (25, 0, 0, 0.8), (0, 28, 0, 0.9))]
    outcome = match(truth, found, 2)
    assert outcome.mean_ap(0, 10) == pytest.approx(1)
    assert outcome.mean_ap(20, 30) < 0.6


def test_the_nearest_free_object_is_taken_and_only_once() -> None:
    truth = [boxes((10, 0, 0, 1), (11, 0, 0, 1))]
    outcome = match(truth, [boxes((10.1, 0, 0, 0.9), (10.2, 0, 0, 0.8), (10.0, 0, 0, 0.7))], 2)
    assert outcome.classes[0].match[2].tolist() == [0, 1, -1]
    assert outcome.frame_counts(0.0).tolist() == [[2, 0, 1]]
    assert outcome.frame_counts(0.85).tolist() == [[1, 1, 0]]


def test_classes_do_not_find_each_other() -> None:
    outcome = match([boxes((10, 0, 0, 1))], [boxes((10, 0, 1, 0.9))], 2)
    assert outcome.frame_counts(0.0).tolist() == [[0, 1, 1]]


def test_boxes_beyond_the_limit_are_left_out() -> None:
    outcome = match([boxes((10, 0, 0, 1), (30, 0, 0, 1))], [boxes((10, 0, 0, 0.9), (30, 0, 0, 0.9))], 2, limit_m=25)
    assert outcome.objects() == 1
    assert outcome.frame_counts(0.0).tolist() == [[1, 0, 0]]


def test_the_best_score_separates_hits_from_false_alarms() -> None:
    truth = [boxes(*((float(x), 0.0, 0, 1.0) for x in range(0, 40, 5)))]
    sure = [(float(x), 0.0, 0, 0.6 + x / 1000) for x in range(0, 40, 5)]
    unsure = [(float(x), 20.0, 0, 0.5) for x in range(0, 40, 5)]
    assert match(truth, [boxes(*sure, *unsure)], 2).best_score() == pytest.approx(0.6)


def test_detections_of_equal_score_come_together_or_not_at_all() -> None:
    wrong = [(0.0, float(y), 0, 0.5) for y in range(20, 45, 5)]
    found = [boxes((10, 0, 0, 0.8), (30, 0, 0, 0.5), *wrong)]
    outcome = match([boxes((10, 0, 0, 1), (30, 0, 0, 1))], found, 2)
    # With the second hit alone F1 would be 1, but five false alarms have its score.
    assert outcome.best_score() == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("truth", "found", "counts"),
    [
        ([Boxes.empty()], [Boxes.empty()], [0, 0, 0]),
        ([boxes((1, 1, 0, 1))], [Boxes.empty()], [0, 1, 0]),
        ([Boxes.empty()], [boxes((1, 1, 0, 0.5))], [0, 0, 1]),
    ],
)
def test_nothing_annotated_and_nothing_found_are_no_error(
    truth: list[Boxes], found: list[Boxes], counts: list[int]
) -> None:
    outcome: Outcome = match(truth, found, 2)
    assert outcome.frame_counts(0.0).tolist() == [counts]
    assert math.isnan(outcome.mean_ap()) == (counts[1] == 0)
    assert outcome.best_score() >= 0
