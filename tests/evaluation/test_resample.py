"""Resampling scenes gives the devkit's own average precision of the scenes that are drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bevkd.data.sources.nuscenes import Config, NuScenesSource, build
from bevkd.errors import ContractError
from bevkd.evaluation import nuscenes, resample
from bevkd.evaluation.resample import ClassMatches, Matches
from bevkd.types import Boxes
from bevkd.world import VAL_SPLIT, VERSION_FOLDER, world_preset, write_world

DISTANCES = 4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> NuScenesSource:
    root = tmp_path_factory.mktemp("world")
    write_world(world_preset("tiny", scenes_val=3, image_height=32, image_width=64), root)
    index_dir = tmp_path_factory.mktemp("index")
    return build(Config(root=root, version=VERSION_FOLDER, split=VAL_SPLIT, index_dir=index_dir))


@pytest.fixture(scope="module")
def found(source: NuScenesSource) -> dict[str, Boxes]:
    """Return three detections near each object, which compete for it, some of them of equal score, and some missing."""
    random = torch.Generator().manual_seed(5)
    predictions = {}
    for token in source.tokens:
        truth = source.annotations(token)
        values = truth.values.nan_to_num().repeat(3, 1)
        values[:, :2] += 0.9 * torch.randn(len(values), 2, generator=random)
        scores = (torch.rand(len(values), generator=random) * 20).round() / 20
        boxes = Boxes(values, truth.labels.repeat(3), scores)
        predictions[token] = boxes[torch.rand(len(values), generator=random) > 0.3]
    return predictions


def ap_by_distance(report: nuscenes.Report, classes: Mapping[str, Any]) -> list[list[float]]:
    """Return the report's AP of each class and distance; NaN of classes without annotations."""
    known = report.classes_present
    return [
        [*report.per_class[name]["ap_by_distance"].values()] if name in known else [np.nan] * DISTANCES
        for name in classes
    ]


def test_every_scene_once_is_the_metric_itself(source: NuScenesSource, found: dict[str, Boxes]) -> None:
    matches, report = resample.match(source, found), nuscenes.evaluate(source, found)
    precisions = resample.average_precisions(matches, np.ones((1, 3), np.int64))
    assert 0.05 < report.mean_ap_present < 0.9
    np.testing.assert_allclose(precisions[0], ap_by_distance(report, matches.classes), atol=1e-9)
    assert resample.mean_ap(precisions)[0] == pytest.approx(report.mean_ap_present, abs=1e-9)


def test_scenes_that_are_not_drawn_do_not_count(source: NuScenesSource, found: dict[str, Boxes]) -> None:
    matches = resample.match(source, found, max_distance_m=15)
    draws = np.array([[1, 0, 1], [0, 1, 0]])
    precisions = resample.average_precisions(matches, draws)
    for draw, each in zip(draws, precisions, strict=True):
        drawn = {name for name, times in zip(matches.scenes, draw, strict=True) if times}
        tokens = [token for token in source.tokens if source.scene(token) in drawn]
        report = nuscenes.evaluate(source, found, tokens, max_distance_m=15)
        np.testing.assert_allclose(each, ap_by_distance(report, matches.classes), atol=1e-9)


def test_a_scene_drawn_twice_counts_as_two_scenes(source: NuScenesSource, found: dict[str, Boxes]) -> None:
    from nuscenes.eval.common.data_classes import EvalBoxes
    from nuscenes.eval.common.utils import center_distance
    from nuscenes.eval.detection.algo import accumulate, calc_ap
    from nuscenes.eval.detection.data_classes import DetectionBox

    def copied(boxes: EvalBoxes) -> EvalBoxes:
        copies = EvalBoxes()
        for token in boxes.sample_tokens:
            for copy in range(draw[source.scene(token)]):
                records = [box.serialize() | {"sample_token": f"{token}{copy}"} for box in boxes[token]]
                copies.add_boxes(f"{token}{copy}", [DetectionBox.deserialize(record) for record in records])
        return copies

    # Distinct scores: of equal ones the devkit would rank the copies of a scene one after the other.
    apart = {
        token: Boxes(boxes.values, boxes.labels, torch.linspace(0.1, 0.9, len(boxes)) + 0.001 * number)
        for number, (token, boxes) in enumerate(found.items())
    }
    matches = resample.match(source, apart)
    draw = dict(zip(matches.scenes, (2, 0, 3), strict=True))
    truth, detected = map(copied, nuscenes.scored_boxes(source, apart, source.tokens))
    precisions = resample.average_precisions(matches, np.array([[2, 0, 3]]))[0]
    for name, row in zip(matches.classes, precisions, strict=True):
        if np.isnan(row).all():
            continue
        for distance, ap in zip((0.5, 1.0, 2.0, 4.0), row, strict=True):
            curve = accumulate(truth, detected, name, center_distance, distance)
            assert ap == pytest.approx(calc_ap(curve, 0.1, 0.1), abs=1e-9)


def test_real_detections_score_as_published(real_data: Path, tmp_path: Path) -> None:
    root = real_data / "nuscenes_mini_real"
    source = build(Config(root=root, version="v1.0-mini", split="mini_val", index_dir=tmp_path))
    folder = real_data / "nuscenes_eval" / "mini_val_synthetic_predictions"
    published = json.loads((folder / "metrics_summary_devkit.json").read_text())["label_aps"]
    matches = resample.match(source, nuscenes.load_detections(folder / "results_nusc.json", source))
    precisions = resample.average_precisions(matches, np.ones((1, len(matches.scenes)), np.int64))[0]
    for name, row in zip(matches.classes, precisions, strict=True):
        if not np.isnan(row).all():
            assert row.tolist() == pytest.approx([*published[name].values()], abs=1e-9)


def test_precision_of_hits_and_misses_in_known_order() -> None:
    # Ten objects in two scenes; hits of rank 1, 3, 4, all in the first scene; the second has a miss of rank 2.
    scene = np.array([0, 1, 0, 0])
    hit = np.array([[True, False, True, True]] * DISTANCES)
    matches = Matches(("a", "b"), {"car": ClassMatches(scene, hit, np.array([4, 6]))})
    first, both = resample.average_precisions(matches, np.array([[1, 0], [1, 1]]))[:, 0, 0]
    # Without the miss precision is 1 up to recall 3/4: 65 of the 90 recalls from .11 on.
    assert first == pytest.approx(65 / 90)
    recalls = np.linspace(0.11, 1, 90)
    expected = np.interp(recalls, [0.1, 0.1, 0.2, 0.3], [1, 1 / 2, 2 / 3, 3 / 4], right=0)
    assert both == pytest.approx(np.clip(expected - 0.1, 0, None).mean() / 0.9)


def test_a_class_without_a_match_scores_zero_and_one_without_objects_nothing() -> None:
    missed = ClassMatches(np.array([0, 0]), np.zeros((DISTANCES, 2), bool), np.array([3, 0]))
    matches = Matches(("a", "b"), {"car": missed})
    precisions = resample.average_precisions(matches, np.array([[1, 1], [0, 2]]))
    assert precisions[0].tolist() == [[0.0] * DISTANCES]
    assert np.isnan(precisions[1]).all()
    mean = resample.mean_ap(precisions)
    assert mean[0] == 0.0
    assert np.isnan(mean[1])


def test_draws_are_seeded_and_as_many_as_there_are_scenes() -> None:
    draws = resample.draw_scenes(7, 50, seed=3)
    assert draws.shape == (50, 7)
    assert (draws.sum(axis=1) == 7).all()
    assert (draws == resample.draw_scenes(7, 50, seed=3)).all()
    assert (draws != resample.draw_scenes(7, 50, seed=4)).any()


def test_one_scene_cannot_be_resampled() -> None:
    with pytest.raises(ContractError, match=r"has one only.*--bootstrap"):
        resample.draw_scenes(1, 10)


def test_the_interval_holds_the_middle_of_the_values() -> None:
    assert resample.interval(np.arange(1001.0)) == (25.0, 975.0)
    assert resample.interval(np.array([0.0, np.nan, 1000.0])) == pytest.approx((25.0, 975.0))
