"""Camera encoder: lift, splat, shoot (Philion and Fidler, arXiv 2008.05711) and BEVDepth (Li et al., arXiv 2206.10092).

On any image backbone of transformers. The published BEVDepth is ``depth_net: camera_aware``, ``depth_weight: 3``,
``key_frames: 2`` on a ResNet-50 or 101, with a BEV encoder of the type ``resnet``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int, UInt8
from pydantic import Field, model_validator
from torch import Tensor, nn

from bevkd.config import StrictModel
from bevkd.data.collate import Batch
from bevkd.data.source import Sensor
from bevkd.errors import ConfigError
from bevkd.geometry.inverse import inverse_3x3, product_3x3
from bevkd.grid import BEVGrid
from bevkd.models.backbone import BackboneConfig, ImageNeck, Normalise, build_backbone
from bevkd.models.depth_net import (
    CameraAwareDepthNet,
    DepthAggregation,
    PlainDepthNet,
    camera_vector,
    depth_loss,
    depth_targets,
)
from bevkd.models.encoders.base import CameraMaps, EncoderConfig
from bevkd.models.splat import scatter, splat
from bevkd.models.widths import scaled
from bevkd.types import LidarDepth


class DepthBins(StrictModel):
    """Depth bins along the optical axis: ``start``, ``start + step``, ... below ``stop``, metres."""

    start: float = Field(default=2.0, gt=0)
    stop: float = 58.0
    step: float = Field(default=0.5, gt=0)

    @model_validator(mode="after")
    def _check(self) -> DepthBins:
        if self.stop - self.start <= self.step / 2:
            raise ValueError(f"stop must lie beyond start, got start {self.start} and stop {self.stop}")
        return self

    def values(self) -> Float[Tensor, "D"]:
        """Return the depth of each bin in metres."""
        return torch.arange(self.start, self.stop - self.step / 2, self.step)


class Config(EncoderConfig):
    """Config of the camera encoder.

    Attributes:
        image_height, image_width: size of the view that the network sees, in pixels.
        stride: of the feature map that is lifted; one of the backbone's stage strides.
        neck_channels: width of each stage in the neck (their concatenation is lifted).
        channels: of ``bev_low``.
        norm: batch norm on the splatted map; without it ``bev_low`` is the raw sum, as published.
        depth_net: ``plain`` is LSS's single layer, ``camera_aware`` BEVDepth's network.
        depth_weight: of the loss that compares depth with the LiDAR's in training; BEVDepth has 3, 0 switches it off.
        aggregation: refine the lifted features along depth, as BEVDepth does; costs the memory that the splat saves.
        frustum: where feature cells look from: their ``centres``, or ``stretched`` so that the outer ones stand on the
            image's edges, as LSS and BEVDepth have it; half a cell off there.
        key_frames: 2 adds the key frame before, whose map doubles the channels of ``bev_low``.
    """

    name: Literal["lift_splat"] = "lift_splat"
    backbone: BackboneConfig = BackboneConfig()
    image_height: int = 256
    image_width: int = 704
    stride: int = 16
    neck_channels: int = 128
    channels: int = 80
    depth: DepthBins = DepthBins()
    norm: bool = False
    depth_net: Literal["plain", "camera_aware"] = "plain"
    depth_weight: float = Field(default=0.0, ge=0)
    aggregation: bool = False
    frustum: Literal["centres", "stretched"] = "centres"
    key_frames: Literal[1, 2] = 1

    @model_validator(mode="after")
    def _check(self) -> Config:
        for name, size in (("image_height", self.image_height), ("image_width", self.image_width)):
            if size <= 0 or size % 32:
                raise ValueError(f"{name} must be a positive multiple of 32, got {size}")
        return self

    @property
    def sensors(self) -> frozenset[Sensor]:
        """Sensors that the encoder reads."""
        return frozenset({"camera", "previous_camera"}) if self.key_frames > 1 else frozenset({"camera"})

    @property
    def supervision(self) -> frozenset[Sensor]:
        """What training reads besides."""
        return frozenset({"lidar_depth"}) if self.depth_weight > 0 else frozenset()

    def scaled(self, factor: float) -> Config:
        """Return the config with neck and context narrower; the backbone has widths of its own."""
        return self.model_copy(
            update={"neck_channels": scaled(self.neck_channels, factor), "channels": scaled(self.channels, factor)}
        )


class LiftSplatEncoder(nn.Module):
    """Images to ``bev_low``: backbone, neck, a depth distribution and a context vector per pixel, splat.

    With two key frames the maps of both lie side by side in the channels, both in the BEV frame of now; as published,
    no gradient flows through the earlier one.
    """

    depths: Tensor

    def __init__(self, config: Config, grid: BEVGrid) -> None:
        super().__init__()
        self.config, self.grid, self.stride = config, grid, config.stride
        self.out_channels = config.channels * config.key_frames
        self.backbone, widths, strides = build_backbone(config.backbone)
        if config.stride not in strides:
            raise ConfigError(
                f"detector.encoder.stride is {config.stride}, but the backbone's stages have the strides "
                f"{', '.join(map(str, strides))}. Set one of them, or change backbone.options.out_features."
            )
        self.neck = ImageNeck(widths, strides, config.stride, config.neck_channels)
        self.register_buffer("depths", config.depth.values(), persistent=False)
        self.normalise = Normalise()
        kind = CameraAwareDepthNet if config.depth_net == "camera_aware" else PlainDepthNet
        self.image_channels = self.neck.out_channels
        self.depth_net = kind(self.neck.out_channels, len(self.depths), config.channels)
        self.aggregation = DepthAggregation(config.channels) if config.aggregation else None
        self.norm = nn.BatchNorm2d(self.out_channels) if config.norm else nn.Identity()

    def forward(self, batch: Batch) -> CameraMaps:
        """Return ``bev_low`` of the batch's images, and depth logits and features of the frame's own images."""
        now, *earlier = _shots(batch, self.config.key_frames)
        bev, depth, features = self._lift(now)
        maps = [bev]
        for shot in earlier:
            with torch.no_grad():
                maps.append(self._lift(shot)[0])
        depth, features = (each.view(len(batch), -1, *each.shape[1:]) for each in (depth, features))
        return CameraMaps(self.norm(torch.cat(maps, dim=1)), depth, features)

    def depth_loss(self, logits: Float[Tensor, "B N D H W"], depth: Sequence[LidarDepth]) -> Float[Tensor, ""]:
        """Return BEVDepth's depth loss times ``depth_weight``.

        Args:
            depth: of each frame, in view pixels.
        """
        B, N, D, H, W = logits.shape
        together = LidarDepth(
            torch.cat([each.cameras + frame * N for frame, each in enumerate(depth)]),
            torch.cat([each.pixels for each in depth]),
            torch.cat([each.depth_m for each in depth]),
        )
        bins = self.config.depth
        with torch.autocast(logits.device.type, enabled=False):
            target = depth_targets(together, B * N, H, W, self.stride, bins.start, bins.step, D)
            return self.config.depth_weight * depth_loss(logits.flatten(0, 1), target)

    def _lift(self, shot: _Shot) -> tuple[Float[Tensor, "B C Y X"], Float[Tensor, "M D H W"], Float[Tensor, "M F H W"]]:
        """Return the map of one key frame, and depth logits and features of its images."""
        B, N = shot.images.shape[:2]
        feature = self.neck(list(self.backbone(self.normalise(shot.images.flatten(0, 1))).feature_maps))
        H, W = feature.shape[-2:]
        # Half precision would put one point in fifty into another cell.
        with torch.autocast(feature.device.type, enabled=False):
            rays = _rays(self._pixels(H, W), shot.intrinsics.flatten(0, 1))
            cells = self._cells(rays, shot.bev_from_camera.flatten(0, 1)).view(B, N * H * W, -1)
            camera = shot.camera_vector()
        plane = rays[..., :2].permute(0, 2, 1).reshape(B * N, 2, H, W).to(feature.dtype)
        logits, context = self.depth_net(feature, plane, camera)
        depth = logits.float().softmax(dim=1)
        if self.aggregation is not None:
            lifted = self.aggregation((depth[:, None] * context[:, :, None]).to(context.dtype))
            points = lifted.permute(0, 3, 4, 2, 1).reshape(B, N * H * W, -1, self.config.channels)
            return scatter(points, cells, self.grid.shape), logits, feature
        probability, content = (each.flatten(2).mT.reshape(B, N * H * W, -1) for each in (depth, context))
        return splat(probability, content, cells, self.grid.shape), logits, feature

    def _pixels(self, H: int, W: int) -> Float[Tensor, "P 2"]:
        """Return the image position (u, v) that each feature cell stands for."""
        device = self.depths.device
        if self.config.frustum == "stretched":
            # Products, not linspace: other runtimes round that differently, which moves points to other cells.
            u, v = (
                torch.arange(cells, device=device) * ((cells * self.stride - 1) / max(cells - 1, 1)) for cells in (W, H)
            )
        else:
            u, v = ((torch.arange(cells, device=device) + 0.5) * self.stride for cells in (W, H))
        rows, columns = torch.meshgrid(v, u, indexing="ij")
        return torch.stack([columns, rows], dim=-1).reshape(-1, 2)

    def _cells(self, rays: Float[Tensor, "M P 3"], bev_from_camera: Float[Tensor, "M 4 4"]) -> Int[Tensor, "M P D"]:
        """Return the flat BEV cell of each pixel at each depth, -1 outside the grid's x, y and z range."""
        rotated = product_3x3(bev_from_camera[:, None, :3, :3], rays)
        origin = bev_from_camera[:, None, :3, 3]
        x, y, z = (origin[..., i, None] + rotated[..., i, None] * self.depths for i in range(3))
        rows, columns = self.grid.shape
        column = ((x - self.grid.x_m[0]) / self.grid.cell_m).floor_()
        row = ((y - self.grid.y_m[0]) / self.grid.cell_m).floor_()
        inside = (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
        inside &= (z >= self.grid.z_m[0]) & (z < self.grid.z_m[1])
        return torch.where(inside, row * columns + column, -1).long()


@dataclass(frozen=True)
class _Shot:
    """The images of one key frame, of all frames of a batch."""

    images: UInt8[Tensor, "B N 3 H W"]
    intrinsics: Float[Tensor, "B N 3 3"]
    bev_from_camera: Float[Tensor, "B N 4 4"]
    view_from_original: Float[Tensor, "B N 3 3"]
    augmentation: Float[Tensor, "B 4 4"]

    def camera_vector(self) -> Float[Tensor, "M 27"]:
        """Return the values that describe each camera."""
        cameras = self.images.shape[1]
        return camera_vector(
            self.intrinsics.flatten(0, 1).float(),
            self.view_from_original.flatten(0, 1).float(),
            self.bev_from_camera.flatten(0, 1).float(),
            self.augmentation.repeat_interleave(cameras, dim=0),
        )


def _shots(batch: Batch, key_frames: int) -> list[_Shot]:
    """Return the batch's images, key frame by key frame."""
    found = (batch.images, batch.intrinsics, batch.bev_from_camera, batch.view_from_original)
    cameras = [each for each in found if each is not None]
    if len(cameras) < len(found):
        raise ValueError(
            "the lift_splat encoder needs images with intrinsics, bev_from_camera and view_from_original in the batch"
        )
    augmentation = torch.stack([affine.matrix() for affine in batch.affines]).to(cameras[1])
    in_order = zip(*(each.chunk(key_frames, dim=1) for each in cameras), strict=True)
    return [_Shot(images, intrinsics, pose, view, augmentation) for images, intrinsics, pose, view in in_order]


def _rays(pixels: Float[Tensor, "P 2"], intrinsics: Float[Tensor, "M 3 3"]) -> Float[Tensor, "M P 3"]:
    """Return the camera-frame direction of each pixel, scaled to depth 1."""
    homogeneous = torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1)
    return product_3x3(inverse_3x3(intrinsics.float())[:, None], homogeneous.expand(len(intrinsics), -1, -1))


def build(config: Config, grid: BEVGrid) -> LiftSplatEncoder:
    """Return the encoder for ``grid``."""
    return LiftSplatEncoder(config, grid)
