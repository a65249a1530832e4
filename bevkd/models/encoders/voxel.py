"""LiDAR encoder: the sparse voxel networks of CenterPoint (arXiv 2006.11275) and SECOND (Yan et al., 2018)."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from bevkd.data.collate import Batch
from bevkd.data.source import Sensor
from bevkd.errors import ConfigError
from bevkd.grid import BEVGrid
from bevkd.models.encoders.base import EncoderConfig
from bevkd.models.sparse import ResidualBlock, down_conv, sparse_tensor, sub_m_block, to_dense
from bevkd.models.voxelize import voxelize
from bevkd.models.widths import scaled


class Config(EncoderConfig):
    """Config of the sparse voxel encoder.

    Attributes:
        kind: ``residual`` is CenterPoint's network, ``plain`` is SECOND's without shortcuts.
        voxel_m: edges along x, y, z; the grid's cell is the x and y edge times the network's stride.
        channels: width of each stage; every stage after the first halves the resolution.
        blocks: residual blocks per stage; of ``plain``, submanifold convolutions per stage, and one in the first.
        out_channels: width of the last convolution, which halves the height; ``bev_low`` has these times the
            remaining height slices.
        point_features: values of a point that are read: the first of x, y, z, intensity, time lag.
        max_points: points of a voxel that count.
        max_voxels: voxels of a frame that count, first come, first served; None is all.
    """

    SENSORS: ClassVar[frozenset[Sensor]] = frozenset({"lidar"})

    name: Literal["voxel"] = "voxel"
    kind: Literal["residual", "plain"] = "residual"
    voxel_m: tuple[float, float, float] = (0.075, 0.075, 0.2)
    channels: tuple[int, ...] = (16, 32, 64, 128)
    blocks: int = 2
    out_channels: int = 128
    point_features: int = Field(default=5, ge=3, le=5)
    max_points: int = Field(default=10, ge=1)
    max_voxels: int | None = Field(default=None, ge=1)

    def scaled(self, factor: float) -> Config:
        """Return the config with its channels times ``factor``."""
        channels = tuple(scaled(width, factor) for width in self.channels)
        return self.model_copy(update={"channels": channels, "out_channels": scaled(self.out_channels, factor)})


class VoxelEncoder(nn.Module):
    """Points to ``bev_low``: voxel means, sparse stages, height folded into channels.

    The full nuScenes size (0.075 m, 41 x 1440 x 1440) gives 256 x 180 x 180, that of KITTI (0.05 m, 41 x 1600 x 1408)
    256 x 200 x 176.

    Weights: ``conv_input.{0,1}`` (convolution, norm), ``stages.S`` (its first block is a strided convolution with norm,
    but for the first stage's), ``conv_out.{0,1}``.
    """

    def __init__(self, config: Config, grid: BEVGrid) -> None:
        super().__init__()
        self.config, self.grid = config, grid
        stride = 2 ** (len(config.channels) - 1)
        for axis, edge in zip("xy", config.voxel_m[:2], strict=True):
            if abs(edge * stride - grid.cell_m) > 1e-6:
                raise ConfigError(
                    f"detector.encoder.voxel_m: {axis} edge {edge} m times stride {stride} is {edge * stride:g} m, but "
                    f"the grid's cell is {grid.cell_m} m. Set grid.cell_m: {edge * stride:g} or change voxel_m."
                )
        rows, columns = grid.shape
        height = round((grid.z_m[1] - grid.z_m[0]) / config.voxel_m[2])
        self.voxels = (height, rows * stride, columns * stride)
        # One slice more than the range holds, as in det3d: strided convolutions then fit evenly.
        self.shape = (height + 1, *self.voxels[1:])
        self.low_m = (grid.x_m[0], grid.y_m[0], grid.z_m[0])
        widths = config.channels
        self.conv_input = sub_m_block(config.point_features, widths[0], "sub_m1")
        self.stages = nn.ModuleList([nn.Sequential(*_blocks(config, widths[0], 0))])
        height = self.shape[0]
        for level, (previous, width) in enumerate(pairwise(widths), start=1):
            # The last stage does not pad in z (41, 21, 11, 5 slices at full size).
            pad_z = 0 if level == len(widths) - 1 else 1
            down = down_conv(previous, width, f"spconv{level + 1}", padding=(pad_z, 1, 1))
            self.stages.append(nn.Sequential(down, *_blocks(config, width, level)))
            height = (height + 2 * pad_z - 3) // 2 + 1
        self.conv_out = down_conv(widths[-1], config.out_channels, "spconv_out", (3, 1, 1), (2, 1, 1), (0, 0, 0))
        height = (height - 3) // 2 + 1
        if height < 1:
            raise ConfigError(
                f"detector.encoder: {self.shape[0]} voxels of {config.voxel_m[2]} m are too few in height for "
                f"{len(widths)} stages. Use a smaller z edge in voxel_m or fewer channels entries."
            )
        self.out_channels = config.out_channels * height

    def forward(self, batch: Batch) -> Float[Tensor, "B C Y X"]:
        """Return ``bev_low`` of the batch's points; channel = feature * slices + slice."""
        if batch.points is None or batch.point_frame is None:
            raise ValueError("the voxel encoder needs points in the batch")
        config = self.config
        # Sparse convolutions stay in float32: half precision costs accuracy here and saves little.
        with torch.autocast(batch.points.device.type, enabled=False):
            points = batch.points[:, : config.point_features]
            features, indices = voxelize(
                points, batch.point_frame, self.low_m, config.voxel_m, self.voxels, config.max_points, config.max_voxels
            )
            if len(features) == 0:  # spconv refuses a batch in which nothing is occupied
                return features.new_zeros(len(batch), self.out_channels, *self.grid.shape)
            sparse = self.conv_input(sparse_tensor(features, indices, self.shape, len(batch)))
            for stage in self.stages:
                sparse = stage(sparse)
            return to_dense(self.conv_out(sparse)).flatten(1, 2)


def _blocks(config: Config, channels: int, stage: int) -> list[nn.Module]:
    """Return what follows the strided convolution of a stage."""
    key = f"res{stage + 1}"
    if config.kind == "residual":
        return [ResidualBlock(channels, key) for _ in range(config.blocks)]
    return [sub_m_block(channels, channels, key) for _ in range(config.blocks if stage else 1)]


def build(config: Config, grid: BEVGrid) -> VoxelEncoder:
    """Return the encoder for ``grid``."""
    return VoxelEncoder(config, grid)
