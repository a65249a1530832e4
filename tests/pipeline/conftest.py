"""A world, a trained teacher and its cache, made once by the command line itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.pipeline import kit
from tests.pipeline.kit import Bevkd, Synthetic


@pytest.fixture(scope="session")
def bevkd(tmp_path_factory: pytest.TempPathFactory) -> Bevkd:
    """Return the command line."""
    return Bevkd(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def world(bevkd: Bevkd, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a world of two scenes for training and one for validation, two frames each."""
    root = tmp_path_factory.mktemp("pipeline") / "world"
    bevkd.well("world", "--preset", "tiny", "--out", root)
    return root


@pytest.fixture(scope="session")
def teacher_recipe(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = kit.evaluated(kit.train_recipe(world, kit.TEACHER), world)
    return kit.write(tmp_path_factory.mktemp("recipes") / "teacher.yaml", recipe)


@pytest.fixture(scope="session")
def teacher(bevkd: Bevkd, teacher_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run of a LiDAR teacher."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    bevkd.well("train-teacher", teacher_recipe, "--out", run)
    return run


@pytest.fixture(scope="session")
def cache_recipe(world: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    spec = kit.write(folder / "spec.yaml", kit.spec())
    return kit.write(folder / "cache.yaml", kit.cache_recipe(world, teacher, spec))


@pytest.fixture(scope="session")
def cache(bevkd: Bevkd, cache_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the sealed cache of the teacher: four frames in two blocks. Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("cache") / "lidar"
    bevkd.well("cache-teacher", cache_recipe, "--out", folder)
    return folder


@pytest.fixture(scope="session")
def student_recipe(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the recipe of a plain camera student."""
    return kit.write(tmp_path_factory.mktemp("recipes") / "student.yaml", kit.train_recipe(world, kit.STUDENT))


@pytest.fixture(scope="session")
def distilled_recipe(world: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the recipe of a camera student that learns from the cache too."""
    recipe = kit.distilled(kit.train_recipe(world, kit.STUDENT), cache)
    return kit.write(tmp_path_factory.mktemp("recipes") / "distilled.yaml", recipe)


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync, which only matters when the power fails, and slows these tests down."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="session")
def synthetic(bevkd: Bevkd, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Synthetic:
    """A made-up teacher's recipe and cache."""
    folder = tmp_path_factory.mktemp("synthetic")
    spec = kit.write(folder / "spec.yaml", kit.spec(block=1))
    recipe = kit.write(folder / "cache.yaml", kit.synthetic_recipe(world, spec))
    bevkd.well("cache-teacher", recipe, "--out", folder / "cache")
    return Synthetic(recipe, folder / "cache")
