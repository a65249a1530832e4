"""A segmenter from masks to a cache of masks, by the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bevkd.cache.reader import CacheReader
from bevkd.data.augment import AugmentConfig, ImageAugment
from bevkd.data.join import TrainingDataset
from bevkd.data.sampler import FrameOrder
from bevkd.models.detector import view_of
from bevkd.types import Instances
from pipeline.parts import open_source
from pipeline.recipe import SegmenterRecipe, load_cache, load_student, load_teacher
from tests.pipeline import kit
from tests.pipeline.kit import CLASSES, GRID, Bevkd

SEGMENTER = {
    "image_height": 64,
    "image_width": 192,
    "neck_channels": 8,
    "backbone": kit.STUDENT["encoder"]["backbone"],  # type: ignore[index]
    "head": {"channels": 16, "layers": 1, "max_instances": 10, "score_threshold": 0.0},
}


def images(world: Path, split: str) -> dict[str, Any]:
    return {"root": str(world), "version": "v1.0-world", "split": split, "classes": list(CLASSES), "min_area_px": 10}


def recipe(world: Path, **training: Any) -> dict[str, Any]:
    return {
        "data": images(world, "world_train"),
        "evaluation": {"data": images(world, "world_val")},
        "segmenter": SEGMENTER,
        "augment": {"flip": True, "zoom": [1.0, 1.2]},
        "training": {**kit.TRAINING, "steps": 4, "checkpoint_every": 2, "ema": 0.9, **training},
        "device": "cpu",
    }


@pytest.fixture(scope="module")
def run(bevkd: Bevkd, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("segmenter")
    bevkd.well("train-teacher", kit.write(folder / "recipe.yaml", recipe(world)), "--out", folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def masks(bevkd: Bevkd, world: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a sealed cache of the segmenter's masks."""
    folder = tmp_path_factory.mktemp("masks")
    values = kit.cache_recipe(world, run, Path("instances"), teacher=teacher(run))
    overrides = ("--set", "spec=" + str(kit.write(folder / "spec.yaml", spec())))
    bevkd.well("cache-teacher", kit.write(folder / "cache.yaml", values), "--out", folder / "cache", *overrides)
    return folder / "cache"


def teacher(run: Path, name: str = "segmenter") -> dict[str, Any]:
    return {"name": name, "run": str(run), "grid": GRID}


def spec() -> dict[str, Any]:
    """Return the shipped spec, but for scores: those of an untrained segmenter are low."""
    stored = {"encoding": "masks", "resolution": 64, "max_error": 0.1, "capacity": 200, "min_score": 0.0}
    return {"name": "instances", "block": 2, "signals": {"instances": stored}}


def test_training_leaves_weights_a_log_and_the_scores_of_masks_and_boxes(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == 4
    assert set(result["metrics"]["per_class"]) == set(CLASSES)
    assert 0 <= result["metrics"]["mask"]["ap"] <= 1
    assert sum(each["objects"] for each in result["metrics"]["per_class"].values()) > 20
    assert {"segmentation/heatmap", "segmentation/box", "segmentation/mask"} < set(kit.losses(run)[0])
    assert (run / "model.safetensors").is_file()


def test_a_finished_run_is_evaluated_again_to_the_same_scores(bevkd: Bevkd, run: Path) -> None:
    again = bevkd.well("evaluate", "--run", run, "--json").json
    assert again == json.loads((run / "result.json").read_text())["metrics"]


def test_evaluation_in_the_loop_keeps_the_best_weights_and_changes_no_loss(
    bevkd: Bevkd, world: Path, run: Path, tmp_path: Path
) -> None:
    bevkd.well(
        "train-teacher", kit.write(tmp_path / "r.yaml", recipe(world, evaluate_every=3)), "--out", tmp_path / "run"
    )
    plain = kit.losses(run)
    assert [line["loss"] for line in kit.losses(tmp_path / "run")] == [line["loss"] for line in plain]
    assert json.loads((tmp_path / "run/result.json").read_text())["best_step"] in (3, plain[-1]["step"])
    assert (tmp_path / "run/best.safetensors").exists()


def test_balanced_classes_are_refused_for_images(bevkd: Bevkd, world: Path, tmp_path: Path) -> None:
    path = kit.write(tmp_path / "recipe.yaml", recipe(world, balanced=True))
    outcome = bevkd("train-teacher", path, "--out", tmp_path / "run")
    assert outcome.code == 1
    assert "training.balanced is for detectors" in outcome.err


def test_an_interrupted_run_ends_as_if_it_had_not_been(bevkd: Bevkd, world: Path, run: Path, tmp_path: Path) -> None:
    path = kit.write(tmp_path / "recipe.yaml", recipe(world))
    begun = tmp_path / "run"
    bevkd.well("train-teacher", path, "--out", begun)
    for leftover in ("model.safetensors", "result.json"):
        (begun / leftover).unlink()
    last = begun / "checkpoints" / "step_00000004"
    for file in sorted(last.iterdir()):
        file.unlink()
    last.rmdir()
    bevkd.well("train-teacher", path, "--out", begun, "--resume")
    assert kit.losses(begun) == kit.losses(run)
    assert (begun / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


def test_its_cache_gives_instances_of_every_camera_in_original_pixels(masks: Path, world: Path) -> None:
    del world
    reader = CacheReader.open(masks)
    assert len(reader) == 4
    cameras = set[int]()
    for token in reader.tokens:
        found = reader.signal(token, "instances")
        assert isinstance(found, Instances)
        cameras |= set(found.cameras.tolist())
        assert all(mask.shape == (64, 64) for mask in found.masks)
        assert (found.boxes[:, :2] >= 0).all()
        assert (found.boxes[:, 2:] <= torch.tensor([176, 64])).all()
        assert (found.boxes[:, :2] < found.boxes[:, 2:]).all()
    assert {0, 4} <= cameras <= set(range(6))


def test_a_student_learns_its_masks_under_augmentation(bevkd: Bevkd, world: Path, masks: Path, tmp_path: Path) -> None:
    """X-IS, with a second cache-less loss term switched off: the head's weights are no part of the student."""
    head = {"channels": 8, "layers": 1}
    loss = {
        "name": "x3kd",
        "teacher": "masks",
        "output": 0,
        "instance": 1,
        "instance_score": 0.0,
        "instance_head": head,
    }
    image = {"flip": True, "zoom": [1.0, 1.2], "rotation_deg": [-5, 5]}
    recipe = {
        **kit.train_recipe(world, kit.STUDENT),
        "augment": {"image": image},
        "distill": {"caches": {"masks": str(masks)}, "losses": [loss]},
    }
    for workers in (0, 1):
        recipe["training"] = {**recipe["training"], "workers": workers}
        path = kit.write(tmp_path / f"student{workers}.yaml", recipe)
        bevkd.well("train-student", path, "--out", tmp_path / f"run{workers}")
    first, second = kit.losses(tmp_path / "run0"), kit.losses(tmp_path / "run1")
    assert [line["x3kd/instance_mask"] for line in first] == [line["x3kd/instance_mask"] for line in second]
    for line in first:
        assert line["x3kd/instance_heatmap"] > 0
        assert line["x3kd/instance_box"] > 0
        assert line["x3kd/instance_mask"] > 0
    weights = load_file(tmp_path / "run0" / "model.safetensors")
    assert not [name for name in weights if "controller" in name]


def test_masks_are_mirrored_with_the_views_that_are(world: Path, masks: Path, tmp_path: Path) -> None:
    recipe = load_student(str(kit.write(tmp_path / "student.yaml", kit.train_recipe(world, kit.STUDENT))), [])
    source, reader = open_source(recipe.data, frozenset({"camera"})), CacheReader.open(masks)
    token = next(token for token in reader.tokens if len(reader.instances(token)))
    view, order = view_of(recipe.detector), FrameOrder([token], [], None, 0)
    flips = AugmentConfig(image=ImageAugment(flip=True))
    dataset = TrainingDataset(source, view, order, flips, {"masks": (reader, ("instances",))}, 0)
    samples = [dataset[position] for position in range(8)]
    straight = {
        camera: sample
        for sample in samples
        for camera, matrix in enumerate(sample.frame.rig.view_from_original)  # type: ignore[union-attr]
        if matrix[0, 0] > 0
    }
    compared = 0
    for sample in samples:
        seen = sample.instances["masks"]
        for camera, matrix in enumerate(sample.frame.rig.view_from_original):  # type: ignore[union-attr]
            if matrix[0, 0] > 0 or camera not in straight:
                continue
            plain = straight[camera].instances["masks"]
            here, there = seen.cameras == camera, plain.cameras == camera
            mirrored = plain.boxes[there][:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1])
            mirrored += torch.tensor([view.image_width, 0, view.image_width, 0])
            torch.testing.assert_close(seen.boxes[here], mirrored, atol=1.0, rtol=0)
            compared += int(here.sum())
    assert compared > 5


def test_a_lidar_student_has_no_images_to_learn_masks_on(
    bevkd: Bevkd, world: Path, masks: Path, tmp_path: Path
) -> None:
    loss = {"name": "x3kd", "teacher": "masks", "output": 0, "instance": 1}
    recipe = {
        **kit.train_recipe(world, kit.TEACHER),
        "distill": {"caches": {"masks": str(masks)}, "losses": [loss]},
    }
    outcome = bevkd("train-student", kit.write(tmp_path / "student.yaml", recipe), "--out", tmp_path / "run")
    assert outcome.code == 1
    assert "X-IS learns from image features" in " ".join(outcome.err.split())


def test_the_cache_knows_its_teacher_and_not_where_it_lay(masks: Path, run: Path) -> None:
    manifest = CacheReader.open(masks).manifest
    assert manifest.teacher.name == "segmenter"
    assert manifest.classes == CLASSES
    assert str(run) not in manifest.model_dump_json()


def test_a_spec_that_wants_boxes_or_maps_of_it_is_refused(bevkd: Bevkd, world: Path, run: Path, tmp_path: Path) -> None:
    path = kit.write(tmp_path / "spec.yaml", kit.spec(signals=("bev_high", "boxes")))
    values = kit.cache_recipe(world, run, path, teacher=teacher(run))
    outcome = bevkd("cache-teacher", kit.write(tmp_path / "cache.yaml", values), "--out", tmp_path / "cache")
    assert outcome.code == 1
    assert "signals.bev_high needs bev_high" in outcome.err
    assert "signals.boxes needs boxes (it sees images, not space)" in outcome.err
    assert not (tmp_path / "cache").exists()


def test_a_detectors_run_is_no_segmenter_and_a_segmenters_run_no_detector(
    bevkd: Bevkd, world: Path, run: Path, tmp_path: Path
) -> None:
    detector = tmp_path / "detector-run"
    detector.mkdir()
    kit.write(detector / "recipe.yaml", kit.train_recipe(world, kit.TEACHER))
    for name, wrong, message in (
        ("segmenter", detector, "trained no segmenter"),
        ("detector", run, "trained no detector"),
    ):
        config = teacher(wrong) if name == "segmenter" else {"name": name, "run": str(wrong)}
        values = kit.cache_recipe(world, wrong, kit.write(tmp_path / f"{name}-spec.yaml", spec()), teacher=config)
        outcome = bevkd("cache-teacher", kit.write(tmp_path / f"{name}.yaml", values), "--out", tmp_path / name)
        assert outcome.code == 1
        assert message in outcome.err


def test_other_classes_than_the_segmenters_are_refused_before_any_work(
    bevkd: Bevkd, world: Path, tmp_path: Path
) -> None:
    values = recipe(world)
    values["evaluation"]["data"]["classes"] = ["car"]
    outcome = bevkd("train-teacher", kit.write(tmp_path / "recipe.yaml", values), "--out", tmp_path / "run")
    assert outcome.code == 1
    assert "evaluation.data.classes has car" in outcome.err
    assert not (tmp_path / "run").exists()


def test_a_missing_image_is_named_before_any_work(bevkd: Bevkd, world: Path, tmp_path: Path) -> None:
    damaged = kit.copy(world, tmp_path / "world")
    victim = sorted((damaged / "samples" / "CAM_BACK").iterdir())[0]
    victim.unlink()
    path = kit.write(tmp_path / "recipe.yaml", recipe(damaged))
    outcome = bevkd("train-teacher", path, "--out", tmp_path / "run")
    assert outcome.code == 1
    assert victim.name in outcome.err.replace("\n", "")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["world_segmenter", "nuimages_segmenter"])
def test_the_shipped_recipes_of_segmenters_are_told_from_those_of_detectors(name: str) -> None:
    assert isinstance(load_teacher(name, []), SegmenterRecipe)
    assert not isinstance(load_teacher("demo_teacher", []), SegmenterRecipe)


@pytest.mark.parametrize(
    ("name", "plug_in"), [("world_instances_cache", "segmenter"), ("mask2former_cache", "mask2former")]
)
def test_the_shipped_recipes_of_mask_caches_can_be_read(name: str, plug_in: str) -> None:
    loaded = load_cache(name, [])
    assert loaded.teacher.name == plug_in
    assert loaded.spec == "instances"
