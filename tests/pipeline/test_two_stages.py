"""From a world to a distilled student and its metrics, through the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open

from bevkd.cache.reader import CacheReader
from bevkd.data.sources.nuscenes import Config, NuScenesSource, build
from bevkd.evaluation.nuscenes import to_results
from bevkd.types import Boxes
from tests.pipeline import kit
from tests.pipeline.kit import Bevkd


@pytest.fixture(scope="module")
def plain(bevkd: Bevkd, student_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run of a student that saw labels only."""
    run = tmp_path_factory.mktemp("plain") / "run"
    bevkd.well("train-student", student_recipe, "--out", run)
    return run


@pytest.fixture(scope="module")
def distilled(bevkd: Bevkd, distilled_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run of a student that learned from the cache too."""
    run = tmp_path_factory.mktemp("distilled") / "run"
    bevkd.well("train-student", distilled_recipe, "--out", run)
    return run


def open_world(bevkd: Bevkd, root: Path, split: str) -> NuScenesSource:
    config = Config(
        root=root, version="v1.0-world", split=split, classes=kit.CLASSES, index_dir=bevkd.home / "bevkd" / "nuscenes"
    )
    return build(config)


def cached_boxes(cache: Path) -> dict[str, Boxes]:
    reader = CacheReader.open(cache)
    return {token: reader.boxes(token) for token in reader.tokens}


# ---------------------------------------------------------------------------------------------- the two stages


def test_a_trained_teacher_leaves_recipe_weights_log_detections_and_metrics(teacher: Path) -> None:
    names = {path.name for path in teacher.iterdir()}
    assert {"recipe.yaml", "model.safetensors", "log.jsonl", "detections.json", "result.json"} <= names
    assert len(kit.losses(teacher)) == kit.TRAINING["steps"]
    assert json.loads((teacher / "result.json").read_bytes())["metrics"]["frames"] == 2


def test_the_recipe_in_a_run_folder_says_everything_that_the_run_used(
    bevkd: Bevkd, student_recipe: Path, tmp_path: Path
) -> None:
    bevkd.well("train-student", student_recipe, "--out", tmp_path / "run", "--set", "training.learning_rate=1e-4")
    recorded = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert recorded["training"]["learning_rate"] == 1e-4
    assert recorded["training"]["clip"] == 35.0
    assert recorded["data"]["min_points"] == 1


def test_the_cache_holds_the_boxes_that_the_teacher_itself_finds(
    bevkd: Bevkd, world: Path, teacher: Path, cache_recipe: Path, tmp_path: Path
) -> None:
    bevkd.well("cache-teacher", cache_recipe, "--out", tmp_path / "val", "--set", "data.split=world_val")
    own = json.loads((teacher / "detections.json").read_bytes())["results"]
    cached = to_results(open_world(bevkd, world, "world_val"), cached_boxes(tmp_path / "val"))["results"]
    assert own.keys() == cached.keys()
    for token, boxes in own.items():
        assert len(boxes) > 5
        assert [box["detection_name"] for box in cached[token]] == [box["detection_name"] for box in boxes]
        for field in ("translation", "size", "rotation", "velocity"):
            ours, theirs = (torch.tensor([box[field] for box in each]) for each in (cached[token], boxes))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_evaluating_a_cache_scores_its_boxes_on_its_frames(
    bevkd: Bevkd, world: Path, cache: Path, tmp_path: Path
) -> None:
    source = open_world(bevkd, world, "world_train")
    (tmp_path / "boxes.json").write_text(json.dumps(to_results(source, cached_boxes(cache))))
    where = ("--set", f"data.root={world}")
    split = ("--set", "data.version=v1.0-world", "--set", "data.split=world_train")
    of_cache = bevkd.well("evaluate", "--cache", cache, *where, "--json").json
    of_file = bevkd.well("evaluate", "--detections", tmp_path / "boxes.json", *where, *split, "--json").json
    assert of_cache["frames"] == 4
    assert of_cache["tp_errors"] == pytest.approx(of_file["tp_errors"], abs=1e-6)
    assert of_cache["mAP"] == pytest.approx(of_file["mAP"], abs=1e-9)


def test_evaluating_a_finished_run_gives_its_own_metrics_again(
    bevkd: Bevkd, world: Path, student_recipe: Path, tmp_path: Path
) -> None:
    recipe = kit.evaluated(yaml.safe_load(student_recipe.read_text()), world)
    run = tmp_path / "run"
    bevkd.well("train-student", kit.write(tmp_path / "recipe.yaml", recipe), "--out", run)
    recorded = json.loads((run / "result.json").read_bytes())["metrics"]
    detections = (run / "detections.json").read_bytes()
    (run / "detections.json").unlink()
    assert bevkd.well("evaluate", "--run", run, "--json").json == recorded
    assert (run / "detections.json").read_bytes() == detections


def test_the_log_of_a_distilled_run_shows_every_term(distilled: Path) -> None:
    terms = set(kit.losses(distilled)[0])
    assert {"detection/heatmap", "detection/box", "x3kd/output_heatmap", "x3kd/output_box"} < terms
    assert {"unidistill/feature", "unidistill/relation", "unidistill/response_class"} < terms


def test_the_logged_loss_is_the_sum_of_the_terms(distilled: Path) -> None:
    for line in kit.losses(distilled):
        terms = [value for name, value in line.items() if "/" in name]
        assert line["loss"] == pytest.approx(sum(terms), rel=1e-6)
        assert min(terms) > 0


def test_distillation_changes_what_the_student_learns(plain: Path, distilled: Path) -> None:
    assert (plain / "model.safetensors").read_bytes() != (distilled / "model.safetensors").read_bytes()


def test_a_student_carries_the_names_of_the_caches_that_it_learned_from(distilled: Path, cache: Path) -> None:
    with safe_open(distilled / "model.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["bevkd"])
    assert facts["caches"] == {"lidar": CacheReader.open(cache).manifest.name}
    assert facts["classes"] == list(kit.CLASSES)


def test_two_runs_of_one_recipe_leave_equal_files(bevkd: Bevkd, distilled_recipe: Path, distilled: Path) -> None:
    again = distilled.with_name("again")
    bevkd.well("train-student", distilled_recipe, "--out", again)
    assert kit.losses(again) == kit.losses(distilled)
    assert (again / "model.safetensors").read_bytes() == (distilled / "model.safetensors").read_bytes()


def test_a_cache_given_by_option_takes_the_place_of_the_recipes(
    bevkd: Bevkd, distilled_recipe: Path, distilled: Path, cache: Path, tmp_path: Path
) -> None:
    moved = ("--set", "distill.caches.lidar=/nowhere", "--cache", f"lidar={cache}")
    bevkd.well("train-student", distilled_recipe, "--out", tmp_path / "run", *moved)
    assert kit.losses(tmp_path / "run") == kit.losses(distilled)


def test_a_finished_run_asked_to_resume_trains_no_more_and_keeps_its_weights(
    bevkd: Bevkd, student_recipe: Path, plain: Path
) -> None:
    before = (plain / "model.safetensors").read_bytes()
    summary = bevkd.well("train-student", student_recipe, "--out", plain, "--resume", "--json").json
    assert summary["steps"] == 0
    assert (plain / "model.safetensors").read_bytes() == before


# ---------------------------------------------------------------------------------------------- hidden labels


def test_a_tenth_of_the_labels_leaves_whole_scenes_without_and_says_so(
    bevkd: Bevkd, distilled_recipe: Path, tmp_path: Path
) -> None:
    said = bevkd.well("train-student", distilled_recipe, "--out", tmp_path / "run").err
    assert "2 labelled and 2 unlabelled frames" in said


def test_a_plain_student_sees_labelled_frames_only(bevkd: Bevkd, student_recipe: Path, tmp_path: Path) -> None:
    assert "2 labelled frames" in bevkd.well("train-student", student_recipe, "--out", tmp_path / "run").err


def corrupted(bevkd: Bevkd, world: Path, to: Path, labelled: bool) -> Path:
    """Return a copy of the world with wrong boxes in its labelled, or in its unlabelled, training scenes."""
    config = Config(**kit.data(world, labels=0.1), index_dir=bevkd.home / "bevkd" / "nuscenes")
    source = build(config)
    wrong = {token for token in source.tokens if (token in source.labelled) == labelled}
    assert len(wrong) == 2

    def spoil(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for record in records:
            if record["sample_token"] in wrong:
                record["translation"] = [coordinate + 3.0 for coordinate in record["translation"]]
                record["size"] = [edge * 2 for edge in record["size"]]
        return records

    root = kit.copy(world, to)
    kit.change_table(root, "sample_annotation", spoil)
    return root


@pytest.mark.parametrize("kind", ["plain", "distilled"])
@pytest.mark.parametrize("labelled", [False, True], ids=["unlabelled", "labelled"])
def test_wrong_boxes_reach_the_student_from_labelled_frames_only(
    bevkd: Bevkd, world: Path, cache_recipe: Path, kind: str, labelled: bool, tmp_path: Path, request: Any
) -> None:
    root = corrupted(bevkd, world, tmp_path / "world", labelled)
    recipe = kit.train_recipe(root, kit.STUDENT)
    if kind == "distilled":  # a new cache, since the old one refuses a data set that was annotated anew
        bevkd.well("cache-teacher", cache_recipe, "--out", tmp_path / "cache", "--set", f"data.root={root}")
        recipe = kit.distilled(recipe, tmp_path / "cache")
    bevkd.well("train-student", kit.write(tmp_path / "recipe.yaml", recipe), "--out", tmp_path / "run")
    changed = kit.losses(tmp_path / "run") != kit.losses(request.getfixturevalue(kind))
    assert changed == labelled


def test_a_teacher_sees_no_wrong_boxes_of_unlabelled_frames(
    bevkd: Bevkd, world: Path, teacher: Path, teacher_recipe: Path, tmp_path: Path
) -> None:
    root = corrupted(bevkd, world, tmp_path / "world", labelled=False)
    bevkd.well("train-teacher", teacher_recipe, "--out", tmp_path / "run", "--set", f"data.root={root}")
    assert kit.losses(tmp_path / "run") == kit.losses(teacher)


# ---------------------------------------------------------------------------------------------- two programs


def test_a_student_trains_where_spconv_cannot_be_imported_and_no_teacher_is_in_memory(
    bevkd: Bevkd, distilled_recipe: Path, distilled: Path, tmp_path: Path
) -> None:
    outcome = bevkd.fresh(
        *("train-student", distilled_recipe, "--out", tmp_path / "run", "--json"),
        before="sys.modules['spconv'] = None",
        after="assert 'bevkd.training.loop' in sys.modules\n"
        "assert not [name for name in sys.modules if name.startswith('bevkd.teachers')]",
    )
    assert outcome.code == 0, outcome.err
    assert outcome.json["steps"] == kit.TRAINING["steps"]
    assert outcome.err == ""
    assert kit.losses(tmp_path / "run") == kit.losses(distilled)


def test_zarr_alone_reads_every_array_of_a_cache(bevkd: Bevkd, cache: Path, tmp_path: Path) -> None:
    reader = CacheReader.open(cache)
    stored = [reader.read(token, tuple(kit.SIGNALS)) for token in reader.tokens]
    outcome = bevkd.python(
        "import sys; sys.modules['bevkd'] = None\n"
        "import numpy, zarr\n"
        "group = zarr.open_group(sys.argv[1], mode='r')\n"
        "numpy.savez(sys.argv[2], **{name: array[:] for name, array in group.arrays()})\n",
        *(cache, tmp_path / "arrays.npz"),
    )
    assert outcome.code == 0, outcome.err
    import numpy as np

    with np.load(tmp_path / "arrays.npz") as arrays:
        assert set(arrays) == set(stored[0])
        for name in arrays:
            np.testing.assert_array_equal(arrays[name], np.stack([sample[name] for sample in stored]))


# ---------------------------------------------------------------------------------------------- the cache


def test_a_sealed_cache_is_not_written_again(bevkd: Bevkd, cache: Path, cache_recipe: Path) -> None:
    def state() -> dict[str, tuple[int, int]]:
        paths = (path for path in sorted(cache.rglob("*")) if path.is_file())
        return {str(path): (path.stat().st_mtime_ns, path.stat().st_ino) for path in paths}

    before = state()
    said = bevkd.well("cache-teacher", cache_recipe, "--out", cache).out
    assert "4 frames" in said
    assert "0 written now" in said
    assert state() == before


def test_a_limit_caches_the_first_frames_only(bevkd: Bevkd, world: Path, cache_recipe: Path, tmp_path: Path) -> None:
    summary = bevkd.well("cache-teacher", cache_recipe, "--out", tmp_path / "cache", "--limit", "3", "--json").json
    assert (summary["frames"], summary["written"]) == (3, 3)
    first = open_world(bevkd, world, "world_train").tokens[:3]
    assert CacheReader.open(tmp_path / "cache").tokens == first


def test_a_cache_does_not_depend_on_where_its_data_and_its_teacher_lie(
    bevkd: Bevkd, world: Path, teacher: Path, cache: Path, cache_recipe: Path, tmp_path: Path
) -> None:
    shutil.copytree(teacher, tmp_path / "teacher")
    kit.copy(world, tmp_path / "world")
    moved = ("--set", f"data.root={tmp_path / 'world'}", "--set", f"teacher.run={tmp_path / 'teacher'}")
    bevkd.well("cache-teacher", cache_recipe, "--out", tmp_path / "cache", *moved)
    assert kit.tree(tmp_path / "cache") == kit.tree(cache)


def test_info_says_what_a_cache_holds(bevkd: Bevkd, cache: Path) -> None:
    said = bevkd.well("cache", "info", cache, "--json").json
    assert said["frames"] == 4
    assert said["blocks"] == "2 of 2 frames"
    assert said["classes"] == ", ".join(kit.CLASSES)
    assert set(said["signals"]) == set(kit.SIGNALS)
    assert said["name"] == CacheReader.open(cache).manifest.name


def test_info_on_a_terminal_cuts_no_name_short(bevkd: Bevkd, cache: Path) -> None:
    said = bevkd.well("cache", "info", cache).out
    assert CacheReader.open(cache).manifest.name in "".join(said.split())


@pytest.mark.parametrize("deep", [(), ("--deep",)], ids=["files", "deep"])
def test_verify_finds_a_whole_cache_whole(bevkd: Bevkd, cache: Path, deep: tuple[str, ...]) -> None:
    assert "is whole" in bevkd.well("cache", "verify", cache, *deep).out


@pytest.mark.parametrize("deep", [(), ("--deep",)], ids=["files", "deep"])
def test_verify_names_the_file_in_which_one_bit_has_flipped(
    bevkd: Bevkd, cache: Path, tmp_path: Path, deep: tuple[str, ...]
) -> None:
    damaged = tmp_path / "cache"
    shutil.copytree(cache, damaged)
    shard = sorted((damaged / "heatmap").glob("c.1*"))[0]
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(content)
    outcome = bevkd("cache", "verify", damaged, *deep)
    assert outcome.code == 1
    assert str(shard) in outcome.err
    assert outcome.out == ""
    as_json = bevkd("cache", "verify", damaged, *deep, "--json")
    assert as_json.code == 1
    assert [str(shard) in fault for fault in as_json.json["faults"]] == [True]


def test_show_draws_the_frame_that_was_asked_for(bevkd: Bevkd, world: Path, cache: Path, tmp_path: Path) -> None:
    tokens = CacheReader.open(cache).tokens
    drawn = {}
    for token in (tokens[0], tokens[-1]):
        path = tmp_path / f"{token}.png"
        bevkd.well("cache", "show", cache, "--token", token, "--out", path, "--set", f"data.root={world}")
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert min(image.size) > 300
        drawn[token] = path.read_bytes()
    assert drawn[tokens[0]] != drawn[tokens[-1]]


# ---------------------------------------------------------------------------------------------- output and exit codes


def test_with_json_every_command_prints_one_document_and_nothing_else(
    bevkd: Bevkd, world: Path, teacher_recipe: Path, student_recipe: Path, cache_recipe: Path, tmp_path: Path
) -> None:
    where = ("--set", f"data.root={world}")
    commands = (
        ("world", "--preset", "tiny", "--out", world),
        ("train-teacher", teacher_recipe, "--out", tmp_path / "teacher"),
        ("cache-teacher", cache_recipe, "--out", tmp_path / "cache"),
        ("cache", "info", tmp_path / "cache"),
        ("cache", "verify", tmp_path / "cache"),
        ("evaluate", "--cache", tmp_path / "cache", *where),
        ("evaluate", "--run", tmp_path / "teacher"),
        ("train-student", student_recipe, "--out", tmp_path / "student"),
        ("doctor",),
    )
    for command in commands:
        outcome = bevkd(*command, "--json")
        assert outcome.json, command
        assert outcome.err == "", command


def test_a_success_exits_with_0(bevkd: Bevkd) -> None:
    assert bevkd("--help").code == 0


def test_an_error_exits_with_1_and_leaves_stdout_empty(bevkd: Bevkd, tmp_path: Path) -> None:
    outcome = bevkd("cache", "info", tmp_path, "--json")
    assert (outcome.code, outcome.out) == (1, "")


@pytest.mark.parametrize(
    "arguments",
    [
        ("train",),
        ("train-student",),
        ("evaluate",),
        ("evaluate", "--cache", "a", "--run", "b"),
        ("cache-teacher", "demo_cache"),
        ("cache-teacher", "demo_cache", "--out", "x", "--limit", "0"),
        ("train-student", "demo_student", "--out", "x", "--cache", "no-name"),
    ],
    ids=" ".join,
)
def test_a_wrong_usage_exits_with_2(bevkd: Bevkd, arguments: tuple[str, ...]) -> None:
    outcome = bevkd(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert "Usage: bevkd" in outcome.err


def test_debug_shows_where_an_error_comes_from(bevkd: Bevkd, tmp_path: Path) -> None:
    outcome = bevkd.fresh("cache", "info", tmp_path, "--debug")
    assert outcome.code == 1
    assert "Traceback" in outcome.err
    assert "CacheError" in outcome.err
