"""Boxes of KITTI between the rectified camera frame of its files and the velodyne frame, exactly and back.

A label is a bottom centre, (height, width, length) and a rotation about the camera's y axis. A box of ours is a gravity
centre, (length, width, height) and a yaw about the velodyne's z axis. The centre moves rigidly; the heading, about
``-rotation - pi / 2``, is looked at from above, since the two axes lean against each other by up to a degree. Both maps
have exact inverses, so labels come back as they were.
"""

from __future__ import annotations

import numpy as np
import torch

from bevkd.data.sources._kitti_files import Calibration, Floats, Objects
from bevkd.types import Boxes

NEAR_M = 0.1
"""What is nearer to the camera plane than this, or behind it, has no image."""

# Corners of a unit box (length, height, width) about its bottom centre in the camera frame, and its edges.
_CORNERS = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (0.0, -1.0) for z in (-0.5, 0.5)])
_EDGES = np.array([(a, b) for a in range(8) for b in range(a + 1, 8) if (_CORNERS[a] != _CORNERS[b]).sum() == 1])


def boxes_from_objects(objects: Objects, labels: Floats, calibration: Calibration) -> Boxes:
    """Return ``objects`` as boxes of the BEV frame; velocities are unknown.

    Args:
        labels: class index of each object.
    """
    lidar_from_rectified = np.linalg.inv(calibration.rectified_from_lidar)
    height, width, length = objects.sizes.T
    center = objects.locations - height[:, None] * [0.0, 0.5, 0.0]
    center = center @ lidar_from_rectified[:3, :3].T + lidar_from_rectified[:3, 3]
    heading = np.stack([np.cos(objects.rotations), -np.sin(objects.rotations)], axis=1) @ _turn(calibration).T
    yaw = np.arctan2(heading[:, 1], heading[:, 0])
    unknown = np.full((len(objects), 2), np.nan)
    values = np.column_stack([center, length, width, height, yaw, unknown])
    return Boxes(
        torch.from_numpy(values).float(), torch.from_numpy(labels).long(), torch.from_numpy(objects.scores).float()
    )


def objects_from_boxes(
    boxes: Boxes, classes: tuple[str, ...], calibration: Calibration, image_size: tuple[int, int]
) -> Objects:
    """Return those of ``boxes`` that image 2 shows as result lines; truncation and occlusion are unknown (-1).

    Args:
        classes: names of the labels.
        image_size: ``(H, W)`` to which the projected boxes are cut.
    """
    values = boxes.values.double().numpy()
    rectified = calibration.rectified_from_lidar
    location = values[:, 0:3] @ rectified[:3, :3].T + rectified[:3, 3] + values[:, 5:6] / 2 * [0.0, 1.0, 0.0]
    heading = np.stack([np.cos(values[:, 6]), np.sin(values[:, 6])], axis=1) @ np.linalg.inv(_turn(calibration)).T
    rotation = np.arctan2(-heading[:, 1], heading[:, 0])
    sizes = values[:, [5, 4, 3]]
    alpha = rotation - np.arctan2(location[:, 0], location[:, 2])
    alpha = np.remainder(alpha + np.pi, 2 * np.pi) - np.pi
    rectangles, seen = project_boxes(location, sizes, rotation, calibration, image_size)
    unknown = np.full(len(values), -1.0)
    table = np.column_stack(
        [unknown, unknown, alpha, rectangles, sizes, location, rotation, boxes.scores.double().numpy()]
    )
    return Objects.from_table([classes[label] for label in boxes.labels.tolist()], table)[seen]


def project_boxes(
    locations: Floats, sizes: Floats, rotations: Floats, calibration: Calibration, image_size: tuple[int, int]
) -> tuple[Floats, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
    """Return the rectangle around each box's image, cut to the image, and whether any of it is inside.

    Edges that pass the camera plane are cut there first.

    Args:
        locations, sizes, rotations: as in :class:`Objects`.
        image_size: ``(H, W)``.
    """
    height, width, length = sizes.T
    x, y, z = (_CORNERS * np.stack([length, height, width], axis=1)[:, None]).transpose(2, 0, 1)
    cos, sin = np.cos(rotations)[:, None], np.sin(rotations)[:, None]
    corners = np.stack([x * cos + z * sin, y, z * cos - x * sin], axis=-1) + locations[:, None]
    ends = corners[:, _EDGES]  # [n, edge, end, axis]
    depth = ends[..., 2]
    step = depth[..., ::-1] - depth
    part = np.divide(NEAR_M - depth, step, out=np.zeros_like(depth), where=step != 0)
    cut = ends + np.where(depth < NEAR_M, part, 0.0)[..., None] * (ends[:, :, ::-1] - ends)
    visible = np.broadcast_to((depth >= NEAR_M).any(axis=2, keepdims=True), depth.shape)
    homogeneous = np.where(visible[..., None], cut, [0.0, 0.0, 1.0]) @ calibration.image_from_rectified[:, :3].T
    pixels = homogeneous + calibration.image_from_rectified[:, 3]
    pixels = (pixels[..., :2] / pixels[..., 2:]).reshape(len(locations), 2 * len(_EDGES), 2)
    hidden = ~visible.reshape(len(locations), 2 * len(_EDGES), 1)
    low = np.where(hidden, np.inf, pixels).min(axis=1, initial=np.inf)
    high = np.where(hidden, -np.inf, pixels).max(axis=1, initial=-np.inf)
    limit = np.array([image_size[1], image_size[0]]) - 1.0  # KITTI's rectangles end at the last pixel
    seen = ((low < limit) & (high > 0) & (low < high)).all(axis=1)
    return np.concatenate([low.clip(0, limit), high.clip(0, limit)], axis=1), seen


def _turn(calibration: Calibration) -> Floats:
    """Return the 2x2 map from the (x, z) of a direction in the rectified frame to its (x, y) in the velodyne's."""
    lidar_from_rectified: Floats = np.linalg.inv(calibration.rectified_from_lidar[:3, :3])[:2][:, [0, 2]]
    return lidar_from_rectified
