"""What the config of every encoder says about it."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from jaxtyping import Float
from torch import Tensor

from bevkd.config import PluginConfig
from bevkd.data.source import Sensor


class CameraMaps(NamedTuple):
    """What an encoder of images returns.

    Attributes:
        bev_low: the BEV map.
        depth: logits of the depth bins of the frame's own images.
        image_features: of the frame's own images, from which depth and context are predicted.
    """

    bev_low: Float[Tensor, "B C Y X"]
    depth: Float[Tensor, "B N bins H W"]
    image_features: Float[Tensor, "B N F H W"]


class EncoderConfig(PluginConfig):
    """Base of an encoder's ``Config``.

    The module that ``build`` returns maps a batch to ``bev_low``, or to :class:`CameraMaps` if it lifts images; then it
    has a ``depth_loss``, ``image_channels`` and the ``stride`` of its image features as well. It has ``out_channels``,
    and ``fineness`` if its map has several cells per cell of the grid along an axis.

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
