"""What stage 1 will cost: the plan beside the cache that follows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bevkd.cache.local import LocalStore
from bevkd.cache.reader import CacheReader
from pipeline.parts import open_source
from pipeline.plan import CachePlan, RepeatedFrames, StageSeconds, stage1_over_forward
from pipeline.recipe import load_cache
from tests.pipeline import kit
from tests.pipeline.kit import Bevkd


@pytest.fixture(scope="module")
def recipe(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the recipe of a made-up teacher that takes a twentieth of a second per frame, in blocks of three."""
    folder = tmp_path_factory.mktemp("plan")
    spec = kit.write(folder / "spec.yaml", kit.spec(block=3))
    values = kit.synthetic_recipe(world, spec)
    return kit.write(folder / "cache.yaml", {**values, "teacher": {**values["teacher"], "seconds_per_frame": 0.05}})


def test_a_plan_foretells_the_cache_that_follows(bevkd: Bevkd, recipe: Path, tmp_path: Path) -> None:
    planned = bevkd.well("cache", "plan", recipe, "--out", tmp_path / "cache", "--frames", "3", "--json").json
    assert not (tmp_path / "cache").exists()
    bevkd.well("cache-teacher", recipe, "--out", tmp_path / "cache")
    files = [path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert planned["frames"] == 4
    assert planned["blocks"] == 2
    assert planned["files"] == len(files)
    assert planned["bytes"] == pytest.approx(sum(files), rel=0.05)
    assert planned["trial_frames"] == 3
    assert planned["seconds_per_frame"]["teacher"] == pytest.approx(0.05, rel=0.3)
    assert planned["device_hours"] == pytest.approx(4 * 0.05 / 3600, rel=0.3)
    assert planned["slowest"] == "teacher"
    assert planned["fits"]


def test_a_plan_is_a_table_that_says_whether_there_is_room(
    bevkd: Bevkd, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalStore, "free_bytes", lambda _: 1234)
    said = bevkd.well("cache", "plan", recipe, "--out", tmp_path / "cache", "--frames", "1").out
    for words in ("4 in 2 blocks", "1.23 kB, NOT ENOUGH", "device hours", "the slowest part is teacher"):
        assert words in said
    assert list(tmp_path.iterdir()) == []


def test_a_spec_that_the_teacher_cannot_keep_is_found_by_the_plan(bevkd: Bevkd, recipe: Path, tmp_path: Path) -> None:
    spec = kit.spec()
    spec["signals"]["bev_low"] = {"encoding": "uint8", "max_error": 1e-6}
    path = kit.write(tmp_path / "spec.yaml", spec)
    outcome = bevkd("cache", "plan", recipe, "--set", f"spec={path}")
    assert outcome.code == 1
    assert "Set signals.bev_low.encoding" in outcome.err


def test_the_slowest_part_sets_the_pace_of_all_devices() -> None:
    seconds = StageSeconds(teacher=0.1, loading=0.8, encoding=0.4)
    plan = CachePlan(
        frames=36_000,
        blocks=1125,
        files=9000,
        bytes=10,
        array_bytes={},
        block_bytes=1,
        trial_frames=4,
        seconds_per_frame=seconds,
        devices=5,
        loaders=4,
        encoders=8,
        free_bytes=9,
    )
    assert plan.slowest == "loading"
    assert plan.device_hours == pytest.approx(1.0)
    assert plan.hours == pytest.approx(0.4)
    assert not plan.fits


def test_frames_are_repeated_under_tokens_of_their_own(bevkd: Bevkd, recipe: Path) -> None:
    loaded = load_cache(str(recipe), [f"data.index_dir={bevkd.home / 'bevkd' / 'nuscenes'}"])
    source = open_source(loaded.data, frozenset({"lidar"}))
    repeated = RepeatedFrames(source, 6)
    assert len(set(repeated.tokens)) == 6
    first, again = (repeated.load(repeated.tokens[index], frozenset({"lidar"})) for index in (0, 4))
    assert (first.token, again.token) == (repeated.tokens[0], repeated.tokens[4])
    assert first.points is not None
    assert again.points is not None
    assert torch.equal(first.points, again.points)


def test_stage_1_takes_little_longer_than_the_teacher_alone(bevkd: Bevkd, recipe: Path, tmp_path: Path) -> None:
    overrides = [f"data.index_dir={bevkd.home / 'bevkd' / 'nuscenes'}", "teacher.seconds_per_frame=0.1", "loaders=1"]
    cost = stage1_over_forward(load_cache(str(recipe), overrides), str(tmp_path), 8, rounds=2)
    assert cost.forward_seconds == pytest.approx((0.8, 0.8), rel=0.2)
    assert cost.within_seconds == pytest.approx((0.8, 0.8), rel=0.2)
    assert 0.99 < cost.ratio < 1.5
    assert len(CacheReader.open(tmp_path / "1").tokens) == 8
