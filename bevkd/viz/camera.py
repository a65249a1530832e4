"""Camera mosaics with projected 3-D boxes and LiDAR points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from bevkd.errors import DataError
from bevkd.types import Boxes, Frame, Instances, Rig
from bevkd.viz.image import font
from bevkd.viz.projection import Segments, visible_edges, visible_points
from bevkd.viz.style import CLASS_COLORS, DEPTH_COLORS, INK, PAPER, ROLE_COLORS, ROLE_NAMES, Role, ramp, rgb

MOSAIC = ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT")
"""Reading order of the nuScenes rig; other cameras follow in the order of their rig."""

COLUMNS = 3
GAP_PX = 6
LEGEND_PX = 30
OVERSAMPLE = 2
"""Tiles are drawn at this multiple of their size and averaged down, which smooths every line."""

MAX_DEPTH_M = 60.0
BOLD_BOX_PX = 45 * OVERSAMPLE
"""Boxes lower than this on the canvas are drawn with thin lines."""

_MASK_OPACITY = 150
"""Of 255."""

MIN_TAG_BOX_PX = 26
"""Boxes lower than this in their tile get no class name: it would hide them."""


@dataclass(frozen=True)
class _Tile:
    """One camera at drawing scale: the canvas and its pinhole model in canvas pixels."""

    name: str
    canvas: Image.Image
    intrinsics: Float[Tensor, "3 3"]
    lidar_from_camera: Float[Tensor, "4 4"]

    def edges(self, boxes: Boxes) -> Segments:
        return visible_edges(
            boxes.values, self.intrinsics, self.lidar_from_camera, self.canvas.height, self.canvas.width
        )


def draw_cameras(
    frame: Frame,
    boxes: Mapping[Role, Boxes],
    classes: Sequence[str],
    *,
    points: Float[Tensor, "P c"] | None = None,
    instances: Instances | None = None,
    min_score: float = 0.0,
    tags: bool = True,
    legend: bool = True,
    tile_width_px: int = 560,
) -> Image.Image:
    """Return the frame's cameras in rows of three with boxes drawn on them.

    The nuScenes rig reads front left, front, front right / back left, back, back right. Edges are cut at the camera's
    near plane; the front face of a box has the bolder lines. Class names stand on large boxes of the last role.

    Args:
        frame: with images and rig; the image size is the one its rig speaks of.
        boxes: boxes of each role in the BEV frame; later roles are drawn over earlier ones.
        classes: names of the labels.
        points: x, y, z in the BEV frame (m), further columns ignored; coloured by depth when given.
        instances: in pixels of these images; their masks are filled with the colour of their class.
        min_score: boxes below this score are left out.
        tags: whether to write class names.
        legend: whether to add a line with the roles' colours.
        tile_width_px: width of one camera in the mosaic.

    Raises:
        DataError: if the frame was loaded without cameras.
    """
    if frame.images is None or frame.rig is None:
        raise DataError(f"frame '{frame.token}' was loaded without cameras. Load it with sensors={{'camera'}}.")
    order = reading_order(frame.rig.names)
    tiles = [_tile(frame.images, frame.rig, camera, tile_width_px) for camera in order]
    for camera, tile in zip(order, tiles, strict=True):
        if points is not None:
            _draw_points(tile, points)
        if instances is not None:
            own = (instances.cameras.cpu() == camera) & (instances.scores.cpu() >= min_score)
            _draw_instances(tile, instances[own.nonzero().squeeze(1)], classes, frame.images.shape[-1], tags)
        for position, (role, all_boxes) in enumerate(boxes.items()):
            shown = all_boxes.to("cpu")[all_boxes.scores.cpu() >= min_score]
            segments = tile.edges(shown)
            _draw_edges(tile, segments, role, shown)
            if tags and position == len(boxes) - 1:
                _draw_tags(tile, segments, shown, role, classes)
        _draw_name(tile)
    mosaic = _assemble(tiles)
    return _with_legend(mosaic, tuple(boxes), points is not None) if legend else mosaic


def reading_order(names: Sequence[str]) -> list[int]:
    """Return the indices of cameras as the mosaic shows them."""
    return sorted(range(len(names)), key=lambda i: MOSAIC.index(names[i]) if names[i] in MOSAIC else len(MOSAIC) + i)


def _tile(images: UInt8[Tensor, "N 3 H W"], rig: Rig, camera: int, tile_width_px: int) -> _Tile:
    image = images[camera].cpu()
    height, width = image.shape[1:]
    scale = tile_width_px * OVERSAMPLE / width
    size = (tile_width_px * OVERSAMPLE, round(height * scale / OVERSAMPLE) * OVERSAMPLE)
    picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    shrink = torch.tensor([size[0] / width, size[1] / height, 1.0]).diag()
    return _Tile(
        rig.names[camera],
        picture.resize(size, Image.Resampling.BICUBIC),
        shrink @ rig.intrinsics[camera].float().cpu(),
        rig.lidar_from_camera[camera].float().cpu(),
    )


def _draw_points(tile: _Tile, points: Float[Tensor, "P c"]) -> None:
    """Draw points as small squares, near over far, coloured by depth."""
    pixels, depth = visible_points(
        points[:, :3].cpu(), tile.intrinsics, tile.lidar_from_camera, tile.canvas.height, tile.canvas.width
    )
    table = np.array(ramp(DEPTH_COLORS), dtype=np.uint8)
    shade = table[(depth.numpy() / MAX_DEPTH_M * 255).clip(0, 255).astype(np.int64)]
    pixel = pixels.numpy().astype(np.int64)
    canvas = np.array(tile.canvas)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            row = (pixel[:, 1] + down).clip(0, canvas.shape[0] - 1)
            column = (pixel[:, 0] + right).clip(0, canvas.shape[1] - 1)
            canvas[row, column] = shade
    tile.canvas.paste(Image.fromarray(canvas))


def _draw_instances(tile: _Tile, instances: Instances, classes: Sequence[str], width: int, tags: bool) -> None:
    """Fill masks, low scores before high ones, and write the class of those that are large enough.

    Args:
        width: of the image that the boxes speak of, pixels.
    """
    scale = tile.canvas.width / width
    pen = ImageDraw.Draw(tile.canvas)
    for index in instances.scores.argsort().tolist():
        box = (instances.boxes[index] * scale).round().int().tolist()
        left, top, right, bottom = box
        if right <= left or bottom <= top:
            continue
        label = int(instances.labels[index])
        color = rgb(CLASS_COLORS[label % len(CLASS_COLORS)])
        mask = Image.fromarray(instances.masks[index].cpu().numpy().astype(np.uint8) * _MASK_OPACITY)
        tile.canvas.paste(color, (left, top), mask.resize((right - left, bottom - top), Image.Resampling.BILINEAR))
        pen.rectangle(box, outline=color, width=OVERSAMPLE)
        if tags and bottom - top >= MIN_TAG_BOX_PX * OVERSAMPLE:
            text = f"{classes[label]} {float(instances.scores[index]):.2f}"
            pen.text(
                (left + 2, top), text, fill=rgb(PAPER), font=font(10 * OVERSAMPLE), stroke_width=2, stroke_fill=rgb(INK)
            )


def _draw_edges(tile: _Tile, segments: Segments, role: Role, boxes: Boxes) -> None:
    """Draw far boxes first; large boxes have bolder lines, and the front face has the boldest."""
    pen = ImageDraw.Draw(tile.canvas)
    distance = boxes.center.norm(dim=1)
    order = distance[segments.box].argsort(descending=True, stable=True)
    height_px = (segments.ends_px[:, :, 1].amax(dim=1), segments.ends_px[:, :, 1].amin(dim=1))
    large = {
        box: float((height_px[0][segments.box == box]).max() - height_px[1][segments.box == box].min()) > BOLD_BOX_PX
        for box in set(segments.box.tolist())
    }
    for index in order.tolist():
        (u0, v0), (u1, v1) = segments.ends_px[index].tolist()
        bold = large[int(segments.box[index])]
        width = (3 if bold else 2) + (3 if bold else 1) * int(segments.front[index])
        pen.line((u0, v0, u1, v1), fill=rgb(ROLE_COLORS[role]), width=width)


def _draw_tags(tile: _Tile, segments: Segments, boxes: Boxes, role: Role, classes: Sequence[str]) -> None:
    """Write class names above boxes that are large enough, near boxes first, where there is room."""
    pen, letters = ImageDraw.Draw(tile.canvas), font(11 * OVERSAMPLE)
    taken: list[tuple[float, float, float, float]] = [(0.0, 0.0, 0.0, 0.0)]
    distance = boxes.center.norm(dim=1)
    for box in distance.argsort().tolist():
        ends = segments.ends_px[segments.box == box].reshape(-1, 2)
        if len(ends) == 0:
            continue
        (left, top), bottom = ends.min(dim=0).values.tolist(), float(ends[:, 1].max())
        if bottom - top < MIN_TAG_BOX_PX * OVERSAMPLE:
            continue
        text = classes[int(boxes.labels[box])].replace("_", " ")
        if float(boxes.scores[box]) < 1:
            text += f" {float(boxes.scores[box]):.2f}"
        width, height = pen.textlength(text, font=letters) + 8, 13 * OVERSAMPLE
        left = min(left, tile.canvas.width - width)
        top = max(top - height, 0.0)
        area = (left, top, left + width, top + height)
        if any(area[0] < b[2] and b[0] < area[2] and area[1] < b[3] and b[1] < area[3] for b in taken):
            continue
        taken.append(area)
        pen.rectangle(area, fill=rgb(ROLE_COLORS[role]))
        ink = INK if role in ("student", "ground_truth") else PAPER
        pen.text((left + 4, top + height / 2), text, fill=rgb(ink), font=letters, anchor="lm")


def _draw_name(tile: _Tile) -> None:
    """Write the camera's name on a light plate in the lower left corner."""
    pen, letters = ImageDraw.Draw(tile.canvas), font(11 * OVERSAMPLE)
    text = tile.name.removeprefix("CAM_").replace("_", " ").lower()
    width, height = pen.textlength(text, font=letters) + 16, 17 * OVERSAMPLE
    bottom = tile.canvas.height
    pen.rectangle((0, bottom - height, width, bottom), fill=rgb(PAPER))
    pen.text((8, bottom - height / 2), text, fill=rgb(INK), font=letters, anchor="lm")


def _assemble(tiles: Sequence[_Tile]) -> Image.Image:
    width = tiles[0].canvas.width // OVERSAMPLE
    height = tiles[0].canvas.height // OVERSAMPLE
    columns = min(COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    size = (columns * (width + GAP_PX) - GAP_PX, rows * (height + GAP_PX) - GAP_PX)
    mosaic = Image.new("RGB", size, rgb(PAPER))
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        small = tile.canvas.resize((width, height), Image.Resampling.BOX)
        mosaic.paste(small, (column * (width + GAP_PX), row * (height + GAP_PX)))
    return mosaic


def _with_legend(mosaic: Image.Image, roles: Sequence[Role], depth: bool) -> Image.Image:
    page = Image.new("RGB", (mosaic.width, mosaic.height + LEGEND_PX), rgb(PAPER))
    page.paste(mosaic, (0, 0))
    pen, letters = ImageDraw.Draw(page), font(14)
    middle, left = mosaic.height + LEGEND_PX // 2 + 2, 2.0
    for role in roles:
        pen.rectangle((left, middle - 2, left + 22, middle + 2), fill=rgb(ROLE_COLORS[role]))
        pen.text((left + 30, middle), ROLE_NAMES[role], fill=rgb(INK), font=letters, anchor="lm")
        left += 30 + pen.textlength(ROLE_NAMES[role], font=letters) + 26
    if depth:
        bar = Image.fromarray(np.array([ramp(DEPTH_COLORS, 120)] * 8, dtype=np.uint8))
        pen.text((left, middle), "LiDAR depth  0 m", fill=rgb(INK), font=letters, anchor="lm")
        left += pen.textlength("LiDAR depth  0 m", font=letters) + 8
        page.paste(bar, (int(left), middle - 4))
        pen.text((left + 128, middle), f"{MAX_DEPTH_M:.0f} m", fill=rgb(INK), font=letters, anchor="lm")
    return page
