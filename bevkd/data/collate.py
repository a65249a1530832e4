"""Batches: samples side by side, in the form that encoders and losses take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.utils.data import default_collate

from bevkd.geometry.affine import BEVAffine
from bevkd.types import Boxes, Frame, LidarDepth

StoredSignals = Mapping[str, Tensor]
"""Arrays of a cache as they are stored (still encoded), by array name."""


@dataclass(frozen=True)
class Sample:
    """One frame joined with what the caches hold of it.

    Attributes:
        frame: already augmented by ``affine``.
        affine: ``augmented_from_canonical`` of the BEV; cached maps are still canonical.
        stored: encoded arrays by cache name.
    """

    frame: Frame
    affine: BEVAffine
    stored: Mapping[str, StoredSignals]


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
        affines: BEV augmentation of each frame, for the cached maps.
        stored: encoded teacher arrays by cache name, canonical.
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

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on ``device`` (asynchronously from pinned memory)."""

        def move(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device, non_blocking=True)

        stored = self.stored or {}
        return replace(
            self,
            boxes=tuple(boxes.to(device) for boxes in self.boxes),
            labelled=self.labelled.to(device),
            points=move(self.points),
            point_frame=move(self.point_frame),
            images=move(self.images),
            intrinsics=move(self.intrinsics),
            bev_from_camera=move(self.bev_from_camera),
            view_from_original=move(self.view_from_original),
            radar=move(self.radar),
            radar_frame=move(self.radar_frame),
            lidar_depth=None if self.lidar_depth is None else tuple(each.to(device) for each in self.lidar_depth),
            stored={
                name: {key: array.to(device, non_blocking=True) for key, array in arrays.items()}
                for name, arrays in stored.items()
            },
        )

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory (called by the DataLoader)."""

        def pin(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.pin_memory()

        stored = self.stored or {}
        return replace(
            self,
            points=pin(self.points),
            images=pin(self.images),
            stored={
                name: {key: array.pin_memory() for key, array in arrays.items()} for name, arrays in stored.items()
            },
        )


def collate(samples: Sequence[Sample]) -> Batch:
    """Return ``samples`` as one batch; all of them must hold the same sensors."""
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
        images=torch.stack(images) if images else None,
        intrinsics=torch.stack([rig.intrinsics for rig in rigs]) if rigs else None,
        bev_from_camera=torch.stack([rig.lidar_from_camera for rig in rigs]) if rigs else None,
        view_from_original=torch.stack([rig.view_from_original for rig in rigs]) if rigs else None,
        radar=torch.cat(radar) if radar else None,
        radar_frame=_owner(radar),
        lidar_depth=depth or None,
        stored={name: default_collate([sample.stored[name] for sample in samples]) for name in samples[0].stored},
    )


def _owner(rows: Sequence[Tensor]) -> Int[Tensor, "P"] | None:
    """Return the frame of each row of all frames."""
    return torch.cat([torch.full((len(each),), frame) for frame, each in enumerate(rows)]) if rows else None
