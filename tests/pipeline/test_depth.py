"""Depth supervision, from point clouds and from a cache, and a student of two key frames."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from bevkd.cache.reader import CacheReader
from tests.pipeline import kit
from tests.pipeline.kit import Bevkd

SUPERVISED = {**kit.STUDENT, "encoder": {**kit.STUDENT["encoder"], "depth_weight": 3.0, "key_frames": 2}}  # type: ignore[dict-item]


def losses(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def student(world: Path, path: Path, **changes: Any) -> Path:
    return kit.write(path, kit.train_recipe(world, SUPERVISED, **changes))


@pytest.fixture(scope="module")
def depth_cache(bevkd: Bevkd, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("depth")
    recipe = kit.write(
        folder / "cache.yaml", {**kit.synthetic_recipe(world, Path("lidar_depth")), "spec": "lidar_depth"}
    )
    bevkd.well("cache-teacher", recipe, "--out", folder / "cache")
    return folder / "cache"


def test_depth_from_a_cache_trains_as_depth_from_point_clouds_does(
    bevkd: Bevkd, world: Path, depth_cache: Path, tmp_path: Path
) -> None:
    bevkd.well("train-student", student(world, tmp_path / "points.yaml"), "--out", tmp_path / "points")
    distill = {"caches": {"depth": str(depth_cache)}, "frames": "labelled"}
    cached = student(world, tmp_path / "cached.yaml", distill=distill)
    bevkd.well("train-student", cached, "--out", tmp_path / "cached")
    for one, other in zip(losses(tmp_path / "points"), losses(tmp_path / "cached"), strict=True):
        assert one["detection/depth"] > 0
        assert one["detection/depth"] == pytest.approx(other["detection/depth"], rel=0.02)
        assert one["detection/heatmap"] == pytest.approx(other["detection/heatmap"], rel=0.02)


def test_with_the_cache_no_point_cloud_is_opened(bevkd: Bevkd, world: Path, depth_cache: Path, tmp_path: Path) -> None:
    images_only = tmp_path / "world"
    shutil.copytree(world, images_only, ignore=shutil.ignore_patterns("LIDAR_TOP"))
    recipe = student(images_only, tmp_path / "student.yaml")
    refused = bevkd("train-student", recipe, "--out", tmp_path / "refused")
    assert refused.code == 1
    assert "LIDAR_TOP" in refused.err
    named = student(images_only, tmp_path / "named.yaml", distill={"caches": {"depth": str(depth_cache)}})
    bevkd.well("train-student", named, "--out", tmp_path / "run")
    assert losses(tmp_path / "run")[-1]["detection/depth"] > 0


def test_a_depth_cache_of_other_frames_is_refused_before_training(bevkd: Bevkd, world: Path, tmp_path: Path) -> None:
    short = kit.write(tmp_path / "cache.yaml", {**kit.synthetic_recipe(world, Path("x")), "spec": "lidar_depth"})
    bevkd.well("cache-teacher", short, "--out", tmp_path / "cache", "--limit", 1)
    recipe = student(world, tmp_path / "student.yaml", distill={"caches": {"depth": str(tmp_path / "cache")}})
    outcome = bevkd("train-student", recipe, "--out", tmp_path / "run")
    assert outcome.code == 1
    assert "samples are not in the cache" in " ".join(outcome.err.split())


def test_the_weights_name_the_cache_that_their_depth_came_from(
    bevkd: Bevkd, world: Path, depth_cache: Path, tmp_path: Path
) -> None:
    recipe = student(world, tmp_path / "student.yaml", distill={"caches": {"depth": str(depth_cache)}})
    bevkd.well("train-student", recipe, "--out", tmp_path / "run")
    with safe_open(tmp_path / "run" / "model.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["bevkd"])
    assert facts["lidar_depth"] == CacheReader.open(depth_cache).manifest.name
