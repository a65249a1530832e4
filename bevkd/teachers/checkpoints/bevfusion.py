"""Checkpoints of MIT's BEVFusion: its LiDAR branch with a center head."""

from __future__ import annotations

from dataclasses import replace

from bevkd.errors import CheckpointError
from bevkd.models.detector import Detector
from bevkd.models.encoders.voxel import VoxelEncoder
from bevkd.teachers.checkpoints import mmdet3d
from bevkd.teachers.checkpoints._file import PublicFile
from bevkd.teachers.checkpoints._layers import OLD_BOXES, Layout, layout_of

NAME = "BEVFusion (MIT)"

_AT = mmdet3d.Prefixes("encoders.lidar.backbone", "", "decoder.backbone", "decoder.neck", "heads.object")


def recognises(file: PublicFile) -> bool:
    """Return whether a file has BEVFusion's names."""
    return any(name.startswith(("encoders.", "heads.object.")) for name in file.tensors)


def layout(detector: Detector, file: PublicFile, version: str | None) -> Layout:  # noqa: ARG001
    """Return the detector's layers beside BEVFusion's.

    Raises:
        CheckpointError: the file is of another kind than LiDAR voxels with a center head.
    """
    faults = []
    if any(name.startswith("encoders.camera.") for name in file.tensors):
        faults.append("reads cameras too")
    if any(name.startswith(("heads.object.heatmap_head", "heads.object.class_encoding")) for name in file.tensors):
        faults.append("has a TransFusion head, which bevkd does not have")
    if not isinstance(detector.encoder, VoxelEncoder):
        faults.append(f"is to be loaded into the encoder '{detector.config.encoder.name}', not 'voxel'")
    if faults:
        raise CheckpointError(
            f"{file.path} is a BEVFusion checkpoint that {' and '.join(faults)}. Only its LiDAR voxel detector with a "
            "CenterHead loads; let other models write their boxes to a file (how-to: write your own teacher)."
        )
    return layout_of(detector, mmdet3d.names(detector, _AT), replace(OLD_BOXES, x_major=True))
