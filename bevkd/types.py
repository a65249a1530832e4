"""The data that flows through bevkd: frozen dataclasses of tensors.

Shape letters: B batch, N cameras, P points, n boxes, K classes, T tasks, C channels, Y rows, X columns,
H and W image height and width. Boxes live in the BEV frame (the key frame's LiDAR frame).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from bevkd.signals import BOX_FIELDS, SIGNALS

__all__ = [
    "BOX_FIELDS",
    "SIGNALS",
    "BoxPoints",
    "Boxes",
    "Frame",
    "Instances",
    "LidarDepth",
    "Rig",
    "Signals",
    "SparseMap",
    "ViewInstances",
]


@dataclass(frozen=True)
class Boxes:
    """Boxes of one frame.

    Attributes:
        values: gravity centre (x, y, z) m, size (length, width, height) m, yaw counter-clockwise from +x in rad,
            velocity (vx, vy) m/s, NaN where unknown.
        labels: class indices in the order of the data set's classes.
        scores: confidence in [0, 1]; ones for annotations.
    """

    values: Float[Tensor, "n 9"]
    labels: Int[Tensor, "n"]
    scores: Float[Tensor, "n"]

    @classmethod
    def empty(cls) -> Boxes:
        """Return zero boxes."""
        return cls(torch.zeros(0, 9), torch.zeros(0, dtype=torch.int64), torch.zeros(0))

    @classmethod
    def unpack(cls, packed: Float[Tensor, "n 11"]) -> Boxes:
        """Return boxes from their ``n x 11`` form; the inverse of :meth:`pack`."""
        return cls(packed[:, :9].float(), packed[:, 10].round().long(), packed[:, 9].float())

    def pack(self) -> Float[Tensor, "n 11"]:
        """Return the ``boxes`` signal: centre 3, size 3, yaw, velocity 2, score, label."""
        return torch.cat([self.values, self.scores[:, None], self.labels[:, None].to(self.values)], dim=1)

    def __len__(self) -> int:
        return self.values.shape[0]

    def __getitem__(self, index: Tensor | slice) -> Boxes:
        return Boxes(self.values[index], self.labels[index], self.scores[index])

    def to(self, device: torch.device | str) -> Boxes:
        """Return the boxes on ``device``."""
        return Boxes(self.values.to(device), self.labels.to(device), self.scores.to(device))

    @property
    def center(self) -> Float[Tensor, "n 3"]:
        """Gravity centre in metres."""
        return self.values[:, 0:3]

    @property
    def size(self) -> Float[Tensor, "n 3"]:
        """Length, width, height in metres."""
        return self.values[:, 3:6]

    @property
    def yaw(self) -> Float[Tensor, "n"]:
        """Heading in radians, counter-clockwise from +x."""
        return self.values[:, 6]

    @property
    def velocity(self) -> Float[Tensor, "n 2"]:
        """Velocity in m/s in the BEV frame; NaN where unknown."""
        return self.values[:, 7:9]


@dataclass(frozen=True)
class Rig:
    """Cameras with calibration.

    Attributes:
        names: camera names, in the order of the other fields.
        intrinsics: pixels of the images as they are held beside this rig, after any resize and crop.
        lidar_from_camera: camera frame (x right, y down, z forward) to BEV frame, metres, through the ego poses of
            both timestamps.
        view_from_original: pixels of the original images to those of the images held beside this rig.
    """

    names: tuple[str, ...]
    intrinsics: Float[Tensor, "N 3 3"]
    lidar_from_camera: Float[Tensor, "N 4 4"]
    view_from_original: Float[Tensor, "N 3 3"]


@dataclass(frozen=True)
class LidarDepth:
    """Depth of the LiDAR returns of one key frame that the cameras of its rig see.

    Attributes:
        cameras: index of the camera in the rig.
        pixels: image position (u, v), edge-based.
        depth_m: along the optical axis, positive.
    """

    cameras: Int[Tensor, "d"]
    pixels: Float[Tensor, "d 2"]
    depth_m: Float[Tensor, "d"]

    def __len__(self) -> int:
        return len(self.cameras)

    def __getitem__(self, index: Tensor) -> LidarDepth:
        return LidarDepth(self.cameras[index], self.pixels[index], self.depth_m[index])

    def to(self, device: torch.device | str) -> LidarDepth:
        """Return the depths on ``device``."""
        return LidarDepth(
            self.cameras.to(device, non_blocking=True),
            self.pixels.to(device, non_blocking=True),
            self.depth_m.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class Frame:
    """One key frame as its source gives it; a sensor that was not asked for is None.

    Attributes:
        token: the sample token, the key of every cache.
        points: x, y, z (BEV frame, m), intensity (as the data set gives it: nuScenes 0-255, KITTI 0-1), time lag (s,
            >= 0, older sweeps are larger).
        images: RGB, of the cameras of ``rig``. With the sensor ``previous_camera`` those of the key frame before
            follow, in a rig that holds every camera twice.
        radar: x, y, z (BEV frame, m), radial velocity compensated for ego motion (vx, vy, m/s, BEV frame),
            radar cross section (dBsm), time lag (s).
        boxes: annotations; None means unlabelled, no boxes means labelled and empty.
        lidar_depth: in pixels of the ORIGINAL images.
    """

    token: str
    timestamp_us: int
    points: Float[Tensor, "P 5"] | None = None
    images: UInt8[Tensor, "N 3 H W"] | None = None
    rig: Rig | None = None
    radar: Float[Tensor, "R 7"] | None = None
    boxes: Boxes | None = None
    lidar_depth: LidarDepth | None = None


@dataclass(frozen=True)
class BoxPoints:
    """A map's values at the nine points of the annotated boxes of one frame.

    Attributes:
        boxes: x, y, z, length, width, height m and yaw rad, un-augmented.
        values: at four corners, centre and four edge mid-points, see ``bevkd.geometry.boxes.nine_points``.
    """

    boxes: Float[Tensor, "n 7"]
    values: Float[Tensor, "n 9 C"]

    def __len__(self) -> int:
        return self.boxes.shape[0]

    def to(self, device: torch.device | str) -> BoxPoints:
        """Return the points on ``device``."""
        return BoxPoints(self.boxes.to(device), self.values.to(device))


@dataclass(frozen=True)
class SparseMap:
    """A map that is known at some cells only.

    Attributes:
        values: zero where unknown.
        known: a zero at a known cell is a value.
    """

    values: Float[Tensor, "*c Y X"]
    known: Bool[Tensor, "*b Y X"]

    def __getitem__(self, frame: int) -> SparseMap:
        """Return one frame of a batch."""
        return SparseMap(self.values[frame], self.known[frame])


@dataclass(frozen=True)
class Instances:
    """Objects in the camera images of one frame.

    Attributes:
        cameras: index of each instance's camera in the rig.
        boxes: left, top, right, bottom in pixels of the ORIGINAL image; right and bottom edges are exclusive.
        labels: class indices of the segmenter.
        scores: confidence in [0, 1].
        masks: the mask of each instance, spread over exactly its box: as many rows and columns as the box has pixels
            when a teacher gives it, fewer when a cache does.
    """

    cameras: Int[Tensor, "n"]
    boxes: Float[Tensor, "n 4"]
    labels: Int[Tensor, "n"]
    scores: Float[Tensor, "n"]
    masks: tuple[Bool[Tensor, "_ _"], ...]

    @classmethod
    def empty(cls) -> Instances:
        """Return zero instances."""
        none = torch.zeros(0, dtype=torch.int64)
        return cls(none, torch.zeros(0, 4), none, torch.zeros(0), ())

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, index: Tensor) -> Instances:
        """Return the instances at ``index``: whether each stays, or the numbers of those that do."""
        kept = index.nonzero().squeeze(1) if index.dtype == torch.bool else index
        masks = tuple(self.masks[row] for row in kept.tolist())
        return Instances(self.cameras[kept], self.boxes[kept], self.labels[kept], self.scores[kept], masks)

    def to(self, device: torch.device | str) -> Instances:
        """Return the instances on ``device``."""
        return Instances(
            self.cameras.to(device),
            self.boxes.to(device),
            self.labels.to(device),
            self.scores.to(device),
            tuple(mask.to(device) for mask in self.masks),
        )


@dataclass(frozen=True)
class ViewInstances:
    """Objects in the views of one frame's cameras: what a student learns of masks, in one piece.

    Attributes:
        cameras: index of each instance's camera in the rig.
        boxes: left, top, right, bottom in pixels of the view.
        labels: class indices.
        scores: confidence in [0, 1].
        masks: the mask of each instance, spread over exactly its box.
    """

    cameras: Int[Tensor, "n"]
    boxes: Float[Tensor, "n 4"]
    labels: Int[Tensor, "n"]
    scores: Float[Tensor, "n"]
    masks: Bool[Tensor, "n s s"]

    def __len__(self) -> int:
        return len(self.masks)


@dataclass(frozen=True)
class Signals:
    """What a teacher knows about B frames; absent signals are None.

    Attributes:
        bev_low: encoder output.
        bev_high: BEV encoder output.
        heatmap: class logits of all tasks in the class order of the data set.
        box_code: per task offset 2, z 1, log size 3, (sin, cos) 2, velocity 2.
        boxes: decoded boxes per frame.
        box_code_known: cells at which ``box_code`` is known; None means all.
        points_low, points_high: ``bev_low`` and ``bev_high`` at the nine points of each annotated box, per frame.
        instances: objects in the camera images, per frame.
        lidar_depth: of the data set, in pixels of the ORIGINAL images, per frame.
    """

    bev_low: Float[Tensor, "B C Y X"] | None = None
    bev_high: Float[Tensor, "B D Y X"] | None = None
    heatmap: Float[Tensor, "B K Y X"] | None = None
    box_code: Float[Tensor, "B T 10 Y X"] | None = None
    boxes: tuple[Boxes, ...] | None = None
    box_code_known: Bool[Tensor, "B Y X"] | None = None
    points_low: tuple[BoxPoints, ...] | None = None
    points_high: tuple[BoxPoints, ...] | None = None
    instances: tuple[Instances, ...] | None = None
    lidar_depth: tuple[LidarDepth, ...] | None = None

    def need(self, name: str) -> Tensor:
        """Return the map ``name``, which the contract check has promised."""
        value = getattr(self, name)
        if not isinstance(value, Tensor):
            raise KeyError(f"signal '{name}' is not in this batch")
        return value
