"""A public checkpoint that does not fit, or cannot be trusted, is refused by name and leaves the detector alone."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bevkd.errors import CheckpointError
from bevkd.teachers.checkpoints import load_checkpoint
from tests.teachers.checkpoint_kit import (
    PILLAR,
    SECOND,
    VOXEL,
    compare,
    detector_of,
    saved,
    scene,
    with_anchors,
)
from tests.teachers.public import Public, randomise


def test_anchor_detectors_of_old_mmdetection3d_are_refused(tmp_path: Path) -> None:
    path = saved(Public("mmdet3d", SECOND, prefix=""), tmp_path)
    with pytest.raises(CheckpointError, match=r"before 1\.0.*v1\.0\.0_models"):
        load_checkpoint(path, with_anchors(SECOND, -math.pi / 2), version="0.x")


def test_directions_that_begin_elsewhere_are_refused(tmp_path: Path) -> None:
    path = saved(Public("mmdet3d", SECOND, prefix=""), tmp_path)
    with pytest.raises(CheckpointError, match=r"direction_offset_rad: -1\.5708"):
        load_checkpoint(path, with_anchors(SECOND, 0.78539), version="1.x")


def test_classes_in_another_order_are_refused(tmp_path: Path) -> None:
    state = {
        "state_dict": Public("mmdet3d", SECOND, prefix="").state_dict(),
        "meta": {"CLASSES": ("car", "bus", "truck")},
    }
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"Set data\.classes: \[car, bus, truck\]"):
        load_checkpoint(tmp_path / "other.pth", with_anchors(SECOND, -math.pi / 2), version="1.x")


def faulty(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> str:
    """Return the message that refuses a changed checkpoint, and check that the detector stayed as it was."""
    state = dict(randomise(Public("openpcdet", VOXEL), 1).state_dict())
    change(state)
    torch.save({"model_state": state}, folder / "faulty.pth")
    detector = detector_of(VOXEL)
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder / "faulty.pth", detector)
    torch.testing.assert_close(dict(detector.state_dict()), before, atol=0, rtol=0)
    return str(caught.value)


def test_every_missing_extra_and_misshapen_tensor_is_named_at_once(tmp_path: Path) -> None:
    def change(state: dict[str, Tensor]) -> None:
        del state["backbone_2d.blocks.0.2.running_var"]
        del state["dense_head.heads_list.1.vel.1.bias"]
        state["backbone_3d.conv9.weight"] = torch.zeros(2, 2)
        state["backbone_2d.blocks.1.1.weight"] = torch.zeros(12, 6, 5, 5)
        state["backbone_3d.conv2.0.0.weight"] = torch.zeros(7, 3, 3, 3, 4)
        state["backbone_3d.conv1.0.conv1.bias"] = torch.zeros(9)

    message = faulty(tmp_path, change)
    assert "missing: backbone_2d.blocks.0.2.running_var" in message
    assert "missing: dense_head.heads_list.1.vel.1.bias" in message
    assert "not in the model: backbone_3d.conv9.weight [2, 2]" in message
    assert "shape of backbone_2d.blocks.1.1.weight: [12, 6, 5, 5]" in message
    assert "the model wants [12, 6, 3, 3]" in message
    assert "shape of backbone_3d.conv2.0.0.weight: [7, 3, 3, 3, 4]" in message
    assert "shape of backbone_3d.conv1.0.conv1.bias" in message


def test_a_pillar_network_with_another_number_of_inputs_says_where_to_set_it(tmp_path: Path) -> None:
    path = saved(randomise(Public("det3d", replace(PILLAR, offsets=2)), 1), tmp_path)
    with pytest.raises(CheckpointError, match=r"\[4, 10\].*\[4, 11\].*center_offsets"):
        load_checkpoint(path, detector_of(PILLAR))


class Executes:
    """What a malicious file would hold: unpickling it calls a function."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (os.mkdir, ("executed",))


def test_a_checkpoint_that_would_execute_code_is_refused_and_executes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model_state": Public("openpcdet", VOXEL).state_dict(), "hook": Executes()}, "bad.pth")
    with pytest.raises(CheckpointError, match=r"run code.*mkdir.*save the tensors alone"):
        load_checkpoint(tmp_path / "bad.pth", detector_of(VOXEL))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut off"])
def test_a_damaged_file_is_called_damaged(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bad\.pth (is damaged|holds more than tensors)"):
        load_checkpoint(tmp_path / "bad.pth", detector_of(VOXEL))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*none\.pth"):
        load_checkpoint(tmp_path / "none.pth", detector_of(VOXEL))


def test_a_file_without_weights_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_checkpoint(tmp_path / "empty.pth", detector_of(VOXEL))


def test_an_unknown_layout_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    torch.save({"state_dict": {"net.a": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"no layout that bevkd knows.*OpenPCDet.*1 tensors: net\.a"):
        load_checkpoint(tmp_path / "other.pth", detector_of(VOXEL))


def test_mmdetection3d_without_a_version_is_asked_for_it(tmp_path: Path) -> None:
    public = randomise(Public("mmdet3d", VOXEL), 1)
    path = saved(public, tmp_path)
    with pytest.raises(CheckpointError, match=r"teacher\.checkpoint_version"):
        load_checkpoint(path, detector_of(VOXEL))
    detector = detector_of(VOXEL)
    load_checkpoint(path, detector, version="0.x")
    compare(detector, public, "mmdet3d0", scene())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("extra", "reason"),
    [("encoders.camera.backbone.weight", "reads cameras"), ("heads.object.heatmap_head.0.weight", "TransFusion head")],
)
def test_other_models_of_bevfusion_are_refused_with_the_reason(extra: str, reason: str, tmp_path: Path) -> None:
    state = {**Public("bevfusion", VOXEL).state_dict(), extra: torch.zeros(1)}
    torch.save({"state_dict": state}, tmp_path / "fusion.pth")
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(tmp_path / "fusion.pth", detector_of(VOXEL))
