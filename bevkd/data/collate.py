"""Batches: samples side by side, in the form that encoders and losses take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.utils.data import default_collate

from bevkd.geometry.affine import BEVAffine
from bevkd.types import Boxes, Frame, LidarDepth, ViewInstances

StoredSignals = Mapping[str, Tensor]
"""Arrays of a cache as they are stored (still encoded), by array name."""


@dataclass(frozen=True)
class Sample:
    """One frame joined with what the caches hold of it.

    Attributes:
        frame: already augmented by ``affine``.
        affine: ``augmented_from_canonical`` of the BEV; cached maps are still canonical.
        stored: encoded arrays by cache name.
        left: ``augmented_from_stored`` of each cache: what is left of ``affine`` where arrays are of a variant.
        instances: of each cache that a loss reads them from, in pixels of the augmented views.
    """

    frame: Frame
    affine: BEVAffine
    stored: Mapping[str, StoredSignals]
    left: Mapping[str, BEVAffine] = field(default_factory=dict)
    instances: Mapping[str, ViewInstances] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """B frames.

    Attributes:
        boxes: annotations after augmentation; empty for frames without labels.
        labelled: which frames carry labels; a labelled frame may be empty.
        points: of all frames, x, y, z, intensity, time lag; ``point_frame`` says whose.
        images, intrinsics, bev_from_camera: per camera, after image and BEV augmentation; with the sensor
            ``previous_camera`` the cameras of the key frame before follow those of the frame.
        view_from_original: per camera, the image augmentation.
        radar: of all frames, see ``Frame.radar``; ``radar_frame`` says whose.
        lidar_depth: of each frame; in view pixels where images are augmented, else in original ones.
        affines: BEV augmentation of each frame.
        stored: encoded teacher arrays by cache name: canonical, or of a variant.
        left: of each frame by cache name: what of ``affines`` the stored arrays do not know.
        instances: of each frame by cache name, in pixels of the augmented views.
    """

    tokens: tuple[str, ...]
    boxes: tuple[Boxes, ...]
    labelled: Bool[Tensor, "B"]
    affines: tuple[BEVAffine, ...]
    points: Float[Tensor, "P 5"] | None = None
    point_frame: Int[Tensor, "P"] | None = None
    images: UInt8[Tensor, "B N 3 H W"] | None = None
    intrinsics: Float[Tensor, "B N 3 3"] | None = None
    bev_from_camera: Float[Tensor, "B N 4 4"] | None = None
    view_from_original: Float[Tensor, "B N 3 3"] | None = None
    radar: Float[Tensor, "R 7"] | None = None
    radar_frame: Int[Tensor, "R"] | None = None
    lidar_depth: tuple[LidarDepth, ...] | None = None
    stored: Mapping[str, StoredSignals] | None = None
    left: Mapping[str, tuple[BEVAffine, ...]] | None = None
    instances: Mapping[str, tuple[ViewInstances, ...]] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on ``device`` (asynchronously from pinned memory)."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory (called by the DataLoader)."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(**{field.name: _changed(getattr(self, field.name), change) for field in fields(self)})


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return ``value`` with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Boxes | LidarDepth | ViewInstances):
        return type(value)(*(change(getattr(value, field.name)) for field in fields(value)))
    if isinstance(value, tuple):
        return tuple(_changed(each, change) for each in value)
    if isinstance(value, Mapping):
        return {key: _changed(each, change) for key, each in value.items()}
    return value


def collate(samples: Sequence[Sample]) -> Batch:
    """Return ``samples`` as one batch; all of them must hold the same sensors.

    What is large is put together by ``default_collate``: in a loader process, where the training process sees it too.
    """
    frames = [sample.frame for sample in samples]
    points = [frame.points for frame in frames if frame.points is not None]
    images = [frame.images for frame in frames if frame.images is not None]
    rigs = [frame.rig for frame in frames if frame.images is not None and frame.rig is not None]
    radar = [frame.radar for frame in frames if frame.radar is not None]
    depth = tuple(frame.lidar_depth for frame in frames if frame.lidar_depth is not None)
    return Batch(
        tokens=tuple(frame.token for frame in frames),
        boxes=tuple(Boxes.empty() if frame.boxes is None else frame.boxes for frame in frames),
        labelled=torch.tensor([frame.boxes is not None for frame in frames]),
        affines=tuple(sample.affine for sample in samples),
        points=torch.cat(points) if points else None,
        point_frame=_owner(points),
        images=default_collate(images) if images else None,
        intrinsics=torch.stack([rig.intrinsics for rig in rigs]) if rigs else None,
        bev_from_camera=torch.stack([rig.lidar_from_camera for rig in rigs]) if rigs else None,
        view_from_original=torch.stack([rig.view_from_original for rig in rigs]) if rigs else None,
        radar=torch.cat(radar) if radar else None,
        radar_frame=_owner(radar),
        lidar_depth=depth or None,
        stored={name: default_collate([sample.stored[name] for sample in samples]) for name in samples[0].stored},
        left={name: tuple(sample.left[name] for sample in samples) for name in samples[0].left},
        instances={name: tuple(sample.instances[name] for sample in samples) for name in samples[0].instances},
    )


def _owner(rows: Sequence[Tensor]) -> Int[Tensor, "P"] | None:
    """Return the frame of each row of all frames."""
    return torch.cat([torch.full((len(each),), frame) for frame, each in enumerate(rows)]) if rows else None
