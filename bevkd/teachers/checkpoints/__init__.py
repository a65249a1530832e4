"""Public checkpoints: one adapter per layout, told by the names in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from bevkd.errors import CheckpointError
from bevkd.models.detector import Detector
from bevkd.teachers.checkpoints import bevfusion, centerpoint, mmdet3d, openpcdet
from bevkd.teachers.checkpoints._convert import Kernels, convert
from bevkd.teachers.checkpoints._file import read_public

__all__ = ["Kernels", "Version", "load_checkpoint"]

Version = Literal["0.x", "1.x"]

_ADAPTERS = (bevfusion, openpcdet, centerpoint, mmdet3d)


def load_checkpoint(
    path: Path, detector: Detector, version: Version | None = None, kernels: Kernels | None = None
) -> str:
    """Load the checkpoint of another framework into ``detector`` and return the name of its layout.

    Args:
        version: of the mmdetection3d that wrote the file, if it does not say.
        kernels: order of sparse kernels, if their shapes do not tell.

    Raises:
        CheckpointError: the file cannot be read without running code, has an unknown layout, or does not fit; names
            every tensor that is missing, left over or misshapen.
    """
    file = read_public(path)
    adapter = next((adapter for adapter in _ADAPTERS if adapter.recognises(file)), None)
    if adapter is None:
        shown = ", ".join(sorted(file.tensors)[:3])
        raise CheckpointError(
            f"{path} has no layout that bevkd knows ({', '.join(each.NAME for each in _ADAPTERS)}); it holds "
            f"{len(file.tensors)} tensors: {shown}, ... Use teacher.weights for bevkd's own safetensors."
        )
    detector.load_state_dict(convert(file, detector, adapter.layout(detector, file, version), kernels))
    name: str = adapter.NAME
    return name
