"""The shipped nuScenes recipes and the evaluation, on real frames."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from bevkd.cache.reader import CacheReader
from tests.pipeline import kit
from tests.pipeline.kit import Bevkd

TOKEN = "ca9a282c9e77460f8360f564131a8af5"
"""The key frame of scene-0061 that has its sensor files."""

SMALL_TEACHER = {
    "teacher.detector.encoder": "{name: voxel, voxel_m: [0.3, 0.3, 1.0], channels: [8, 8], blocks: 1, out_channels: 8}",
    "teacher.detector.bev_encoder": "{layers: [0], strides: [1], channels: [8], up_channels: [8]}",
    "teacher.detector.head.channels": "8",
}
SMALL_STUDENT = {
    "detector.encoder.backbone.options": "{embedding_size: 16, hidden_sizes: [16, 16, 16, 16], depths: [1, 1, 1, 1], "
    "layer_type: basic, out_features: [stage3, stage4]}",
    "detector.encoder.neck_channels": "8",
    "detector.encoder.channels": "8",
    "detector.encoder.depth.step": "2.0",
    "detector.bev_encoder": "{layers: [0], strides: [1], channels: [8], up_channels: [8]}",
    "detector.head.channels": "8",
    "training": "{steps: 1, batch_size: 1, workers: 0, log_every: 1}",
    "evaluation": "null",
}


def sets(values: dict[str, str]) -> list[str]:
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


def data(real_data: Path, split: str) -> dict[str, str]:
    root = str(real_data / "nuscenes_mini_real")
    return {"data.root": root, "data.version": "v1.0-mini", "data.split": split, "device": "cpu"}


def evaluation_data(real_data: Path) -> list[str]:
    values = data(real_data, "mini_val")
    return sets({key: value for key, value in values.items() if key != "device"})


@pytest.fixture(scope="module")
def real_cache(bevkd: Bevkd, real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the cache of a small random teacher on one real frame, made with the recipe that ships."""
    folder = tmp_path_factory.mktemp("real") / "cache"
    values = {**data(real_data, "mini_train"), **SMALL_TEACHER, "loaders": "0"}
    bevkd.well("cache-teacher", "nuscenes_cache", "--out", folder, *sets(values))
    return folder


def test_the_shipped_cache_recipe_caches_a_real_frame_under_its_token_and_licence(
    bevkd: Bevkd, real_cache: Path
) -> None:
    reader = CacheReader.open(real_cache)
    assert reader.tokens == (TOKEN,)
    assert reader.manifest.sample_shapes["heatmap"] == (10, 180, 180)
    assert "CC BY-NC-SA" in bevkd.well("cache", "info", real_cache, "--json").json["licence"]
    assert "is whole" in bevkd.well("cache", "verify", real_cache, "--deep").out


def test_the_cached_map_is_lit_where_the_points_of_the_frame_are(real_cache: Path) -> None:
    low = CacheReader.open(real_cache).signal(TOKEN, "bev_low")
    occupied = (low.abs().sum(dim=0) > 0).float()
    assert 0.02 < float(occupied.mean()) < 0.6
    middle, edge = occupied[70:110, 70:110].mean(), occupied[:20].mean()
    assert middle > 2 * edge


def test_a_real_frame_is_drawn_with_its_cameras(
    bevkd: Bevkd, real_data: Path, real_cache: Path, tmp_path: Path
) -> None:
    where = ("--set", f"data.root={real_data / 'nuscenes_mini_real'}")
    bevkd.well("cache", "show", real_cache, "--out", tmp_path / "frame.png", *where)
    with Image.open(tmp_path / "frame.png") as image:
        assert image.format == "PNG"
        assert image.width > 600
        assert len(image.convert("RGB").getcolors(maxcolors=2**24) or []) > 100


def test_the_shipped_student_recipe_learns_from_six_real_images_at_full_size(
    bevkd: Bevkd, real_data: Path, real_cache: Path, tmp_path: Path
) -> None:
    values = {**data(real_data, "mini_train"), **SMALL_STUDENT, "distill.losses.0.adapter": "true"}
    given = ("--cache", f"teacher={real_cache}", *sets(values))
    bevkd.well("train-student", "nuscenes_student", "--out", tmp_path / "run", *given)
    (line,) = kit.losses(tmp_path / "run")
    assert line["detection/heatmap"] > 0
    assert line["detection/box"] > 0
    assert line["unidistill/feature"] > 0


def test_published_scores_of_real_detections_are_reproduced(bevkd: Bevkd, real_data: Path) -> None:
    folder = real_data / "nuscenes_eval" / "mini_val_A"
    given = ("--detections", folder / "results_nusc.json", *evaluation_data(real_data))
    found = bevkd.well("evaluate", *given, "--json").json
    published = json.loads((folder / "metrics_summary.json").read_bytes())
    assert found["mAP"] == pytest.approx(0.07551618, abs=1e-8)
    assert found["NDS"] == pytest.approx(0.10336284, abs=1e-8)
    assert found["tp_errors"] == pytest.approx(published["tp_errors"], abs=1e-9)
    assert found["frames"] == 81


def test_devkit_scores_of_synthetic_detections_of_all_classes_are_reproduced(bevkd: Bevkd, real_data: Path) -> None:
    path = real_data / "nuscenes_eval" / "mini_val_synthetic_predictions" / "results_nusc.json"
    found = bevkd.well("evaluate", "--detections", path, *evaluation_data(real_data), "--json").json
    assert found["mAP"] == pytest.approx(0.369686, abs=1e-6)
    assert found["NDS"] == pytest.approx(0.440722, abs=1e-6)


def test_frames_whose_files_are_not_here_are_left_out_on_demand_and_counted(
    bevkd: Bevkd, real_data: Path, tmp_path: Path
) -> None:
    values = {**data(real_data, "mini_val"), **SMALL_STUDENT, "distill": "null", "data.skip_missing": "true"}
    said = bevkd.well("train-student", "nuscenes_student", "--out", tmp_path / "run", *sets(values)).err
    assert "77 of 81 frames of mini_val left out" in said
    assert "4 labelled frames" in said
