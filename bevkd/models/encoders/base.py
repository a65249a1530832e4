"""What the config of every encoder says about it."""

from __future__ import annotations

from typing import ClassVar

from bevkd.config import PluginConfig
from bevkd.data.source import Sensor


class EncoderConfig(PluginConfig):
    """Base of an encoder's ``Config``.

    The module that ``build`` returns maps a batch to ``bev_low``, or to ``bev_low`` and the depth logits of its images
    if it predicts depth; then it has a ``depth_loss`` as well. It has ``out_channels``, and ``fineness`` if its map has
    several cells per cell of the grid along an axis.

    Attributes:
        SENSORS: what the encoder reads.
    """

    SENSORS: ClassVar[frozenset[Sensor]]

    @property
    def sensors(self) -> frozenset[Sensor]:
        """Sensors that this encoder reads; by default ``SENSORS``."""
        return self.SENSORS

    @property
    def supervision(self) -> frozenset[Sensor]:
        """What training reads besides; by default nothing."""
        return frozenset()

    def scaled(self, factor: float) -> EncoderConfig:
        """Return the config with its channels multiplied by ``factor``, for ``detector.widths``."""
        raise NotImplementedError(f"encoder '{self.name}' has no widths. Leave detector.widths.encoder at 1.")
