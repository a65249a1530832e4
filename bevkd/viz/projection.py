"""Boxes and points of the BEV frame in camera images: pinhole projection with exact clipping.

Pixels are edge-based: pixel ``u`` covers ``[u, u + 1)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bevkd.geometry.boxes import corners_3d

NEAR_M = 0.3
"""What lies closer to the camera plane than this, or behind it, is cut away before the division by depth."""

EDGES = ((0, 1), (1, 2), (3, 0), (4, 5), (5, 6), (7, 4), (0, 4), (1, 5), (2, 3), (6, 7), (2, 6), (3, 7))
"""Corner pairs of :func:`corners_3d`; the last four bound the front face."""

FRONT_EDGES = 4


@dataclass(frozen=True)
class Segments:
    """The visible pieces of box edges in one image.

    Attributes:
        ends_px: start and end ``(u, v)`` of each piece, inside the image.
        box: which box each piece belongs to.
        front: whether the piece bounds the front face.
    """

    ends_px: Float[Tensor, "m 2 2"]
    box: Int[Tensor, "m"]
    front: Bool[Tensor, "m"]


def camera_points(xyz: Float[Tensor, "*n 3"], lidar_from_camera: Float[Tensor, "4 4"]) -> Float[Tensor, "*n 3"]:
    """Return points of the BEV frame in the camera frame (x right, y down, z forward), metres."""
    camera_from_lidar: Tensor = torch.linalg.inv(lidar_from_camera.double()).to(xyz)
    return xyz @ camera_from_lidar[:3, :3].T + camera_from_lidar[:3, 3]


def project(xyz: Float[Tensor, "*n 3"], intrinsics: Float[Tensor, "3 3"]) -> Float[Tensor, "*n 2"]:
    """Return the pixels ``(u, v)`` of camera-frame points, all in front of the camera."""
    homogeneous = xyz @ intrinsics.to(xyz).T
    return homogeneous[..., :2] / homogeneous[..., 2:]


def visible_edges(
    boxes: Float[Tensor, "n 9"],
    intrinsics: Float[Tensor, "3 3"],
    lidar_from_camera: Float[Tensor, "4 4"],
    height: int,
    width: int,
) -> Segments:
    """Return the edges of ``boxes`` cut at the near plane, projected and cut at the borders of the image."""
    corners = camera_points(corners_3d(boxes.float()), lidar_from_camera)
    ends = corners[:, torch.tensor(EDGES)].reshape(-1, 2, 3)
    box = torch.arange(len(boxes)).repeat_interleave(len(EDGES))
    front = (torch.arange(len(EDGES)) >= len(EDGES) - FRONT_EDGES).repeat(len(boxes))

    ahead = (ends[..., 2] > NEAR_M).any(dim=1) & torch.isfinite(ends).all(dim=-1).all(dim=-1)
    ends, box, front = _cut_near(ends[ahead]), box[ahead], front[ahead]
    pixels, inside = _cut_to_image(project(ends, intrinsics), height, width)
    return Segments(pixels[inside], box[inside], front[inside])


def _cut_near(ends: Float[Tensor, "m 2 3"]) -> Float[Tensor, "m 2 3"]:
    """Return segments with at least one end beyond the near plane, with the other end moved onto it if needed."""
    start, stop = ends[:, 0], ends[:, 1]
    depth = stop[:, 2] - start[:, 2]
    share = (NEAR_M - start[:, 2]) / torch.where(depth == 0, torch.ones_like(depth), depth)
    crossing = start + share[:, None] * (stop - start)
    return torch.stack(
        [
            torch.where(start[:, 2:] < NEAR_M, crossing, start),
            torch.where(stop[:, 2:] < NEAR_M, crossing, stop),
        ],
        dim=1,
    )


def _cut_to_image(
    ends: Float[Tensor, "m 2 2"], height: int, width: int
) -> tuple[Float[Tensor, "m 2 2"], Bool[Tensor, "m"]]:
    """Return segments cut to the image (Liang and Barsky, 1984) and which of them touch it."""
    start, step = ends[:, 0].double(), (ends[:, 1] - ends[:, 0]).double()
    first, last = torch.zeros(len(ends), dtype=torch.float64), torch.ones(len(ends), dtype=torch.float64)
    inside = torch.ones(len(ends), dtype=torch.bool)
    for axis, limit in ((0, width), (1, height)):
        for direction, room in ((-step[:, axis], start[:, axis]), (step[:, axis], limit - start[:, axis])):
            share = room / torch.where(direction == 0, torch.ones_like(direction), direction)
            first = torch.where(direction < 0, torch.maximum(first, share), first)
            last = torch.where(direction > 0, torch.minimum(last, share), last)
            inside &= (direction != 0) | (room >= 0)
    inside &= first < last
    cut = torch.stack([start + first[:, None] * step, start + last[:, None] * step], dim=1)
    return cut.to(ends), inside


def visible_points(
    xyz: Float[Tensor, "P 3"],
    intrinsics: Float[Tensor, "3 3"],
    lidar_from_camera: Float[Tensor, "4 4"],
    height: int,
    width: int,
) -> tuple[Float[Tensor, "m 2"], Float[Tensor, "m"]]:
    """Return pixels ``(u, v)`` and depths (m) of the points inside the image, the farthest first."""
    in_camera = camera_points(xyz.float(), lidar_from_camera)
    in_camera = in_camera[in_camera[:, 2] > NEAR_M]
    pixels, depth = project(in_camera, intrinsics), in_camera[:, 2]
    inside = ((pixels >= 0) & (pixels < pixels.new_tensor([width, height]))).all(dim=1)
    order = depth[inside].argsort(descending=True)
    return pixels[inside][order], depth[inside][order]
