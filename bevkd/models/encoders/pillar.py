"""LiDAR encoder: the pillar network of PointPillars (arXiv 1812.05784), also that of CenterPoint with pillars."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from bevkd.data.collate import Batch
from bevkd.data.source import Sensor
from bevkd.errors import ConfigError
from bevkd.grid import BEVGrid
from bevkd.models.encoders.base import EncoderConfig
from bevkd.models.voxelize import VoxelGroups, group_points
from bevkd.models.widths import scaled

_BN_EPS, _BN_MOMENTUM = 1e-3, 0.01
_ANY_HEIGHT_M = (-1e6, 1e6)


class Config(EncoderConfig):
    """Config of the pillar encoder.

    Attributes:
        pillar_m: edge along x and y; the grid's cell is a whole number of pillars.
        channels: width of each layer, the last one of ``bev_low``. A layer that another one follows computes half of
            its width and doubles it with the maximum over the pillar.
        point_features: values of a point that are read: the first of x, y, z, intensity, time lag.
        center_offsets: 3 adds x, y and z from the pillar's centre, 2 (det3d) only x and y.
        max_points: points of a pillar that count.
        max_pillars: pillars of a frame that count, first come, first served; None is all.
        dynamic: all points of a pillar count, whatever their height, and none of its slots is empty, as in OpenPCDet's
            dynamic pillars.
    """

    SENSORS: ClassVar[frozenset[Sensor]] = frozenset({"lidar"})

    name: Literal["pillar"] = "pillar"
    pillar_m: float = Field(default=0.2, gt=0)
    channels: tuple[int, ...] = Field((64, 64), min_length=1)
    point_features: int = Field(default=5, ge=3, le=7)
    center_offsets: Literal[2, 3] = 3
    max_points: int = Field(default=20, ge=1)
    max_pillars: int | None = Field(default=None, ge=1)
    dynamic: bool = False

    def scaled(self, factor: float) -> Config:
        """Return the config with its channels times ``factor``."""
        return self.model_copy(update={"channels": tuple(scaled(width, factor) for width in self.channels)})


class PillarEncoder(nn.Module):
    """Points to ``bev_low``: a small network per point, its maximum over each pillar, scattered onto the map.

    Public implementations hold ``max_points`` slots per pillar and fill the empty ones with zeros, which go through the
    layers like points and take part in every maximum. Here a pillar that is not full has one such empty point, which
    gives the same maximum. Outputs in eval mode are therefore theirs; in training the batch norms see fewer zeros.

    Weights: ``layers.N.{linear,norm}``.

    Attributes:
        fineness: pillars per cell of the grid along an axis; ``bev_low`` has as many times the grid's rows and columns.
    """

    def __init__(self, config: Config, grid: BEVGrid) -> None:
        super().__init__()
        self.config, self.grid = config, grid
        self.fineness = round(grid.cell_m / config.pillar_m)
        if self.fineness < 1 or abs(self.fineness * config.pillar_m - grid.cell_m) > 1e-6:
            raise ConfigError(
                f"detector.encoder.pillar_m is {config.pillar_m} m, of which the grid's cell of {grid.cell_m} m is no "
                f"whole number. Set grid.cell_m: {max(1, self.fineness) * config.pillar_m:g} or change pillar_m."
            )
        rows, columns = grid.shape
        self.pillars = (1, rows * self.fineness, columns * self.fineness)
        low_z, high_z = _ANY_HEIGHT_M if config.dynamic else grid.z_m
        self.low_m = (grid.x_m[0], grid.y_m[0], low_z)
        self.pillar_m = (config.pillar_m, config.pillar_m, high_z - low_z)
        inputs = config.point_features + 3 + config.center_offsets
        last = len(config.channels) - 1
        self.layers = nn.ModuleList(
            _PointLayer(before, width if index == last else width // 2)
            for index, (before, width) in enumerate(pairwise((inputs, *config.channels)))
        )
        self.out_channels = config.channels[-1]

    def forward(self, batch: Batch) -> Float[Tensor, "B C y x"]:
        """Return ``bev_low`` of the batch's points, with ``fineness`` times the grid's rows and columns."""
        if batch.points is None or batch.point_frame is None:
            raise ValueError("the pillar encoder needs points in the batch")
        return self.encode(batch.points, batch.point_frame, len(batch))

    def encode(self, points: Float[Tensor, "P F"], frame: Int[Tensor, "P"], frames: int) -> Float[Tensor, "B C y x"]:
        """Return the map of any points: x, y, z in metres first, and the frame of each."""
        config = self.config
        # Half precision is too coarse for coordinates.
        with torch.autocast(points.device.type, enabled=False):
            points = points[:, : config.point_features]
            groups = group_points(
                points,
                frame,
                self.low_m,
                self.pillar_m,
                self.pillars,
                max(len(points), 1) if config.dynamic else config.max_points,
                config.max_pillars,
            )
            if len(groups.counts) == 0:
                return points.new_zeros(frames, self.out_channels, *self.pillars[1:])
            pillar = groups.voxel_of_point
            features = self._inputs(points[groups.points], pillar, groups)
            if not config.dynamic:
                partial = (groups.counts < config.max_points).nonzero().squeeze(1)
                features = torch.cat([features, features.new_zeros(len(partial), features.shape[1])])
                pillar = torch.cat([pillar, partial])
            for index, layer in enumerate(self.layers):
                features = layer(features)
                largest = _maximum(features, pillar, len(groups.counts))
                if index < len(self.layers) - 1:
                    features = torch.cat([features, largest[pillar]], dim=1)
            return self._scatter(largest, groups.indices.long(), frames)

    def _inputs(self, points: Float[Tensor, "N F"], pillar: Int[Tensor, "N"], groups: VoxelGroups) -> Tensor:
        """Return the values of each point with its offsets from the mean and from the centre of its pillar."""
        sums = points.new_zeros(len(groups.counts), 3).index_add_(0, pillar, points[:, :3])
        mean = sums / groups.counts[:, None]
        edge, grid = self.config.pillar_m, self.grid
        first = points.new_tensor([grid.x_m[0] + edge / 2, grid.y_m[0] + edge / 2, sum(grid.z_m) / 2])
        center = groups.indices[:, [3, 2, 1]] * points.new_tensor([edge, edge, 0.0]) + first
        offsets = points[:, :3] - center[pillar]
        return torch.cat([points, points[:, :3] - mean[pillar], offsets[:, : self.config.center_offsets]], dim=1)

    def _scatter(self, values: Float[Tensor, "V C"], indices: Int[Tensor, "V 4"], frames: int) -> Tensor:
        """Return the map with the values of each pillar in their place and zeros elsewhere."""
        _, rows, columns = self.pillars
        frame, _, row, column = indices.unbind(1)
        flat = values.new_zeros(frames * rows * columns, self.out_channels)
        flat = flat.index_copy(0, (frame * rows + row) * columns + column, values)
        return flat.view(frames, rows, columns, self.out_channels).permute(0, 3, 1, 2)


class _PointLayer(nn.Module):
    """Linear (no bias), batch norm, ReLU."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, channels, bias=False)
        self.norm = nn.BatchNorm1d(channels, eps=_BN_EPS, momentum=_BN_MOMENTUM)

    def forward(self, features: Float[Tensor, "N C"]) -> Float[Tensor, "N D"]:
        return torch.relu(self.norm(self.linear(features)))


def _maximum(features: Float[Tensor, "N C"], pillar: Int[Tensor, "N"], pillars: int) -> Float[Tensor, "V C"]:
    """Return the largest value of each pillar, which all have a point."""
    index = pillar[:, None].expand_as(features)
    start = features.new_zeros(pillars, features.shape[1])
    return start.scatter_reduce(0, index, features, "amax", include_self=False)


def build(config: Config, grid: BEVGrid) -> PillarEncoder:
    """Return the encoder for ``grid``."""
    return PillarEncoder(config, grid)
