"""Camera and LiDAR encoder: UniDistill's fusion (Zhou et al., arXiv 2303.15083) of the maps of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from bevkd.data.collate import Batch
from bevkd.data.source import Sensor
from bevkd.grid import BEVGrid
from bevkd.models.bev_encoder import conv_bn_relu
from bevkd.models.encoders import lift_splat, voxel
from bevkd.models.encoders.base import CameraMaps, EncoderConfig
from bevkd.models.widths import scaled
from bevkd.types import LidarDepth


class Config(EncoderConfig):
    """Config of the fusion encoder.

    Attributes:
        camera, lidar: the encoders whose maps are joined.
        channels: of ``bev_low``.
    """

    name: Literal["fusion"] = "fusion"
    camera: lift_splat.Config = lift_splat.Config()
    lidar: voxel.Config = voxel.Config()
    channels: int = Field(default=256, gt=0)

    @property
    def sensors(self) -> frozenset[Sensor]:
        """Sensors that the encoder reads."""
        return self.camera.sensors | {"lidar"}

    @property
    def supervision(self) -> frozenset[Sensor]:
        """What training reads besides."""
        return self.camera.supervision

    @property
    def image_height(self) -> int:
        """Height of the view that the camera encoder sees, in pixels."""
        return self.camera.image_height

    @property
    def image_width(self) -> int:
        """Width of the view that the camera encoder sees, in pixels."""
        return self.camera.image_width

    def scaled(self, factor: float) -> Config:
        """Return the config with both encoders and the fused map narrower."""
        return self.model_copy(
            update={
                "camera": self.camera.scaled(factor),
                "lidar": self.lidar.scaled(factor),
                "channels": scaled(self.channels, factor),
            }
        )


class ChannelAttention(nn.Module):
    """Scales each channel by what the means of all channels say."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, bev: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        """Return the scaled map."""
        scale: Tensor = self.conv(bev.mean(dim=(2, 3), keepdim=True)).sigmoid()
        return bev * scale


class FusionEncoder(nn.Module):
    """Images and points to ``bev_low``: both maps side by side, channel attention, one 3x3 convolution."""

    def __init__(self, config: Config, grid: BEVGrid) -> None:
        super().__init__()
        self.camera = lift_splat.build(config.camera, grid)
        self.lidar = voxel.build(config.lidar, grid)
        joined = self.camera.out_channels + self.lidar.out_channels
        self.fuse = nn.Sequential(ChannelAttention(joined), *conv_bn_relu(joined, config.channels, 3))
        self.out_channels = config.channels
        self.image_channels, self.stride = self.camera.image_channels, self.camera.stride

    def forward(self, batch: Batch) -> CameraMaps:
        """Return ``bev_low`` of the batch, and what the camera encoder says of its images."""
        seen = self.camera(batch)
        fused = self.fuse(torch.cat([seen.bev_low, self.lidar(batch).to(seen.bev_low.dtype)], dim=1))
        return CameraMaps(fused, seen.depth, seen.image_features)

    def depth_loss(self, logits: Float[Tensor, "B N D H W"], depth: Sequence[LidarDepth]) -> Float[Tensor, ""]:
        """Return the camera encoder's depth loss."""
        return self.camera.depth_loss(logits, depth)


def build(config: Config, grid: BEVGrid) -> FusionEncoder:
    """Return the encoder for ``grid``."""
    return FusionEncoder(config, grid)
