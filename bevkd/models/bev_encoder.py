"""The BEV encoder: ``bev_low`` to ``bev_high``, SECOND's 2-D backbone and neck (Yan et al., 2018)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from bevkd.config import StrictModel
from bevkd.errors import ConfigError
from bevkd.models.widths import scaled

_BN_EPS, _BN_MOMENTUM = 1e-3, 0.01
_WIDTHS = ("channels", "up_channels")


class BEVEncoderConfig(StrictModel):
    """One entry per level.

    Attributes:
        layers: 3x3 convolutions after the first (strided) one.
        strides: of each level's first convolution, relative to the level before.
        channels: width of each level.
        up_channels: width of each level after it is brought to the grid; their sum is the channel count of
            ``bev_high``.
        dropout: of whole channels of ``bev_high``.
    """

    type: Literal["second"] = "second"

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

    def scaled(self, factor: float) -> BEVEncoderConfig:
        """Return the config with all widths multiplied by ``factor``."""
        widths = {name: tuple(scaled(each, factor) for each in getattr(self, name)) for name in _WIDTHS}
        return self.model_copy(update=widths)


def conv_bn_relu(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """Return convolution (no bias), batch norm and ReLU with same-size padding."""
    return [
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(out_channels, eps=_BN_EPS, momentum=_BN_MOMENTUM),
        nn.ReLU(inplace=True),
    ]


def _to_grid(in_channels: int, out_channels: int, stride: int, fineness: int) -> nn.Sequential:
    """Return what brings a level of a total stride to the grid, of which ``fineness`` input cells make up one."""
    if stride % fineness and fineness % stride:
        raise ConfigError(
            f"detector.bev_encoder.strides: a level of total stride {stride} does not fit an encoder with {fineness} "
            "pillars per cell of the grid along an axis. Make one of the two a multiple of the other."
        )
    if stride >= fineness:
        factor = stride // fineness
        layer: nn.Module = nn.ConvTranspose2d(in_channels, out_channels, factor, factor, bias=False)
    else:
        factor = fineness // stride
        layer = nn.Conv2d(in_channels, out_channels, factor, factor, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(out_channels, eps=_BN_EPS, momentum=_BN_MOMENTUM), nn.ReLU(inplace=True))


class BEVEncoder(nn.Module):
    """Levels of growing stride, each brought to the grid and concatenated.

    Weights: ``blocks.L.{0,3,...}`` (convolutions) with a norm after each, ``deblocks.L.{0,1}`` (strided convolution of
    levels finer than the grid, transposed convolution of the others, and norm).

    Args:
        in_channels: of ``bev_low``.
        fineness: cells of ``bev_low`` per cell of the grid along an axis.
    """

    def __init__(self, config: BEVEncoderConfig, in_channels: int, fineness: int = 1) -> None:
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
            self.deblocks.append(_to_grid(width, up, total, fineness))
            in_channels = width
        self.dropout = nn.Dropout2d(config.dropout)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, bev_low: Float[Tensor, "B C y x"]) -> Float[Tensor, "B D Y X"]:
        """Return ``bev_high`` on the grid; ``bev_low`` is finer where the encoder's pillars are."""
        levels = []
        feature = bev_low
        for block, deblock in zip(self.blocks, self.deblocks, strict=True):
            feature = block(feature)
            levels.append(deblock(feature))
        bev_high: Tensor = self.dropout(torch.cat(levels, dim=1))
        return bev_high
