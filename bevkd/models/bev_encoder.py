"""The BEV encoder: ``bev_low`` to ``bev_high``, SECOND's 2-D backbone and neck (Yan et al., 2018)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from bevkd.config import StrictModel

_BN_EPS, _BN_MOMENTUM = 1e-3, 0.01


class BEVEncoderConfig(StrictModel):
    """One entry per level.

    Attributes:
        layers: 3x3 convolutions after the first (strided) one.
        strides: of each level's first convolution, relative to the level before.
        channels: width of each level.
        up_channels: width of each level after it is brought back to the input's resolution; their sum is the
            channel count of ``bev_high``.
    """

    layers: tuple[int, ...] = (5, 5)
    strides: tuple[int, ...] = (1, 2)
    channels: tuple[int, ...] = (128, 256)
    up_channels: tuple[int, ...] = (256, 256)
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> BEVEncoderConfig:
        if len({len(self.layers), len(self.strides), len(self.channels), len(self.up_channels)}) != 1:
            raise ValueError("layers, strides, channels and up_channels need one entry per level each")
        return self

    @property
    def out_channels(self) -> int:
        """Channels of ``bev_high``."""
        return sum(self.up_channels)


def conv_bn_relu(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """Return convolution (no bias), batch norm and ReLU with same-size padding."""
    return [
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(out_channels, eps=_BN_EPS, momentum=_BN_MOMENTUM),
        nn.ReLU(inplace=True),
    ]


def _upsample(in_channels: int, out_channels: int, factor: int) -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(in_channels, out_channels, factor, factor, bias=False),
        nn.BatchNorm2d(out_channels, eps=_BN_EPS, momentum=_BN_MOMENTUM),
        nn.ReLU(inplace=True),
    )


class BEVEncoder(nn.Module):
    """Levels of growing stride, each brought back to the input's resolution and concatenated."""

    def __init__(self, config: BEVEncoderConfig, in_channels: int) -> None:
        super().__init__()
        self.out_channels = config.out_channels
        self.blocks, self.deblocks = nn.ModuleList(), nn.ModuleList()
        total = 1
        for depth, stride, width, up in zip(
            config.layers, config.strides, config.channels, config.up_channels, strict=True
        ):
            total *= stride
            layers = conv_bn_relu(in_channels, width, 3, stride)
            for _ in range(depth):
                layers += conv_bn_relu(width, width, 3)
            self.blocks.append(nn.Sequential(*layers))
            self.deblocks.append(_upsample(width, up, total))
            in_channels = width
        self.dropout = nn.Dropout2d(config.dropout)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, bev_low: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B D Y X"]:
        """Return ``bev_high`` at the resolution of ``bev_low``."""
        levels = []
        feature = bev_low
        for block, deblock in zip(self.blocks, self.deblocks, strict=True):
            feature = block(feature)
            levels.append(deblock(feature))
        bev_high: Tensor = self.dropout(torch.cat(levels, dim=1))
        return bev_high
