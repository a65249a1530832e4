"""Deformable convolution (Dai et al., arXiv 1703.06211) in plain torch: it runs on any device, forward and backward."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class DeformConv2d(nn.Module):
    """A 3x3 convolution whose nine taps move: a second convolution says by how much, in cells, at every cell.

    Offsets start at zero, where it is an ordinary convolution with padding 1. One set of offsets serves all channels.

    Args:
        groups: of the channels, as in ``nn.Conv2d``.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int = 1) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, 3, 3))
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
        self.offset = nn.Conv2d(in_channels, 18, 3, padding=1)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.get_parameter("bias"))

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D H W"]:
        """Return the map of the same size; taps beyond the border read zero."""
        return deform_conv2d(x, self.offset(x), self.weight, self.groups)


def deform_conv2d(
    x: Float[Tensor, "B C H W"],
    offset: Float[Tensor, "B 18 H W"],
    weight: Float[Tensor, "D G 3 3"],
    groups: int = 1,
) -> Float[Tensor, "B D H W"]:
    """Return the 3x3 convolution of ``x`` with padding 1 and moved taps.

    Args:
        offset: (dy, dx) in cells of each of the nine taps, row by row, at every cell.
        weight: G is C over the number of groups.
    """
    B, C, H, W = x.shape
    device = x.device
    rows = (
        torch.arange(H, device=device)[:, None] + torch.arange(-1, 2, device=device).repeat_interleave(3)[:, None, None]
    )
    columns = torch.arange(W, device=device)[None] + torch.arange(-1, 2, device=device).repeat(3)[:, None, None]
    moved = offset.float().view(B, 9, 2, H, W)
    v, u = rows + moved[:, :, 0], columns + moved[:, :, 1]
    where = torch.stack([(u + 0.5) * 2 / W - 1, (v + 0.5) * 2 / H - 1], dim=-1).flatten(1, 2)
    taps = nn.functional.grid_sample(x.float(), where, align_corners=False).to(x.dtype)
    # One tap after the other along the rows: the nine taps of a channel side by side make it a grouped 1x1 convolution.
    columns_of_taps = taps.view(B, C, 9, H * W).flatten(1, 2)[..., None]
    flat = weight.flatten(2).flatten(1)[..., None, None]
    return nn.functional.conv2d(columns_of_taps, flat, groups=groups).view(B, -1, H, W)
