"""Masks as people look at them."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from bevkd.types import Instances


def paste(instances: Instances, height: int, width: int) -> Bool[Tensor, "n H W"]:
    """Return each mask in its whole image.

    Args:
        instances: with boxes of whole pixels and a mask value at each, as :func:`move_instances` returns them.
        height, width: of the images.
    """
    canvas = torch.zeros(len(instances), height, width, dtype=torch.bool, device=instances.boxes.device)
    for whole, mask, box in zip(canvas, instances.masks, instances.boxes.round().long().tolist(), strict=True):
        left, top, right, bottom = box
        whole[top:bottom, left:right] = mask
    return canvas
