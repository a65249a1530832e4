"""Image networks of transformers, and the neck that brings their stages to one stride."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor, nn

from bevkd.config import StrictModel
from bevkd.errors import CheckpointError

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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


class Normalise(nn.Module):
    """8-bit RGB to what image networks were trained on: zero mean and unit variance over ImageNet."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(_IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, images: UInt8[Tensor, "M 3 H W"]) -> Float[Tensor, "M 3 H W"]:
        """Return normalised images."""
        return (images.to(self.mean.dtype) / 255 - self.mean) / self.std


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


def build_backbone(config: BackboneConfig) -> tuple[nn.Module, list[int], list[int]]:
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
