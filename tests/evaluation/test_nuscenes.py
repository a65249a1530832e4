"""The metrics are the devkit's, on exactly the frames asked for."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bevkd.data.sources.nuscenes import CLASSES, Config, NuScenesSource, build
from bevkd.errors import ContractError
from bevkd.evaluation import nuscenes
from bevkd.types import Boxes

PUBLISHED = {
    "mini_val_A": ("metrics_summary.json", 0.07551618, 0.10336284),
    "mini_val_B": ("metrics_summary_devkit.json", 0.061302, 0.099236),
    "mini_val_synthetic_predictions": ("metrics_summary_devkit.json", 0.369686, 0.440722),
}


@pytest.fixture(scope="module")
def open_source(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., NuScenesSource]:
    place = tmp_path_factory.mktemp("index")
    root = real_data / "nuscenes_mini_real"
    return lambda **options: build(Config(root=root, version="v1.0-mini", split="mini_val", index_dir=place, **options))


@pytest.fixture(scope="module")
def source(open_source: Callable[..., NuScenesSource]) -> NuScenesSource:
    return open_source()


@pytest.fixture(scope="module")
def results(real_data: Path) -> dict[str, Any]:
    path = real_data / "nuscenes_eval" / "mini_val_synthetic_predictions" / "results_nusc.json"
    return nuscenes.read_results(path)


def known(boxes: Boxes, seed: int = 0) -> Boxes:
    """Return the boxes with unknown velocities at rest and with distinct scores."""
    scores = torch.rand(len(boxes), generator=torch.Generator().manual_seed(seed))
    return dataclasses.replace(boxes, values=boxes.values.nan_to_num(), scores=scores)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_scores_are_reproduced(source: NuScenesSource, real_data: Path, name: str) -> None:
    folder = real_data / "nuscenes_eval" / name
    file, mean_ap, nds = PUBLISHED[name]
    summary = json.loads((folder / file).read_text())
    scores = nuscenes.evaluate(source, nuscenes.load_detections(folder / "results_nusc.json", source))
    assert scores.frames == 81
    assert (scores.mAP, scores.NDS) == pytest.approx((mean_ap, nds), abs=1e-6)
    assert (scores.mAP, scores.NDS) == pytest.approx((summary["mean_ap"], summary["nd_score"]), abs=1e-8)
    assert scores.tp_errors == pytest.approx(summary["tp_errors"], abs=1e-6)
    assert list(scores.per_class) == list(CLASSES)
    for label, score in scores.per_class.items():
        assert score["ap"] == pytest.approx(summary["mean_dist_aps"][label], abs=1e-12)
        by_distance = {str(distance): ap for distance, ap in score["ap_by_distance"].items()}
        assert by_distance == pytest.approx(summary["label_aps"][label], abs=1e-12)
        assert score["errors"] == pytest.approx(summary["label_tp_errors"][label], abs=1e-6, nan_ok=True)


def test_boxes_pass_the_same_filters_as_in_the_devkit(
    source: NuScenesSource, real_data: Path, results: dict[str, Any]
) -> None:
    from nuscenes import NuScenes
    from nuscenes.eval.common import loaders
    from nuscenes.eval.common.data_classes import EvalBoxes
    from nuscenes.eval.detection.config import config_factory
    from nuscenes.eval.detection.data_classes import DetectionBox

    devkit = NuScenes("v1.0-mini", str(real_data / "nuscenes_mini_real"), verbose=False)
    ranges = config_factory(nuscenes.CONFIG).class_range
    truth = loaders.load_gt_of_sample_tokens(devkit, list(source.tokens), DetectionBox)
    found = EvalBoxes.deserialize(results["results"], DetectionBox)
    ours = nuscenes._eval_boxes(source, results["results"], source.tokens, ranges)
    for mine, theirs in zip(ours, (truth, found), strict=True):
        total = len(theirs.all)
        theirs = loaders.filter_eval_boxes(devkit, loaders.add_center_dist(devkit, theirs), ranges)
        assert len(theirs.all) < total
        for token in source.tokens:
            assert [_without_nan(box) for box in mine[token]] == [_without_nan(box) for box in theirs[token]]


def _without_nan(box: Any) -> dict[str, Any]:
    return {**box.serialize(), "velocity": np.nan_to_num(box.velocity, nan=999.0).tolist()}


def test_annotations_given_as_detections_come_back_exactly(source: NuScenesSource) -> None:
    scores = nuscenes.evaluate(source, {token: known(source.annotations(token)) for token in source.tokens})
    assert scores.classes_present == ("car", "truck", "bus", "pedestrian", "motorcycle", "bicycle", "traffic_cone")
    assert scores.mean_ap_present == pytest.approx(1)
    assert scores.mAP == pytest.approx(0.7)
    for name in ("car", "truck", "bus", "pedestrian", "motorcycle", "bicycle"):
        errors = scores.per_class[name]["errors"]
        assert max(errors[key] for key in ("trans_err", "scale_err", "orient_err", "vel_err")) < 2e-6
        assert errors["attr_err"] < 0.5  # guessed from class and speed


def test_a_subset_of_frames_is_scored_alone(
    source: NuScenesSource, open_source: Callable[..., NuScenesSource], results: dict[str, Any]
) -> None:
    narrow = open_source(scenes=("scene-0103",))
    assert {source.scene(token) for token in narrow.tokens} == {"scene-0103"}
    scores = nuscenes.evaluate(narrow, results)
    assert scores.frames == len(narrow.tokens) == 40
    assert scores.mAP != pytest.approx(PUBLISHED["mini_val_synthetic_predictions"][1], abs=1e-3)
    few = narrow.tokens[:5]
    assert (
        nuscenes.evaluate(open_source(tokens=few), results).to_json()
        == nuscenes.evaluate(source, results, few).to_json()
    )


def test_unlabelled_frames_and_a_high_min_points_do_not_change_the_ground_truth(
    source: NuScenesSource, open_source: Callable[..., NuScenesSource], results: dict[str, Any]
) -> None:
    other = open_source(labels=("scene-0916",), min_points=20)
    tokens = source.tokens[:10]
    theirs, ours = (nuscenes.evaluate(each, results, tokens).to_json() for each in (other, source))
    assert theirs == ours


def test_classes_the_source_leaves_out_are_not_among_those_present(
    open_source: Callable[..., NuScenesSource], results: dict[str, Any]
) -> None:
    narrow = open_source(classes=("pedestrian", "car"), scenes=("scene-0103",))
    scores = nuscenes.evaluate(narrow, results, narrow.tokens[:5])
    assert scores.classes_present == ("pedestrian", "car")
    aps = [scores.per_class[name]["ap"] for name in narrow.classes]
    assert scores.mean_ap_present == pytest.approx(sum(aps) / 2)


def test_frames_without_any_box_score_zero(source: NuScenesSource) -> None:
    scores = nuscenes.evaluate(source, dict.fromkeys(source.tokens[:2], Boxes.empty()), source.tokens[:2])
    assert (scores.mAP, scores.NDS, scores.mean_ap_present) == (0, 0, 0)


def test_a_report_becomes_json_without_nan(source: NuScenesSource, results: dict[str, Any]) -> None:
    scores = nuscenes.evaluate(source, results, source.tokens[:1])
    content = json.loads(json.dumps(scores.to_json(), allow_nan=False))
    assert content["per_class"]["traffic_cone"]["errors"]["vel_err"] is None
    assert set(content["per_class"]["car"]["ap_by_distance"]) == {"0.5", "1.0", "2.0", "4.0"}
    assert content["frames"] == 1


def test_a_submission_holds_the_best_500_boxes_and_the_devkit_reads_it(source: NuScenesSource, tmp_path: Path) -> None:
    from nuscenes.eval.common.loaders import load_prediction
    from nuscenes.eval.detection.data_classes import DetectionBox

    token = source.tokens[0]
    values = torch.tensor([[10.0, -4.0, 0.0, 4.5, 1.9, 1.6, 0.3, 3.0, 1.0]]).repeat(600, 1)
    many = Boxes(values, torch.zeros(600, dtype=torch.int64), torch.linspace(0, 1, 600))
    submission = nuscenes.to_results(source, {token: many}, frozenset({"camera"}))
    path = tmp_path / "results.json"
    path.write_text(json.dumps(submission))
    boxes, meta = load_prediction(str(path), nuscenes.MAX_BOXES, DetectionBox)
    assert meta == {f"use_{name}": name == "camera" for name in ("camera", "lidar", "radar", "map", "external")}
    assert len(boxes.all) == 500
    assert min(box.detection_score for box in boxes.all) == pytest.approx(100 / 599)
    box = boxes.all[0]
    assert box.size == pytest.approx((1.9, 4.5, 1.6))
    assert box.attribute_name == "vehicle.moving"
    assert math.hypot(*box.velocity) == pytest.approx(math.hypot(3, 1), abs=1e-2)


@pytest.mark.parametrize(
    ("column", "value", "message"), [(7, math.inf, "not finite"), (0, math.nan, "not finite"), (4, 0.0, "positive")]
)
def test_predictions_that_are_no_boxes_are_refused(
    source: NuScenesSource, column: int, value: float, message: str
) -> None:
    boxes = known(source.annotations(source.tokens[0]))
    boxes.values[2, column] = value
    with pytest.raises(ContractError, match=rf"{source.tokens[0]}: 1 of {len(boxes)} boxes .*{message}"):
        nuscenes.to_results(source, {source.tokens[0]: boxes})


def test_a_label_outside_the_classes_is_refused(source: NuScenesSource) -> None:
    boxes = known(source.annotations(source.tokens[0]))
    boxes.labels[0] = len(CLASSES)
    with pytest.raises(ContractError, match="label outside the 10 classes"):
        nuscenes.to_results(source, {source.tokens[0]: boxes})


def test_all_faults_of_a_result_file_are_reported_at_once(
    source: NuScenesSource, results: dict[str, Any], tmp_path: Path
) -> None:
    broken = copy.deepcopy(results)
    del broken["meta"]
    del broken["results"][source.tokens[0]]
    broken["results"]["made-up"] = []
    first, second, third = (broken["results"][token] for token in source.tokens[1:4])
    del first[0]["velocity"]
    second[0]["velocity"] = [math.nan, 0.0]
    second[1]["detection_name"] = "tram"
    second[2]["attribute_name"] = "flying"
    third += third[:1] * 600
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(broken))
    with pytest.raises(ContractError) as caught:
        nuscenes.load_detections(path, source)
    text = str(caught.value)
    for part in ("'meta'", "made-up", f"1 of 81 frames have no entry, first '{source.tokens[0]}'", "no key velocity"):
        assert part in text
    for part in ("velocity must be 2 finite numbers", "'tram'", "'flying'", "at most 500"):
        assert part in text


def test_a_file_that_is_no_submission_says_so(source: NuScenesSource, tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    for content, message in (("[]", "must hold"), ("{", "is no JSON"), ('{"meta": {}}', "no key 'results'")):
        path.write_text(content)
        with pytest.raises(ContractError, match=message):
            nuscenes.load_detections(path, source)
    with pytest.raises(ContractError, match="no such result file"):
        nuscenes.load_detections(tmp_path / "absent.json", source)


def test_detections_must_answer_for_every_frame(source: NuScenesSource) -> None:
    with pytest.raises(ContractError, match="80 of 81 frames have no entry"):
        nuscenes.evaluate(source, {source.tokens[0]: Boxes.empty()})
    with pytest.raises(ContractError, match="first 'elsewhere'"):
        nuscenes.evaluate(source, {"elsewhere": Boxes.empty()}, source.tokens[:1])


def test_a_box_of_unknown_velocity_counts_as_standing(source: NuScenesSource) -> None:
    boxes = known(source.annotations(source.tokens[0]))
    boxes.values[:, 7:9] = math.nan
    records = nuscenes.to_results(source, {source.tokens[0]: boxes})["results"][source.tokens[0]]
    assert len(records) == len(boxes)
    assert all(record["velocity"] == [0.0, 0.0] for record in records)
