"""Checkpoints of CenterPoint's own repository (det3d): voxel and pillar."""

from __future__ import annotations

from bevkd.models.detector import Detector
from bevkd.teachers.checkpoints._file import PublicFile
from bevkd.teachers.checkpoints._layers import OLD_BOXES, Layout, Names, layout_of

NAME = "CenterPoint (det3d)"

_NAMES = Names(
    conv_input=("backbone.conv_input.0", "backbone.conv_input.1"),
    conv_out=("backbone.extra_conv.0", "backbone.extra_conv.1"),
    down=lambda stage: (f"backbone.conv{stage + 1}.0", f"backbone.conv{stage + 1}.1"),
    # From the second stage on, convolution, norm and ReLU come first.
    block=lambda stage, index: f"backbone.conv{stage + 1}.{index + (3 if stage else 0)}",
    pillar="reader.pfn_layers",
    blocks="neck.blocks",
    deblocks="neck.deblocks",
    first_conv=1,  # a padding layer comes first
    at_stride_1="conv",
    shared=("bbox_head.shared_conv.0", "bbox_head.shared_conv.1"),
    branch=lambda task, name: (
        f"bbox_head.tasks.{task}.{name}.0",
        f"bbox_head.tasks.{task}.{name}.1",
        f"bbox_head.tasks.{task}.{name}.3",
    ),
    branches={"reg": "reg", "height": "height", "dim": "dim", "rot": "rot", "vel": "vel", "heatmap": "hm"},
)


def recognises(file: PublicFile) -> bool:
    """Return whether a file has det3d's names."""
    return any(name.startswith(("neck.blocks.", "bbox_head.tasks.")) for name in file.tensors)


def layout(detector: Detector, file: PublicFile, version: str | None) -> Layout:  # noqa: ARG001
    """Return the detector's layers beside det3d's."""
    return layout_of(detector, _NAMES, OLD_BOXES)
