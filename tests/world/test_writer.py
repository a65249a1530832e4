"""Worlds are reproducible, resumable and never mixed."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bevkd.errors import WorldError
from bevkd.world import (
    TEST_SPLIT,
    TRAIN_SPLIT,
    VAL_SPLIT,
    VERSION_FOLDER,
    WorldConfig,
    world_preset,
    write_world,
)


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_the_bytes_do_not_depend_on_the_number_of_workers(world: Path, config: WorldConfig, tmp_path: Path) -> None:
    assert _digests(write_world(config, tmp_path / "two", workers=2)) == _digests(world)


def test_another_seed_gives_other_images_and_tokens(world: Path, tmp_path: Path) -> None:
    other = _digests(write_world(world_preset("tiny", seed=1, scenes=2), tmp_path / "other", workers=1))
    same = set(other.values()) & set(_digests(world).values())
    # Only the table of visibility levels has the official tokens "1" to "4".
    assert same == {other[f"{VERSION_FOLDER}/visibility.json"]}


def test_scenes_depend_on_their_index_alone(world: Path, tmp_path: Path) -> None:
    fewer = _digests(write_world(world_preset("tiny", scenes=2), tmp_path / "fewer", workers=1))
    first = {name: digest for name, digest in fewer.items() if "scene-0000" in name}
    assert first
    assert first.items() <= _digests(world).items()


def test_writing_the_same_world_again_does_nothing(world: Path, config: WorldConfig) -> None:
    before = {p: p.stat().st_mtime_ns for p in world.rglob("*")}
    calls: list[tuple[int, int]] = []
    assert write_world(config, world, progress=lambda done, total: calls.append((done, total))) == world
    assert calls == []
    assert {p: p.stat().st_mtime_ns for p in world.rglob("*")} == before


def test_an_interrupted_run_is_completed(world: Path, config: WorldConfig, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt(f"{done} of {total}")

    with pytest.raises(KeyboardInterrupt):
        write_world(config, tmp_path / "w", workers=1, progress=stop)
    assert not (tmp_path / "w" / VERSION_FOLDER).exists()
    assert not (tmp_path / "w" / "world.json").exists()
    # A run that died while it wrote the tables leaves some of them behind.
    (tmp_path / "w" / f"{VERSION_FOLDER}.partial").mkdir()
    (tmp_path / "w" / f"{VERSION_FOLDER}.partial" / "old.json").write_text("[")
    calls: list[tuple[int, int]] = []
    write_world(config, tmp_path / "w", workers=1, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert _digests(tmp_path / "w") == _digests(world)


def test_another_world_is_not_overwritten(world: Path) -> None:
    before = _digests(world)
    with pytest.raises(WorldError, match=r"holds another world \(seed: 0, wanted 7\)"):
        write_world(world_preset("tiny", seed=7), world)
    assert _digests(world) == before


def test_a_foreign_folder_or_file_is_refused(config: WorldConfig, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(WorldError, match="not empty and holds no world"):
        write_world(config, tmp_path)
    with pytest.raises(WorldError, match="is a file"):
        write_world(config, tmp_path / "notes.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("nowhere", {}, "no world preset 'nowhere'"),
        ("tiny", {"scenes": 1}, "at least 2 scenes"),
        ("tiny", {"image_hight": 64}, "image_hight"),
        ("tiny", {"classes": {"tram": 1.0}}, "tram"),
        ("tiny", {"classes": {}}, "at least one class"),
        ("tiny", {"lidar_dropout": 1.5}, "lidar_dropout"),
    ],
)
def test_wrong_presets_are_refused_with_the_field(name: str, overrides: dict[str, object], message: str) -> None:
    with pytest.raises(WorldError, match=message):
        world_preset(name, **overrides)


def test_scenes_are_split_three_to_one() -> None:
    config = world_preset("demo", scenes=200)
    assert (config.scenes_train, config.scenes_val) == (150, 50)
    assert config == world_preset("demo")


def test_the_test_split_is_there_if_asked_for_and_shares_no_scene(tmp_path: Path) -> None:
    world = world_preset("tiny", scenes_test=1, keyframes_per_scene=1, image_height=32, image_width=64)
    write_world(world, tmp_path / "w")
    splits = json.loads((tmp_path / "w" / VERSION_FOLDER / "splits.json").read_text())
    assert {name: len(scenes) for name, scenes in splits.items()} == {TRAIN_SPLIT: 2, VAL_SPLIT: 1, TEST_SPLIT: 1}
    assert len({scene for scenes in splits.values() for scene in scenes}) == 4


def test_no_worker_is_refused(config: WorldConfig, tmp_path: Path) -> None:
    with pytest.raises(WorldError, match="workers=0"):
        write_world(config, tmp_path / "w", workers=0)


def test_the_world_imports_no_torch() -> None:
    code = "import sys, bevkd.world; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
