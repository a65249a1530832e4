"""On the embedded world the metrics equal those of the devkit's own evaluation program."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from bevkd.data.sources.nuscenes import Config, NuScenesSource, build
from bevkd.evaluation import nuscenes
from bevkd.types import Boxes
from bevkd.world import VAL_SPLIT, VERSION_FOLDER, world_preset, write_world


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> NuScenesSource:
    root = tmp_path_factory.mktemp("world")
    write_world(world_preset("tiny", scenes_val=3, image_height=32, image_width=64), root)
    index_dir = tmp_path_factory.mktemp("index")
    return build(Config(root=root, version=VERSION_FOLDER, split=VAL_SPLIT, index_dir=index_dir))


def test_scores_equal_the_devkits_evaluation(source: NuScenesSource, tmp_path: Path) -> None:
    from nuscenes import NuScenes
    from nuscenes.eval.detection.config import config_factory
    from nuscenes.eval.detection.evaluate import DetectionEval

    random = torch.Generator().manual_seed(3)
    noise = torch.tensor([0.4, 0.4, 0.1, 0.2, 0.1, 0.1, 0.2, 0.3, 0.3])
    predictions = {}
    for token in source.tokens:
        truth = source.annotations(token)
        values = truth.values.nan_to_num() + noise * torch.randn(truth.values.shape, generator=random)
        values[:, 3:6] = values[:, 3:6].clamp(min=0.1)
        found = torch.rand(len(truth), generator=random)
        predictions[token] = Boxes(values, truth.labels, found)[found > 0.2]
    scores = nuscenes.evaluate(source, predictions)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(nuscenes.to_results(source, predictions)))
    devkit = NuScenes(VERSION_FOLDER, str(source.config.root), verbose=False)
    config = config_factory(nuscenes.CONFIG)
    official, _ = DetectionEval(devkit, config, str(path), VAL_SPLIT, str(tmp_path), verbose=False).evaluate()
    assert 0.1 < scores.mAP < 0.5
    assert scores.mAP == official.mean_ap
    assert official.nd_score == scores.NDS
    assert scores.tp_errors == official.tp_errors


def test_annotations_given_as_detections_are_perfect(source: NuScenesSource) -> None:
    predictions = {}
    for number, token in enumerate(source.tokens):
        boxes = source.annotations(token)
        ranks = torch.linspace(0.1, 0.9, len(boxes)) + 0.01 * number
        predictions[token] = dataclasses.replace(boxes, values=boxes.values.nan_to_num(), scores=ranks)
    scores = nuscenes.evaluate(source, predictions)
    assert set(scores.classes_present) == {"car", "truck", "pedestrian", "bicycle", "traffic_cone"}
    assert scores.mean_ap_present == pytest.approx(1)
    for name in scores.classes_present:
        assert scores.per_class[name]["errors"]["trans_err"] < 1e-5


def test_results_become_the_boxes_that_they_were_made_of(source: NuScenesSource) -> None:
    made = {}
    for token in source.tokens:
        truth = source.annotations(token)
        made[token] = dataclasses.replace(truth, values=truth.values.nan_to_num(), scores=torch.rand(len(truth)))
    back = nuscenes.to_boxes(source, nuscenes.to_results(source, made), source.tokens)
    for token, boxes in made.items():
        order = boxes.scores.argsort(descending=True, stable=True)
        assert torch.allclose(back[token].values, boxes.values[order], atol=1e-4)
        assert torch.equal(back[token].labels, boxes.labels[order])
        assert torch.allclose(back[token].scores, boxes.scores[order])


def test_boxes_of_classes_that_the_source_has_not_are_left_out(source: NuScenesSource) -> None:
    token = source.tokens[0]
    boxes = dataclasses.replace(source.annotations(token), values=source.annotations(token).values.nan_to_num())
    results = nuscenes.to_results(source, {token: boxes})
    cars = build(source.config.model_copy(update={"classes": ("car",)}))
    found = nuscenes.to_boxes(cars, results, [token])[token]
    assert len(found) == int((boxes.labels == source.classes.index("car")).sum()) > 0
