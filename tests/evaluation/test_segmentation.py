"""Mask AP means what COCO means by it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from bevkd.evaluation.segmentation import SegmentationReport, score_instances
from bevkd.types import Instances

SIZE = (60, 80)
CLASSES = ("car", "pedestrian", "bus")


def boxes(
    *values: tuple[float, float, float, float], labels: list[int], scores: list[float] | None = None
) -> Instances:
    """Return instances that fill their boxes."""
    masks = tuple(torch.ones(int(b - t), int(r - l), dtype=torch.bool) for l, t, r, b in values)  # noqa: E741
    return Instances(
        torch.zeros(len(values)).long(),
        torch.tensor(values, dtype=torch.float32).view(-1, 4),
        torch.tensor(labels),
        torch.tensor(scores or [1.0] * len(values)),
        masks,
    )


TRUTH = {
    "a": boxes((0, 0, 10, 20), (30, 10, 50, 20), labels=[0, 0]),
    "b": boxes((5, 5, 15, 25), labels=[1]),
    "c": Instances.empty(),
}
SIZES = dict.fromkeys(TRUTH, SIZE)


def score(found: dict[str, Instances], min_area_px: int = 1) -> SegmentationReport:
    return score_instances(TRUTH, {**dict.fromkeys(TRUTH, Instances.empty()), **found}, SIZES, CLASSES, min_area_px)


def test_the_truth_itself_scores_one_and_absent_classes_do_not_count() -> None:
    report = score(TRUTH)
    assert [report.mask.ap, report.box.ap, report.mask.ap75] == pytest.approx([1, 1, 1])
    assert [each.objects for each in report.per_class.values()] == [2, 1, 0]
    assert math.isnan(report.per_class["bus"].mask.ap)


def test_nothing_found_scores_zero() -> None:
    assert score({}).mask.ap == 0


def test_half_of_the_objects_found_is_half_of_the_recall() -> None:
    report = score({"a": boxes((0, 0, 10, 20), labels=[0])})
    # 51 of the 101 recall levels, 0 to 0.5, are reached.
    assert report.per_class["car"].mask.ap == pytest.approx(51 / 101)
    assert report.mask.ap == pytest.approx(51 / 202)


def test_a_better_scored_false_alarm_halves_the_precision() -> None:
    found = boxes((40, 40, 60, 50), (5, 5, 15, 25), labels=[1, 1], scores=[0.9, 0.5])
    assert score({"b": found}).per_class["pedestrian"].mask.ap == pytest.approx(0.5)


def test_the_right_mask_of_another_class_is_wrong() -> None:
    assert score({"b": replace(TRUTH["b"], labels=torch.tensor([0]))}).per_class["pedestrian"].mask.ap == 0


def test_a_mask_counts_at_the_thresholds_that_its_overlap_reaches() -> None:
    # 9 x 16 of 10 x 20 pixels: IoU 0.72, which reaches 0.5, 0.55, 0.6, 0.65 and 0.7.
    report = score({"b": boxes((5, 5, 14, 21), labels=[1])})
    pedestrian = report.per_class["pedestrian"].mask
    assert pedestrian.ap50 == pytest.approx(1)
    assert pedestrian.ap75 == 0
    assert pedestrian.ap == pytest.approx(0.5)


def test_masks_are_judged_by_their_pixels_and_boxes_by_their_edges() -> None:
    hollow = torch.zeros(20, 10, dtype=torch.bool)
    hollow[:, 0] = hollow[:, -1] = hollow[0] = hollow[-1] = True
    report = score({"b": replace(TRUTH["b"], masks=(hollow,))})
    assert report.per_class["pedestrian"].box.ap == pytest.approx(1)
    assert report.per_class["pedestrian"].mask.ap == 0


def test_small_objects_are_neither_asked_for_nor_held_against_who_finds_them() -> None:
    tiny = boxes((0, 0, 10, 20), (70, 50, 72, 52), labels=[0, 0])
    truth, sizes = {"a": tiny}, {"a": SIZE}
    found = boxes((0, 0, 10, 20), (70, 50, 72, 52), labels=[0, 0], scores=[0.5, 0.9])
    assert score_instances(truth, {"a": found}, sizes, CLASSES, 10).mask.ap == pytest.approx(1)
    missed = boxes((0, 0, 10, 20), labels=[0])
    assert score_instances(truth, {"a": missed}, sizes, CLASSES, 10).mask.ap == pytest.approx(1)
    assert score_instances(truth, {"a": missed}, sizes, CLASSES, 1).mask.ap == pytest.approx(51 / 101)


def test_scoring_prints_nothing_and_the_report_becomes_json(capsys: pytest.CaptureFixture[str]) -> None:
    values = score(TRUTH).to_json()
    assert capsys.readouterr().out == ""
    assert values["per_class"]["bus"]["mask"]["ap"] is None
    assert values["mask"]["ap50"] == pytest.approx(1)
    assert score(TRUTH).headline == pytest.approx({"mask AP": 1, "mask AP50": 1, "box AP": 1})


def test_the_table_has_a_row_for_each_class_and_the_mean() -> None:
    table = score(TRUTH).table()
    assert list(table.columns[0].cells) == [*CLASSES, "mean"]
    assert list(table.columns[2].cells) == ["100.0", "100.0", "-", "100.0"]
