"""The commands on a KITTI folder: teacher with anchors, its cache, a student, and the metrics of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bevkd.cache.reader import CacheReader
from bevkd.data.sources.kitti import Config, build
from bevkd.geometry.boxes import rotate
from bevkd.types import Boxes
from pipeline.recipe import load_cache, load_train
from tests.data import kitti_kit
from tests.data.kitti_kit import label
from tests.pipeline import kit
from tests.pipeline.kit import Bevkd

CLASSES = ["Car", "Pedestrian"]
GRID = {"x_m": [0, 25.6], "y_m": [-12.8, 12.8], "z_m": [-3, 1], "cell_m": 0.8}
ANCHORS = {
    "Car": {"size_m": [3.9, 1.6, 1.56], "bottom_m": -1.78, "matched": 0.6, "unmatched": 0.45},
    "Pedestrian": {"size_m": [0.8, 0.6, 1.73], "bottom_m": -1.78, "matched": 0.5, "unmatched": 0.35},
}
TEACHER = {
    "grid": GRID,
    "encoder": {"name": "pillar", "pillar_m": 0.8, "channels": [16], "point_features": 4, "max_points": 16},
    "bev_encoder": {"layers": [1], "strides": [1], "channels": [32], "up_channels": [32]},
    "head": {"name": "anchor", "anchors": ANCHORS, "score_threshold": 0.05},
}
FRAMES = tuple(f"{index:06d}" for index in range(6))


def surface(box: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Return returns all over the side of a box that is nearest to the sensor."""
    local = torch.from_numpy(rng.uniform(-0.5, 0.5, (300, 3))).float() * box[3:6]
    xy = rotate(local[:, :2], box[6].expand(300)) + box[:2]
    return torch.cat([xy, local[:, 2:] + box[2], torch.full((300, 1), 0.4)], dim=1)


@pytest.fixture(scope="module")
def kitti(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of six frames with two objects each, train and val alike."""
    root, rng = tmp_path_factory.mktemp("kitti"), np.random.default_rng(0)
    labels = {}
    for token in FRAMES:
        car = label("Car", (rng.uniform(-4, 0), 1.7, rng.uniform(9, 20)), rotation=rng.uniform(-3, 3))
        walker = label("Pedestrian", (rng.uniform(2, 5), 1.7, rng.uniform(9, 20)), size=(1.75, 0.6, 0.8))
        labels[token] = [car, walker]
    kitti_kit.write(root, labels, {"train": FRAMES, "val": FRAMES[:4]})
    source = build(Config(root=root, classes=("Car", "Pedestrian")))
    for token in FRAMES:
        boxes = source.annotations(token).values[:, :7]
        kitti_kit.write_points(root, token, torch.cat([surface(box, rng) for box in boxes]).tolist())
    return root


def data(root: Path, split: str = "train") -> dict[str, Any]:
    return {"name": "kitti", "root": str(root), "split": split, "classes": CLASSES}


@pytest.fixture(scope="module")
def teacher(bevkd: Bevkd, kitti: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run of a small teacher that has seen the frames 50 times."""
    folder = tmp_path_factory.mktemp("teacher")
    recipe = {
        "data": data(kitti),
        "evaluation": {"data": data(kitti, "val")},
        "detector": TEACHER,
        "training": {"steps": 100, "batch_size": 3, "learning_rate": 0.01, "workers": 0, "threads": 1},
        "device": "cpu",
    }
    bevkd.well("train-teacher", kit.write(folder / "recipe.yaml", recipe), "--out", folder / "run", "--json")
    return folder / "run"


@pytest.fixture(scope="module")
def cache(bevkd: Bevkd, kitti: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    recipe = {
        "data": data(kitti),
        "teacher": {"name": "detector", "run": str(teacher)},
        "spec": str(kit.write(folder / "spec.yaml", kit.spec())),
        "loaders": 0,
        "device": "cpu",
    }
    bevkd.well("cache-teacher", kit.write(folder / "recipe.yaml", recipe), "--out", folder / "cache")
    return folder / "cache"


def test_a_teacher_learns_the_frames_by_heart(teacher: Path) -> None:
    result = json.loads((teacher / "result.json").read_text())
    first, last = (kit.losses(teacher)[index]["loss"] for index in (0, -1))
    assert last < 0.1 * first
    assert result["metrics"]["objects"]["Car"]["moderate"] == 4
    # Four objects reach four of 41 recall positions at most, the first of which R40 leaves out.
    assert 0 < max(scores["BEV"]["moderate"] for scores in result["metrics"]["ap_r11"].values()) <= 1 / 11


def test_the_detections_of_a_run_score_as_the_run(bevkd: Bevkd, kitti: Path, teacher: Path) -> None:
    of_run = bevkd.well("evaluate", "--run", teacher, "--json").json
    assert of_run == json.loads((teacher / "result.json").read_text())["metrics"]
    where = ("--set", "data.name=kitti", "--set", f"data.root={kitti}", "--set", "data.split=val")
    of_files = bevkd.well("evaluate", "--detections", teacher / "detections", *where, "--json").json
    assert {name: of_files["ap_r40"][name] for name in CLASSES} == of_run["ap_r40"]


def test_a_table_names_every_class_and_difficulty(bevkd: Bevkd, teacher: Path) -> None:
    shown = bevkd.well("evaluate", "--run", teacher).out
    for word in ("Car", "Pedestrian", "moderate", "AOS", "4 frames"):
        assert word in shown


def test_a_teacher_with_anchors_is_cached_with_maps_and_boxes(bevkd: Bevkd, kitti: Path, cache: Path) -> None:
    reader = CacheReader.open(cache)
    assert reader.tokens == FRAMES
    boxes = reader.boxes("000003")
    assert isinstance(boxes, Boxes)
    assert len(boxes) >= 2
    truth = build(Config(root=kitti, classes=("Car", "Pedestrian"))).annotations("000003")
    best = boxes[boxes.scores.argsort(descending=True)[:2]]
    assert torch.cdist(truth.center, best.center).amin(dim=1).max() < 1
    scores = bevkd.well("evaluate", "--cache", cache, "--set", f"data.root={kitti}", "--json").json
    assert scores["frames"] == 6
    assert scores["objects"]["Car"]["moderate"] == 6
    assert 0 < max(each["BEV"]["moderate"] for each in scores["ap_r11"].values()) <= 2 / 11


def test_a_student_learns_from_the_cache(bevkd: Bevkd, kitti: Path, cache: Path, tmp_path: Path) -> None:
    student = {**TEACHER, "head": {**kit.HEAD, "tasks": [["Car"], ["Pedestrian"]]}}
    recipe = {
        "data": {**data(kitti), "labels": 0.5},
        "evaluation": {"data": data(kitti, "val")},
        "detector": student,
        "training": kit.TRAINING,
        "device": "cpu",
        "distill": {"caches": {"lidar": str(cache)}, "losses": list(kit.LOSSES)},
    }
    bevkd.well("train-student", kit.write(tmp_path / "recipe.yaml", recipe), "--out", tmp_path / "run")
    losses = kit.losses(tmp_path / "run")[-1]
    assert all(np.isfinite(value) for value in losses.values())
    assert any(name.startswith("unidistill/") for name in losses)


@pytest.mark.parametrize("name", ["kitti_second", "kitti_pointpillars"])
def test_the_shipped_recipes_name_the_benchmark_and_agree_with_each_other(name: str) -> None:
    recipe = load_train(name, [])
    assert recipe.data.classes == recipe.evaluation.data.classes == ("Car", "Pedestrian", "Cyclist")  # type: ignore[union-attr]
    cached = load_cache("kitti_cache", [])
    if name == "kitti_second":
        assert cached.teacher.detector == recipe.detector
