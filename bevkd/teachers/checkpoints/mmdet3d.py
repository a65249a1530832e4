"""Checkpoints of mmdetection3d, before and after 1.0: CenterPoint, SECOND and PointPillars."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from bevkd.errors import CheckpointError
from bevkd.models.detector import Detector
from bevkd.models.encoders.pillar import PillarEncoder
from bevkd.models.encoders.voxel import VoxelEncoder
from bevkd.teachers.checkpoints._file import PublicFile
from bevkd.teachers.checkpoints._layers import NEW_BOXES, OLD_BOXES, Layout, Names, layout_of

NAME = "mmdetection3d"


@dataclass(frozen=True)
class Prefixes:
    """Where the parts of a detector stand, ``pts_middle_encoder`` and so on, and their kind of 1x1 up-sampling."""

    sparse: str
    pillar: str
    backbone: str
    neck: str
    head: str
    at_stride_1: Literal["conv", "transposed"] = "conv"


_MULTI_MODAL = Prefixes("pts_middle_encoder", "pts_voxel_encoder", "pts_backbone", "pts_neck", "pts_bbox_head")
_SINGLE = Prefixes("middle_encoder", "voxel_encoder", "backbone", "neck", "bbox_head", "transposed")


def recognises(file: PublicFile) -> bool:
    """Return whether a file has mmdetection3d's names."""
    return any(
        name.startswith(tuple(f"{at.backbone}.blocks." for at in (_MULTI_MODAL, _SINGLE))) for name in file.tensors
    )


def layout(detector: Detector, file: PublicFile, version: str | None) -> Layout:
    """Return the detector's layers beside mmdetection3d's.

    Args:
        version: ``0.x`` or ``1.x``; None asks the file.

    Raises:
        CheckpointError: the version is unknown, or the file's head cannot be converted.
    """
    multi_modal = any(name.startswith(_MULTI_MODAL.head) for name in file.tensors)
    old = _version(file, version) == "0.x"
    means = OLD_BOXES if old else NEW_BOXES
    if detector.config.head.name == "anchor":
        _check_anchor(file, detector, old)
    if not multi_modal and isinstance(detector.encoder, PillarEncoder):
        means = replace(means, points=legacy_points(detector.encoder))
    return layout_of(detector, names(detector, _MULTI_MODAL if multi_modal else _SINGLE), means)


def names(detector: Detector, at: Prefixes) -> Names:
    """Return the names of mmdetection3d and its descendants for the parts of ``detector``."""
    layer = f"{at.sparse}.encoder_layers.encoder_layer"
    plain = isinstance(detector.encoder, VoxelEncoder) and detector.encoder.config.kind == "plain"
    blocks = detector.encoder.config.blocks if isinstance(detector.encoder, VoxelEncoder) else 0

    def down(stage: int) -> tuple[str, str]:
        # Residual stages end with the strided convolution that leads to the next one.
        theirs = f"{layer}{stage + 1}.0" if plain else f"{layer}{stage}.{blocks}"
        return f"{theirs}.0", f"{theirs}.1"

    def branch(task: int, name: str) -> tuple[str, str, str]:
        theirs = f"{at.head}.task_heads.{task}.{name}"
        return f"{theirs}.0.conv", f"{theirs}.0.bn", f"{theirs}.1"

    return Names(
        conv_input=(f"{at.sparse}.conv_input.0", f"{at.sparse}.conv_input.1"),
        conv_out=(f"{at.sparse}.conv_out.0", f"{at.sparse}.conv_out.1"),
        down=down,
        block=lambda stage, index: f"{layer}{stage + 1}.{index + (min(stage, 1) if plain else 0)}",
        pillar=f"{at.pillar}.pfn_layers",
        blocks=f"{at.backbone}.blocks",
        deblocks=f"{at.neck}.deblocks",
        first_conv=0,
        at_stride_1=at.at_stride_1,
        shared=(f"{at.head}.shared_conv.conv", f"{at.head}.shared_conv.bn"),
        branch=branch,
        branches={name: name for name in ("reg", "height", "dim", "rot", "vel", "heatmap")},
        anchor=(f"{at.head}.conv_cls", f"{at.head}.conv_reg", f"{at.head}.conv_dir_cls"),
    )


def legacy_points(encoder: PillarEncoder) -> Tensor:
    """Return the inputs of mmdetection3d's ``legacy`` pillar network from ours.

    It writes the offsets from the pillar's centre over the coordinates that they were computed from.
    """
    offsets, points = encoder.config.center_offsets, encoder.config.point_features
    inputs = torch.eye(points + 3 + offsets)
    for axis in range(offsets):
        inputs[axis, axis], inputs[axis, points + 3 + axis] = 0, 1
    return inputs


def _version(file: PublicFile, version: str | None) -> str:
    stated = str(file.meta.get("mmdet3d_version") or "")
    found = "0.x" if stated.startswith("0.") else "1.x" if stated else None
    if version is None and found is None:
        raise CheckpointError(
            f"{file.path} does not say which version of mmdetection3d wrote it, and 1.0 changed what sizes and yaw "
            "mean. Set teacher.checkpoint_version: 1.x (files of the model zoo's v1.0.0_models), or 0.x for older ones."
        )
    return version or str(found)


def _check_anchor(file: PublicFile, detector: Detector, old: bool) -> None:
    if old:
        raise CheckpointError(
            f"{file.path} is an anchor detector of mmdetection3d before 1.0, whose anchors and direction classes are "
            "turned by a quarter. Take the file of the same model from the model zoo's v1.0.0_models."
        )
    # Its public configs leave the offset at mmdetection3d's default.
    if abs(detector.config.head.direction_offset_rad + math.pi / 2) > 0.01:
        raise CheckpointError(
            f"{file.path}: mmdetection3d counts directions from -pi / 2. Set "
            "teacher.detector.head.direction_offset_rad: -1.5708; otherwise half of the boxes face backwards."
        )
    classes = file.meta.get("CLASSES") or file.meta.get("classes")
    if classes and tuple(classes) != detector.classes:
        raise CheckpointError(
            f"{file.path} has the classes {', '.join(classes)} in this order, the recipe has "
            f"{', '.join(detector.classes)}. Set data.classes: [{', '.join(classes)}]."
        )
