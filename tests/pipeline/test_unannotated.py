"""Sweeps between key frames and unannotated drives: a cached teacher labels them, a student trains on them too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from bevkd.cache.reader import CacheReader
from bevkd.data.sources.nuscenes import Config, NuScenesSource, build
from bevkd.evaluation.predict import predict
from bevkd.progress import Silent
from bevkd.world import world_preset, write_world
from pipeline.recipe import load_train
from pipeline.trained import trained_detector
from tests.pipeline import kit
from tests.pipeline.kit import Bevkd

TRAINING = {**kit.TRAINING, "steps": 6, "checkpoint_every": 2, "keep": 10}


@dataclass(frozen=True)
class Case:
    """Data with frames that nobody annotated: the data section of a recipe, and how many of them are annotated."""

    data: dict[str, Any]
    frames: int
    annotated: int
    told: str
    where: Sequence[str]


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a world whose cameras record sweeps too."""
    return write_world(world_preset("tiny", camera_sweeps=True), tmp_path_factory.mktemp("sweeps") / "world")


@pytest.fixture(scope="module")
def drive(sweeps: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a world without annotations, as a version of its own."""
    root = kit.copy(sweeps, tmp_path_factory.mktemp("drive") / "world")
    for table in ("sample_annotation", "instance"):
        kit.change_table(root, table, lambda _: [])
    (root / "v1.0-world").rename(root / "v1.0-drive")
    return root


@pytest.fixture(scope="module", params=["sweeps", "drive"])
def case(request: pytest.FixtureRequest, world: Path, sweeps: Path, drive: Path) -> Case:
    if request.param == "sweeps":
        data, where = kit.data(sweeps, labels=0.1, sweep_frames=1), ("--set", f"data.root={sweeps}")
        return Case(data, 8, 4, "2 labelled, 2 unlabelled and 4 unannotated frames", where)
    parts = [kit.data(world, labels=0.1), kit.data(drive, version="v1.0-drive")]
    where = ("--set", f"data.sources.0.root={world}", "--set", f"data.sources.1.root={drive}")
    told = "2 labelled, 2 unlabelled and 4 unannotated frames"
    return Case({"name": "concat", "sources": parts}, 8, 4, told, where)


@pytest.fixture(scope="module")
def cache(bevkd: Bevkd, case: Case, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the cache of the teacher over all frames of the case."""
    folder = tmp_path_factory.mktemp("cache")
    spec = kit.write(folder / "spec.yaml", kit.spec(block=3))
    recipe = kit.cache_recipe(Path(), teacher, spec, data=case.data)
    bevkd.well("cache-teacher", kit.write(folder / "cache.yaml", recipe), "--out", folder / "lidar")
    return folder / "lidar"


def student(case: Case, cache: Path, folder: Path, **changes: Any) -> Path:
    recipe = kit.distilled(kit.train_recipe(Path(), kit.STUDENT, data=case.data, training=TRAINING), cache)
    return kit.write(folder / "student.yaml", {**recipe, **changes})


@pytest.fixture(scope="module")
def run(bevkd: Bevkd, case: Case, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run of a student on all frames of the case."""
    folder = tmp_path_factory.mktemp("run")
    said = bevkd.well("train-student", student(case, cache, folder), "--out", folder / "run").err
    (folder / "said").write_text(said)
    return folder / "run"


def open_sweeps(root: Path, bevkd: Bevkd, **changes: Any) -> NuScenesSource:
    return build(Config(**kit.data(root, **changes), index_dir=bevkd.home / "bevkd" / "nuscenes"))


# ---------------------------------------------------------------------------------------------- the cache


def test_the_cache_holds_all_frames_and_its_check_counts_annotated_ones(cache: Path, case: Case) -> None:
    reader = CacheReader.open(cache)
    assert len(reader.tokens) == case.frames
    assert reader.manifest.self_check is not None
    assert reader.manifest.self_check.frames == case.annotated


def test_the_cache_says_nothing_of_where_data_lie(cache: Path, sweeps: Path, drive: Path, world: Path) -> None:
    text = (cache / "manifest.json").read_text()
    assert not [path for path in (sweeps, drive, world) if str(path) in text]
    assert "labels" not in text


def test_its_boxes_are_what_the_teacher_finds_in_a_sweep(
    bevkd: Bevkd, case: Case, cache: Path, sweeps: Path, teacher: Path
) -> None:
    if case.data["name"] == "concat":
        pytest.skip("frames of other sources are frames like any other")
    source, reader = open_sweeps(sweeps, bevkd, sweep_frames=1), CacheReader.open(cache)
    tokens = [token for token in source.tokens if token not in source.annotated]
    detector = trained_detector(load_train(str(teacher / "recipe.yaml"), []), str(teacher), torch.device("cpu"))  # type: ignore[arg-type]
    for token, boxes in predict(detector, source, tokens, Silent()).items():
        assert len(boxes) > 5
        torch.testing.assert_close(reader.boxes(token).values, boxes.values, rtol=1e-4, atol=1e-4)


def test_evaluating_the_cache_scores_annotated_frames_only(bevkd: Bevkd, case: Case, cache: Path) -> None:
    report = bevkd.well("evaluate", "--cache", cache, *case.where, "--json").json
    assert report["frames"] == case.annotated


def test_a_frame_without_annotations_can_be_shown(bevkd: Bevkd, case: Case, cache: Path, tmp_path: Path) -> None:
    token = CacheReader.open(cache).tokens[-2 if case.data["name"] == "concat" else 0]
    out = tmp_path / "frame.png"
    bevkd.well("cache", "show", cache, "--token", token, "--out", out, *case.where)
    with Image.open(out) as image:
        assert image.width > 600


def test_a_cache_without_one_annotated_frame_is_sealed_unscored(
    bevkd: Bevkd, drive: Path, teacher: Path, tmp_path: Path
) -> None:
    spec = kit.write(tmp_path / "spec.yaml", kit.spec())
    recipe = kit.cache_recipe(drive, teacher, spec, data=kit.data(drive, version="v1.0-drive", sweep_frames=1))
    told = bevkd.well("cache-teacher", kit.write(tmp_path / "cache.yaml", recipe), "--out", tmp_path / "cache")
    assert "4 key frames and 4 sweep frames of world_train" in told.err
    assert "self-check: not scored: no frame of the cache is annotated" in told.out
    outcome = bevkd("evaluate", "--cache", tmp_path / "cache", "--set", f"data.root={drive}")
    assert outcome.code == 1
    assert "none of its frames is annotated" in outcome.err


# ---------------------------------------------------------------------------------------------- the student


def test_a_student_trains_on_all_of_them_and_says_how_many(run: Path, case: Case) -> None:
    said = " ".join((run.parent / "said").read_text().split())
    assert case.told in said
    assert ("4 key frames and 4 sweep frames of world_train" in said) == ("sweep_frames" in case.data)
    for line in kit.losses(run):
        assert line["x3kd/output_heatmap"] > 0


def test_a_resumed_run_has_the_same_losses_and_the_same_weights(
    bevkd: Bevkd, case: Case, cache: Path, run: Path, tmp_path: Path
) -> None:
    cut = Path(shutil.copytree(run, tmp_path / "run"))
    for name in ("model.safetensors", "result.json", "checkpoints/step_00000004", "checkpoints/step_00000006"):
        path = cut / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    said = bevkd.well("train-student", student(case, cache, tmp_path), "--out", cut, "--resume").err
    assert "resuming at step 2" in said
    assert kit.losses(cut) == kit.losses(run)
    assert (cut / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


def test_a_run_goes_on_where_its_data_were_moved_to(
    bevkd: Bevkd, case: Case, cache: Path, run: Path, sweeps: Path, drive: Path, tmp_path: Path
) -> None:
    moved = dict(case.data)
    copy = kit.copy(drive if "sources" in moved else sweeps, tmp_path / "moved")
    if "sources" in moved:
        moved["sources"] = [moved["sources"][0], {**moved["sources"][1], "root": str(copy)}]
    else:
        moved["root"] = str(copy)
    recipe = student(case, cache, tmp_path, data=moved)
    assert bevkd.well("train-student", recipe, "--out", run, "--resume", "--json").json["steps"] == 0
    fewer = json.loads(json.dumps(moved).replace('"labels": 0.1', '"labels": 1.0'))
    outcome = bevkd("train-student", student(case, cache, tmp_path, data=fewer), "--out", run, "--resume")
    assert outcome.code == 1
    assert "another recipe" in outcome.err


def test_labelled_frames_alone_leave_the_others_out(bevkd: Bevkd, case: Case, cache: Path, tmp_path: Path) -> None:
    said = bevkd.well(
        "train-student", student(case, cache, tmp_path), "--out", tmp_path / "run", "--set", "distill.frames=labelled"
    ).err
    assert "2 labelled frames" in said


# ---------------------------------------------------------------------------------------------- evaluation


def test_evaluation_in_and_after_training_scores_key_frames_only(bevkd: Bevkd, sweeps: Path, tmp_path: Path) -> None:
    found = {}
    for every in (0, 1):
        recipe = kit.evaluated(kit.train_recipe(sweeps, kit.STUDENT), sweeps)
        recipe["evaluation"]["data"]["sweep_frames"] = every
        recipe["training"] = {**kit.TRAINING, "evaluate_every": 1}
        recipe["evaluation"]["frames"] = 2
        run = tmp_path / str(every)
        bevkd.well("train-student", kit.write(tmp_path / "student.yaml", recipe), "--out", run)
        report = json.loads((run / "result.json").read_bytes())["metrics"]
        detections = json.loads((run / "detections.json").read_bytes())["results"]
        found[every] = (report, detections, kit.losses(run))
        where = [
            f"data.{key}={recipe['evaluation']['data'][key]}" for key in ("root", "version", "split", "sweep_frames")
        ]
        given = ("--detections", run / "detections.json", *(part for each in where for part in ("--set", each)))
        assert bevkd.well("evaluate", *given, "--json").json["frames"] == 2
    assert found[0] == found[1]
    assert found[1][0]["frames"] == 2


def test_predictions_cover_sweeps_too(bevkd: Bevkd, run: Path, sweeps: Path, tmp_path: Path) -> None:
    data = kit.data(sweeps, split="world_val", sweep_frames=1)
    given = [part for key, value in data.items() for part in ("--set", f"evaluation.data.{key}={json.dumps(value)}")]
    summary = bevkd.well("predict", run, "--out", tmp_path / "all.json", *given, "--json").json
    assert (summary["frames"], summary["annotated"]) == (4, True)
    scored = bevkd.well(
        *("evaluate", "--detections", tmp_path / "all.json", "--set", f"data.root={sweeps}"),
        *("--set", "data.version=v1.0-world", "--set", "data.split=world_val", "--json"),
    ).json
    assert scored["frames"] == 2


def test_evaluation_on_several_data_sets_is_refused_before_the_work(
    bevkd: Bevkd, world: Path, drive: Path, tmp_path: Path
) -> None:
    parts = [kit.data(world, split="world_val"), kit.data(drive, version="v1.0-drive")]
    recipe = kit.train_recipe(world, kit.STUDENT, evaluation={"data": {"name": "concat", "sources": parts}})
    outcome = bevkd("train-student", kit.write(tmp_path / "student.yaml", recipe), "--out", tmp_path / "run")
    assert outcome.code == 1
    assert "put together of 2 sources ('concat')" in " ".join(outcome.err.split())
    assert not (tmp_path / "run").exists()


def test_evaluation_on_frames_without_annotations_is_refused_before_the_work(
    bevkd: Bevkd, world: Path, drive: Path, tmp_path: Path
) -> None:
    recipe = kit.train_recipe(world, kit.STUDENT, evaluation={"data": kit.data(drive, version="v1.0-drive")})
    outcome = bevkd("train-student", kit.write(tmp_path / "student.yaml", recipe), "--out", tmp_path / "run")
    assert outcome.code == 1
    assert "has no annotations" in " ".join(outcome.err.split())
    assert not (tmp_path / "run").exists()


def test_a_camera_student_without_images_of_sweeps_is_told_so(bevkd: Bevkd, world: Path, tmp_path: Path) -> None:
    recipe = kit.train_recipe(world, kit.STUDENT, data=kit.data(world, sweep_frames=1))
    outcome = bevkd("train-student", kit.write(tmp_path / "student.yaml", recipe), "--out", tmp_path / "run")
    assert outcome.code == 1
    assert "none of the 4 sweep frames has a reading of every camera" in " ".join(outcome.err.split())
