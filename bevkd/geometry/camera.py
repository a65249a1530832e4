"""Points seen by cameras."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from bevkd.types import LidarDepth

NEAR_M = 1e-3
"""Points nearer than this to the image plane's side of a camera are not seen by it."""


def lidar_depth(
    points: Float[Tensor, "P c"],
    intrinsics: Float[Tensor, "N 3 3"],
    lidar_from_camera: Float[Tensor, "N 4 4"],
    sizes: Float[Tensor, "N 2"],
) -> LidarDepth:
    """Return the depth of every point in every camera that sees it, camera by camera, in the order of the points.

    Args:
        points: x, y, z in the BEV frame, metres, then any further values.
        intrinsics: of the original images.
        sizes: height and width of the original images.
    """
    camera_from_lidar = torch.linalg.inv(lidar_from_camera.double())
    xyz = points[:, :3].double()
    seen = torch.einsum("nij,pj->npi", camera_from_lidar[:, :3, :3], xyz) + camera_from_lidar[:, None, :3, 3]
    image = torch.einsum("nij,npj->npi", intrinsics.double(), seen)
    depth = seen[..., 2]
    pixels = image[..., :2] / image[..., 2:].clamp(min=NEAR_M)
    limits = sizes.flip(-1)[:, None].to(pixels)
    camera, point = ((depth > NEAR_M) & ((pixels >= 0) & (pixels < limits)).all(dim=-1)).nonzero(as_tuple=True)
    return LidarDepth(camera, pixels[camera, point].float(), depth[camera, point].float())


def move_depth(depth: LidarDepth, view_from_original: Float[Tensor, "N 3 3"], height: int, width: int) -> LidarDepth:
    """Return the depths in view pixels; those outside the view are dropped.

    Args:
        view_from_original: of each camera of the rig.
        height, width: of the views.
    """
    matrix = view_from_original[depth.cameras]
    pixels = torch.einsum("dij,dj->di", matrix[:, :2, :2], depth.pixels) + matrix[:, :2, 2]
    inside = ((pixels >= 0) & (pixels < pixels.new_tensor([width, height]))).all(dim=-1)
    return LidarDepth(depth.cameras[inside], pixels[inside], depth.depth_m[inside])
