"""``bevkd bench train`` measures what it says, on a world and a student small enough for a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bevkd.errors import ConfigError
from bevkd.progress import Silent
from pipeline.bench import train
from pipeline.bench.train import TrainSettings, bench_train, result_plot, result_table
from pipeline.online import open_teachers
from pipeline.train_student import prepare_student
from tests.pipeline import kit
from tests.pipeline.kit import Bevkd

SIZES = ("--steps", 2, "--rounds", 1, "--frames", 2)


def settings(out: Path, recipe: Path, **changes: Any) -> TrainSettings:
    values: dict[str, Any] = {"steps": 2, "rounds": 1, "frames": 2}
    return TrainSettings(out, str(recipe), **{**values, **changes})


@pytest.fixture(scope="module", autouse=True)
def in_this_process() -> Any:
    """Measure in this process, which saves the start of five."""

    def here(function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "in_new_process", here)
        yield


@pytest.fixture(scope="module")
def recipe(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the recipe of a student whose cache is yet to be written."""
    folder = tmp_path_factory.mktemp("bench")
    losses = [{**loss, "teacher": "lidar"} for loss in kit.LOSSES]
    values = kit.distilled(kit.evaluated(kit.train_recipe(world, kit.STUDENT), world), Path("nowhere"), losses)
    return kit.write(folder / "student.yaml", values)


@pytest.fixture(scope="module")
def small_teacher(world: Path, recipe: Path) -> Path:
    """Return the recipe of a made-up teacher, which takes no time."""
    spec = kit.write(recipe.parent / "spec.yaml", kit.spec(block=1))
    return kit.write(recipe.parent / "cache.yaml", kit.synthetic_recipe(world, spec))


@pytest.fixture(scope="module")
def out(recipe: Path) -> Path:
    return recipe.parent / "out"


@pytest.fixture(scope="module")
def result(bevkd: Bevkd, recipe: Path, small_teacher: Path, out: Path) -> dict[str, Any]:
    """Return the figures with a made-up teacher."""
    command = ("bench", "train", recipe, "--teacher", small_teacher, "--out", out)
    figures: dict[str, Any] = bevkd.well(*command, *SIZES, "--json").json
    return figures


def test_the_json_has_every_figure_of_every_mode(result: dict[str, Any]) -> None:
    for figure in ("step_seconds", "peak_memory_bytes", "data_wait_fraction"):
        assert set(result[figure]) == {"plain", "cached", "online"}
    assert min(*result["step_seconds"].values(), *result["peak_memory_bytes"].values()) > 0
    assert all(0 <= wait < 1 for wait in result["data_wait_fraction"].values())
    assert set(result["ratios"]) == {"step_seconds", "peak_memory_bytes"}
    assert set(result["ratios"]["step_seconds"]) == {"cached", "online"}
    assert (result["batch_size"], result["steps"], result["device"]) == (2, 2, "cpu, 1 threads")


def test_the_loader_is_measured_without_a_student(result: dict[str, Any]) -> None:
    loader = result["loader"]
    assert min(loader.values()) > 0
    assert loader["over_student"] == pytest.approx(loader["frames_per_second"] / loader["student_frames_per_second"])
    assert loader["student_frames_per_second"] == pytest.approx(2 / result["step_seconds"]["cached"])


def test_the_figures_fit_into_a_table_and_a_plot(result: dict[str, Any], out: Path) -> None:
    assert (out / "train.png").is_file()
    assert result_table(result).row_count == 3
    plot: Any = result_plot(result)
    assert len(plot.axes) == 2


def test_modes_differ_in_where_the_signals_come_from_and_in_nothing_else(
    recipe: Path, small_teacher: Path, tmp_path: Path
) -> None:
    student, teacher = train._prepare(settings(tmp_path, recipe, teacher=str(small_teacher)), Silent())
    plain, cached, online = (
        train._of_mode(student, teacher, mode, tmp_path).model_dump(exclude_none=True) for mode in train.MODES
    )
    assert "distill" not in plain
    assert cached.pop("distill") | {"teacher": "online"} == online.pop("distill")
    assert plain == cached == online
    assert len(plain["data"]["tokens"]) == 2
    assert "evaluation" not in plain


def test_the_cache_is_written_once(recipe: Path, small_teacher: Path, out: Path, result: dict[str, Any]) -> None:
    assert result
    (cache,) = out.glob("cache-*")
    before = kit.tree(cache)
    _, teacher = train._prepare(settings(out, recipe, teacher=str(small_teacher)), Silent())
    assert train._cache_of(out, teacher) == cache
    train._write_cache(teacher, cache)
    assert kit.tree(cache) == before


def test_without_a_teacher_an_untrained_one_fits_the_student(recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("spconv")
    student, teacher = train._prepare(settings(tmp_path, recipe), Silent())
    recipe_online = train._of_mode(student, teacher, "online", tmp_path)
    online = open_teachers(recipe_online)["lidar"]
    assert online.view.sensors == {"lidar"}
    assert online.sample_shapes["bev_low"] == (8, 32, 32)
    _, _, distillation = prepare_student(recipe_online, Silent(), {"lidar": online})
    assert list(distillation.teachers) == ["lidar"]


def test_a_teacher_of_ones_own_is_taken_with_its_own_sensor_settings(world: Path, recipe: Path, tmp_path: Path) -> None:
    spec = kit.write(tmp_path / "spec.yaml", kit.spec(block=1))
    own = kit.synthetic_recipe(world, spec)
    own["data"]["sweeps"] = 3
    path = kit.write(tmp_path / "cache.yaml", own)
    student, teacher = train._prepare(settings(tmp_path / "out", recipe, teacher=str(path)), Silent())
    assert teacher.teacher.name == "synthetic"
    assert teacher.data == student.data
    assert (student.data.sweeps, student.data.labels) == (3, 1.0)  # type: ignore[attr-defined]


def test_a_plain_student_has_nothing_to_compare(student_recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no 'distill' with losses"):
        bench_train(settings(tmp_path, student_recipe), Silent())


def test_without_a_recipe_a_small_world_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def make(*arguments: Any) -> None:
        made.append(arguments[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "make_world", make)
    with pytest.raises(KeyboardInterrupt):
        bench_train(TrainSettings(tmp_path), Silent())
    assert made == [(tmp_path / "world", "demo", 4)]
