"""Training-time augmentation: one BEV affine per frame, one view per camera image, brightness.

Both are drawn before anything is loaded: an image is decoded straight into its view, and the BEV affine also reaches
the cached teacher maps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from bevkd.config import StrictModel
from bevkd.data.images import ImageView
from bevkd.geometry.affine import BEVAffine, BEVAffineConfig
from bevkd.types import Frame


class ImageAugment(StrictModel):
    """How camera images are varied.

    Attributes:
        zoom: range of magnification relative to the view that covers the image's width. BEVDepth and UniDistill
            (resize 0.386 to 0.55 of 1600 x 900 for 704 pixels) are [0.877, 1.25].
        shift: move the crop sideways anywhere inside the image.
        flip: mirror half of the images.
        rotation_deg: range of a turn about the centre of the view, after crop and mirror; its corners may be black.
            BEVDepth and UniDistill: [-5.4, 5.4].
        brightness: range of a factor on the pixel values of each image.
    """

    zoom: tuple[float, float] = (1.0, 1.0)
    shift: bool = False
    flip: bool = False
    rotation_deg: tuple[float, float] = (0.0, 0.0)
    brightness: tuple[float, float] = (1.0, 1.0)

    @model_validator(mode="after")
    def _check(self) -> ImageAugment:
        for name, (low, high) in (("zoom", self.zoom), ("brightness", self.brightness)):
            if not 0 <= low <= high:
                raise ValueError(f"{name} must be [low, high] with 0 <= low <= high, got [{low}, {high}]")
        if self.zoom[0] == 0:
            raise ValueError(f"zoom must be positive, got {list(self.zoom)}")
        if self.rotation_deg[0] > self.rotation_deg[1]:
            raise ValueError(f"rotation_deg must be [low, high] with low <= high, got {list(self.rotation_deg)}")
        return self


_PUBLISHED_IMAGE = {"zoom": (0.877, 1.25), "shift": True, "flip": True, "rotation_deg": (-5.4, 5.4)}
PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "none": {},
    "d4": {"bev": {"flip": True, "quarter_turns": True}},
    "bevdepth": {
        "bev": {"flip": True, "rotation_deg": (-22.5, 22.5), "scale": (0.95, 1.05)},
        "image": _PUBLISHED_IMAGE,
    },
    "unidistill": {
        "bev": {"flip": True, "rotation_deg": (-45, 45), "scale": (0.9, 1.1), "translation_std_m": 0.5},
        "image": _PUBLISHED_IMAGE,
    },
}
"""What a recipe may name instead: BEVDepth (arXiv 2206.10092) and UniDistill (arXiv 2303.15083) as published, and
``d4``, which is exact on cached maps of a symmetric grid."""

_MIXES_FRAMES = re.compile("paste|gt_?(aug|sampl)|sampler|mosaic|mix_?up|cut_?mix|polar_?mix", re.IGNORECASE)


class AugmentConfig(StrictModel):
    """How training frames are varied; the name of a preset (none, d4, bevdepth, unidistill) stands for its values.

    Attributes:
        bev: of points, rig geometry, boxes and cached maps alike.
        image: of camera images.
    """

    bev: BEVAffineConfig = Field(default_factory=BEVAffineConfig)
    image: ImageAugment = ImageAugment()

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, value: object) -> object:
        if isinstance(value, str):
            if value not in PRESETS:
                raise ValueError(f"'{value}' is no preset; there are {', '.join(PRESETS)}, or give bev and image")
            return PRESETS[value]
        if isinstance(value, Mapping):
            parts = [value, *(part for part in value.values() if isinstance(part, Mapping))]
            mixing = [str(key) for part in parts for key in part if _MIXES_FRAMES.search(str(key))]
            if mixing:
                raise ValueError(
                    f"{', '.join(mixing)}: objects or images of other frames cannot be mixed in. A cache holds what "
                    "the teacher saw in each frame alone; of an object that is pasted in, and of what it would hide, "
                    "it knows nothing. Leave it out (the published nuScenes students train without)"
                )
        return value


def _uniform(limits: tuple[float, float], generator: torch.Generator) -> float:
    return limits[0] + (limits[1] - limits[0]) * float(torch.rand((), generator=generator))


def draw_view(
    original: tuple[int, int], height: int, width: int, config: ImageAugment, generator: torch.Generator
) -> ImageView:
    """Return a random view of an ``(H, W)`` image; before it is turned, its bottom is the bottom of the image."""
    view = ImageView.cover(original, height, width, zoom=_uniform(config.zoom, generator))
    spare = round(original[1] * view.scale) - width
    if config.shift and spare > 0:
        view = replace(view, left=int(_uniform((0, spare + 1), generator)))
    view = replace(view, flip=config.flip and _uniform((0, 1), generator) < 0.5)
    if config.rotation_deg == (0.0, 0.0):
        return view
    return replace(view, rotation_rad=math.radians(_uniform(config.rotation_deg, generator)))


def scale_brightness(images: Tensor, config: ImageAugment, generator: torch.Generator) -> Tensor:
    """Return uint8 ``images [N, 3, H, W]`` with one random factor per image."""
    if config.brightness == (1.0, 1.0):
        return images
    factors = torch.tensor([_uniform(config.brightness, generator) for _ in images])
    return (images * factors[:, None, None, None]).clamp_(0, 255).to(torch.uint8)


def apply_affine(frame: Frame, affine: BEVAffine) -> Frame:
    """Return ``frame`` with points, rig and boxes moved by the BEV affine; images stay as they are."""
    matrix = affine.matrix()
    return replace(
        frame,
        points=None if frame.points is None else affine.apply_to_points(frame.points),
        boxes=None if frame.boxes is None else affine.apply_to_boxes(frame.boxes),
        rig=None
        if frame.rig is None
        else replace(frame.rig, lidar_from_camera=(matrix @ frame.rig.lidar_from_camera.double()).float()),
        radar=None if frame.radar is None else _move_radar(frame.radar, affine),
    )


def _move_radar(radar: Float[Tensor, "R 7"], affine: BEVAffine) -> Float[Tensor, "R 7"]:
    """Return radar returns with positions moved and velocities turned with them."""
    return torch.cat(
        [affine.apply_to_points(radar[:, :3]), affine.apply_to_vectors(radar[:, 3:5]), radar[:, 5:]], dim=1
    )
