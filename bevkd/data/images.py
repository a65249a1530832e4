"""Views of camera images: which part of the original the network sees, at which scale."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from bevkd.errors import DataError


@dataclass(frozen=True)
class ImageView:
    """A resize, then a crop, then a mirror, then a turn of an original image: BEVDepth's order.

    An original pixel ``(u, v)`` lands on ``(u * scale - left, v * scale - top)``, mirrored in x if ``flip``, turned
    about the centre of the view. The view may reach beyond the image; the outside is black.

    Attributes:
        height, width: size of the view in pixels.
        scale: view pixels per original pixel.
        left, top: offset of the crop in the resized image, pixels.
        flip: mirror left and right after the crop.
        rotation_rad: turn after the mirror, counter-clockwise as people see it.
    """

    height: int
    width: int
    scale: float
    left: int = 0
    top: int = 0
    flip: bool = False
    rotation_rad: float = 0.0

    @classmethod
    def cover(cls, original: tuple[int, int], height: int, width: int, zoom: float = 1.0) -> ImageView:
        """Return the smallest view of ``height x width`` that covers the width of an ``(H, W)`` original.

        The crop keeps the bottom and the horizontal centre (BEVDepth's test-time crop: the sky goes first).
        ``zoom`` > 1 magnifies about that anchor.
        """
        scale = max(height / original[0], width / original[1]) * zoom
        resized_height, resized_width = round(original[0] * scale), round(original[1] * scale)
        return cls(height, width, scale, left=(resized_width - width) // 2, top=resized_height - height)

    def matrix(self) -> Float[Tensor, "3 3"]:
        """Return the pixel transform ``view_from_original`` (multiplies homogeneous edge-based pixels)."""
        view = torch.tensor([[self.scale, 0.0, -self.left], [0.0, self.scale, -self.top], [0.0, 0.0, 1.0]])
        if self.flip:
            view = torch.tensor([[-1.0, 0.0, float(self.width)], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]) @ view
        if self.rotation_rad:
            cos, sin = math.cos(self.rotation_rad), math.sin(self.rotation_rad)
            x, y = self.width / 2, self.height / 2
            view = (
                torch.tensor([[cos, sin, x - cos * x - sin * y], [-sin, cos, y + sin * x - cos * y], [0, 0, 1]]) @ view
            )
        return view


def read_image(
    path: Path, view: ImageView | None = None, size: tuple[int, int] | None = None
) -> UInt8[Tensor, "3 H W"]:
    """Return ``view`` of the RGB image at ``path``, or the whole image if ``view`` is None.

    A JPEG is decoded at the smallest of its built-in scales (1, 1/2, 1/4, 1/8) that still holds the view's detail; one
    antialiased resampling of the visible region does the rest. Pixels whose centre lies outside the image are black.

    Args:
        path: image file.
        view: what to decode.
        size: ``(H, W)`` that the file must have, e.g. the size its calibration holds for.

    Raises:
        DataError: the file is missing, is no image, is truncated, or has another size than ``size``.
    """
    try:
        with Image.open(path) as image:
            if size is not None and (image.height, image.width) != size:
                raise DataError(
                    f"{path} is {image.width} x {image.height} pixels, its table says {size[1]} x {size[0]}. "
                    "Restore the original file, or correct width and height in the table."
                )
            if view is None:
                pixels = np.array(image.convert("RGB"))
            else:
                pixels = _turned(image, view) if view.rotation_rad else _upright(image, view)
    except FileNotFoundError as error:
        raise DataError(f"no such image: {path}. Download it again, or leave its frame out.") from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise DataError(f"{path} cannot be decoded: {error}. Download it again, or leave its frame out.") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _upright(image: Image.Image, view: ImageView) -> npt.NDArray[np.uint8]:
    """Return a view that is not turned, by an antialiased resize along each axis."""
    canvas = np.zeros((view.height, view.width, 3), dtype=np.uint8)
    across = _Span.of(image.width, view.scale, view.left, view.width)
    down = _Span.of(image.height, view.scale, view.top, view.height)
    if across.start < across.whole and down.start < down.whole:
        part, x, y = _decoded(image, view.scale)
        part = part.resize(
            (across.whole - across.start, down.whole - down.start),
            Image.Resampling.BILINEAR,
            box=(across.low * x, down.low * y, min(across.high * x, part.width), min(down.high * y, part.height)),
        )
        border = ((0, down.stop - down.whole), (0, across.stop - across.whole), (0, 0))
        canvas[down.start : down.stop, across.start : across.stop] = np.pad(np.asarray(part), border, mode="edge")
    return np.ascontiguousarray(canvas[:, ::-1]) if view.flip else canvas


def _turned(image: Image.Image, view: ImageView) -> npt.NDArray[np.uint8]:
    """Return a view that is turned: each pixel is the mean of as many bilinear samples as it has decoded pixels."""
    part, x, y = _decoded(image, view.scale)
    taps = max(1, round(min(x, y) / view.scale))
    finer = torch.diag(torch.tensor([taps, taps, 1.0], dtype=torch.float64))
    decoded = torch.diag(torch.tensor([x, y, 1.0], dtype=torch.float64))
    decoded_from_fine = decoded @ torch.linalg.inv(finer @ view.matrix().double())
    fine = part.transform(
        (view.width * taps, view.height * taps),
        Image.Transform.AFFINE,
        decoded_from_fine[:2].flatten().tolist(),
        Image.Resampling.BILINEAR,
    )
    return np.array(fine.reduce(taps))


def _decoded(image: Image.Image, scale: float) -> tuple[Image.Image, float, float]:
    """Return the pixels of an image that is wanted at ``scale``, and how large they are in x and y beside the original.

    Decoders that can scale for free (JPEG) do so; the others ignore the hint.
    """
    original = image.size
    draft = image.draft("RGB", (math.ceil(original[0] * scale), math.ceil(original[1] * scale)))
    x, y = (draft[1][2] / original[0], draft[1][3] / original[1]) if draft else (1.0, 1.0)
    return image.convert("RGB"), x, y


@dataclass(frozen=True)
class _Span:
    """One axis of a view: which of its pixels show the image, and which part of the original they show.

    Attributes:
        start, whole: first pixel inside, and the end of those that lie inside with their whole area.
        stop: end of those whose centre lies inside; at most one more than ``whole``.
        low, high: what ``start`` to ``whole`` covers, in original pixels.
    """

    start: int
    whole: int
    stop: int
    low: float
    high: float

    @classmethod
    def of(cls, size: int, scale: float, offset: int, length: int) -> _Span:
        """Return the span of a view of ``length`` pixels that starts at ``offset`` in an axis resized by ``scale``."""
        slack = 1e-3  # of a pixel: scales are quotients of sizes, their products miss whole numbers by rounding
        end = size * scale - offset
        start = max(0, -offset)
        whole = min(length, math.floor(end + slack))
        stop = min(length, max(whole, math.ceil(end - 0.5 - slack)))
        return cls(start, whole, stop, (start + offset) / scale, (whole + offset) / scale)
