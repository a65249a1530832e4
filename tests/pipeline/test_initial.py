"""Detectors that start from the weights of an earlier run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bevkd.models.detector import Detector
from bevkd.models.inherit import narrowed
from pipeline.recipe import load_train
from pipeline.training import seeded_detector
from tests.pipeline import kit
from tests.pipeline.kit import Bevkd

WIDE = {
    **kit.TEACHER,
    "encoder": {**kit.TEACHER["encoder"], "channels": [16, 16], "out_channels": 16},
    "bev_encoder": {**kit.BEV_ENCODER, "channels": [16], "up_channels": [16]},
}


def recipe(world: Path, path: Path, detector: dict[str, Any], run: Path, **initial: Any) -> Path:
    """Write a recipe whose detector starts from ``run``."""
    return kit.write(path, {**kit.train_recipe(world, detector), "initial": {"run": str(run), **initial}})


def started(path: Path) -> Detector:
    return seeded_detector(load_train(str(path), ()))


@pytest.fixture(scope="module")
def wide(bevkd: Bevkd, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run of a teacher of twice the width."""
    folder = tmp_path_factory.mktemp("wide")
    bevkd.well("train-teacher", kit.write(folder / "wide.yaml", kit.train_recipe(world, WIDE)), "--out", folder / "run")
    return folder / "run"


def test_a_narrow_detector_starts_from_the_channels_of_a_wide_one(world: Path, wide: Path, tmp_path: Path) -> None:
    detector = started(recipe(world, tmp_path / "narrow.yaml", kit.TEACHER, wide))
    weights = load_file(wide / "model.safetensors")
    for name, value in detector.state_dict().items():
        expected = narrowed(weights[name], value.shape)
        assert expected is not None, name
        assert torch.equal(value, expected), name


def test_a_camera_student_takes_head_and_bev_encoder_of_a_lidar_teacher(
    bevkd: Bevkd, world: Path, teacher: Path, tmp_path: Path
) -> None:
    path = recipe(world, tmp_path / "camera.yaml", kit.STUDENT, teacher, parts=["bev_encoder", "head"])
    outcome = bevkd.well("train-student", path, "--out", tmp_path / "run")
    assert "inherited as they are" in outcome.err
    fresh = kit.write(tmp_path / "fresh.yaml", kit.train_recipe(world, kit.STUDENT))
    weights, camera = load_file(teacher / "model.safetensors"), started(path).state_dict()
    for name, value in started(fresh).state_dict().items():
        of_teacher = not name.startswith("encoder.")
        assert torch.equal(camera[name], weights[name] if of_teacher else value), name


def test_a_part_that_the_run_does_not_have_is_refused_before_training(
    bevkd: Bevkd, world: Path, teacher: Path, tmp_path: Path
) -> None:
    path = recipe(world, tmp_path / "camera.yaml", kit.STUDENT, teacher)
    outcome = bevkd("train-student", path, "--out", tmp_path / "run")
    assert outcome.code == 1
    assert "nothing that fits the part 'encoder'" in " ".join(outcome.err.split())
    assert not (tmp_path / "run").exists()


def test_a_head_of_other_tasks_is_refused(bevkd: Bevkd, world: Path, teacher: Path, tmp_path: Path) -> None:
    tasks = [["car"], ["truck", "pedestrian", "bicycle", "traffic_cone"]]
    detector = {**kit.TEACHER, "head": {**kit.HEAD, "tasks": tasks}}
    path = recipe(world, tmp_path / "other.yaml", detector, teacher)
    outcome = bevkd("train-teacher", path, "--out", tmp_path / "run")
    assert outcome.code == 1
    assert "a head with another tasks" in " ".join(outcome.err.split())


def test_a_folder_without_a_run_is_named(bevkd: Bevkd, world: Path, tmp_path: Path) -> None:
    path = recipe(world, tmp_path / "nothing.yaml", kit.TEACHER, tmp_path / "nowhere")
    outcome = bevkd("train-teacher", path, "--out", tmp_path / "run")
    assert outcome.code == 1
    assert "there is no finished run in" in " ".join(outcome.err.split())
