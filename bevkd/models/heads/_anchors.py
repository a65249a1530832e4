"""Anchors: boxes of fixed size and heading at every cell, their code, and which of them are an annotated box.

Shape letters: B batch, K classes, R rotations, A = K R anchors of a cell (class by class), Y rows, X columns, n boxes
or anchors. Anchor code (7 values): offsets x, y in units of the anchor's diagonal, z in units of its height, log ratios
of length, width and height, difference of yaw (SECOND, Yan et al., Sensors 2018, section 3.2.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bevkd.grid import BEVGrid

CODE_SIZE = 7

LOG_RATIO_LIMIT = 5.0
"""Decoded log ratios are cut to this, so that an untrained head yields finite boxes."""

POSITIVE, NEGATIVE, IGNORED = 1, 0, -1


@dataclass(frozen=True)
class Anchors:
    """The anchors of a grid.

    Attributes:
        x, y: positions of the columns and rows, metres.
        shape: z of the centre m, length, width, height m and yaw rad of each anchor of a cell.
    """

    x: Float[Tensor, "X"]
    y: Float[Tensor, "Y"]
    shape: Float[Tensor, "A 5"]

    @classmethod
    def on(cls, grid: BEVGrid, shape: Float[Tensor, "A 5"]) -> Anchors:
        """Return anchors from edge to edge of the grid, not at cell centres, as public detectors place them."""
        rows, columns = grid.shape
        return cls(torch.linspace(*grid.x_m, columns), torch.linspace(*grid.y_m, rows), shape)

    def at(self, anchor: Int[Tensor, "*n"], row: Int[Tensor, "*m"], column: Int[Tensor, "*l"]) -> Float[Tensor, "*k 7"]:
        """Return x, y, z, length, width, height and yaw of anchors; the indices broadcast."""
        parts = self.x[column][..., None], self.y[row][..., None], self.shape[anchor]
        x, y, shape = torch.broadcast_tensors(*parts)  # type: ignore[no-untyped-call]
        return torch.cat([x[..., :1], y[..., :1], shape], dim=-1)


def encode_anchors(boxes: Float[Tensor, "*n 7"], anchors: Float[Tensor, "*n 7"]) -> Float[Tensor, "*n 7"]:
    """Return the code of boxes at their anchors; the inverse of :func:`decode_anchors`."""
    scale = _scale(anchors)
    ratio = (boxes[..., 3:6] / anchors[..., 3:6]).log()
    return torch.cat([(boxes[..., 0:3] - anchors[..., 0:3]) / scale, ratio, boxes[..., 6:] - anchors[..., 6:]], dim=-1)


def decode_anchors(codes: Float[Tensor, "*n 7"], anchors: Float[Tensor, "*n 7"]) -> Float[Tensor, "*n 7"]:
    """Return the boxes of codes at their anchors; the heading may still be turned by half a turn."""
    center = codes[..., 0:3] * _scale(anchors) + anchors[..., 0:3]
    size = codes[..., 3:6].clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp() * anchors[..., 3:6]
    return torch.cat([center, size, codes[..., 6:] + anchors[..., 6:]], dim=-1)


def _scale(anchors: Tensor) -> Tensor:
    diagonal = torch.hypot(anchors[..., 3], anchors[..., 4])
    return torch.stack([diagonal, diagonal, anchors[..., 5]], dim=-1)


def direction_of(yaw: Float[Tensor, "*n"], offset_rad: float) -> Int[Tensor, "*n"]:
    """Return which half turn, counted from ``offset_rad``, each heading is in: 0 or 1."""
    return (torch.remainder(yaw - offset_rad, 2 * math.pi) / math.pi).long().clamp(max=1)


def turned_to(yaw: Float[Tensor, "*n"], direction: Int[Tensor, "*n"], offset_rad: float) -> Float[Tensor, "*n"]:
    """Return headings, known up to half a turn, brought into the half turn that ``direction`` says."""
    return torch.remainder(yaw - offset_rad, math.pi) + offset_rad + math.pi * direction


def nearest_overlap(boxes: Float[Tensor, "n 7"], anchors: Anchors) -> Float[Tensor, "n A Y X"]:
    """Return the IoU seen from above of boxes and anchors after each is turned to the nearest axis.

    The overlap of axis-parallel rectangles is that along x times that along y, and along x it is the same in every row:
    the map of a box is an outer product.
    """
    length, width = _upright(boxes[:, 3], boxes[:, 4], boxes[:, 6])
    of_anchor = _upright(anchors.shape[:, 1], anchors.shape[:, 2], anchors.shape[:, 4])
    along_x = _shared(boxes[:, 0], length, anchors.x, of_anchor[0])
    along_y = _shared(boxes[:, 1], width, anchors.y, of_anchor[1])
    shared = along_y[..., :, None] * along_x[..., None, :]
    areas = (length * width)[:, None] + of_anchor[0] * of_anchor[1]
    return shared / (areas[..., None, None] - shared)


def _upright(length: Tensor, width: Tensor, yaw: Tensor) -> tuple[Tensor, Tensor]:
    """Return the extents along x and y after turning to the nearest axis."""
    lying = (torch.remainder(yaw + math.pi / 2, math.pi) - math.pi / 2).abs() < math.pi / 4
    return torch.where(lying, length, width), torch.where(lying, width, length)


def _shared(center: Tensor, extent: Tensor, places: Tensor, extents: Tensor) -> Tensor:
    """Return the length ``[n, A, places]`` that each interval shares with those of each extent at each place."""
    low = torch.maximum((center - extent / 2)[:, None, None], places - extents[:, None] / 2)
    high = torch.minimum((center + extent / 2)[:, None, None], places + extents[:, None] / 2)
    return (high - low).clamp(min=0)


def assign(
    overlap: Float[Tensor, "n a"], frame: Int[Tensor, "n"], frames: int, matched: float, unmatched: float
) -> tuple[Int[Tensor, "frames a"], Int[Tensor, "frames a"]]:
    """Return the state of every anchor of every frame, and the box that it overlaps most (where it is positive).

    An anchor is positive from an overlap of ``matched`` on, negative below ``unmatched``, ignored between. The anchors
    that overlap a box most are always positive, for the box that they themselves overlap most.

    Args:
        overlap: of each box of one class with each anchor of that class.
        frame: of each box.
    """
    counts = torch.bincount(frame, minlength=frames)
    first = counts.cumsum(0) - counts
    # Sorted by frame, so that a box's place in its frame is its distance from the first one.
    order = frame.argsort(stable=True)
    place = torch.arange(len(frame), device=frame.device) - first[frame[order]]
    most = max(int(counts.max()), 1) if len(frame) else 1
    by_frame = overlap.new_full((frames, most, overlap.shape[1]), -1.0)
    by_frame[frame[order], place] = overlap[order]
    box = frame.new_zeros(frames, most)
    box[frame[order], place] = order
    best, which = by_frame.max(dim=1)

    state = torch.full_like(which, NEGATIVE)
    state[best >= unmatched] = IGNORED
    state[best >= matched] = POSITIVE
    highest = overlap.amax(dim=1, keepdim=True) if overlap.shape[1] else overlap
    nearest, anchor = ((overlap == highest) & (highest > 0)).nonzero(as_tuple=True)
    state[frame[nearest], anchor] = POSITIVE
    return state, box.gather(1, which)
