"""The BEV encoder of camera detectors: BEVDepth's residual trunk and neck (Li et al., arXiv 2206.10092)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from bevkd.config import StrictModel
from bevkd.models.widths import scaled


class BEVResNetConfig(StrictModel):
    """One entry per stage.

    Attributes:
        stem_channels: of the 7x7 convolution with stride 2 that comes first.
        layers: residual blocks of each stage.
        strides: of each stage's first block, relative to the stage before.
        channels: width of each stage.
        up_channels: width of ``bev_low`` and of each stage after they are brought back to the input's resolution; their
            sum is the channel count of ``bev_high``.
    """

    type: Literal["resnet"] = "resnet"
    stem_channels: int = Field(default=160, gt=0)
    layers: tuple[int, ...] = (2, 2, 2)
    strides: tuple[int, ...] = (1, 2, 2)
    channels: tuple[int, ...] = (160, 320, 640)
    up_channels: tuple[int, ...] = (64, 64, 64, 64)

    @model_validator(mode="after")
    def _check(self) -> BEVResNetConfig:
        if len({len(self.layers), len(self.strides), len(self.channels), len(self.up_channels) - 1}) != 1:
            raise ValueError(
                "layers, strides and channels need one entry per stage, up_channels one more for the input"
            )
        return self

    def scaled(self, factor: float) -> BEVResNetConfig:
        """Return the config with all widths multiplied by ``factor``."""
        return self.model_copy(
            update={
                "stem_channels": scaled(self.stem_channels, factor),
                "channels": tuple(scaled(each, factor) for each in self.channels),
                "up_channels": tuple(scaled(each, factor) for each in self.up_channels),
            }
        )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm around an identity (He et al., arXiv 1512.03385)."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B D V U"]:
        """Return the block's output; a stride makes it coarser."""
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class BEVResNet(nn.Module):
    """A stem of stride 2, residual stages, and a neck that brings input and stages to the input's resolution."""

    def __init__(self, config: BEVResNetConfig, in_channels: int) -> None:
        super().__init__()
        self.out_channels = sum(config.up_channels)
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, config.stem_channels, 7, 2, 3, bias=False),
            nn.BatchNorm2d(config.stem_channels),
            nn.ReLU(inplace=True),
        )
        self.stages, factors, width, total = nn.ModuleList(), [1], config.stem_channels, 2
        for depth, stride, channels in zip(config.layers, config.strides, config.channels, strict=True):
            blocks = [BasicBlock(width, channels, stride), *(BasicBlock(channels, channels) for _ in range(depth - 1))]
            self.stages.append(nn.Sequential(*blocks))
            width, total = channels, total * stride
            factors.append(total)
        self.deblocks = nn.ModuleList(
            nn.Sequential(
                nn.ConvTranspose2d(source, up, factor, factor, bias=False), nn.BatchNorm2d(up), nn.ReLU(inplace=True)
            )
            for source, up, factor in zip((in_channels, *config.channels), config.up_channels, factors, strict=True)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, bev_low: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B D Y X"]:
        """Return ``bev_high`` at the resolution of ``bev_low``; what strides make too large is cut at the far ends."""
        levels, feature = [bev_low], self.stem(bev_low)
        for stage in self.stages:
            feature = stage(feature)
            levels.append(feature)
        rows, columns = bev_low.shape[-2:]
        grown = [deblock(level) for level, deblock in zip(levels, self.deblocks, strict=True)]
        return torch.cat([level[..., :rows, :columns] for level in grown], dim=1)
