"""A student that learns from the points of boxes: both stages, with shipped specs."""

from __future__ import annotations

from pathlib import Path

import pytest

from bevkd.cache.reader import CacheReader
from bevkd.cache.verify import verify
from tests.pipeline import kit
from tests.pipeline.kit import Bevkd

POINTS_LOSS = {
    **{"name": "unidistill", "teacher": "lidar", "source": "points"},
    **{"feature": 1, "relation": 1, "response": 0},
}
MAPS_LOSS = {**POINTS_LOSS, "source": "maps"}


@pytest.mark.parametrize(("spec", "loss"), [("points", POINTS_LOSS), ("all_methods", MAPS_LOSS)])
def test_a_student_learns_from_a_cache_of_a_shipped_spec(
    bevkd: Bevkd, world: Path, teacher: Path, tmp_path: Path, spec: str, loss: dict[str, object]
) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    bevkd.well(
        "cache-teacher",
        kit.write(tmp_path / "cache.yaml", kit.cache_recipe(world, teacher, Path(spec))),
        "--out",
        cache,
    )
    assert verify(cache, deep=True) == []
    recipe = kit.distilled(kit.train_recipe(world, kit.STUDENT), cache, [loss])
    bevkd.well("train-student", kit.write(tmp_path / "student.yaml", recipe), "--out", run)
    assert all({"unidistill/feature", "unidistill/relation"} <= set(line) for line in kit.losses(run))


def test_both_points_of_a_frame_belong_to_the_same_boxes(
    bevkd: Bevkd, world: Path, teacher: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    recipe = kit.cache_recipe(world, teacher, Path("points"))
    bevkd.well("cache-teacher", kit.write(tmp_path / "cache.yaml", recipe), "--out", cache)
    reader = CacheReader.open(cache)
    assert reader.manifest.sample_shapes == {"points_low": (9, 8), "points_high": (9, 8)}
    low, high = (reader.signal(reader.tokens[0], name) for name in ("points_low", "points_high"))
    assert len(low) == len(high) > 0  # type: ignore[arg-type]
    assert (low.boxes == high.boxes).all()  # type: ignore[union-attr]
