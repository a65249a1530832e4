"""Every published recipe takes a step on a real frame: with range and images smaller, and at full size on demand."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bevkd.cache.reader import CacheReader
from bevkd.cache.spec import load_spec
from bevkd.config import parse
from bevkd.progress import Silent
from bevkd.training import loop
from pipeline.cache_teacher import cache_teacher
from pipeline.recipe import CacheRecipe, StudentRecipe, load_cache, load_student
from pipeline.train_student import train_student
from tests.conformance.cases import segmenter_run
from tests.pipeline import kit
from tests.pipeline.test_published import CACHES, PUBLISHED, SAME, losses_of, shapes_of

SMALL = ["detector.encoder.image_height=128", "detector.encoder.image_width=352"]
TRAINING = {"steps": 1, "batch_size": 1, "workers": 0, "log_every": 1, "balanced": "false", "precision": "no"}


def near(recipe: StudentRecipe) -> dict[str, Any]:
    """Return the grid of a recipe with 40 cells along each axis, around the car or ahead of it."""
    grid = recipe.detector.grid
    reach = 20 * grid.cell_m
    ahead = grid.x_m[0] == 0
    x_m = [0.0, 2 * reach] if ahead else [-reach, reach]
    return {"x_m": x_m, "y_m": [-reach, reach], "z_m": list(grid.z_m), "cell_m": grid.cell_m}


def frame_of(real_data: Path, name: str) -> list[str]:
    """Return where one real frame lies."""
    if name.startswith("kitti"):
        return [f"data.root={real_data / 'kitti'}", "data.split=trainval"]
    where = {"root": real_data / "nuscenes_mini_real", "version": "v1.0-mini", "split": "mini_train"}
    return [*(f"data.{key}={value}" for key, value in where.items()), "data.scenes=[scene-0061]"]


def written(cache: CacheRecipe, name: str, grid: dict[str, Any], folder: Path) -> str:
    """Return the cache of one frame by a made-up teacher with the channels of the published one."""
    values = load_spec(cache.spec).model_dump(mode="json")
    data = cache.data.model_dump(mode="json")
    if cache.teacher.name == "mask2former":
        (folder / "segmenter").mkdir()
        teacher = {"name": "segmenter", **segmenter_run(folder / "segmenter", tuple(data["classes"])), "grid": grid}
        values["signals"]["instances"] |= {"min_score": 0.0, "capacity": 20}
    else:
        shapes = shapes_of(cache, name)
        channels = {stage: shapes[stage][0] for stage in ("bev_low", "bev_high") if stage in shapes}
        teacher = {"name": "synthetic", "grid": grid, "tasks": shapes["box_code"][0], **channels}
    for signal in values["signals"].values():
        signal["max_error"] = 1.0  # made-up maps are harder to store than real ones
    spec = kit.write(folder / "spec.yaml", values)
    recipe = {"data": data, "teacher": teacher, "spec": str(spec), "loaders": 0, "device": "cpu"}
    cache_teacher(parse(CacheRecipe, recipe, name), str(folder / "cache"), 1, Silent())
    return str(folder / "cache")


def student_of(name: str, real_data: Path, folder: Path, grid: dict[str, Any], changes: list[str]) -> StudentRecipe:
    """Return a student whose caches hold one real frame."""
    where, caches = frame_of(real_data, name), {}
    for teacher, (cache_name, *of_cache) in CACHES[name].items():
        (own := folder / teacher).mkdir()
        caches[teacher] = written(load_cache(cache_name, [*of_cache, *where]), cache_name, grid, own)
    training = [f"training.{key}={value}" for key, value in TRAINING.items()]
    given = [*where, *training, f"distill.caches={caches}", "evaluation=null", "device=cpu", *changes]
    recipe = load_student(name, given)
    cached = CacheReader.open(next(iter(caches.values()))).tokens
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"tokens": cached})})


def check(recipe: StudentRecipe, logged: list[dict[str, float]]) -> None:
    """Check that every loss has given terms, and all of them finite."""
    assert all(math.isfinite(value) for line in logged for value in line.values())
    for loss in losses_of(recipe):
        assert any(key.startswith(f"{loss.name}") for key in logged[0])


WITH_RADAR = "real radar returns are not at hand"


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_student_takes_a_step_on_a_real_frame(name: str, real_data: Path, tmp_path: Path) -> None:
    published = load_student(name, [])
    if published.detector.encoder.name == "radar":
        pytest.skip(WITH_RADAR)
    grid = near(published)
    small = SMALL if published.detector.encoder.name == "lift_splat" else []
    recipe = student_of(name, real_data, tmp_path, grid, [f"detector.grid={grid}", *small])
    train_student(recipe, tmp_path / "run", False, Silent())
    check(recipe, kit.losses(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PUBLISHED, *SAME])
def test_a_published_student_takes_two_steps_at_full_size(
    name: str, real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Takes minutes each; writes what it costs, in seconds of one core, to the file that is asked for."""
    figures = os.environ.get("BEVKD_FULL_SIZE")
    if not figures:
        pytest.skip("set BEVKD_FULL_SIZE to the file that the figures go to")
    published = load_student(name, [])
    if published.detector.encoder.name == "radar":
        pytest.skip(WITH_RADAR)
    recipe = student_of(
        name, real_data, tmp_path, published.detector.grid.model_dump(), ["training.steps=2", "training.threads=1"]
    )
    # Other processes do not count.
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=time.process_time))
    cost = train_student(recipe, tmp_path / "run", False, Silent()).cost
    logged = kit.losses(tmp_path / "run")
    check(recipe, logged)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    row = {
        "recipe": name,
        "step_seconds": [line["seconds"] for line in lines],
        "peak_gb": cost.peak_memory_bytes / 1e9,
        "terms": [{key: value for key, value in line.items() if key == "loss" or "/" in key} for line in lines],
    }
    with Path(figures).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
