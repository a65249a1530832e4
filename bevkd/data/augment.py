"""Training-time augmentation: one BEV affine per frame, one view per camera image, brightness.

Both are drawn before anything is loaded: an image is decoded straight into its view, and the BEV affine also reaches
the cached teacher maps.
"""

from __future__ import annotations

from dataclasses import replace

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
        brightness: range of a factor on the pixel values of each image.
    """

    zoom: tuple[float, float] = (1.0, 1.0)
    shift: bool = False
    flip: bool = False
    brightness: tuple[float, float] = (1.0, 1.0)

    @model_validator(mode="after")
    def _check(self) -> ImageAugment:
        for name, (low, high) in (("zoom", self.zoom), ("brightness", self.brightness)):
            if not 0 <= low <= high:
                raise ValueError(f"{name} must be [low, high] with 0 <= low <= high, got [{low}, {high}]")
        if self.zoom[0] == 0:
            raise ValueError(f"zoom must be positive, got {list(self.zoom)}")
        return self


class AugmentConfig(StrictModel):
    """How training frames are varied.

    Attributes:
        bev: of points, rig geometry, boxes and cached maps alike.
        image: of camera images.
    """

    bev: BEVAffineConfig = Field(default_factory=BEVAffineConfig)
    image: ImageAugment = ImageAugment()


def _uniform(limits: tuple[float, float], generator: torch.Generator) -> float:
    return limits[0] + (limits[1] - limits[0]) * float(torch.rand((), generator=generator))


def draw_view(
    original: tuple[int, int], height: int, width: int, config: ImageAugment, generator: torch.Generator
) -> ImageView:
    """Return a random view of an ``(H, W)`` image; the bottom of the image always stays in sight."""
    view = ImageView.cover(original, height, width, zoom=_uniform(config.zoom, generator))
    spare = round(original[1] * view.scale) - width
    if config.shift and spare > 0:
        view = replace(view, left=int(_uniform((0, spare + 1), generator)))
    return replace(view, flip=config.flip and _uniform((0, 1), generator) < 0.5)


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
