"""Checkpoints are either complete or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bevkd.errors import CheckpointError
from bevkd.training.checkpoint import Checkpoints, Snapshot, write_atomic


def snapshot(value: float) -> Snapshot:
    weights = {"w": torch.full((3,), value)}
    state = {"weights": weights, "optimizer": {"lr": 0.1, "steps": [1, 2]}, "note": "x"}
    return Snapshot(weights, {"made": "here"}, state, {"recipe": {"data": "x"}})


def test_the_newest_checkpoint_is_loaded(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=5)
    for step in (2, 10, 4):
        checkpoints.save(step, snapshot(float(step)))
    found = checkpoints.load_latest()
    assert found is not None
    step, loaded = found
    assert step == 10
    assert loaded["weights"]["w"].tolist() == [10.0] * 3
    assert loaded["optimizer"] == {"lr": 0.1, "steps": [1, 2]}


def test_no_folder_is_no_checkpoint(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "nowhere", keep=1).load_latest() is None


def test_only_the_newest_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in range(1, 6):
        checkpoints.save(step, snapshot(0.0))
    assert checkpoints.steps() == [4, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000004", "step_00000005"]


def test_a_half_written_folder_is_ignored_and_cleared_away(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(3, snapshot(3.0))
    half = tmp_path / ".step_00000004.99.tmp"
    half.mkdir()
    (half / "state.pt").write_bytes(b"half")
    found = checkpoints.load_latest()
    assert found is not None
    assert found[0] == 3
    checkpoints.clear()
    assert not half.exists()
    assert checkpoints.steps() == [3]


def test_the_best_stays_however_old_it_is_and_is_not_where_a_run_goes_on(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, snapshot(1.0), best=True)
    checkpoints.save(2, snapshot(2.0), best=True)
    for step in (3, 4):
        checkpoints.save(step, snapshot(float(step)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "step_00000004"]
    assert load_file(tmp_path / "best" / "model.safetensors")["w"].tolist() == [2.0] * 3
    found = checkpoints.load_latest()
    assert found is not None
    assert found[0] == 4


def test_a_checkpoint_says_of_itself_what_it_is(tmp_path: Path) -> None:
    folder = Checkpoints(tmp_path, keep=1).save(3, snapshot(3.0))
    assert json.loads((folder / "checkpoint.json").read_text()) == {"step": 3, "recipe": {"data": "x"}}
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"made": "here"}


def test_a_crash_while_writing_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, snapshot(1.0))

    def crash(*_: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", crash)
        with pytest.raises(OSError, match="no space"):
            checkpoints.save(2, snapshot(2.0))
    assert checkpoints.steps() == [1]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, snapshot(1.0))
    checkpoints.save(1, snapshot(5.0))
    found = checkpoints.load_latest()
    assert found is not None
    assert found[1]["weights"]["w"].tolist() == [5.0] * 3


@pytest.mark.parametrize("damage", [b"", b"garbage", None], ids=["empty", "garbage", "truncated"])
def test_a_damaged_checkpoint_is_named_with_the_way_out(tmp_path: Path, damage: bytes | None) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    path = checkpoints.save(7, snapshot(1.0)) / "state.pt"
    path.write_bytes(path.read_bytes()[:300] if damage is None else damage)
    with pytest.raises(CheckpointError, match=r"step_00000007.*Delete its folder"):
        checkpoints.load_latest()


def test_a_checkpoint_never_executes_code(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    path = checkpoints.save(1, snapshot(1.0)) / "state.pt"
    torch.save({"weights": Path("executed")}, path)
    with pytest.raises(CheckpointError):
        checkpoints.load_latest()


def test_an_atomic_write_replaces_the_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, b"1")
    write_atomic(path, b"22")
    assert path.read_bytes() == b"22"
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]
