"""Cameras, bird's-eye views and maps within a page: pictures as data, and boxes over them as SVG."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor

from bevkd.geometry.boxes import bev_corners
from bevkd.grid import BEVGrid
from bevkd.types import Boxes, Frame, Rig
from bevkd.viz.bev import NOSE_M, point_shade
from bevkd.viz.camera import reading_order
from bevkd.viz.html.element import Html, element, number
from bevkd.viz.maps import robust_range
from bevkd.viz.projection import Segments, visible_edges
from bevkd.viz.style import ENERGY_COLORS, ramp

CAMERA_PX = 480
"""Width of an embedded camera image; smaller ones stay as they are."""

CAMERA_UNITS = 1000
"""Width of the coordinates that boxes on a camera image are drawn in."""

JPEG_QUALITY = 78
POINTS_PX = 420
POINT_SHADES = 12
"""Of points per pixel: fewer shades, fewer bytes."""

RINGS_M = (10, 20, 30, 50)


@dataclass(frozen=True)
class Layer:
    """Boxes of one method in one frame.

    Attributes:
        tone: the method's colour class.
        right: whether each box stands where an annotated object of its class is.
        missed: whether each annotated object has no such box.
    """

    name: str
    tone: str
    boxes: Boxes
    right: Bool[Tensor, "n"]
    missed: Bool[Tensor, "m"]

    @property
    def summary(self) -> str:
        """What it found, in words."""
        found, total = int((~self.missed).sum()), len(self.missed)
        wrong = int((~self.right).sum())
        return f"{found} of {total} found, {wrong} false"


def camera_views(frame: Frame, truth: Boxes, layers: Sequence[Layer], classes: Sequence[str]) -> Html | None:
    """Return the frame's cameras in rows, with the boxes of every layer over them; None without cameras.

    Args:
        classes: names of the labels.
    """
    if frame.images is None or frame.rig is None:
        return None
    order = [camera for camera in reading_order(frame.rig.names) if camera < len(frame.images)]
    views = [_camera(frame.images, frame.rig, camera, truth, layers, classes) for camera in order]
    return element("div", views, class_="cameras")


def points_defs(points: Float[Tensor, "P c"] | None, grid: BEVGrid, name: str) -> Html | None:
    """Return the points of a frame as an image that :func:`top_view` shows by its ``name``, drawn once per page."""
    if points is None:
        return None
    shade = point_shade(points, grid, POINTS_PX).flip(0).numpy()
    alpha = np.ceil(shade * POINT_SHADES) / POINT_SHADES * 255
    black = np.zeros_like(alpha)
    picture = Image.fromarray(np.stack([black, alpha], axis=-1).round().astype(np.uint8), "LA")
    x, y, width, height = _window(grid)
    image = element(
        "image", id=name, href=_png(picture), x=x, y=y, width=width, height=height, preserveAspectRatio="none"
    )
    return element("svg", element("defs", image), width=0, height=0, aria_hidden="true", class_="hidden")


def top_view(layer: Layer, truth: Boxes, grid: BEVGrid, classes: Sequence[str], points: str | None) -> Html:
    """Return a bird's-eye view of one layer: annotated objects found and missed, boxes right and false.

    Args:
        points: name of the picture of the points.
    """
    window = _window(grid)
    seen = [radius for radius in RINGS_M if radius < max(-window[0], window[0] + window[2])]
    rings = [element("circle", cx=0, cy=0, r=radius, class_="ring") for radius in seen]
    small = f"font-size:{number(window[2] / 32)}px"
    rings += [element("text", f"{radius} m", x=radius - 0.4, y=-0.5, text_anchor="end", style=small) for radius in seen]
    ego = element("path", d="M0-1.6L1-.0 1 1.2-1 1.2-1 0Z", class_="ego")
    objects = [
        _outline(truth, row, classes, "missed" if missed else "truth", "missed" if missed else "found")
        for row, missed in enumerate(layer.missed.tolist())
    ]
    boxes = [
        _outline(layer.boxes, row, classes, "true" if right else "false", "right" if right else "false")
        for row, right in enumerate(layer.right.tolist())
    ]
    svg = element(
        "svg",
        rings,
        element("use", href=f"#{points}", class_="points") if points else None,
        ego,
        element("g", objects, class_="layer c-truth"),
        element("g", boxes),
        viewBox=" ".join(number(each) for each in window),
        role="img",
        aria_label=f"Bird's-eye view, {layer.name}: {layer.summary}",
    )
    caption = element(
        "figcaption", element("span", class_="swatch"), element("b", layer.name), element("br"), layer.summary
    )
    return element("figure", svg, caption, class_=f"top layer {layer.tone}")


def map_view(values: Float[Tensor, "Y X"], grid: BEVGrid, truth: Boxes | None, name: str, tone: str, what: str) -> Html:
    """Return a map on the grid, a pixel per cell, on its own scale from light to dark, with objects outlined."""
    low, high = robust_range(values)
    share = ((values.float() - low) / (high - low)).clamp(0, 1).nan_to_num().flip(0)
    picture = Image.fromarray((share * 255).round().to(torch.uint8).numpy(), "L")
    picture.putpalette([part for color in ramp(ENERGY_COLORS) for part in color])
    window = _window(grid)
    outlines = [] if truth is None else [element("path", d=_corners(truth, row)) for row in range(len(truth))]
    shape = f"{number(window[2])} / {number(window[3])}"
    view = element(
        "div",
        element("img", src=_png(picture), alt=f"{what}, {name}", style=f"--shape:{shape}"),
        element(
            "svg",
            element("g", outlines, class_="outline"),
            viewBox=" ".join(number(each) for each in window),
            preserveAspectRatio="none",
            aria_hidden="true",
        ),
        class_="view",
    )
    return element("figure", view, element("figcaption", element("span", class_="swatch"), name), class_=f"map {tone}")


def _camera(
    images: UInt8[Tensor, "N 3 H W"],
    rig: Rig,
    camera: int,
    truth: Boxes,
    layers: Sequence[Layer],
    classes: Sequence[str],
) -> Html:
    image = Image.fromarray(np.ascontiguousarray(images[camera].permute(1, 2, 0).numpy()))
    scale = CAMERA_UNITS / image.width
    size = (CAMERA_UNITS, round(image.height * scale))
    intrinsics = torch.tensor([scale, scale, 1.0]).diag() @ rig.intrinsics[camera].float()

    def drawn(name: str, tone: str, boxes: Boxes) -> Html | None:
        pose = rig.lidar_from_camera[camera].float()
        segments = visible_edges(boxes.values, intrinsics, pose, size[1], size[0])
        return _projected(segments, name, tone, boxes, classes)

    place = rig.names[camera].removeprefix("CAM_").replace("_", " ").lower()
    seen = [drawn("annotated", "c-truth", truth), *(drawn(layer.name, layer.tone, layer.boxes) for layer in layers)]
    overlay = element("svg", seen, viewBox=f"0 0 {size[0]} {size[1]}", aria_hidden="true")
    picture = element("img", src=_jpeg(image), alt=f"camera {place}", width=image.width, height=image.height)
    return element("figure", picture, overlay, element("figcaption", place), class_="view")


def _projected(segments: Segments, name: str, tone: str, boxes: Boxes, classes: Sequence[str]) -> Html | None:
    """Return the edges of a method's boxes in one image, dark beneath, each box with its class and score in words."""
    ends = segments.ends_px.round().int().flatten(1).tolist()
    if not ends:
        return None
    lines: dict[int, dict[bool, list[str]]] = {}
    for (u0, v0, u1, v1), box, front in zip(ends, segments.box.tolist(), segments.front.tolist(), strict=True):
        lines.setdefault(box, {False: [], True: []})[front].append(f"M{u0} {v0}L{u1} {v1}")
    everything = "".join(line for parts in lines.values() for side in parts.values() for line in side)
    drawn = [
        element(
            "g",
            element("title", f"{name}: {_words(boxes, row, classes)}"),
            element("path", d="".join(parts[False])) if parts[False] else None,
            element("path", d="".join(parts[True]), class_="front") if parts[True] else None,
        )
        for row, parts in lines.items()
    ]
    return element("g", element("path", d=everything, class_="halo"), drawn, class_=f"box layer {tone}")


def _outline(boxes: Boxes, row: int, classes: Sequence[str], kind: str, verdict: str) -> Html:
    """Return a box from above with a line through its front."""
    x, y, yaw = (float(boxes.values[row, column]) for column in (0, 1, 6))
    reach = float(boxes.size[row, 0]) / 2 + NOSE_M
    nose = (x + reach * float(np.cos(yaw)), y + reach * float(np.sin(yaw)))
    path = f"{_corners(boxes, row)}M{number(x)} {number(-y)}L{number(nose[0])} {number(-nose[1])}"
    title = element("title", f"{_words(boxes, row, classes)}: {verdict}")
    return element("g", title, element("path", d=path, class_=kind))


def _corners(boxes: Boxes, row: int) -> str:
    corners = bev_corners(boxes.values[row : row + 1].float())[0].tolist()
    return "M" + "L".join(f"{number(x)} {number(-y)}" for x, y in corners) + "Z"


def _words(boxes: Boxes, row: int, classes: Sequence[str]) -> str:
    score = float(boxes.scores[row])
    distance = float(boxes.center[row, :2].norm())
    known = f" {score:.2f}" if score < 1 else ""
    return f"{classes[int(boxes.labels[row])].replace('_', ' ')}{known}, {distance:.0f} m away"


def _window(grid: BEVGrid) -> tuple[float, float, float, float]:
    """Return left, top, width and height of the grid in the coordinates of a view from above: x right, y up."""
    return grid.x_m[0], -grid.y_m[1], grid.x_m[1] - grid.x_m[0], grid.y_m[1] - grid.y_m[0]


def _jpeg(image: Image.Image) -> str:
    if image.width > CAMERA_PX:
        image = image.resize((CAMERA_PX, round(image.height * CAMERA_PX / image.width)), Image.Resampling.LANCZOS)
    return _data("image/jpeg", image, format="JPEG", quality=JPEG_QUALITY, optimize=True)


def _png(image: Image.Image) -> str:
    return _data("image/png", image, format="PNG", optimize=True)


def _data(kind: str, image: Image.Image, **how: object) -> str:
    buffer = io.BytesIO()
    image.save(buffer, **how)  # type: ignore[arg-type]
    return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
