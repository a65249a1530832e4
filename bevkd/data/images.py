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
    """A resize followed by a crop (and a mirror) of an original image.

    An original pixel ``(u, v)`` lands on ``(u * scale - left, v * scale - top)``, mirrored in x if ``flip``.
    The crop may reach beyond the image; the outside is black.

    Attributes:
        height, width: size of the view in pixels.
        scale: view pixels per original pixel.
        left, top: offset of the crop in the resized image, pixels.
        flip: mirror left and right after the crop.
    """

    height: int
    width: int
    scale: float
    left: int = 0
    top: int = 0
    flip: bool = False

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
        shift = torch.tensor([[self.scale, 0.0, -self.left], [0.0, self.scale, -self.top], [0.0, 0.0, 1.0]])
        if not self.flip:
            return shift
        mirror = torch.tensor([[-1.0, 0.0, float(self.width)], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        return mirror @ shift


def read_image(
    path: Path, view: ImageView | None = None, size: tuple[int, int] | None = None
) -> UInt8[Tensor, "3 H W"]:
    """Return ``view`` of the RGB image at ``path``, or the whole image if ``view`` is None.

    A JPEG is decoded at the smallest of its built-in scales (1, 1/2, 1/4, 1/8) that still holds the view's detail; one
    antialiased resize of the visible region does the rest. Pixels whose centre lies outside the image are black.

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
            pixels = np.array(image.convert("RGB")) if view is None else _render(image, view)
    except FileNotFoundError as error:
        raise DataError(f"no such image: {path}. Download it again, or leave its frame out.") from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise DataError(f"{path} cannot be decoded: {error}. Download it again, or leave its frame out.") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _render(image: Image.Image, view: ImageView) -> npt.NDArray[np.uint8]:
    canvas = np.zeros((view.height, view.width, 3), dtype=np.uint8)
    across = _Span.of(image.width, view.scale, view.left, view.width)
    down = _Span.of(image.height, view.scale, view.top, view.height)
    if across.start < across.whole and down.start < down.whole:
        original = image.size
        # Decoders that can scale for free (JPEG) do so here; the others ignore the hint.
        draft = image.draft("RGB", (math.ceil(original[0] * view.scale), math.ceil(original[1] * view.scale)))
        x, y = (draft[1][2] / original[0], draft[1][3] / original[1]) if draft else (1.0, 1.0)
        part = image.convert("RGB")
        part = part.resize(
            (across.whole - across.start, down.whole - down.start),
            Image.Resampling.BILINEAR,
            box=(across.low * x, down.low * y, min(across.high * x, part.width), min(down.high * y, part.height)),
        )
        border = ((0, down.stop - down.whole), (0, across.stop - across.whole), (0, 0))
        canvas[down.start : down.stop, across.start : across.stop] = np.pad(np.asarray(part), border, mode="edge")
    return np.ascontiguousarray(canvas[:, ::-1]) if view.flip else canvas


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
