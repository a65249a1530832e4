"""Masks that are spread over their box: between its pixels, those of other views, and a grid of fixed size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from bevkd.types import Instances, ViewInstances

_SLACK_PX = 1e-3
"""Products of scales and sizes miss whole pixels by rounding."""

STORED = 64
"""Rows and columns of masks that have to fit into one tensor."""

_OUTSIDE = 2.0
"""Where ``grid_sample`` is told to look for pixels that no mask covers."""


def shrink(mask: Bool[Tensor, "h w"], rows: int, columns: int) -> Bool[Tensor, "r c"]:
    """Return the mask on ``rows`` x ``columns`` cells: what it is at the centre of each."""
    found = functional.interpolate(mask[None, None].float(), (rows, columns), mode="nearest-exact")
    return found[0, 0] >= 0.5


def spread(mask: Bool[Tensor, "r c"], height: int, width: int) -> Bool[Tensor, "h w"]:
    """Return the mask on ``height`` x ``width`` pixels, its edge interpolated between cells."""
    soft = functional.interpolate(mask[None, None].float(), (height, width), mode="bilinear", align_corners=False)
    return soft[0, 0] >= 0.5


def tighten(
    mask: Bool[Tensor, "h w"], left: int = 0, top: int = 0
) -> tuple[Bool[Tensor, "r c"], tuple[int, int, int, int]] | None:
    """Return the part of a mask that its pixels span, and the box (left, top, right, bottom) of that part.

    Args:
        left, top: where the mask's first pixel lies.

    None means that the mask has no pixel.
    """
    rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
    if not len(rows):
        return None
    first, last = int(rows[0]), int(rows[-1]) + 1
    start, stop = int(columns[0]), int(columns[-1]) + 1
    return mask[first:last, start:stop], (left + start, top + first, left + stop, top + last)


def move_instances(
    instances: Instances, target_from_source: Float[Tensor, "N 3 3"], size: tuple[int, int] | None = None
) -> Instances:
    """Return the instances in other pixels of their images, e.g. those of a view, or back in the original ones.

    Boxes are whole pixels and fit their masks, which have a value at each pixel of the box. An instance that covers no
    pixel centre any more is left out.

    Args:
        target_from_source: affine pixel transform of each camera.
        size: height and width of the target images, beyond which nothing reaches; None means no limit.
    """
    moved, boxes, masks = [], [], []
    matrices = target_from_source.double().cpu()[instances.cameras.cpu()]
    sources = instances.boxes.double().cpu()
    for index, mask in enumerate(instances.masks):
        left, top, grid = _moved_grid(sources[index], matrices[index], size)
        if not grid.numel():
            continue
        found = functional.grid_sample(
            mask[None, None].float(), grid[None].to(mask.device), padding_mode="border", align_corners=False
        )
        within = (grid != _OUTSIDE).all(dim=-1).to(mask.device)
        tight = tighten((found[0, 0] >= 0.5) & within, left, top)
        if tight is not None:
            moved.append(index)
            masks.append(tight[0])
            boxes.append(tight[1])
    kept = torch.tensor(moved, dtype=torch.int64, device=instances.boxes.device)
    fitted = instances.boxes.new_tensor(boxes).view(-1, 4)
    return Instances(instances.cameras[kept], fitted, instances.labels[kept], instances.scores[kept], tuple(masks))


def in_views(
    instances: Instances, view_from_original: Float[Tensor, "N 3 3"], size: tuple[int, int], side: int = STORED
) -> ViewInstances:
    """Return the instances of original images as the views show them, their masks on ``side`` x ``side`` cells.

    Args:
        view_from_original: affine pixel transform of each camera.
        size: height and width of the views.
    """
    moved = move_instances(instances, view_from_original, size)
    masks = [shrink(mask, side, side) for mask in moved.masks]
    together = torch.stack(masks) if masks else torch.zeros(0, side, side, dtype=torch.bool)
    return ViewInstances(moved.cameras, moved.boxes, moved.labels, moved.scores, together)


def join_views(frames: Sequence[ViewInstances], cameras: int, score: float = 0.0) -> ViewInstances:
    """Return the instances above ``score`` of all frames as those of one rig with the cameras of all frames.

    Args:
        cameras: of each frame.
    """
    numbers = torch.cat([frame.cameras + index * cameras for index, frame in enumerate(frames)])
    boxes, labels, scores, masks = (
        torch.cat([getattr(frame, name) for frame in frames]) for name in ("boxes", "labels", "scores", "masks")
    )
    kept = scores > score
    return ViewInstances(numbers[kept], boxes[kept], labels[kept], scores[kept], masks[kept])


def _moved_grid(
    box: Float[Tensor, "4"], target_from_source: Float[Tensor, "3 3"], size: tuple[int, int] | None
) -> tuple[int, int, Float[Tensor, "rows columns 2"]]:
    """Return the first pixel of what a moved box spans, and where ``grid_sample`` finds each pixel in the box's mask.

    If the transform turns, pixels outside of the box are among them: their position is ``_OUTSIDE``.
    """
    linear, shift = target_from_source[:2, :2], target_from_source[:2, 2]
    corners = box.view(2, 2)
    if linear[0, 1] == 0 and linear[1, 0] == 0:
        return pixel_grid((corners @ linear.T + shift).flatten().tolist(), size)
    low, high = corners
    around = torch.cartesian_prod(box[[0, 2]], box[[1, 3]]) @ linear.T + shift
    left, top, grid = pixel_grid([*around.amin(dim=0).tolist(), *around.amax(dim=0).tolist()], size)
    rows, columns = grid.shape[:2]
    across, down = (torch.arange(n, dtype=torch.float64) + first + 0.5 for n, first in ((columns, left), (rows, top)))
    centres = torch.stack(torch.meshgrid(across, down, indexing="xy"), dim=-1)
    source = (centres - shift) @ torch.linalg.inv(linear).T
    positions = (source - low) / (high - low) * 2 - 1
    outside = (positions.abs() > 1).any(dim=-1, keepdim=True)
    return left, top, torch.where(outside, _OUTSIDE, positions).float()


def pixel_grid(box: Sequence[float], size: tuple[int, int] | None) -> tuple[int, int, Float[Tensor, "rows columns 2"]]:
    """Return the first pixel (column, row) whose centre lies in a box, and where ``grid_sample`` finds each such pixel.

    Args:
        box: left, top, right, bottom of what is sampled, in pixels; mirrored if left and right are exchanged.
        size: height and width of the image that the pixels belong to; None means no limit.
    """
    height, width = size or (None, None)
    left, horizontal = _sampling(box[0], box[2], width)
    top, vertical = _sampling(box[1], box[3], height)
    return left, top, torch.stack(torch.meshgrid(horizontal, vertical, indexing="xy"), dim=-1)


def _sampling(start: float, stop: float, limit: int | None) -> tuple[int, Float[Tensor, "p"]]:
    """Return the first pixel of a span of an axis, and where in a mask over the span each of its pixels looks.

    Args:
        start, stop: ends of the span in pixels; ``stop`` is the smaller one if the axis is mirrored.
        limit: number of pixels that there are.

    Positions are those of ``grid_sample``: -1 and 1 are the ends of the span.
    """
    low, high = min(start, stop), max(start, stop)
    first, end = max(0, math.ceil(low - 0.5 - _SLACK_PX)), math.ceil(high - 0.5 - _SLACK_PX)
    end = end if limit is None else min(end, limit)
    centres = torch.arange(first, max(first, end), dtype=torch.float64) + 0.5
    return first, (2 * (centres - start) / (stop - start) - 1).float()


def gather_cameras(frames: Sequence[Instances], cameras: int) -> Instances:
    """Return the instances of all frames as those of one rig with the cameras of all frames, frame by frame.

    Args:
        cameras: of each frame.
    """
    numbers = [frame.cameras + index * cameras for index, frame in enumerate(frames)]
    return Instances(
        torch.cat(numbers),
        torch.cat([frame.boxes for frame in frames]),
        torch.cat([frame.labels for frame in frames]),
        torch.cat([frame.scores for frame in frames]),
        tuple(mask for frame in frames for mask in frame.masks),
    )


def split_cameras(instances: Instances, cameras: int, frames: int) -> tuple[Instances, ...]:
    """Return the instances of each frame; the inverse of :func:`gather_cameras`."""
    owner = instances.cameras // cameras
    split = (instances[owner == frame] for frame in range(frames))
    return tuple(replace(each, cameras=each.cameras % cameras) for each in split)
