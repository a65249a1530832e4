"""Damaged tables and files, wrong names and selections: each is told apart, named, and told how to fix."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from bevkd.data.images import ImageView
from bevkd.data.sources.nuscenes import Config, NuScenesSource, build
from bevkd.errors import DataError
from bevkd.world import TRAIN_SPLIT, VAL_SPLIT, VERSION_FOLDER, world_preset, write_world

LIDAR, CAMERA = frozenset({"lidar"}), frozenset({"camera"})
Open = Callable[..., NuScenesSource]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    config = world_preset("tiny", scenes_train=3, image_height=32, image_width=64, lidar_azimuths=36)
    write_world(config, folder)
    return folder


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    """Return a copy of the data set that a test may damage."""
    return Path(shutil.copytree(pristine, tmp_path / "data"))


@pytest.fixture
def open_source(root: Path, tmp_path: Path) -> Open:
    def open_it(**options: Any) -> NuScenesSource:
        sensors = options.pop("sensors", frozenset())
        values = {"root": root, "version": VERSION_FOLDER, "split": TRAIN_SPLIT, "index_dir": tmp_path / "index"}
        return build(Config(**{**values, **options}), sensors)

    return open_it


def edit(root: Path, table: str, change: Callable[[list[dict[str, Any]]], object]) -> None:
    path = root / VERSION_FOLDER / f"{table}.json"
    records = json.loads(path.read_text())
    change(records)
    path.write_text(json.dumps(records))


def test_all_damaged_tables_are_reported_at_once(root: Path, open_source: Open) -> None:
    (root / VERSION_FOLDER / "category.json").unlink()
    (root / VERSION_FOLDER / "instance.json").unlink()
    with pytest.raises(DataError) as caught:
        open_source()
    assert "category.json: missing" in str(caught.value)
    assert "instance.json: missing" in str(caught.value)


def test_fields_and_links_that_do_not_fit_are_reported_together(root: Path, open_source: Open) -> None:
    (root / VERSION_FOLDER / "attribute.json").write_text("[{")
    edit(root, "scene", lambda records: records[1].pop("name"))
    edit(root, "ego_pose", lambda records: records[3].update(rotation=[0, 0, 0, 0]))
    edit(root, "sample_annotation", lambda records: records[2].update(instance_token="nobody"))
    edit(root, "sample_data", lambda records: [record.update(prev="gone") for record in records[:4]])
    with pytest.raises(DataError) as caught:
        open_source()
    text = str(caught.value)
    for fault in (
        "attribute.json: is not a JSON list of records",
        "scene.json: record 1 has no 'name'",
        "ego_pose.json: 'rotation' of record 3 is not a quaternion (four finite numbers, not all zero), it is [0,",
        "sample_annotation.json: 1 'instance_token' name no record of instance.json, first is 'nobody'",
        "sample_data.json: 4 'prev' name no record of sample_data.json, first is 'gone'",
        "To fix:",
    ):
        assert fault in text


def test_a_sample_without_its_lidar_is_refused(root: Path, open_source: Open) -> None:
    def drop(records: list[dict[str, Any]]) -> None:
        gone = next(record for record in records if record["is_key_frame"] and "LIDAR_TOP" in record["filename"])
        gone["is_key_frame"] = False

    edit(root, "sample_data", drop)
    with pytest.raises(DataError, match="1 of 8 samples have no LIDAR_TOP key frame"):
        open_source()


def test_missing_and_truncated_files_are_reported_at_once(root: Path, open_source: Open) -> None:
    source = open_source(sweeps=1)
    first, second = source.tokens[:2]
    rows = [source.index.row(token) for token in (first, second)]
    lidar = [root / source.index.file(int(source.index["frame_reading"][row, 0])) for row in rows]
    column = next(column for column, name in source.index.channels("camera") if name == "CAM_FRONT")
    image = root / source.index.file(int(source.index["frame_reading"][rows[1], column]))
    lidar[0].unlink()
    lidar[1].write_bytes(lidar[1].read_bytes()[:-7])
    image.write_bytes(image.read_bytes()[:-300])
    faults = source.check([first, second], LIDAR | CAMERA)
    assert len(faults) == 3
    for path, words in ((lidar[0], "missing"), (lidar[1], "truncated"), (image, "truncated")):
        assert any(fault.startswith(str(path)) and words in fault for fault in faults)
    assert source.check(source.tokens[2:], LIDAR | CAMERA) == []
    with pytest.raises(DataError, match="truncated"):
        source.load(second, LIDAR)
    with pytest.raises(DataError, match=r"\.jpg cannot be decoded"):
        source.load(second, CAMERA, {"CAM_FRONT": ImageView(32, 64, 1.0)})
    assert open_source(sweeps=1, skip_missing=True, sensors=LIDAR).tokens == source.tokens[2:]


def test_a_damaged_radar_file_is_a_fault(root: Path, open_source: Open) -> None:
    source = open_source(radar_sweeps=1)
    column, _ = source.index.channels("radar")[0]
    path = root / source.index.file(int(source.index["frame_reading"][source.index.row(source.tokens[0]), column]))
    path.write_bytes(path.read_bytes()[:-200])
    (fault,) = source.check(source.tokens, frozenset({"radar"}))
    assert fault.startswith(str(path))
    assert "truncated" in fault
    with pytest.raises(DataError, match="is no whole radar file: truncated"):
        source.load(source.tokens[0], frozenset({"radar"}))


def test_returns_from_the_car_itself_are_left_out(root: Path, open_source: Open) -> None:
    source = open_source(sweeps=1)
    token = source.tokens[0]
    path = root / source.index.file(int(source.index["frame_reading"][source.index.row(token), 0]))
    rows = [[0.5, -0.9, 0, 200, 1], [0.5, 3, 1, 255, 2], [-4, 0.1, -1, 7, 3]]
    np.array(rows, dtype=np.float32).tofile(path)
    points = source.load(token, LIDAR).points
    assert points is not None
    torch.testing.assert_close(points, torch.tensor([[0.5, 3, 1, 255, 0], [-4, 0.1, -1, 7, 0]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": "v2"}, f"no version 'v2'. Set version to one of: {VERSION_FOLDER}"),
        ({"root": "nowhere"}, "no such data set folder: nowhere"),
        ({"split": "vla"}, "unknown split 'vla'. Splits with scenes"),
        ({"split": "mini_val"}, "split 'mini_val' has no scene"),
        ({"scenes": ["scene-9"]}, "scenes scene-9 are not in split 'world_train'"),
        ({"scenes": []}, "no key frame is left"),
        ({"tokens": ["x", "x"]}, "'x' is in no record of sample.json"),
        ({"labels": ["scene-9"]}, "'labels' names scenes scene-9; the frames are of scenes scene-0000"),
        ({"labels": "no/such/file"}, "no/such/file, which cannot be read"),
    ],
)
def test_unknown_names_are_told_with_those_that_exist(open_source: Open, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        open_source(**options)
    assert message in str(caught.value)


def test_an_official_split_of_another_version_is_refused(root: Path, open_source: Open) -> None:
    (root / VERSION_FOLDER).rename(root / "v1.0-mini")
    with pytest.raises(DataError, match=r"split 'val' belongs to version v1\.0-trainval, version is v1\.0-mini"):
        open_source(version="v1.0-mini", split="val")


def test_a_token_of_another_split_is_told_with_its_scene(open_source: Open) -> None:
    token = open_source(split=VAL_SPLIT).tokens[0]
    with pytest.raises(DataError, match=f"'{token}' belongs to scene-0003, which split '{TRAIN_SPLIT}'"):
        open_source(tokens=[token])


def test_scenes_and_tokens_narrow_the_split(open_source: Open) -> None:
    everything = open_source()
    assert len(everything.tokens) == 6
    assert open_source(scenes=["scene-0001"]).tokens == everything.tokens[2:4]
    narrowed = open_source(tokens=[everything.tokens[4], everything.tokens[1]])
    assert narrowed.tokens == (everything.tokens[1], everything.tokens[4])
    assert narrowed.identity.frames == 2
    assert narrowed.identity.annotation_digest == everything.identity.annotation_digest


def test_a_fraction_labels_whole_scenes_and_more_of_them_include_fewer(open_source: Open) -> None:
    chosen = [open_source(labels=fraction).labelled for fraction in (0.01, 0.34, 1.0)]
    assert [len(tokens) for tokens in chosen] == [2, 4, 6]
    assert chosen[0] < chosen[1] < chosen[2]
    source = open_source(labels=0.01)
    assert len({source.scene(token) for token in source.labelled}) == 1
    assert len({open_source(labels=0.01, labels_seed=seed).labelled for seed in range(8)}) > 1
    for token in source.tokens:
        assert (source.load(token, frozenset()).boxes is None) == (token not in source.labelled)
        assert source.annotations(token) is not None


def test_labels_may_be_scenes_or_a_file_of_tokens(open_source: Open, tmp_path: Path) -> None:
    tokens = open_source().tokens
    assert open_source(labels=["scene-0002"]).labelled == frozenset(tokens[4:])
    listed = tmp_path / "labels.txt"
    listed.write_text(f"{tokens[3]}\n\n{tokens[0]}\n")
    assert open_source(labels=str(listed)).labelled == {tokens[0], tokens[3]}
    listed.write_text("elsewhere\n")
    with pytest.raises(DataError, match=r"1 token\(s\) that are not among the 6 frames: elsewhere"):
        open_source(labels=listed)


def test_classes_and_min_points_choose_the_boxes(open_source: Open) -> None:
    everything, few = open_source(min_points=0), open_source(classes=["pedestrian", "car"], min_points=5)
    for token in everything.tokens:
        truth = everything.global_annotations(token)
        named = [name for name in truth.names if name]
        assert [everything.classes[label] for label in everything.annotations(token).labels] == named
        wanted = [name for name, n in zip(truth.names, truth.points, strict=True) if name in few.classes and n >= 5]
        assert [few.classes[label] for label in few.annotations(token).labels] == wanted


@pytest.mark.parametrize(
    "options",
    [{"labels": -0.1}, {"labels": 1.5}, {"labels": True}, {"classes": ["tram"]}, {"classes": []}, {"sweeps": 11}],
)
def test_a_config_out_of_range_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Config(root=Path("data"), **options)


def test_a_camera_that_does_not_exist_is_named(open_source: Open) -> None:
    source = open_source()
    with pytest.raises(DataError, match="no camera CAM_TOP; the data set has CAM_FRONT_LEFT, CAM_FRONT"):
        source.load(source.tokens[0], CAMERA, {"CAM_TOP": ImageView(8, 8, 1.0)})
    with pytest.raises(DataError, match="sample token 'nobody' is not in"):
        source.load("nobody", LIDAR)


def test_edited_tables_get_a_new_index_and_copies_share_one(root: Path, open_source: Open, tmp_path: Path) -> None:
    before = open_source()
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    assert open_source(root=copy).index.folder == before.index.folder
    edit(root, "sample_annotation", lambda records: records[0].update(num_lidar_pts=12345))
    after = open_source()
    assert after.index.folder != before.index.folder
    assert after.identity.annotation_digest != before.identity.annotation_digest


def test_a_damaged_index_is_built_again(open_source: Open) -> None:
    source = open_source()
    (source.index.folder / "box_lidar.npy").unlink()
    again = open_source()
    assert torch.equal(again.annotations(again.tokens[0]).labels, source.annotations(source.tokens[0]).labels)


@pytest.mark.skipif(os.name != "posix", reason="XDG folders are a POSIX convention")
def test_the_index_lies_in_the_users_cache_and_never_in_the_data_set(
    open_source: Open, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = sorted(root.rglob("*"))
    assert open_source(index_dir=None).index.folder.is_relative_to(tmp_path / "cache" / "bevkd")
    assert sorted(root.rglob("*")) == before


def test_an_index_folder_that_cannot_be_written_is_named(open_source: Open, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="Set index_dir to a folder that can be written"):
        open_source(index_dir=tmp_path / "file" / "index")
