"""Mistakes of a new user: every message says what is wrong, where, and how to mend it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bevkd.cache import shard
from bevkd.cache.manifest import COMMITS, MANIFEST
from bevkd.cache.reader import CacheReader
from bevkd.models import sparse
from tests.pipeline import kit
from tests.pipeline.kit import Bevkd, Outcome


def complains(outcome: Outcome, kind: str, *words: object) -> str:
    """Check that a command failed with one clear block that holds all ``words``, and return the block."""
    assert outcome.code == 1, outcome
    assert outcome.out == ""
    assert outcome.err.splitlines()[0] == kind
    assert "Traceback" not in outcome.err
    assert "defect" not in outcome.err
    missing = [str(word) for word in words if str(word) not in outcome.err]
    assert not missing, outcome.err
    return outcome.err


def changed(recipe: Path, to: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Write a copy of a recipe after ``change`` had it, and return its path."""
    values = yaml.safe_load(recipe.read_text())
    change(values)
    return kit.write(to, values)


def half(path: Path) -> Path:
    """Cut a file of a copied world in two."""
    content = path.read_bytes()
    return kit.replace(path, content[: len(content) // 40 * 20 + 7])


@pytest.fixture
def student(bevkd: Bevkd, student_recipe: Path, tmp_path: Path) -> Callable[..., Outcome]:
    """Return the command that trains the plain student with further arguments."""
    return lambda *arguments: bevkd("train-student", student_recipe, "--out", tmp_path / "run", *arguments)


@pytest.fixture
def distilled(bevkd: Bevkd, distilled_recipe: Path, tmp_path: Path) -> Callable[..., Outcome]:
    """Return the command that trains the distilled student with further arguments."""
    return lambda *arguments: bevkd("train-student", distilled_recipe, "--out", tmp_path / "run", *arguments)


@pytest.fixture
def caching(bevkd: Bevkd, cache_recipe: Path, tmp_path: Path) -> Callable[..., Outcome]:
    """Return the command that writes a cache with further arguments."""
    return lambda *arguments: bevkd("cache-teacher", cache_recipe, "--out", tmp_path / "cache", *arguments)


@pytest.fixture
def own_world(world: Path, tmp_path: Path) -> Path:
    """Return a copy of the world that a test may damage."""
    return kit.copy(world, tmp_path / "world")


Command = Callable[..., Outcome]


# ---------------------------------------------------------------------------------------------- recipes


def test_a_recipe_that_is_not_there(bevkd: Bevkd, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    complains(bevkd("train-student", path, "--out", tmp_path / "run"), "ConfigError", path, "Check the path")


def test_a_shipped_recipe_misspelt(bevkd: Bevkd, tmp_path: Path) -> None:
    outcome = bevkd("train-student", "demo_studnet", "--out", tmp_path / "run")
    complains(outcome, "ConfigError", "demo_studnet", "demo_student,", "path of a .yaml file")


def test_a_recipe_that_is_not_yaml(bevkd: Bevkd, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("data: [1, 2\ntraining: 3")
    complains(bevkd("train-student", path, "--out", tmp_path / "run"), "ConfigError", path, "line 2")


def test_two_faults_of_a_recipe_are_told_together(bevkd: Bevkd, student_recipe: Path, tmp_path: Path) -> None:
    def spoil(values: dict[str, Any]) -> None:
        values["data"]["sweeep"] = 3
        values["training"]["steps"] = "many"

    path = changed(student_recipe, tmp_path / "mine.yaml", spoil)
    outcome = bevkd("train-student", path, "--out", tmp_path / "run")
    words = ("2 fault(s)", "data.sweeep: unknown key", "training.steps", "integer", "'many'")
    complains(outcome, "ConfigError", path, *words)
    assert not (tmp_path / "run").exists()


def test_overrides_that_cannot_be_applied_are_told_together(student: Command) -> None:
    outcome = student("--set", "training.steps", "--set", "data.classes.9=car")
    complains(
        outcome, "ConfigError", "--set", "'training.steps'", "key.path=value", "'data.classes.9=car'", "5 entries"
    )


def test_an_override_of_a_key_that_does_not_exist(student: Command) -> None:
    complains(student("--set", "training.step=5"), "ConfigError", "training.step: unknown key", "spelling")


def test_an_unknown_plug_in(student: Command) -> None:
    outcome = student("--set", "detector.encoder={name: bevdepth}")
    complains(outcome, "ConfigError", "detector.encoder", "'bevdepth'", "lift_splat")


def test_an_unknown_cache_spec(caching: Command) -> None:
    complains(caching("--set", "spec=everything"), "ConfigError", "'everything'", "unidistill", ".yaml")


def test_a_head_whose_tasks_lack_a_class(student: Command) -> None:
    outcome = student("--set", "detector.head.tasks=[[car, truck], [pedestrian, bicycle]]")
    complains(outcome, "ConfigError", "tasks", "traffic_cone")


# ---------------------------------------------------------------------------------------------- the data set


def test_a_data_root_that_is_not_there(student: Command) -> None:
    complains(student("--set", "data.root=/data/nuscenes"), "DataError", "/data/nuscenes", "Set root", "samples/")


def test_a_version_that_is_not_there(student: Command, world: Path) -> None:
    outcome = student("--set", "data.version=v1.0-trainval")
    complains(outcome, "DataError", world, "'v1.0-trainval'", "Set version to one of: v1.0-world")


def test_an_unknown_split(student: Command, world: Path) -> None:
    outcome = student("--set", "data.split=training")
    complains(outcome, "DataError", "'training'", world, "world_train (2 scenes)", "splits.json")


def test_an_official_split_without_a_scene_here(student: Command) -> None:
    complains(student("--set", "data.split=val"), "DataError", "'val'", "no scene", "world_val (1 scenes)")


def test_an_unknown_scene(student: Command) -> None:
    outcome = student("--set", "data.scenes=[scene-0553]")
    complains(outcome, "DataError", "scene-0553", "'world_train'", "Correct 'scenes'")


def test_missing_table_files_are_told_together(student: Command, own_world: Path) -> None:
    for name in ("ego_pose", "sensor"):
        (own_world / "v1.0-world" / f"{name}.json").unlink()
    outcome = student("--set", f"data.root={own_world}")
    complains(outcome, "DataError", own_world, "ego_pose.json: missing", "sensor.json: missing", "extract the metadata")


def test_tables_that_do_not_fit_together(student: Command, own_world: Path) -> None:
    kit.change_table(own_world, "sample", lambda records: records[1:])
    outcome = student("--set", f"data.root={own_world}")
    complains(outcome, "DataError", own_world, "sample_data.json", "no record of sample.json", "all tables together")


def test_half_a_point_file(caching: Command, own_world: Path, tmp_path: Path) -> None:
    path = half(sorted((own_world / "samples" / "LIDAR_TOP").iterdir())[0])
    outcome = caching("--set", f"data.root={own_world}")
    complains(outcome, "DataError", "1 sensor file(s)", path, "truncated", "Restore", "data.skip_missing: true")
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def bad_images(own_world: Path) -> dict[Path, str]:
    """Damage three images of three key frames, and return what is wrong with each."""
    cut, other, gone = sorted((own_world / "samples" / "CAM_FRONT").iterdir())[:3]
    half(cut)
    kit.replace(other, b"<html>404</html>")
    gone.unlink()
    return {cut: "truncated", other: "is not a JPEG image", gone: "missing"}


def test_bad_images_are_told_together_before_the_first_step(
    student: Command, own_world: Path, bad_images: dict[Path, str], tmp_path: Path
) -> None:
    outcome = student("--set", f"data.root={own_world}", "--set", "data.labels=1.0")
    said = complains(outcome, "DataError", "3 sensor file(s)", "data.skip_missing: true")
    for path, fault in bad_images.items():
        assert f"{path}: {fault}" in said
    assert not (tmp_path / "run").exists()


def test_frames_with_bad_images_are_left_out_on_demand_and_counted(
    student: Command, own_world: Path, bad_images: dict[Path, str]
) -> None:
    outcome = student(
        *("--set", f"data.root={own_world}", "--set", "data.labels=1.0", "--set", "data.skip_missing=true")
    )
    assert outcome.code == 0, outcome.err
    assert f"{len(bad_images)} of 4 frames of world_train left out" in outcome.err
    assert "1 labelled frames" in outcome.err


def test_frames_with_bad_point_files_are_left_out_of_a_cache_and_counted(
    caching: Command, own_world: Path, tmp_path: Path
) -> None:
    half(sorted((own_world / "samples" / "LIDAR_TOP").iterdir())[0])
    outcome = caching("--set", f"data.root={own_world}", "--set", "data.skip_missing=true")
    assert outcome.code == 0, outcome.err
    assert "1 of 4 frames of world_train left out" in outcome.err
    assert len(CacheReader.open(tmp_path / "cache")) == 3


def test_a_data_set_without_one_whole_frame(student: Command, own_world: Path) -> None:
    shutil.rmtree(own_world / "samples")
    outcome = student("--set", f"data.root={own_world}", "--set", "data.skip_missing=true")
    complains(outcome, "DataError", "skip_missing leaves no frame", own_world, "missing", "Download")


# ---------------------------------------------------------------------------------------------- caches


def test_a_cache_of_another_grid_and_of_other_classes(distilled: Command, cache: Path, tmp_path: Path) -> None:
    reordered = "[truck, car, pedestrian, bicycle, traffic_cone]"
    outcome = distilled("--set", "detector.grid.cell_m=3.2", "--set", f"data.classes={reordered}")
    words = ("grid", "cell 1.6 m", "wanted is", "cell 3.2 m", "classes", "wanted are truck, car")
    complains(outcome, "ContractError", cache, *words, "Change the recipe", "or write a cache")
    assert not (tmp_path / "run").exists()


def test_frames_that_the_cache_does_not_hold(distilled: Command, cache: Path) -> None:
    outcome = distilled("--set", "data.split=world_val")
    complains(outcome, "ContractError", cache, "2 of 2 samples are not in the cache", "write a cache")


def test_a_data_set_annotated_anew_since_the_cache_was_written(distilled: Command, own_world: Path) -> None:
    def turn(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**record, "rotation": [0.6, 0.0, 0.0, 0.8]} for record in records]

    kit.change_table(own_world, "sample_annotation", turn)
    outcome = distilled("--set", f"data.root={own_world}")
    complains(outcome, "ContractError", "dataset.annotation_digest", "write a cache")


def test_a_folder_that_is_no_cache(distilled: Command, teacher: Path) -> None:
    outcome = distilled("--cache", f"lidar={teacher}")
    complains(outcome, "CacheError", f"no cache at {teacher}", "Check the address", "cache-teacher")


def test_a_folder_that_is_no_cache_is_not_called_damaged(bevkd: Bevkd, tmp_path: Path) -> None:
    outcome = bevkd("cache", "verify", tmp_path)
    said = complains(outcome, "CacheError", f"{tmp_path} is not a whole cache", f"no cache at {tmp_path}")
    assert "damaged" not in said


def test_a_cache_that_is_not_finished(distilled: Command, cache: Path, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    shutil.copytree(cache, begun)
    (begun / MANIFEST).unlink()
    (begun / COMMITS / "1.json").unlink()
    outcome = distilled("--cache", f"lidar={begun}")
    complains(outcome, "CacheError", begun, "1 of 2 blocks", "Run cache-teacher with the same recipe again")


def test_a_cache_whose_shard_is_damaged_is_told_with_sample_and_remedy(
    bevkd: Bevkd, world: Path, cache: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(cache, damaged)
    path = sorted(damaged.glob("boxes/c.0*"))[0]
    path.write_bytes(path.read_bytes()[:-3])
    outcome = bevkd("evaluate", "--cache", damaged, "--set", f"data.root={world}")
    complains(outcome, "CacheError", path, "Restore the file", "run cache-teacher again")


def test_a_shard_that_a_loader_process_finds_damaged_is_told_without_a_traceback(
    distilled: Command, cache: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(cache, damaged)
    path = sorted(damaged.glob("boxes/c.0*"))[0]
    path.write_bytes(path.read_bytes()[:-3])
    outcome = distilled("--cache", f"lidar={damaged}", "--set", "training.workers=1")
    assert outcome.err.splitlines()[1] == "CacheError"
    assert outcome.err.splitlines()[2].startswith("sample '")
    assert str(path) in outcome.err
    assert "Traceback" not in outcome.err


def test_a_cache_in_a_bucket_without_credentials(
    distilled: Command, bevkd: Bevkd, cache_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    words = ("no credentials for bucket 'bucket'", "AWS_ACCESS_KEY_ID")
    complains(distilled("--cache", "lidar=s3://bucket/lidar"), "CacheError", "s3://bucket/lidar", *words)
    outcome = bevkd("cache-teacher", cache_recipe, "--out", "s3://bucket/lidar")
    complains(outcome, "CacheError", "s3://bucket/lidar", *words)


def test_a_cache_under_a_name_that_no_loss_reads(distilled: Command, cache: Path) -> None:
    outcome = distilled("--cache", f"lidra={cache}")
    complains(outcome, "ConfigError", f"--cache lidra={cache}", "no loss reads it", "lidar")


def test_a_loss_whose_cache_is_not_given(bevkd: Bevkd, distilled_recipe: Path, tmp_path: Path) -> None:
    path = changed(distilled_recipe, tmp_path / "mine.yaml", lambda values: values["distill"].update(caches={}))
    outcome = bevkd("train-student", path, "--out", tmp_path / "run")
    complains(outcome, "ContractError", "'lidar'", "Add --cache lidar=URI")


def test_a_cache_for_a_recipe_without_losses(student: Command, cache: Path) -> None:
    complains(student("--cache", f"lidar={cache}"), "ConfigError", "no 'distill'", "leave out --cache")


def test_a_loss_that_reads_what_the_cache_does_not_hold(
    bevkd: Bevkd, world: Path, teacher: Path, distilled: Command, tmp_path: Path
) -> None:
    spec = kit.write(tmp_path / "spec.yaml", kit.spec(signals=("boxes",)))
    recipe = kit.write(tmp_path / "cache.yaml", kit.cache_recipe(world, teacher, spec))
    bevkd.well("cache-teacher", recipe, "--out", tmp_path / "boxes")
    outcome = distilled("--cache", f"lidar={tmp_path / 'boxes'}")
    words = [f"{signal} is not stored (stored are boxes)" for signal in ("bev_low", "bev_high", "heatmap", "box_code")]
    complains(outcome, "ContractError", tmp_path / "boxes", *words, "spec that stores it")


def test_a_student_of_another_width_than_the_cached_maps(distilled: Command) -> None:
    outcome = distilled("--set", "detector.encoder.channels=12")
    complains(outcome, "ContractError", "loss 'unidistill'", "8 channels in the cache and 12", "adapter: true")


def test_a_cache_begun_with_another_recipe(bevkd: Bevkd, cache: Path, cache_recipe: Path) -> None:
    before = kit.tree(cache)
    outcome = bevkd("cache-teacher", cache_recipe, "--out", cache, "--limit", "2", "--set", "licence=CC0")
    words = ("licence: the cache has '', this run 'CC0'", "tokens: the cache has 4, this run 2", "another folder")
    complains(outcome, "CacheError", cache, *words)
    assert kit.tree(cache) == before


def test_a_disk_that_is_full_leaves_a_cache_that_a_rerun_completes(
    bevkd: Bevkd, cache: Path, cache_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    write = shard.ShardWriter._write
    budget = [sum(path.stat().st_size for path in cache.rglob("c.0*")) + 5000]

    def until_full(self: shard.ShardWriter, data: bytes) -> None:
        budget[0] -= len(data)
        if budget[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(shard.ShardWriter, "_write", until_full)
        outcome = bevkd("cache-teacher", cache_recipe, "--out", folder)
    complains(outcome, "CacheError", f"the disk of {folder} is full", "more bytes are needed", "run the same command")
    assert [path.name for path in (folder / COMMITS).iterdir()] == ["0.json"]
    assert not list(folder.rglob(".tmp-*"))
    bevkd.well("cache-teacher", cache_recipe, "--out", folder)
    assert kit.tree(folder) == kit.tree(cache)


# ---------------------------------------------------------------------------------------------- teachers


def test_a_teacher_that_was_trained_on_other_classes(caching: Command, teacher: Path) -> None:
    outcome = caching("--set", "data.classes=[car, truck]")
    complains(outcome, "ContractError", teacher, "trained on the classes car, truck, ped", "Set data.classes")


def test_a_teacher_run_that_is_not_there(caching: Command, tmp_path: Path) -> None:
    outcome = caching("--set", f"teacher.run={tmp_path / 'nowhere'}")
    complains(outcome, "CheckpointError", tmp_path / "nowhere", "recipe.yaml", "train-teacher")


def test_a_teacher_run_that_is_not_finished(caching: Command, teacher: Path, tmp_path: Path) -> None:
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(teacher / "recipe.yaml", unfinished)
    outcome = caching("--set", f"teacher.run={unfinished}")
    complains(outcome, "CheckpointError", unfinished / "model.safetensors", "finished run")


def test_teacher_weights_that_do_not_fit_are_never_loaded_in_part(
    bevkd: Bevkd, teacher: Path, cache_recipe: Path, tmp_path: Path
) -> None:
    def widen(values: dict[str, Any]) -> None:
        detector = {**kit.TEACHER, "bev_encoder": {**kit.BEV_ENCODER, "channels": [12]}}
        weights = str(teacher / "model.safetensors")
        values["teacher"] = {"name": "detector", "detector": detector, "weights": weights}

    path = changed(cache_recipe, tmp_path / "mine.yaml", widen)
    outcome = bevkd("cache-teacher", path, "--out", tmp_path / "cache")
    words = ("shape of bev_encoder.blocks.0.0.weight", "file [8, 8, 3, 3], model [12, 8, 3, 3]")
    complains(outcome, "CheckpointError", teacher / "model.safetensors", *words)


# ---------------------------------------------------------------------------------------------- runs


def test_a_run_folder_that_is_in_use(student: Command, tmp_path: Path) -> None:
    assert student().code == 0
    before = kit.tree(tmp_path / "run")
    complains(student(), "TrainingError", tmp_path / "run", "Add --resume", "another --out")
    assert kit.tree(tmp_path / "run") == before


def test_a_resume_with_another_recipe(student: Command, tmp_path: Path) -> None:
    assert student().code == 0
    outcome = student("--resume", "--set", "training.steps=9", "--set", "training.batch_size=1")
    words = ("training.steps: 3 there, 9 here", "training.batch_size: 2 there, 1 here", "another --out")
    complains(outcome, "TrainingError", tmp_path / "run", *words)


def test_a_run_folder_with_something_else_in_it(bevkd: Bevkd, student_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    outcome = bevkd("train-student", student_recipe, "--out", tmp_path)
    complains(outcome, "TrainingError", tmp_path, "holds no run", "another --out")


def test_a_run_folder_that_is_a_file(bevkd: Bevkd, student_recipe: Path) -> None:
    outcome = bevkd("train-student", student_recipe, "--out", student_recipe)
    complains(outcome, "TrainingError", student_recipe, "cannot be used as run folder", "another --out")


def test_a_picture_in_a_place_that_cannot_be_written(bevkd: Bevkd, world: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    where = ("--set", f"data.root={world}")
    outcome = bevkd("cache", "show", cache, "--out", tmp_path / "file" / "x.png", *where)
    complains(outcome, "FileExistsError", tmp_path / "file", "Check that path, its rights and the free space")


def test_a_run_without_evaluation_that_is_to_be_evaluated(student: Command, bevkd: Bevkd, tmp_path: Path) -> None:
    assert student().code == 0
    outcome = bevkd("evaluate", "--run", tmp_path / "run")
    complains(outcome, "ConfigError", tmp_path / "run", "no 'evaluation'", "--set evaluation.data=")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device that the test says it lacks")
def test_a_device_that_this_machine_does_not_have(student: Command) -> None:
    complains(student("--set", "device=cuda"), "ConfigError", "'cuda'", "not usable on this machine", "device: cpu")
    assert student("--set", "device=cpu").code == 0


def test_a_lidar_detector_without_spconv(
    bevkd: Bevkd, teacher_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse.load_spconv.cache_clear()
    monkeypatch.setitem(sys.modules, "spconv.pytorch", None)
    outcome = bevkd("train-teacher", teacher_recipe, "--out", tmp_path / "run")
    sparse.load_spconv.cache_clear()
    complains(outcome, "BevkdError", "spconv", "pip install 'bevkd[teacher]'")


# ---------------------------------------------------------------------------------------------- evaluation


@pytest.fixture
def evaluated(bevkd: Bevkd, world: Path, student_recipe: Path, tmp_path: Path) -> Command:
    """Return the command that trains and evaluates the plain student with further arguments."""
    recipe = kit.evaluated(yaml.safe_load(student_recipe.read_text()), world)
    path = kit.write(tmp_path / "evaluated.yaml", recipe)
    return lambda *arguments: bevkd("train-student", path, "--out", tmp_path / "run", *arguments)


def test_evaluation_frames_that_are_not_there_are_told_before_the_training(evaluated: Command, tmp_path: Path) -> None:
    complains(evaluated("--set", "evaluation.data.split=val"), "DataError", "'val'", "world_val (1 scenes)")
    assert not (tmp_path / "run").exists()


def test_evaluation_files_that_are_damaged_are_told_before_the_training(
    evaluated: Command, own_world: Path, tmp_path: Path
) -> None:
    path = half(sorted((own_world / "samples" / "CAM_BACK").iterdir())[-1])
    outcome = evaluated("--set", f"evaluation.data.root={own_world}")
    complains(outcome, "DataError", f"{path}: truncated", "data.skip_missing: true")
    assert not (tmp_path / "run").exists()


def test_evaluation_classes_in_another_order_than_those_of_the_training(evaluated: Command, tmp_path: Path) -> None:
    outcome = evaluated("--set", "evaluation.data.classes=[truck, car, pedestrian, bicycle, traffic_cone]")
    complains(outcome, "ContractError", "evaluation.data.classes has truck, car", "trained on data.classes: car, truck")
    assert not (tmp_path / "run").exists()


def test_a_run_evaluated_with_classes_in_another_order(evaluated: Command, bevkd: Bevkd, tmp_path: Path) -> None:
    assert evaluated().code == 0
    reordered = "evaluation.data.classes=[truck, car, pedestrian, bicycle, traffic_cone]"
    outcome = bevkd("evaluate", "--run", tmp_path / "run", "--set", reordered)
    complains(outcome, "ContractError", "evaluation.data.classes has truck, car", "same order")


def test_a_cache_evaluated_with_classes_in_another_order(bevkd: Bevkd, world: Path, cache: Path) -> None:
    reordered = "data.classes=[truck, car, pedestrian, bicycle, traffic_cone]"
    outcome = bevkd("evaluate", "--cache", cache, "--set", f"data.root={world}", "--set", reordered)
    complains(outcome, "ContractError", cache, "classes: the cache has car, truck", "wanted are truck, car")


def test_detections_of_unknown_and_of_missing_frames(bevkd: Bevkd, world: Path, tmp_path: Path) -> None:
    path = tmp_path / "detections.json"
    path.write_text(json.dumps({"meta": {}, "results": {"f00": [], "f01": []}}))
    where = [f"data.root={world}", "data.version=v1.0-world", "data.split=world_val"]
    outcome = bevkd("evaluate", "--detections", path, *(part for value in where for part in ("--set", value)))
    words = ("2 tokens are not in", world, "'f00'", "2 of 2 frames have no entry", "give [] for none")
    complains(outcome, "ContractError", path, *words)


def test_detections_without_a_data_set(bevkd: Bevkd, tmp_path: Path) -> None:
    outcome = bevkd("evaluate", "--detections", tmp_path / "detections.json")
    complains(outcome, "ConfigError", "--set data.root=FOLDER", "data.version", "data.split", "missing")


def test_a_cache_evaluated_without_a_data_set(bevkd: Bevkd, cache: Path) -> None:
    complains(bevkd("evaluate", "--cache", cache), "ConfigError", cache, "--set data.root=FOLDER")


def test_a_cache_shown_for_a_frame_that_it_does_not_hold(bevkd: Bevkd, world: Path, cache: Path) -> None:
    outcome = bevkd("cache", "show", cache, "--token", "f00", "--set", f"data.root={world}")
    complains(outcome, "CacheError", "'f00'", cache, CacheReader.open(cache).tokens[0])
