"""Masks that are spread over their box: between the pixels of the box and a grid of fixed size."""

from __future__ import annotations

from jaxtyping import Bool
from torch import Tensor
from torch.nn import functional


def shrink(mask: Bool[Tensor, "h w"], rows: int, columns: int) -> Bool[Tensor, "r c"]:
    """Return the mask on ``rows`` x ``columns`` cells: what it is at the centre of each."""
    found = functional.interpolate(mask[None, None].float(), (rows, columns), mode="nearest-exact")
    return found[0, 0] >= 0.5


def spread(mask: Bool[Tensor, "r c"], height: int, width: int) -> Bool[Tensor, "h w"]:
    """Return the mask on ``height`` x ``width`` pixels, its edge interpolated between cells."""
    soft = functional.interpolate(mask[None, None].float(), (height, width), mode="bilinear", align_corners=False)
    return soft[0, 0] >= 0.5
