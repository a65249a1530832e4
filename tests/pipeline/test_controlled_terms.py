"""Terms under control, through the command line: standardised, balanced, measured, and without any label."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bevkd.cache import manifest
from bevkd.cache.reader import CacheReader
from tests.pipeline import kit
from tests.pipeline.kit import Bevkd

BOXES = {"name": "x3kd", "teacher": "lidar", "score": 0.1}
FEATURE = {"name": "unidistill", "teacher": "lidar", "feature": 1, "relation": 0, "response": 0, "adapter": True}


def recipe(world: Path, cache: Path, path: Path, losses: list[dict[str, Any]], **distill: Any) -> Path:
    values = kit.distilled(kit.train_recipe(world, kit.STUDENT), cache, losses)
    values["distill"] |= distill
    return kit.write(path / "recipe.yaml", values)


def result(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "result.json").read_bytes())
    return found


# ---------------------------------------------------------------------------------------------- labels


def test_a_student_learns_without_any_label(bevkd: Bevkd, world: Path, cache: Path, tmp_path: Path) -> None:
    path = recipe(world, cache, tmp_path, [BOXES])
    said = bevkd.well("train-student", path, "--out", tmp_path / "run", "--set", "data.labels=0").err
    assert "0 labelled and 4 unlabelled frames" in said
    assert "warning" not in said
    for line in kit.losses(tmp_path / "run"):
        assert line["detection/heatmap"] == line["detection/box"] == 0
        assert line["x3kd/output_heatmap"] > 0
    assert all(torch.tensor(values).isfinite().all() for values in kit.weights_of(tmp_path / "run").values())


def test_terms_that_punish_no_inventions_on_unlabelled_frames_are_warned_of_before_the_first_step(
    bevkd: Bevkd, world: Path, cache: Path, tmp_path: Path
) -> None:
    path = recipe(world, cache, tmp_path, [FEATURE])
    said = bevkd.well("train-student", path, "--out", tmp_path / "run").err
    (message,) = result(tmp_path / "run")["warnings"]
    for part in ("2 frames have no labels", "unidistill", "Add {name: soft}", "set distill.frames: labelled"):
        assert part in message
    assert said.index("have no labels") < said.index("training")


@pytest.mark.parametrize(
    "remedy",
    [
        "distill.frames=labelled",
        "training.labelled_share=1",
        "distill.losses=[{name: unidistill, teacher: lidar, relation: 0, adapter: true}, {name: soft, teacher: lidar}]",
    ],
)
def test_each_remedy_ends_the_warning(bevkd: Bevkd, world: Path, cache: Path, tmp_path: Path, remedy: str) -> None:
    path = recipe(world, cache, tmp_path, [FEATURE])
    assert "have no labels" not in bevkd.well("train-student", path, "--out", tmp_path / "run", "--set", remedy).err


@pytest.mark.parametrize(("share", "learned"), [(0, False), (1, True)])
def test_a_share_of_0_or_1_draws_frames_of_one_kind_alone(
    bevkd: Bevkd, world: Path, cache: Path, tmp_path: Path, share: int, learned: bool
) -> None:
    path = recipe(world, cache, tmp_path, [BOXES])
    bevkd.well("train-student", path, "--out", tmp_path / "run", "--set", f"training.labelled_share={share}")
    assert {line["detection/heatmap"] > 0 for line in kit.losses(tmp_path / "run")} == {learned}


@pytest.mark.parametrize(("share", "labels", "message"), [(1, 0, "raise data.labels"), (0, 1, "lower data.labels")])
def test_a_share_of_frames_that_are_not_there_is_refused(
    bevkd: Bevkd, world: Path, cache: Path, tmp_path: Path, share: int, labels: int, message: str
) -> None:
    path = recipe(world, cache, tmp_path, [BOXES])
    changed = ("--set", f"training.labelled_share={share}", "--set", f"data.labels={labels}")
    outcome = bevkd("train-student", path, "--out", tmp_path / "run", *changed)
    assert outcome.code == 1
    assert message in outcome.err
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------- scale


def test_standardised_features_are_those_of_the_cache_by_its_statistics(
    bevkd: Bevkd, world: Path, cache: Path, tmp_path: Path
) -> None:
    losses = [BOXES, FEATURE | {"standardise": True}, {"name": "itkd", "teacher": "lidar", "standardise": True}]
    path = recipe(world, cache, tmp_path, losses)
    bevkd.well("train-student", path, "--out", tmp_path / "run")
    bevkd.well("train-student", path, "--out", tmp_path / "raw", "--set", "distill.losses.1.standardise=false")
    own, raw = (kit.losses(tmp_path / name)[0]["unidistill/feature"] for name in ("run", "raw"))
    assert own != raw
    statistics = CacheReader.open(cache).manifest.statistics
    assert set(statistics) == {"bev_low", "bev_high", "points_low", "points_high"}
    assert own < 2  # the mean distance of values of deviation 1 and of an adapter that has learned nothing


def test_a_cache_without_statistics_serves_all_losses_but_standardised_ones(
    bevkd: Bevkd, world: Path, cache: Path, tmp_path: Path
) -> None:
    older = kit.copy(cache, tmp_path / "older")
    data = json.loads((cache / "manifest.json").read_bytes())
    del data["statistics"]
    kit.replace(older / "manifest.json", json.dumps({**data, "name": manifest.name_of(data)}).encode())
    path = recipe(world, older, tmp_path, [BOXES, FEATURE])
    bevkd.well("train-student", path, "--out", tmp_path / "run")
    outcome = bevkd("train-student", path, "--out", tmp_path / "no", "--set", "distill.losses.1.standardise=true")
    assert outcome.code == 1
    for part in ("loss 'unidistill'", "no statistics of points_low", "write it again", "set standardise: false"):
        assert part in outcome.err


def test_a_teacher_at_work_online_has_no_statistics(
    bevkd: Bevkd, world: Path, cache: Path, cache_recipe: Path, tmp_path: Path
) -> None:
    lidar = FEATURE | {"standardise": True}
    changes = {"caches": {}, "teacher": "online", "online": {"lidar": str(cache_recipe)}}
    path = recipe(world, cache, tmp_path, [lidar], **changes)
    outcome = bevkd("train-student", path, "--out", tmp_path / "run")
    assert outcome.code == 1
    assert "a teacher at work online has no statistics" in outcome.err


def test_a_recipe_balances_schedules_and_measures(bevkd: Bevkd, world: Path, cache: Path, tmp_path: Path) -> None:
    scheduled = FEATURE | {"feature": 100, "schedule": {"feature": {"warmup": 0.5}}}
    path = recipe(world, cache, tmp_path, [BOXES, scheduled], balance={"least": 0.0})
    run = tmp_path / "run"
    bevkd.well(
        "train-student",
        path,
        "--out",
        run,
        "--set",
        "training.gradient_norms=1",
        "--set",
        "training.steps=4",
        "--set",
        "data.labels=1",
    )
    first, second, *rest = kit.losses(run)
    assert first["unidistill/feature"] == 0  # of the warm-up
    assert second["unidistill/feature"] > 0
    for line in rest:
        assert line["balance/x3kd/output"] <= 1
        assert line["balance/unidistill/feature"] < 1
        assert line["gradient/detection"] > 0
        terms = {
            name: value for name, value in line.items() if name.split("/")[0] in ("detection", "x3kd", "unidistill")
        }
        assert line["loss"] == pytest.approx(sum(terms.values()), rel=1e-6)
    assert yaml.safe_load((run / "recipe.yaml").read_text())["distill"]["balance"] == {"least": 0.0, "most": 1.0}
