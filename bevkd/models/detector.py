"""A detector is three named parts, whatever its sensor: encoder, BEV encoder, head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bevkd import registry
from bevkd.config import StrictModel, plugin
from bevkd.data.collate import Batch
from bevkd.data.join import View
from bevkd.data.source import Sensor
from bevkd.grid import BEVGrid
from bevkd.models.bev_encoder import BEVEncoder, BEVEncoderConfig
from bevkd.models.heads.center import HeadOutput

_SAFE_CHANNELS = 16


class DetectorConfig(StrictModel):
    """What to build; the same for teachers and students.

    Attributes:
        encoder: a plug-in of ``bevkd.models.encoders``.
        head: a plug-in of ``bevkd.models.heads``.
    """

    grid: BEVGrid
    encoder: plugin("bevkd.models.encoders")  # type: ignore[valid-type]
    bev_encoder: BEVEncoderConfig = BEVEncoderConfig()
    head: plugin("bevkd.models.heads")  # type: ignore[valid-type]

    @property
    def sensors(self) -> frozenset[Sensor]:
        """Sensors that the encoder reads."""
        sensors: frozenset[Sensor] = registry.load("bevkd.models.encoders", self.encoder.name).SENSORS
        return sensors


def view_of(config: DetectorConfig) -> View:
    """Return what the detector's encoder wants of a frame."""
    encoder = config.encoder
    if "camera" not in config.sensors:
        return View(config.sensors)
    return View(config.sensors, encoder.image_height, encoder.image_width)


@dataclass(frozen=True)
class DetectorOutput:
    """All that a detector says about a batch, by the names that signals have.

    Attributes:
        bev_low: encoder output.
        bev_high: BEV encoder output.
        head: class logits and box codes.
    """

    bev_low: Float[Tensor, "B C Y X"]
    bev_high: Float[Tensor, "B D Y X"]
    head: HeadOutput


def channels_last(model: nn.Module) -> None:
    """Bring the weights of 2-D convolutions into the layout that runs fastest, on CPUs as on GPUs.

    Values stay what they are. Sparse convolutions, whose weights have five dimensions, are left alone, and so are
    models with a strided 1x1 convolution of few channels: oneDNN's backward pass of it writes outside its memory.
    """
    if any(
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride != (1, 1)
        and module.in_channels < _SAFE_CHANNELS
        for module in model.modules()
    ):
        return
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


class Detector(nn.Module):
    """Encoder (sensor to ``bev_low``), BEV encoder (to ``bev_high``), head (to heatmap and box codes)."""

    def __init__(self, config: DetectorConfig, classes: tuple[str, ...]) -> None:
        super().__init__()
        self.config, self.classes = config, classes
        self.encoder: Any = registry.load("bevkd.models.encoders", config.encoder.name).build(
            config.encoder, config.grid
        )
        self.bev_encoder = BEVEncoder(config.bev_encoder, self.encoder.out_channels)
        self.head: Any = registry.load("bevkd.models.heads", config.head.name).build(
            config.head, self.bev_encoder.out_channels, config.grid, classes
        )

    def forward(self, batch: Batch) -> DetectorOutput:
        """Return the maps of every part."""
        bev_low = self.encoder(batch)
        bev_high = self.bev_encoder(bev_low)
        return DetectorOutput(bev_low=bev_low, bev_high=bev_high, head=self.head(bev_high))
