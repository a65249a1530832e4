"""Several data sets put together as one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bevkd.config import parse
from bevkd.data.source import Sensor
from bevkd.data.sources import nuscenes
from bevkd.data.sources.concat import ConcatSource, Config, build
from bevkd.errors import ConfigError, ContractError, DataError
from bevkd.evaluation.score import evaluate, metrics_of
from bevkd.types import Boxes
from bevkd.world import VERSION_FOLDER, world_preset, write_world

DRIVE = "v1.0-drive"
LIDAR: frozenset[Sensor] = frozenset({"lidar"})
Part = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the world ``town`` and the world ``drive``, which nobody annotated."""
    folder = tmp_path_factory.mktemp("worlds")
    for seed, name in enumerate(("town", "drive")):
        small = {"scenes_train": 2 - seed, "image_height": 32, "image_width": 64, "lidar_azimuths": 36}
        write_world(world_preset("tiny", seed=seed, sweeps_per_keyframe=0, **small), folder / name)
    tables = folder / "drive" / VERSION_FOLDER
    for name in ("sample_annotation", "instance"):
        (tables / f"{name}.json").write_text("[]")
    tables.rename(tables.with_name(DRIVE))
    return folder


@pytest.fixture(scope="module")
def part(worlds: Path, tmp_path_factory: pytest.TempPathFactory) -> Part:
    """Return the config of a source, by default of the town's frames for training."""
    index_dir = str(tmp_path_factory.mktemp("index"))

    def config(root: str = "town", split: str = "world_train", **options: Any) -> dict[str, Any]:
        version = DRIVE if root == "drive" else VERSION_FOLDER
        values = {"name": "nuscenes", "root": str(worlds / root), "version": version, "split": split, "sweeps": 1}
        return {**values, "index_dir": index_dir, **options}

    return config


def together(*parts: dict[str, Any], sensors: frozenset[Sensor] = frozenset(), **options: Any) -> ConcatSource:
    return build(parse(Config, {"name": "concat", "sources": list(parts), **options}, "a recipe"), sensors)


def alone(part: dict[str, Any]) -> nuscenes.NuScenesSource:
    return nuscenes.build(nuscenes.Config(**part))


def test_the_frames_of_all_sources_follow_each_other(part: Part) -> None:
    town, drive = part(labels=0.5), part("drive")
    source, first, second = together(town, drive), alone(town), alone(drive)
    assert source.tokens == (*first.tokens, *second.tokens)
    assert source.annotated == frozenset(first.tokens)
    assert source.labelled == first.labelled
    assert (len(source.tokens), len(source.labelled)) == (6, 2)
    assert source.classes == first.classes
    assert source.identity.frames == 6


def test_each_frame_is_loaded_by_its_own_source(part: Part) -> None:
    source = together(part(), part("drive"))
    for own in (alone(part()), alone(part("drive"))):
        token = own.tokens[0]
        ours, theirs = source.load(token, LIDAR), own.load(token, LIDAR)
        assert ours.points is not None
        assert theirs.points is not None
        assert torch.equal(ours.points, theirs.points)
        assert (ours.boxes is None) == (theirs.boxes is None) == (own.annotated == frozenset())
        assert torch.equal(source.annotations(token).values, own.annotations(token).values)
        assert torch.equal(source.global_from_lidar(token), own.global_from_lidar(token))
        assert source.image_sizes(token) == own.image_sizes(token)
    with pytest.raises(DataError, match=r"frame 'nobody' is in none of the 2 sources .*\(world_train\+world_train\)"):
        source.load("nobody", LIDAR)


def test_missing_files_of_all_sources_are_reported_together(part: Part, worlds: Path, tmp_path: Path) -> None:
    copies = []
    for name in ("town", "drive"):
        copies.append(Path(shutil.copytree(worlds / name, tmp_path / name, copy_function=os.link)))
        sorted((copies[-1] / "samples" / "LIDAR_TOP").iterdir())[0].unlink()
    parts = [{**part(copy.name), "root": str(copy)} for copy in copies]
    source = together(*parts)
    faults = source.check(source.tokens[::-1], LIDAR)
    assert [fault.startswith(str(copy)) for fault, copy in zip(faults, copies, strict=True)] == [True, True]
    left = together(*({**each, "skip_missing": True} for each in parts), sensors=LIDAR)
    assert len(left.tokens) == 4
    assert left.notes == tuple(
        f"1 of {frames} frames of world_train left out: sensor files missing or damaged" for frames in (4, 2)
    )


# ---------------------------------------------------------------------------------------------- what a cache records


def test_the_same_parts_are_the_same_data_set_in_any_order(part: Part) -> None:
    one, other = together(part(), part("drive")).identity, together(part("drive"), part(labels=0.5)).identity
    assert (one.name, one.version) == (other.name, other.version) == ("nuscenes", f"{DRIVE}+{VERSION_FOLDER}")
    assert one.annotation_digest == other.annotation_digest
    assert one.annotation_digest not in {alone(each).identity.annotation_digest for each in (part(), part("drive"))}


def test_splits_of_one_data_set_are_still_that_data_set(part: Part) -> None:
    both, own = together(part(), part(split="world_val")).identity, alone(part()).identity
    assert both == own.model_copy(update={"split": "world_train+world_val", "frames": 6})


# ---------------------------------------------------------------------------------------------- what cannot be


def test_a_frame_of_two_sources_is_refused_by_name(part: Part) -> None:
    with pytest.raises(DataError) as caught:
        together(part("drive"), part(), part(scenes=["scene-0001"]))
    shared = alone(part(scenes=["scene-0001"])).tokens
    assert f"sources.1 (world_train) and sources.2 (world_train) have 2 frames in common: {', '.join(shared)}" in str(
        caught.value
    )


def test_sources_of_other_classes_are_refused(part: Part) -> None:
    with pytest.raises(ConfigError, match=r"sources.0 has car, truck; sources.1 has truck, car"):
        together(part(classes=["car", "truck"]), part("drive", classes=["truck", "car"]))
    with pytest.raises(ConfigError, match=r"sources.0 has car; classes has car, truck"):
        together(part(classes=["car"]), classes=["car", "truck"])


def test_the_classes_of_all_sources_stand_in_the_config(part: Part) -> None:
    values = {"name": "concat", "sources": [part(classes=["car", "bus"])]}
    config = parse(Config, values, "a recipe")
    assert config.classes == ("car", "bus")
    assert parse(Config, json.loads(config.model_dump_json()), "the same") == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sources": []}, "sources: Tuple should have at least 1 item"),
        ({"sources": [{"name": "concat", "sources": []}]}, "sources"),
        ({"sources": [{"name": "nuscenes"}]}, "root"),
        ({"sources": [{"root": "data"}]}, "needs 'name', one of: concat, kitti, nuscenes"),
    ],
)
def test_a_config_that_is_none_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Config, {"name": "concat", **values}, "a recipe")
    assert message in str(caught.value)


def test_a_concat_within_another_is_refused(part: Part) -> None:
    with pytest.raises(ConfigError, match="cannot be another 'concat'"):
        together({"name": "concat", "sources": [part()]})


def test_sources_with_other_numbers_of_cameras_are_refused_before_they_meet_in_a_batch(
    part: Part, worlds: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(worlds / "drive", tmp_path / "drive", copy_function=os.link))
    path = copy / DRIVE / "sample_data.json"
    kept = [each for each in json.loads(path.read_bytes()) if "CAM_BACK/" not in each["filename"]]
    path.unlink()
    path.write_text(json.dumps(kept))
    parts = part(), {**part("drive"), "root": str(copy)}
    with pytest.raises(DataError, match=r"sources.0 \(world_train\) has 6, sources.1 \(world_train\) has 5"):
        together(*parts, sensors=frozenset({"camera"}))
    assert len(together(*parts, sensors=LIDAR).tokens) == 6


# ---------------------------------------------------------------------------------------------- metrics


def test_frames_of_one_source_are_scored_by_its_metrics(part: Part) -> None:
    source, own = together(part("drive"), part()), alone(part())
    found = {token: own.annotations(token) for token in own.tokens}
    found = {token: Boxes(each.values.nan_to_num(), each.labels, each.scores) for token, each in found.items()}
    report = evaluate(source, {**found, **dict.fromkeys(source.tokens[:2], Boxes.empty())})
    assert report.to_json() == evaluate(own, found).to_json()
    assert report.to_json()["frames"] == 4


def test_frames_of_several_sources_are_not_scored_together(part: Part) -> None:
    source = together(part(), part(split="world_val"))
    with pytest.raises(ContractError, match=r"of 2 data sets \(world_train, world_val\), and metrics are those of one"):
        evaluate(source, dict.fromkeys(source.tokens, Boxes.empty()))


def test_detections_are_written_and_read_for_one_data_set_only(part: Part) -> None:
    source = together(part(), part("drive"))
    assert source.metrics == "nuscenes"
    with pytest.raises(
        ContractError, match=r"put together of 2 sources \('concat'\).* one of world_train\+world_train"
    ):
        metrics_of(source)
