"""The wheel holds what stands at the root, and every file that ships is in order."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bevkd import config
from bevkd.cache.spec import load_spec
from bevkd.config import StrictModel, read_yaml
from bevkd.types import SIGNALS
from pipeline.recipe import CacheRecipe, SegmenterRecipe, StudentRecipe, TrainRecipe, find

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "pipeline" / "recipes").glob("*.yaml"))
SPECS = sorted(path.stem for path in (ROOT / "cache_specs").glob("*.yaml"))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Return the names of the files in a freshly built wheel."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert built.returncode == 0, built.stdout + built.stderr
    (file,) = out.glob("*.whl")
    return set(zipfile.ZipFile(file).namelist())


def tracked(folder: str, pattern: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob(pattern)}


def test_the_wheel_holds_the_root_packages_and_nothing_else(wheel: set[str]) -> None:
    roots = {name.split("/")[0] for name in wheel}
    (information,) = (root for root in roots if root.endswith(".dist-info"))
    assert roots == {"bevkd", "pipeline", "cache_specs", "cli.py", information}


@pytest.mark.parametrize(
    ("folder", "pattern"),
    [
        ("bevkd", "*.py"),
        ("bevkd", "*.css"),
        ("bevkd", "*.js"),
        ("pipeline", "*.py"),
        ("pipeline", "*.yaml"),
        ("cache_specs", "*.yaml"),
        ("cache_specs", "*.py"),
    ],
)
def test_the_wheel_holds_every_source_recipe_and_spec(wheel: set[str], folder: str, pattern: str) -> None:
    wanted = tracked(folder, pattern)
    assert wanted
    assert {name for name in wheel if name.startswith(f"{folder}/") and name.endswith(pattern[1:])} == wanted


def test_the_wheel_holds_no_other_kinds_of_files(wheel: set[str]) -> None:
    code = {name for name in wheel if ".dist-info/" not in name}
    assert {Path(name).suffix for name in code} <= {".py", ".yaml", ".typed", ".css", ".js"}


def test_the_wheel_installs_the_command(wheel: set[str]) -> None:
    assert any(name.endswith("dist-info/entry_points.txt") for name in wheel)
    assert any("LICENSE" in name for name in wheel)


# ---------------------------------------------------------------------------------------------- recipes and specs


def model_of(recipe: str) -> type[StrictModel]:
    """Return what a shipped recipe is for, by its keys."""
    values = read_yaml(find(recipe))
    if "teacher" in values:
        return CacheRecipe
    if "segmenter" in values:
        return SegmenterRecipe
    return StudentRecipe if "distill" in values or "student" in recipe else TrainRecipe


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_whole(recipe: str) -> None:
    # Parsing loads each plug-in that the recipe names and checks its config.
    loaded = config.load(model_of(recipe), find(recipe))
    assert config.parse(type(loaded), loaded.model_dump(mode="json"), "its own dump") == loaded


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_says_how_to_run_it(recipe: str) -> None:
    text = find(recipe).read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert f" {recipe} --out " in text


@pytest.mark.parametrize("recipe", [name for name in RECIPES if "cache" in name])
def test_the_spec_of_every_cache_recipe_exists(recipe: str) -> None:
    loaded = config.load(CacheRecipe, find(recipe))
    assert set(load_spec(loaded.spec).signals) <= set(SIGNALS)


def test_there_are_recipes_for_all_stages() -> None:
    assert {model_of(recipe) for recipe in RECIPES} == {CacheRecipe, SegmenterRecipe, StudentRecipe, TrainRecipe}


@pytest.mark.parametrize("spec", SPECS)
def test_every_spec_is_whole_and_carries_its_files_name(spec: str) -> None:
    assert load_spec(spec).name == spec
