"""Checkpoints of OpenPCDet: CenterPoint (voxel and pillar), SECOND and PointPillars."""

from __future__ import annotations

import torch

from bevkd.models.detector import Detector
from bevkd.teachers.checkpoints._file import PublicFile
from bevkd.teachers.checkpoints._layers import Conventions, Layout, Names, layout_of

NAME = "OpenPCDet"

_NAMES = Names(
    conv_input=("backbone_3d.conv_input.0", "backbone_3d.conv_input.1"),
    conv_out=("backbone_3d.conv_out.0", "backbone_3d.conv_out.1"),
    down=lambda stage: (f"backbone_3d.conv{stage + 1}.0.0", f"backbone_3d.conv{stage + 1}.0.1"),
    block=lambda stage, index: f"backbone_3d.conv{stage + 1}.{index + min(stage, 1)}",
    pillar="vfe.pfn_layers",
    blocks="backbone_2d.blocks",
    deblocks="backbone_2d.deblocks",
    first_conv=1,  # a padding layer comes first
    at_stride_1="transposed",
    shared=("dense_head.shared_conv.0", "dense_head.shared_conv.1"),
    branch=lambda task, name: (
        f"dense_head.heads_list.{task}.{name}.0.0",
        f"dense_head.heads_list.{task}.{name}.0.1",
        f"dense_head.heads_list.{task}.{name}.1",
    ),
    branches={"reg": "center", "height": "center_z", "dim": "dim", "rot": "rot", "vel": "vel", "heatmap": "hm"},
    anchor=("dense_head.conv_cls", "dense_head.conv_box", "dense_head.conv_dir_cls"),
    bookkeeping=("global_step",),
)
# (cos, sin); everything else means what it means here.
_MEANS = Conventions(rot=torch.tensor([[0.0, 1.0], [1.0, 0.0]]))


def recognises(file: PublicFile) -> bool:
    """Return whether a file has OpenPCDet's names."""
    return any(name.startswith(("backbone_2d.", "dense_head.")) for name in file.tensors)


def layout(detector: Detector, file: PublicFile, version: str | None) -> Layout:  # noqa: ARG001
    """Return the detector's layers beside OpenPCDet's."""
    return layout_of(detector, _NAMES, _MEANS)
