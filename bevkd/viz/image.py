"""Figures and images as one thing: make, render, stack and save pictures."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageFont

from bevkd.errors import ConfigError
from bevkd.viz.style import DPI, ENERGY_COLORS, PAPER, ROLE_COLORS, rgb

Picture = Figure | Image.Image
"""What the drawing functions return and :func:`save` takes."""

MAX_BYTES = 1_500_000


def new_figure(width_px: int, height_px: int) -> Figure:
    """Return an empty figure of exactly this size, drawn by Agg and unknown to pyplot."""
    figure = Figure(figsize=(width_px / DPI, height_px / DPI), dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def axes_at(figure: Figure, left: int | float, top: int | float, width: int | float, height: int | float) -> Axes:
    """Return new axes whose frame covers this rectangle, in pixels from the figure's upper left corner."""
    total_width, total_height = (side * DPI for side in figure.get_size_inches())
    return figure.add_axes(
        (
            left / total_width,
            1 - (top + height) / total_height,
            width / total_width,
            height / total_height,
        )
    )


def text_at(figure: Figure, left: int | float, top: int | float, text: str, **style: object) -> None:
    """Write ``text`` with its anchor (upper left unless ``ha`` / ``va`` say otherwise) at a pixel of the figure."""
    width, height = (side * DPI for side in figure.get_size_inches())
    figure.text(left / width, 1 - top / height, text, **{"ha": "left", "va": "top", **style})  # type: ignore[arg-type]


def render(picture: Picture) -> Image.Image:
    """Return the picture as an RGB image."""
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    buffer = io.BytesIO()
    picture.savefig(buffer, format="rgba", dpi=picture.dpi)
    size = picture.canvas.get_width_height()
    return Image.frombytes("RGBA", size, buffer.getvalue()).convert("RGB")


def stack(pictures: Sequence[Picture], gap_px: int = 0, margin_px: int = 0) -> Image.Image:
    """Return the pictures one below the other, left aligned, on white."""
    images = [render(picture) for picture in pictures]
    width = max(image.width for image in images) + 2 * margin_px
    height = sum(image.height for image in images) + gap_px * (len(images) - 1) + 2 * margin_px
    page = Image.new("RGB", (width, height), rgb(PAPER))
    top = margin_px
    for image in images:
        page.paste(image, (margin_px, top))
        top += image.height + gap_px
    return page


@lru_cache(maxsize=16)
def font(size_px: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return the font that matplotlib draws with, so that text in images and in figures is alike."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size_px)


def save(picture: Picture, path: Path | str, max_bytes: int = MAX_BYTES) -> Path:
    """Write the picture as a PNG of at most ``max_bytes`` and return its path.

    The file appears whole or not at all. Pictures with much photographic content are first reduced to 256 colours,
    which keep the roles' colours, and then in size, until they fit. Missing folders are made.

    Raises:
        ConfigError: if the name does not end in ``.png``.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ConfigError(f"pictures are PNG files, but '{path}' does not end in .png. Rename it to '{path.stem}.png'.")
    data = _encode(render(picture), max_bytes)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        Path(partial).chmod(0o644)
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    return path


def _encode(image: Image.Image, max_bytes: int) -> bytes:
    data = _png(image)
    while len(data) > max_bytes:
        data = _png(_reduce_colors(image))
        if len(data) > max_bytes:
            shrink = min(0.95, (max_bytes / len(data)) ** 0.5)
            image = image.resize((max(1, int(image.width * shrink)), max(1, int(image.height * shrink))))
            if image.size == (1, 1):
                return _png(image)
    return data


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def _reduce_colors(image: Image.Image) -> Image.Image:
    """Return the image in a palette fitted to it plus the roles' and energy colours, which must stay exact."""
    fixed = [rgb(color) for color in (*ROLE_COLORS.values(), *ENERGY_COLORS, PAPER)]
    fitted = image.quantize(256 - len(fixed), method=Image.Quantize.FASTOCTREE).getpalette() or []
    palette = Image.new("P", (1, 1))
    palette.putpalette([*fitted[: 3 * (256 - len(fixed))], *(value for color in fixed for value in color)])
    return image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
