"""Detection files for any split, and evaluation over several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline import kit
from tests.pipeline.kit import ROOT, Bevkd

TEST_VERSION = "v1.0-test"


@pytest.fixture(scope="module")
def student(bevkd: Bevkd, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run of a camera student that finds something in every frame."""
    folder = tmp_path_factory.mktemp("student")
    detector = {**kit.STUDENT, "head": {**kit.HEAD, "heatmap_bias": 0.0}}
    recipe = kit.evaluated(kit.train_recipe(world, detector), world)
    recipe["evaluation"].update(workers=0, batch_size=1)
    bevkd.well("train-student", kit.write(folder / "student.yaml", recipe), "--out", folder / "run")
    return folder / "run"


@pytest.fixture
def unlabelled(world: Path, tmp_path: Path) -> Path:
    """Return the world as a test split is published: the same tables, without annotations."""
    root = kit.copy(world, tmp_path / "unlabelled")
    for table in ("sample_annotation", "instance"):
        kit.change_table(root, table, lambda _: [])
    (root / "v1.0-world").rename(root / TEST_VERSION)
    return root


def at(root: Path, version: str = TEST_VERSION) -> tuple[str, ...]:
    return ("--set", f"evaluation.data.root={root}", "--set", f"evaluation.data.version={version}")


def read(path: Path) -> Any:
    return json.loads(path.read_bytes())


def torchrun(bevkd: Bevkd, processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(bevkd.home), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", "--", "cli", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_predictions_of_another_split_answer_for_all_its_frames_and_say_what_was_seen(
    bevkd: Bevkd, student: Path, world: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "train.json"
    summary = bevkd.well("predict", student, "--out", out, "--split", "world_train", "--json").json
    assert summary["path"] == str(out)
    assert summary["frames"] == 4
    content = read(out)
    assert sum(map(len, content["results"].values())) == summary["boxes"] > 0
    assert content["meta"]["use_camera"] is True
    assert content["meta"]["use_lidar"] is content["meta"]["use_radar"] is False
    assert set(content["results"]) == tokens_of(world, "world_train")


def tokens_of(world: Path, split: str) -> set[str]:
    tables = world / "v1.0-world"
    scenes = set(read(tables / "splits.json")[split])
    named = {scene["token"] for scene in read(tables / "scene.json") if scene["name"] in scenes}
    return {sample["token"] for sample in read(tables / "sample.json") if sample["scene_token"] in named}


def test_a_prediction_scores_like_the_run_itself(bevkd: Bevkd, student: Path, world: Path, tmp_path: Path) -> None:
    out = tmp_path / "val.json"
    assert "boxes on 2 frames of world_val" in bevkd.well("predict", student, "--out", out).out
    data = kit.data(world, split="world_val")
    given = [part for key, value in data.items() for part in ("--set", f"data.{key}={json.dumps(value)}")]
    by_file = bevkd.well("evaluate", "--detections", out, *given, "--json").json
    by_run = bevkd.well("evaluate", "--run", student, "--json").json
    assert by_file == by_run
    assert read(student / "result.json")["metrics"] == by_run
    assert read(student / "detections.json") == read(out)


def test_the_devkit_loads_a_prediction(bevkd: Bevkd, student: Path, tmp_path: Path) -> None:
    from nuscenes.eval.common.loaders import load_prediction
    from nuscenes.eval.detection.data_classes import DetectionBox

    out = tmp_path / "val.json"
    bevkd.well("predict", student, "--out", out)
    boxes, meta = load_prediction(str(out), 500, DetectionBox)
    assert meta == {"use_camera": True, **dict.fromkeys(("use_lidar", "use_radar", "use_map", "use_external"), False)}
    assert len(boxes.sample_tokens) == 2
    assert len(boxes.all) > 0


def test_a_split_without_annotations_is_predicted_in_full(
    bevkd: Bevkd, student: Path, unlabelled: Path, tmp_path: Path
) -> None:
    labelled, out = tmp_path / "labelled.json", tmp_path / "test.json"
    bevkd.well("predict", student, "--out", labelled)
    said = bevkd.well("predict", student, "--out", out, *at(unlabelled)).out
    assert "no annotations, so there are no scores" in said
    assert read(out) == read(labelled)


def test_a_split_without_annotations_cannot_be_scored_and_that_is_said(
    bevkd: Bevkd, student: Path, unlabelled: Path
) -> None:
    outcome = bevkd("evaluate", "--run", student, *at(unlabelled))
    assert outcome.code == 1
    assert "has no annotations" in outcome.err
    assert "bevkd predict" in outcome.err


def test_a_split_without_annotations_is_no_data_to_train_on(
    bevkd: Bevkd, student_recipe: Path, unlabelled: Path, tmp_path: Path
) -> None:
    where = ("--set", f"data.root={unlabelled}", "--set", f"data.version={TEST_VERSION}")
    outcome = bevkd("train-student", student_recipe, "--out", tmp_path / "run", *where)
    assert outcome.code == 1
    assert "no frame to train on" in outcome.err


def test_weights_and_a_recipe_do_as_well_as_a_run(bevkd: Bevkd, student: Path, tmp_path: Path) -> None:
    given = ("--weights", student / "model.safetensors")
    bevkd.well("predict", student / "recipe.yaml", *given, "--out", tmp_path / "a.json")
    bevkd.well("predict", student, "--out", tmp_path / "b.json")
    assert read(tmp_path / "a.json") == read(tmp_path / "b.json")
    assert "add --weights" in bevkd("predict", student / "recipe.yaml", "--out", tmp_path / "c.json").err


def test_what_is_there_is_not_overwritten(bevkd: Bevkd, student: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    outcome = bevkd("predict", student, "--out", tmp_path / "mine")
    assert outcome.code == 1
    assert "exists. Remove it, or choose another --out" in outcome.err


def test_weights_that_a_run_does_not_have_are_named(bevkd: Bevkd, student: Path, tmp_path: Path) -> None:
    outcome = bevkd("predict", student, "--out", tmp_path / "a.json", "--weights", "nowhere")
    assert outcome.code == 1
    assert "nowhere.safetensors" in outcome.err


def test_processes_of_torchrun_write_one_file_that_equals_that_of_one_process(
    bevkd: Bevkd, student: Path, tmp_path: Path
) -> None:
    alone, shared = tmp_path / "alone.json", tmp_path / "shared.json"
    bevkd.well("predict", student, "--out", alone, "--split", "world_train")
    done = torchrun(bevkd, 2, "predict", student, "--out", shared, "--split", "world_train", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["frames"] == 4
    assert shared.read_bytes() == alone.read_bytes()


@pytest.mark.slow
def test_a_run_is_evaluated_by_several_processes_as_by_one(bevkd: Bevkd, student: Path) -> None:
    alone = bevkd.well("evaluate", "--run", student, "--json").json
    done = torchrun(bevkd, 2, "evaluate", "--run", student, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == alone
