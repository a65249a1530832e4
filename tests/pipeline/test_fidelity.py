"""`bevkd cache fidelity`: what encodings cost in bytes and in gradient, on the tiny world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bevkd.cache.spec import CacheSpec, load_spec
from pipeline.fidelity import variants
from pipeline.fidelity_report import Agreement
from tests.pipeline import kit
from tests.pipeline.kit import Bevkd

TERMS = {"x3kd.output", "unidistill.feature", "unidistill.relation", "unidistill.response"}


@pytest.fixture(scope="module")
def recipes(world: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the recipe of a cache with the shipped spec of all methods, and that of a student."""
    folder = tmp_path_factory.mktemp("fidelity")
    cache = kit.cache_recipe(world, teacher, Path("all_methods"))
    student = kit.distilled(kit.train_recipe(world, kit.STUDENT), Path("unused"))
    return kit.write(folder / "cache.yaml", cache), kit.write(folder / "student.yaml", student)


def rows(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in report["rows"]}


def test_it_compares_gradients_and_bytes_over_encodings(bevkd: Bevkd, recipes: tuple[Path, Path]) -> None:
    cache, student = recipes
    report = bevkd.well("cache", "fidelity", cache, "--student", student, "--frames", 2, "--json").json
    assert len(report["frames"]) == 2
    assert report["at"] == "parameters"
    found = rows(report)
    assert list(found) == [
        "all_methods",
        "float16",
        "root8, 127 levels",
        "root8, 64 levels",
        "root8, 32 levels",
        "uint8 / int8, logit8",
    ]
    for row in found.values():
        assert set(row["gradient_cosine"]) == TERMS
        assert row["bytes_per_frame"] == pytest.approx(sum(row["bytes"].values()))
        assert row["decode_ms"] > 0
    assert all(value > 0.9999 for value in found["float16"]["gradient_cosine"].values() if value is not None)
    assert all(value > 0.99 for value in found["all_methods"]["gradient_cosine"].values() if value is not None)
    sizes = [found[name]["bytes_per_frame"] for name in ("float16", "root8, 127 levels", "root8, 32 levels")]
    assert sizes == sorted(sizes, reverse=True)
    assert found["all_methods"]["errors"]["bev_low"] < 0.03


def test_points_are_measured_against_exact_points(bevkd: Bevkd, recipes: tuple[Path, Path]) -> None:
    cache, student = recipes
    loss = "distill.losses=[{name: unidistill, teacher: lidar, response: 0, source: points}]"
    arguments = ("--set", "spec=points", "--student-set", loss, "--frames", 1, "--json")
    found = rows(bevkd.well("cache", "fidelity", cache, "--student", student, *arguments).json)
    assert set(found["points"]["gradient_cosine"]) == {"unidistill.feature", "unidistill.relation"}
    assert found["float16"]["gradient_cosine"]["unidistill.feature"] > 0.9999


def test_outputs_are_quicker_and_the_table_says_so(bevkd: Bevkd, recipes: tuple[Path, Path]) -> None:
    cache, student = recipes
    said = bevkd.well("cache", "fidelity", cache, "--student", student, "--frames", 1, "--outputs").out
    assert "student's outputs" in " ".join(said.split())
    assert "all_methods" in said


def test_a_student_without_losses_is_refused(bevkd: Bevkd, recipes: tuple[Path, Path]) -> None:
    cache, student = recipes
    failed = bevkd("cache", "fidelity", cache, "--student", student, "--student-set", "distill=null")
    assert failed.code == 1
    assert "no distill.losses" in failed.err


def test_losses_that_read_what_the_spec_does_not_store_are_refused_with_all_other_faults(
    bevkd: Bevkd, recipes: tuple[Path, Path]
) -> None:
    cache, student = recipes
    failed = bevkd(
        *("cache", "fidelity", cache, "--student", student, "--set", "spec=boxes"),
        *("--student-set", "detector.grid.cell_m=0.8"),
    )
    assert failed.code == 1
    said = " ".join(failed.err.split())
    assert "loss 'unidistill' reads bev_low, bev_high, heatmap, box_code, which spec 'boxes' does not store" in said
    assert "the student has the grid" in said


def test_signed_maps_are_tried_in_int8_and_boxes_alone_have_no_variants() -> None:
    tried = dict(variants(load_spec("x3kd"), {"bev_low": True, "bev_high": False, "boxes": False}))
    even = tried["uint8 / int8, logit8"].signals
    assert (even["bev_low"].encoding, even["bev_high"].encoding) == ("int8", "uint8")
    boxes = CacheSpec.model_validate({"name": "b", "signals": {"boxes": {"encoding": "boxes"}}})
    assert [name for name, _ in variants(boxes, {"boxes": False})] == ["b"]


def test_agreement_is_over_all_frames_side_by_side() -> None:
    agreement = Agreement()
    assert agreement.cosine is None
    assert agreement.relative_norm is None
    agreement.add(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]))
    agreement.add(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0]))
    assert agreement.cosine == pytest.approx(1 / (5**0.5 * 2**0.5))
    assert agreement.relative_norm == pytest.approx((5 / 2) ** 0.5)
