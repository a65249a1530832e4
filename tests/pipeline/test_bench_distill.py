"""``bevkd bench distill`` measures what it says, on a student small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bevkd import registry
from bevkd.errors import ConfigError
from bevkd.progress import Silent
from pipeline.bench import distill
from pipeline.bench.distill import METHODS, DistillSettings, bench_distill, result_table
from tests.pipeline import kit
from tests.pipeline.kit import Bevkd

SIZES: dict[str, Any] = {"rounds": 1, "bev_low": 8, "bev_high": 8, "device": "cpu"}


@pytest.fixture(scope="module")
def recipe(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kit.write(tmp_path_factory.mktemp("bench") / "student.yaml", kit.train_recipe(world, kit.STUDENT))


@pytest.fixture(scope="module")
def result(recipe: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "IMAGE_SIZE", (90, 160))
        found: dict[str, Any] = json.loads(json.dumps(bench_distill(DistillSettings(str(recipe), **SIZES), Silent())))
    return found


def test_every_loss_that_ships_is_measured() -> None:
    assert {str(loss["name"]) for losses in METHODS.values() for loss in losses} == set(registry.names("bevkd.distill"))


def test_the_json_has_every_figure_of_every_method(result: dict[str, Any]) -> None:
    assert set(result["methods"]) == set(METHODS)
    assert result["step_seconds"] > 0
    for row in result["methods"].values():
        assert set(row) == {"added_seconds", "ratio", "flops_ratio", "added_mb"}
        assert row["added_seconds"] > 0
        assert row["ratio"] == pytest.approx(1 + row["added_seconds"] / result["step_seconds"])
    assert result_table(result).row_count == len(METHODS)


def test_more_terms_take_more_operations(result: dict[str, Any]) -> None:
    ratio = {name: row["flops_ratio"] for name, row in result["methods"].items()}
    assert ratio["soft"] == pytest.approx(1, abs=0.01)
    assert ratio["x3kd with X-IS"] > ratio["x3kd"] > 1


def test_a_method_without_its_sensor_is_left_out_unless_it_is_asked_for(world: Path, tmp_path: Path) -> None:
    radar = {**kit.STUDENT, "encoder": {"name": "radar", "channels": [8]}}
    path = str(kit.write(tmp_path / "radar.yaml", kit.train_recipe(world, radar)))
    settings = DistillSettings(path, methods=("x3kd with X-IS",), **SIZES)
    with pytest.raises(ConfigError, match=r"'x3kd with X-IS' does not suit .*: X-IS learns from image features"):
        bench_distill(settings, Silent())
    found = bench_distill(DistillSettings(path, **SIZES), Silent())
    assert set(found["methods"]) == set(METHODS) - {"x3kd with X-IS"}


def test_an_unknown_method_is_named(bevkd: Bevkd) -> None:
    outcome = bevkd("bench", "distill", "--method", "osmosis")
    assert outcome.code == 1
    assert "no method 'osmosis'" in outcome.err
