"""Masks that are spread over their box: between the pixels of the box and a grid of fixed size."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn import functional


def shrink(mask: Bool[Tensor, "h w"], rows: int, columns: int) -> Bool[Tensor, "r c"]:
    """Return the mask on ``rows`` x ``columns`` cells; a cell is in if at least half of its area is."""
    area = functional.interpolate(mask[None, None].float(), (rows, columns), mode="area")
    return area[0, 0] >= 0.5


def spread(mask: Bool[Tensor, "r c"], height: int, width: int) -> Bool[Tensor, "h w"]:
    """Return the mask on ``height`` x ``width`` pixels, its edge interpolated between cells."""
    soft = functional.interpolate(mask[None, None].float(), (height, width), mode="bilinear", align_corners=False)
    return soft[0, 0] >= 0.5
