"""A detector is three named parts, whatever its sensor: encoder, BEV encoder, head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from jaxtyping import Float
from pydantic import Discriminator, Field, Tag, field_validator
from torch import Tensor, nn

from bevkd import registry
from bevkd.config import PluginConfig, StrictModel, plugin
from bevkd.data.collate import Batch
from bevkd.data.join import View
from bevkd.data.source import Sensor
from bevkd.grid import BEVGrid
from bevkd.models.bev_encoder import BEVEncoder, BEVEncoderConfig
from bevkd.models.bev_resnet import BEVResNet, BEVResNetConfig
from bevkd.models.encoders.base import CameraMaps, EncoderConfig
from bevkd.models.heads.base import HeadMaps

_SAFE_CHANNELS = 16


class Widths(StrictModel):
    """Channels of each part relative to what its config says, rounded to multiples of 8.

    Narrow students of RDD (arXiv 2308.10308) are S (1, 0.5, 0.5), XS (0.75, 0.5, 0.5) and XXS (0.5, 0.25, 0.25), those
    of itKD (arXiv 2205.15531) (1, 0.5, 1) and (1, 0.25, 1).
    """

    encoder: float = Field(default=1.0, gt=0, le=1)
    bev_encoder: float = Field(default=1.0, gt=0, le=1)
    head: float = Field(default=1.0, gt=0, le=1)


def _kind_of(config: object) -> str:
    """Return which BEV encoder a config describes; without ``type`` it is SECOND's."""
    return str(config.get("type", "second") if isinstance(config, dict) else getattr(config, "type", "second"))


class DetectorConfig(StrictModel):
    """What to build; the same for teachers and students.

    Attributes:
        encoder: a plug-in of ``bevkd.models.encoders``.
        bev_encoder: of the ``type`` ``second`` or ``resnet``.
        head: a plug-in of ``bevkd.models.heads``.
        widths: makes parts narrower.
    """

    grid: BEVGrid
    encoder: plugin("bevkd.models.encoders")  # type: ignore[valid-type]
    bev_encoder: Annotated[
        Annotated[BEVEncoderConfig, Tag("second")] | Annotated[BEVResNetConfig, Tag("resnet")], Discriminator(_kind_of)
    ] = BEVEncoderConfig()
    head: plugin("bevkd.models.heads")  # type: ignore[valid-type]
    widths: Widths = Widths()

    @field_validator("encoder")
    @classmethod
    def _check_encoder(cls, encoder: PluginConfig) -> PluginConfig:
        if not isinstance(encoder, EncoderConfig):
            raise ValueError(
                f"the Config of encoder '{encoder.name}' must derive from bevkd.models.encoders.base.EncoderConfig"
            )
        return encoder

    @property
    def sensors(self) -> frozenset[Sensor]:
        """Sensors that the encoder reads."""
        sensors: frozenset[Sensor] = self.encoder.sensors
        return sensors

    @property
    def training_sensors(self) -> frozenset[Sensor]:
        """Sensors that training reads: those of the encoder, and what supervises it."""
        supervision: frozenset[Sensor] = self.encoder.supervision
        return self.sensors | supervision

    def scaled(self) -> DetectorConfig:
        """Return the config of the same detector with ``widths`` applied to the channels of every part."""
        parts = {name: getattr(self, name) for name in ("encoder", "bev_encoder", "head")}
        factors = {name: getattr(self.widths, name) for name in parts}
        changed = {name: part if factors[name] == 1 else part.scaled(factors[name]) for name, part in parts.items()}
        return self.model_copy(update={**changed, "widths": Widths()})


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
        bev_low: encoder output; pillars may be finer than the grid.
        bev_high: BEV encoder output.
        head: class logits and box codes.
        depth: logits of the depth bins of each image, where the encoder predicts depth.
        image_features: of each image, where the encoder lifts images.
    """

    bev_low: Float[Tensor, "B C y x"]
    bev_high: Float[Tensor, "B D Y X"]
    head: HeadMaps
    depth: Float[Tensor, "B N bins H W"] | None = None
    image_features: Float[Tensor, "B N F H W"] | None = None


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
        parts = config.scaled()
        self.encoder: Any = registry.load("bevkd.models.encoders", parts.encoder.name).build(parts.encoder, parts.grid)
        # Pillars are finer than the grid; the BEV encoder brings their map to it.
        fineness: int = getattr(self.encoder, "fineness", 1)
        self.bev_encoder: Any = (
            BEVResNet(parts.bev_encoder, self.encoder.out_channels)
            if isinstance(parts.bev_encoder, BEVResNetConfig)
            else BEVEncoder(parts.bev_encoder, self.encoder.out_channels, *([fineness] if fineness > 1 else []))
        )
        self.head: Any = registry.load("bevkd.models.heads", parts.head.name).build(
            parts.head, self.bev_encoder.out_channels, parts.grid, classes
        )

    def forward(self, batch: Batch) -> DetectorOutput:
        """Return the maps of every part."""
        encoded = self.encoder(batch)
        bev_low, depth, features = encoded if isinstance(encoded, CameraMaps) else (encoded, None, None)
        bev_high = self.bev_encoder(bev_low)
        return DetectorOutput(bev_low, bev_high, self.head(bev_high), depth, features)

    def loss(self, output: DetectorOutput, batch: Batch) -> dict[str, Tensor]:
        """Return the detection losses of a batch by name: those of the head, and ``depth`` if the encoder learns it.

        Frames that are not ``batch.labelled`` add nothing to the head's; depth needs no labels.
        """
        terms: dict[str, Tensor] = self.head.loss(output.head, self.head.targets(batch.boxes), batch.labelled)
        if output.depth is not None and batch.lidar_depth is not None:
            terms["depth"] = self.encoder.depth_loss(output.depth, batch.lidar_depth)
        return terms
