"""Radar encoder: the pillar network on the returns of all radars."""

from __future__ import annotations

from typing import ClassVar, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from bevkd.data.collate import Batch
from bevkd.data.source import Sensor
from bevkd.grid import BEVGrid
from bevkd.models.encoders import pillar
from bevkd.models.encoders.base import EncoderConfig
from bevkd.models.widths import scaled

_RADAR_VALUES = 7


class Config(EncoderConfig):
    """Config of the radar encoder; how many scans are put together is ``data.radar_sweeps``.

    Attributes:
        channels: width of each layer, the last one of ``bev_low``.
        max_points: returns of a cell that count; the newest scan comes first.
    """

    SENSORS: ClassVar[frozenset[Sensor]] = frozenset({"radar"})

    name: Literal["radar"] = "radar"
    channels: tuple[int, ...] = Field(default=(64, 64), min_length=1)
    max_points: int = Field(default=20, ge=1)

    def scaled(self, factor: float) -> Config:
        """Return the config with its channels times ``factor``."""
        return self.model_copy(update={"channels": tuple(scaled(width, factor) for width in self.channels)})


class RadarEncoder(nn.Module):
    """Radar returns to ``bev_low``: position, velocity, cross section and age of each return, one pillar per cell."""

    def __init__(self, config: Config, grid: BEVGrid) -> None:
        super().__init__()
        pillars = pillar.Config(
            pillar_m=grid.cell_m,
            channels=config.channels,
            point_features=_RADAR_VALUES,
            max_points=config.max_points,
        )
        self.pillars = pillar.build(pillars, grid)
        self.out_channels = self.pillars.out_channels

    def forward(self, batch: Batch) -> Float[Tensor, "B C Y X"]:
        """Return ``bev_low`` of the batch's radar returns."""
        if batch.radar is None or batch.radar_frame is None:
            raise ValueError("the radar encoder needs radar in the batch")
        return self.pillars.encode(batch.radar, batch.radar_frame, len(batch))


def build(config: Config, grid: BEVGrid) -> RadarEncoder:
    """Return the encoder for ``grid``."""
    return RadarEncoder(config, grid)
