"""One student learns from several caches, teachers and papers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bevkd.config import parse
from bevkd.progress import Silent
from pipeline.cache_teacher import cache_teacher
from pipeline.recipe import CacheRecipe, StudentRecipe
from pipeline.train_student import prepare_student, train_student
from tests.conformance.cases import segmenter_run
from tests.pipeline import kit

MIX = (
    {"name": "unidistill", "teacher": "lidar", "feature": 1, "relation": 1, "response": 1},
    {"name": "distillbev", "teacher": "lidar"},
    {"name": "soft", "teacher": "fusion"},
    {"name": "tigbev", "teacher": "fusion", "side": 4},
    {"name": "x3kd", "teacher": "masks", "output": 0, "instance": 1.0, "instance_head": {"channels": 8}},
)
ENSEMBLE = tuple({"name": "soft", "teacher": teacher} for teacher in ("lidar", "fusion"))


@pytest.fixture(scope="module")
def caches(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the caches of two detectors, which agree in nothing, and of a segmenter; all of them untrained."""
    folder = tmp_path_factory.mktemp("mix")
    maps = kit.write(folder / "maps.yaml", kit.spec())
    instances = {"instances": {"encoding": "masks", "min_score": 0.0, "capacity": 12}}
    masks = kit.write(folder / "masks.yaml", {"name": "masks", "block": 2, "signals": instances})
    recipes = {name: kit.synthetic_recipe(world, maps) for name in ("lidar", "fusion")}
    recipes["fusion"]["teacher"] = {**recipes["fusion"]["teacher"], "seed": 1}
    recipes["masks"] = kit.synthetic_recipe(world, masks)
    recipes["masks"]["teacher"] = {"name": "segmenter", **segmenter_run(folder, kit.CLASSES), "grid": kit.GRID}
    for name, recipe in recipes.items():
        cache_teacher(parse(CacheRecipe, recipe, name), str(folder / name), None, Silent())
    return {name: str(folder / name) for name in recipes}


def student(world: Path, caches: dict[str, str], losses: Any, **training: Any) -> StudentRecipe:
    recipe = kit.train_recipe(world, kit.STUDENT, data=kit.data(world), training={**kit.TRAINING, **training})
    return parse(StudentRecipe, {**recipe, "distill": {"caches": caches, "losses": list(losses)}}, "the student")


def first_terms(recipe: StudentRecipe, run: Path) -> dict[str, float]:
    """Return what the log says of the first step."""
    train_student(recipe, run, False, Silent())
    return kit.losses(run)[0]


def test_losses_of_four_papers_on_three_caches_add_up(world: Path, caches: dict[str, str], tmp_path: Path) -> None:
    logged = first_terms(student(world, caches, MIX, steps=1), tmp_path / "run")
    terms = {name: value for name, value in logged.items() if "/" in name}
    assert {name.split("/")[0] for name in terms} == {"detection", *(str(loss["name"]) for loss in MIX)}
    assert logged["loss"] == pytest.approx(sum(terms.values()), rel=1e-4)


def test_of_each_cache_only_what_its_losses_read_is_loaded(world: Path, caches: dict[str, str]) -> None:
    _, _, distillation = prepare_student(student(world, caches, MIX), Silent())
    assert {name: set(signals) for name, (_, signals) in distillation.caches.items()} == {
        "lidar": {"bev_low", "bev_high", "heatmap", "box_code"},
        "fusion": {"heatmap", "box_code", "bev_high"},
        "masks": {"instances"},
    }


def test_an_ensemble_is_the_same_loss_once_per_cache(world: Path, caches: dict[str, str], tmp_path: Path) -> None:
    both = {name: uri for name, uri in caches.items() if name != "masks"}
    logged = first_terms(student(world, both, ENSEMBLE, steps=1), tmp_path / "both")
    for label, loss in (("soft", ENSEMBLE[0]), ("soft-2", ENSEMBLE[1])):
        alone = {loss["teacher"]: caches[loss["teacher"]]}
        one = first_terms(student(world, alone, [loss], steps=1), tmp_path / label)
        for term in ("heatmap", "box"):
            assert logged[f"{label}/{term}"] == pytest.approx(one[f"soft/{term}"], rel=1e-5)
    assert logged["soft/heatmap"] != pytest.approx(logged["soft-2/heatmap"], rel=1e-3)
