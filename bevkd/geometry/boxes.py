"""Points of boxes and points in boxes.

Boxes are rows of at least seven values: gravity centre (x, y, z) m, size (length, width, height) m and yaw
counter-clockwise from +x in rad; further values are ignored.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

CORNER_SIGNS = ((-1.0, -1.0), (-1.0, 1.0), (1.0, 1.0), (1.0, -1.0))
"""Corners before rotation, in units of half length and half width."""


def wrap_angle(angle_rad: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Return the same angles within [-pi, pi)."""
    return torch.remainder(angle_rad + math.pi, 2 * math.pi) - math.pi


def rotate(xy: Float[Tensor, "*n 2"], angle_rad: Float[Tensor, "*m"]) -> Float[Tensor, "*k 2"]:
    """Return vectors turned counter-clockwise; ``angle_rad`` broadcasts against the vectors' leading axes."""
    cos, sin = angle_rad.cos(), angle_rad.sin()
    x, y = xy.unbind(-1)
    return torch.stack([x * cos - y * sin, x * sin + y * cos], dim=-1)


def bev_corners(boxes: Float[Tensor, "*n d"]) -> Float[Tensor, "*n 4 2"]:
    """Return the corners seen from above: (-,-), (-,+), (+,+), (+,-) of half length and half width, then rotated."""
    signs = boxes.new_tensor(CORNER_SIGNS)
    offsets = signs * (boxes[..., None, 3:5] / 2)
    return rotate(offsets, boxes[..., 6, None]) + boxes[..., None, 0:2]


def nine_points(boxes: Float[Tensor, "*n d"]) -> Float[Tensor, "*n 9 2"]:
    """Return four corners, the centre and the mid-points of edges 01, 12, 23 and 03 (UniDistill, arXiv 2303.15083)."""
    corners = bev_corners(boxes)
    middles = (corners[..., [0, 1, 2, 0], :] + corners[..., [1, 2, 3, 3], :]) / 2
    return torch.cat([corners, boxes[..., None, 0:2], middles], dim=-2)


def corners_3d(boxes: Float[Tensor, "*n d"]) -> Float[Tensor, "*n 8 3"]:
    """Return the corners: the four of :func:`bev_corners` at the bottom, then the same four at the top."""
    bev = bev_corners(boxes)
    half = boxes[..., None, 5:6].expand(*bev.shape[:-1], 1) / 2
    z = boxes[..., None, 2:3]
    return torch.cat([torch.cat([bev, z - half], dim=-1), torch.cat([bev, z + half], dim=-1)], dim=-2)


def points_in_boxes(points: Float[Tensor, "P c"], boxes: Float[Tensor, "n d"]) -> Bool[Tensor, "n P"]:
    """Return whether each box holds each point; faces belong to the box.

    Args:
        points: x, y, z in metres, then any further values.
    """
    offset = points[None, :, 0:3] - boxes[:, None, 0:3]
    local = rotate(offset[..., 0:2], -boxes[:, None, 6])
    inside = (local.abs() <= boxes[:, None, 3:5] / 2).all(dim=-1)
    return inside & (offset[..., 2].abs() <= boxes[:, None, 5] / 2)
