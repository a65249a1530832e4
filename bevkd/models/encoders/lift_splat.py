"""Camera encoder: lift, splat, shoot (Philion and Fidler, arXiv 2008.05711) on any transformers image backbone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from bevkd.config import PluginConfig, StrictModel
from bevkd.data.collate import Batch
from bevkd.data.source import Sensor
from bevkd.errors import CheckpointError, ConfigError
from bevkd.grid import BEVGrid
from bevkd.models.bev_encoder import conv_bn_relu
from bevkd.models.splat import splat

SENSORS: frozenset[Sensor] = frozenset({"camera"})
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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


class BackboneConfig(StrictModel):
    """An image network of transformers' ``AutoBackbone``.

    Attributes:
        model_type: e.g. ``resnet``, ``convnext``, ``swin``.
        options: keys of that model type's config, e.g. ``depths`` and ``out_features``.
        weights: a local folder in the hub's layout (config.json, model.safetensors); None starts from random.
    """

    model_type: str = "resnet"
    options: dict[str, Any] = Field(default_factory=dict)
    weights: Path | None = None


class Config(PluginConfig):
    """Config of the camera encoder.

    Attributes:
        image_height, image_width: size of the view that the network sees, in pixels.
        stride: of the feature map that is lifted; one of the backbone's stage strides.
        neck_channels: width of each stage in the neck (their concatenation is lifted).
        channels: of ``bev_low``.
        norm: batch norm on the splatted map; without it ``bev_low`` is the raw sum, as published.
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

    @model_validator(mode="after")
    def _check(self) -> Config:
        for name, size in (("image_height", self.image_height), ("image_width", self.image_width)):
            if size <= 0 or size % 32:
                raise ValueError(f"{name} must be a positive multiple of 32, got {size}")
        return self


class ImageNeck(nn.Module):
    """Brings the stages of a backbone to one stride and concatenates them (SECONDFPN)."""

    def __init__(self, in_channels: list[int], strides: list[int], stride: int, channels: int) -> None:
        super().__init__()
        self.out_channels = channels * len(in_channels)
        self.levels = nn.ModuleList()
        for width, own in zip(in_channels, strides, strict=True):
            if own > stride:
                layer: nn.Module = nn.ConvTranspose2d(width, channels, own // stride, own // stride, bias=False)
            else:
                layer = nn.Conv2d(width, channels, stride // own, stride // own, bias=False)
            self.levels.append(nn.Sequential(layer, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)))

    def forward(self, stages: list[Tensor]) -> Tensor:
        """Return ``[B, C, H / stride, W / stride]``."""
        return torch.cat([level(stage) for level, stage in zip(self.levels, stages, strict=True)], dim=1)


class LiftSplatEncoder(nn.Module):
    """Images to ``bev_low``: backbone, neck, a depth distribution and a context vector per pixel, splat.

    The two coordinates of each pixel's viewing ray join the features, so that resized and cropped images still tell
    where the horizon is.
    """

    mean: Tensor
    std: Tensor
    depths: Tensor

    def __init__(self, config: Config, grid: BEVGrid) -> None:
        super().__init__()
        self.grid, self.stride, self.out_channels = grid, config.stride, config.channels
        self.backbone, widths, strides = _backbone(config.backbone)
        if config.stride not in strides:
            raise ConfigError(
                f"detector.encoder.stride is {config.stride}, but the backbone's stages have the strides "
                f"{', '.join(map(str, strides))}. Set one of them, or change backbone.options.out_features."
            )
        self.neck = ImageNeck(widths, strides, config.stride, config.neck_channels)
        self.register_buffer("depths", config.depth.values(), persistent=False)
        self.register_buffer("mean", torch.tensor(_IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_IMAGENET_STD).view(3, 1, 1), persistent=False)
        width = self.neck.out_channels
        self.depth_net = nn.Sequential(
            *conv_bn_relu(width + 2, width, 3), nn.Conv2d(width, len(self.depths) + config.channels, 1)
        )
        self.norm = nn.BatchNorm2d(config.channels) if config.norm else nn.Identity()

    def forward(self, batch: Batch) -> Float[Tensor, "B C Y X"]:
        """Return ``bev_low`` of the batch's images."""
        if batch.images is None or batch.intrinsics is None or batch.bev_from_camera is None:
            raise ValueError("the lift_splat encoder needs images with calibration in the batch")
        B, N = batch.images.shape[:2]
        images = batch.images.flatten(0, 1).to(self.mean.dtype) / 255
        stages = self.backbone((images - self.mean) / self.std).feature_maps
        feature = self.neck(list(stages))
        H, W = feature.shape[-2:]
        # Half precision would put one point in fifty into another cell.
        with torch.autocast(feature.device.type, enabled=False):
            rays = _rays(self._pixels(H, W), batch.intrinsics.flatten(0, 1))
            cells = self._cells(rays, batch.bev_from_camera.flatten(0, 1))
        plane = rays[..., :2].permute(0, 2, 1).reshape(B * N, 2, H, W).to(feature.dtype)
        lifted = self.depth_net(torch.cat([feature, plane], dim=1))
        depth, context = lifted.flatten(2).permute(0, 2, 1).split([len(self.depths), self.out_channels], dim=-1)
        bev = splat(
            depth.float().softmax(dim=-1).reshape(B, N * H * W, -1),
            context.reshape(B, N * H * W, -1),
            cells.view(B, N * H * W, -1),
            self.grid.shape,
        )
        return self.norm(bev)  # type: ignore[no-any-return]

    def _pixels(self, H: int, W: int) -> Float[Tensor, "P 2"]:
        """Return the image position (u, v) of each feature cell's centre."""
        v, u = torch.meshgrid(
            torch.arange(H, device=self.mean.device), torch.arange(W, device=self.mean.device), indexing="ij"
        )
        return (torch.stack([u, v], dim=-1).reshape(-1, 2) + 0.5) * self.stride

    def _cells(self, rays: Float[Tensor, "M P 3"], bev_from_camera: Float[Tensor, "M 4 4"]) -> Int[Tensor, "M P D"]:
        """Return the flat BEV cell of each pixel at each depth, -1 outside the grid's x, y and z range."""
        rotated = torch.einsum("mij,mpj->mpi", bev_from_camera[:, :3, :3], rays)
        origin = bev_from_camera[:, None, :3, 3]
        x, y, z = (origin[..., i, None] + rotated[..., i, None] * self.depths for i in range(3))
        rows, columns = self.grid.shape
        column = ((x - self.grid.x_m[0]) / self.grid.cell_m).floor_()
        row = ((y - self.grid.y_m[0]) / self.grid.cell_m).floor_()
        inside = (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
        inside &= (z >= self.grid.z_m[0]) & (z < self.grid.z_m[1])
        return torch.where(inside, row * columns + column, -1).long()


def _rays(pixels: Float[Tensor, "P 2"], intrinsics: Float[Tensor, "M 3 3"]) -> Float[Tensor, "M P 3"]:
    """Return the camera-frame direction of each pixel, scaled to depth 1."""
    homogeneous = torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1)
    return torch.einsum("mij,pj->mpi", torch.linalg.inv(intrinsics.float()), homogeneous)


def _backbone(config: BackboneConfig) -> tuple[nn.Module, list[int], list[int]]:
    """Return the image network, its stages' channels and their strides."""
    from transformers import AutoBackbone, AutoConfig

    if config.weights is not None:
        network = _pretrained(config.weights, config.options)
    else:
        settings = AutoConfig.for_model(config.model_type, **config.options)
        network = AutoBackbone.from_config(settings)  # type: ignore[no-untyped-call]
    side = 128
    with torch.no_grad():
        network.eval()
        stages = network(torch.zeros(1, 3, side, side)).feature_maps
        network.train()
    return network, [stage.shape[1] for stage in stages], [math.ceil(side / stage.shape[-1]) for stage in stages]


def _pretrained(folder: Path, options: dict[str, Any]) -> nn.Module:
    """Return the image network of a local folder.

    Raises:
        CheckpointError: there is no such folder, or a weight is missing from it.
    """
    from transformers import AutoBackbone, AutoConfig

    if not folder.is_dir():
        raise CheckpointError(
            f"backbone weights: no such folder {folder}. Give a local folder with config.json and "
            "model.safetensors, or set detector.encoder.backbone.weights: null for a random start."
        )
    # AutoBackbone.from_pretrained asks the hub even for a local folder; the class behind it does not.
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True, **options)
    kind: Any = type(AutoBackbone.from_config(config))  # type: ignore[no-untyped-call]
    network, found = kind.from_pretrained(str(folder), config=config, local_files_only=True, output_loading_info=True)
    if found["missing_keys"]:
        raise CheckpointError(
            f"backbone weights in {folder} lack {', '.join(sorted(found['missing_keys'])[:5])}. "
            "Make detector.encoder.backbone.options fit the folder's config.json."
        )
    return network  # type: ignore[no-any-return]


def build(config: Config, grid: BEVGrid) -> LiftSplatEncoder:
    """Return the encoder for ``grid``."""
    return LiftSplatEncoder(config, grid)
