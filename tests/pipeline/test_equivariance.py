"""How far warped maps are from the teacher on augmented frames."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch

from bevkd.progress import Silent
from bevkd.types import Boxes
from pipeline.equivariance import Difference, EquivarianceReport, Peaks, equivariance
from pipeline.recipe import load_cache
from tests.pipeline import kit
from tests.pipeline.kit import Bevkd

EXACT = ("flip x", "flip y", "quarter turns")
RESAMPLED = ("turn 22.5°", "scale 0.95 / 1.05", "shift 0.5 m", "bevdepth", "unidistill")


@pytest.fixture
def of_symmetric(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EquivarianceReport:
    """Return the report of a teacher that is equivariant under flips and quarter turns."""
    own = importlib.metadata.EntryPoint("symmetric", "tests.pipeline.symmetric", "bevkd.teachers")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: (own,) if group == "bevkd.teachers" else ())
    spec = kit.write(tmp_path / "spec.yaml", kit.spec())
    values = kit.synthetic_recipe(world, spec, teacher={"name": "symmetric", "grid": kit.GRID})
    return equivariance(load_cache(str(kit.write(tmp_path / "cache.yaml", values)), []), 2, Silent())


def test_an_equivariant_teacher_costs_nothing_where_warps_are_exact(of_symmetric: EquivarianceReport) -> None:
    kinds = {kind.name: kind for kind in of_symmetric.kinds}
    assert tuple(kinds) == (*EXACT, *RESAMPLED)
    for name in EXACT:
        assert kinds[name].exact_warp
        found = kinds[name].to_json()
        for values in (*found["everywhere"].values(), *found["at_objects"].values()):
            assert values["error"] < 1e-3
            assert values["cosine"] > 0.9999
        assert found["boxes"]["agreement"] == 1.0
        assert found["boxes"]["shift_m"] < 1e-3
    assert [kinds[name].passes for name in (*EXACT, *RESAMPLED)] == [2, 2, 6, 4, 4, 4, 4, 4]


def test_resampled_kinds_cost_what_resampling_and_the_teacher_do(of_symmetric: EquivarianceReport) -> None:
    kinds = {kind.name: kind for kind in of_symmetric.kinds}
    for name in RESAMPLED:
        assert not kinds[name].exact_warp
        error = kinds[name].at_objects["bev_high"].error
        assert error is not None
        assert error > 0.05


def test_the_command_prints_a_table_and_a_sentence(bevkd: Bevkd, cache_recipe: Path) -> None:
    said = bevkd.well("cache", "equivariance", cache_recipe, "--frames", "1").out
    assert "quarter turns" in said
    assert "at objects, a warped bev_high differs from what the teacher says of the augmented frame by: flip x" in said
    told = bevkd.well("cache", "equivariance", cache_recipe, "--frames", "1", "--json").json
    assert [kind["kind"] for kind in told["kinds"]] == [*EXACT, *RESAMPLED]
    assert set(told["kinds"][0]["at_objects"]) == {
        *("bev_low", "bev_high", "heatmap", "box_code", "points_low", "points_high")
    }
    assert told["kinds"][0]["everywhere"]["bev_high"]["error"] > 1e-3


def test_a_difference_is_relative_to_what_the_teacher_says() -> None:
    found = Difference()
    assert (found.error, found.cosine) == (None, None)
    found.add(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0]))
    assert found.error == pytest.approx(5 / 4)
    assert found.cosine == 0
    found.add(torch.tensor([2.0]), torch.tensor([2.0]))
    assert found.error == pytest.approx((25 / 20) ** 0.5)


def boxes(*rows: tuple[float, float, int]) -> Boxes:
    values = torch.zeros(len(rows), 9)
    values[:, :2] = torch.tensor([row[:2] for row in rows]).view(-1, 2)
    return Boxes(values, torch.tensor([row[2] for row in rows], dtype=torch.int64), torch.ones(len(rows)))


def test_peaks_are_counted_both_ways_and_per_class() -> None:
    peaks = Peaks()
    assert (peaks.agreement, peaks.shift_m) == (None, None)
    peaks.add(boxes((0, 0, 1), (10, 0, 1)), boxes((0, 1, 1), (10, 0, 2), (20, 0, 1)))
    assert (peaks.boxes, peaks.matched) == (5, 2)
    assert peaks.shift_m == pytest.approx(1.0)
    peaks.add(boxes(), boxes((0, 0, 0)))
    assert (peaks.boxes, peaks.matched) == (6, 2)
