"""The segmenter: objects in camera images, each with box, class and mask, in a single stage."""

from __future__ import annotations

from jaxtyping import UInt8
from pydantic import Field
from torch import Tensor, nn

from bevkd.config import StrictModel
from bevkd.errors import ConfigError
from bevkd.models.backbone import BackboneConfig, ImageNeck, Normalise, build_backbone
from bevkd.models.instance_head import InstanceHead, InstanceHeadConfig, InstanceOutput


class SegmenterConfig(StrictModel):
    """What to build.

    Attributes:
        image_height, image_width: size of the view that the network sees, in pixels.
        stride: of the feature map that the head reads; one of the backbone's stage strides.
        neck_channels: width of each stage in the neck (the head reads their concatenation).
    """

    backbone: BackboneConfig = BackboneConfig()
    image_height: int = Field(default=512, gt=0, multiple_of=32)
    image_width: int = Field(default=928, gt=0, multiple_of=32)
    stride: int = Field(default=4, gt=0)
    neck_channels: int = Field(default=64, gt=0)
    head: InstanceHeadConfig = InstanceHeadConfig()


class Segmenter(nn.Module):
    """Backbone, neck and instance head."""

    def __init__(self, config: SegmenterConfig, classes: tuple[str, ...]) -> None:
        super().__init__()
        self.config, self.classes = config, classes
        self.normalise = Normalise()
        self.backbone, widths, strides = build_backbone(config.backbone)
        faults = []
        if config.stride not in strides:
            faults.append(f"stride is {config.stride}, the backbone's stages have {', '.join(map(str, strides))}")
        if config.stride % config.head.fineness:
            faults.append(f"head.fineness is {config.head.fineness}, which does not divide the stride {config.stride}")
        if faults:
            raise ConfigError(
                f"segmenter: {'; '.join(faults)}. Change them, or backbone.options.out_features for other stages."
            )
        self.neck = ImageNeck(widths, strides, config.stride, config.neck_channels)
        self.head = InstanceHead(config.head, self.neck.out_channels, config.stride, len(classes))

    def forward(self, images: UInt8[Tensor, "M 3 H W"]) -> InstanceOutput:
        """Return the head's maps; ``head.decode`` turns them into instances in pixels of ``images``."""
        stages = self.backbone(self.normalise(images)).feature_maps
        output: InstanceOutput = self.head(self.neck(list(stages)))
        return output
