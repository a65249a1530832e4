"""Overlap of rotated boxes, and non-maximum suppression, in plain torch.

Boxes are rows of at least seven values: gravity centre 3 m, size (length, width, height) m, yaw in rad.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bevkd.geometry.boxes import CORNER_SIGNS, rotate

_PAIRS = 1 << 18
"""Pairs of boxes whose overlap is computed at once, about 0.1 GB: an untrained head may offer millions."""


def bev_intersection(a: Float[Tensor, "*n d"], b: Float[Tensor, "*n d"]) -> Float[Tensor, "*n"]:
    """Return the area in m^2 that each box of ``a`` shares with the box of ``b`` at the same place.

    In the frame of ``a`` its rectangle is ``[0, l] x [0, w]``, and by Green's theorem the shared area is the integral
    of ``clamp(x, 0, l) dy`` along the part of the outline of ``b`` with ``y`` in ``[0, w]``. Every edge is a sum of
    clamps: no polygon is built, and touching, equal and flat boxes are no special cases.
    """
    signs = b.new_tensor(CORNER_SIGNS)
    between = rotate(b[..., 0:2] - a[..., 0:2], -a[..., 6])
    outline = rotate(signs * (b[..., None, 3:5] / 2), (b[..., 6] - a[..., 6])[..., None])
    # CORNER_SIGNS runs clockwise; reversed, the integral is positive.
    start = (outline + (between + a[..., 3:5] / 2)[..., None, :]).flip(-2)
    end = start.roll(-1, dims=-2)
    length, width = a[..., None, 3], a[..., None, 4]
    (x0, y0), (x1, y1) = start.unbind(-1), end.unbind(-1)
    first, last = _span(y0, y1, width)
    low, high = x0 + (x1 - x0) * first, x0 + (x1 - x0) * last
    enter, leave = _span(low, high, length)
    low, high = torch.minimum(low.clamp(min=0), length), torch.minimum(high.clamp(min=0), length)
    mean = enter * low + (leave - enter) * (low + high) / 2 + (1 - leave) * high
    return (mean * (y1 - y0) * (last - first)).sum(dim=-1).clamp(min=0)


def _span(start: Tensor, end: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Return the fractions of the way from ``start`` to ``end`` that lie within ``[0, limit]``, from and to.

    A way that never gets there yields an empty span; a way that does not move yields all or nothing.
    """
    way = end - start
    still = way.abs() < 1e-9
    safe = torch.where(still, torch.ones_like(way), way)
    a, b = -start / safe, (limit - start) / safe
    first = torch.minimum(a, b).clamp(0, 1)
    last = torch.maximum(a, b).clamp(0, 1)
    inside = (start >= 0) & (start <= limit)
    return torch.where(still, 0.0, first), torch.where(still, inside.to(way), last)


def bev_iou(a: Float[Tensor, "*n d"], b: Float[Tensor, "*n d"]) -> Float[Tensor, "*n"]:
    """Return the IoU seen from above of each box of ``a`` and the box of ``b`` at the same place."""
    return _ratio(bev_intersection(a, b), a[..., 3] * a[..., 4], b[..., 3] * b[..., 4])


def iou_3d(a: Float[Tensor, "*n d"], b: Float[Tensor, "*n d"]) -> Float[Tensor, "*n"]:
    """Return the volume IoU of each box of ``a`` and the box of ``b`` at the same place."""
    top = torch.minimum(a[..., 2] + a[..., 5] / 2, b[..., 2] + b[..., 5] / 2)
    bottom = torch.maximum(a[..., 2] - a[..., 5] / 2, b[..., 2] - b[..., 5] / 2)
    shared = bev_intersection(a, b) * (top - bottom).clamp(min=0)
    return _ratio(shared, a[..., 3:6].prod(-1), b[..., 3:6].prod(-1))


def _ratio(shared: Tensor, of_a: Tensor, of_b: Tensor) -> Tensor:
    union = of_a + of_b - shared
    return torch.where(union > 0, shared / union.clamp(min=torch.finfo(union.dtype).tiny), 0.0).clamp(0, 1)


def bev_iou_matrix(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """Return the IoU seen from above of every box of ``a`` with every box of ``b``."""
    row, column = _near(a, b).nonzero(as_tuple=True)
    return a.new_zeros(len(a), len(b)).index_put((row, column), bev_iou(a[row], b[column]))


def iou_3d_matrix(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """Return the volume IoU of every box of ``a`` with every box of ``b``."""
    row, column = _near(a, b).nonzero(as_tuple=True)
    return a.new_zeros(len(a), len(b)).index_put((row, column), iou_3d(a[row], b[column]))


def _near(a: Tensor, b: Tensor) -> Tensor:
    """Return which pairs have circumscribed circles that overlap: the only ones that can share area."""
    reach = torch.hypot(a[:, 3], a[:, 4])[:, None] + torch.hypot(b[:, 3], b[:, 4])[None]
    return (a[:, None, 0:2] - b[None, :, 0:2]).square().sum(-1) < (reach / 2).square()


def rotated_nms(
    boxes: Float[Tensor, "n d"], scores: Float[Tensor, "n"], iou_threshold: float, pre: int, post: int
) -> Int[Tensor, "k"]:
    """Return indices of the boxes kept, best first: none overlaps a better kept one by more than the threshold.

    Args:
        iou_threshold: IoU seen from above, in [0, 1].
        pre: number of best boxes looked at.
        post: number of boxes kept at most.
    """
    order = scores.argsort(descending=True, stable=True)[:pre]
    ranked = boxes[order]
    better, worse = _near(ranked, ranked).triu(diagonal=1).nonzero(as_tuple=True)
    parts = [slice(start, start + _PAIRS) for start in range(0, max(len(better), 1), _PAIRS)]
    clash = torch.cat([bev_iou(ranked[better[part]], ranked[worse[part]]) > iou_threshold for part in parts])
    return order[_survivors(len(order), better[clash], worse[clash])][:post]


def circle_nms(
    centers: Float[Tensor, "n 2"], scores: Float[Tensor, "n"], squared_distance: float, post: int
) -> Int[Tensor, "k"]:
    """Return indices of the boxes kept, best first: none is within the distance of a better kept one.

    Args:
        squared_distance: threshold in m^2 (CenterPoint's "radii" are squared distances).
        post: number of boxes kept at most.
    """
    order = scores.argsort(descending=True, stable=True)
    ranked = centers[order]
    squared = (ranked[:, None] - ranked[None]).square().sum(-1)
    better, worse = (squared <= squared_distance).triu(diagonal=1).nonzero(as_tuple=True)
    return order[_survivors(len(order), better, worse)][:post]


def _survivors(n: int, better: Tensor, worse: Tensor) -> Tensor:
    """Return which of ``n`` ranked boxes greedy suppression keeps.

    Repeating "kept unless a kept better one clashes" settles on the greedy answer, since box ``i`` depends on boxes
    before it alone; it takes as many rounds as the longest chain of clashes, not as many as there are boxes.
    """
    kept = torch.ones(n, dtype=torch.bool, device=better.device)
    while True:
        beaten = torch.zeros_like(kept)
        beaten[worse[kept[better]]] = True
        if torch.equal(kept, ~beaten):
            return kept
        kept = ~beaten
