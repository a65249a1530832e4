"""Depth and context of image features: the plain layer of LSS and the camera-aware network of BEVDepth.

Shape letters: M images (frames x cameras), C channels of the image features, D depth bins, K context channels.
BEVDepth is Li et al., arXiv 2206.10092; its section 3 names the parts.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bevkd.geometry.inverse import inverse_3x3, inverse_affine
from bevkd.models.bev_encoder import conv_bn_relu
from bevkd.models.bev_resnet import BasicBlock
from bevkd.models.deform_conv import DeformConv2d
from bevkd.types import LidarDepth

CAMERA_VALUES = 27
"""Values that describe a camera to the depth network, see :func:`camera_vector`."""


def camera_vector(
    intrinsics: Float[Tensor, "M 3 3"],
    view_from_original: Float[Tensor, "M 3 3"],
    bev_from_camera: Float[Tensor, "M 4 4"],
    augmentation: Float[Tensor, "M 4 4"],
) -> Float[Tensor, "M 27"]:
    """Return what BEVDepth tells its depth network of each camera.

    These are focal lengths and centre of the original image (4), the image augmentation's 2x2 and shift (6), the BEV
    augmentation's 2x2 and z scale (5), and the camera's pose in the un-augmented BEV frame (12).

    Args:
        intrinsics: of the views.
        bev_from_camera: with the BEV augmentation in it.
        augmentation: the BEV affine of each image's frame.
    """
    original = inverse_3x3(view_from_original) @ intrinsics
    pose = inverse_affine(augmentation) @ bev_from_camera
    parts = [
        torch.stack([original[:, 0, 0], original[:, 1, 1], original[:, 0, 2], original[:, 1, 2]], dim=1),
        view_from_original[:, :2, :].flatten(1),
        augmentation[:, :2, :2].flatten(1),
        augmentation[:, 2, 2:3],
        pose[:, :3, :].flatten(1),
    ]
    return torch.cat(parts, dim=1)


class PlainDepthNet(nn.Module):
    """LSS: one 3x3 and one 1x1 convolution for depth and context at once.

    The two coordinates of each pixel's viewing ray join the features, so that resized and cropped images still tell
    where the horizon is.
    """

    def __init__(self, in_channels: int, bins: int, context: int) -> None:
        super().__init__()
        self.bins = bins
        self.layers = nn.Sequential(
            *conv_bn_relu(in_channels + 2, in_channels, 3), nn.Conv2d(in_channels, bins + context, 1)
        )

    def forward(
        self, feature: Float[Tensor, "M C H W"], plane: Float[Tensor, "M 2 H W"], camera: Float[Tensor, "M 27"]
    ) -> tuple[Float[Tensor, "M D H W"], Float[Tensor, "M K H W"]]:
        """Return depth logits and context.

        Args:
            plane: where each pixel's ray meets the plane at depth 1.
            camera: not looked at.
        """
        del camera
        lifted: Tensor = self.layers(torch.cat([feature, plane], dim=1))
        return lifted[:, : self.bins], lifted[:, self.bins :]


class Gate(nn.Module):
    """Scales channels by what the camera's values say: squeeze-and-excitation that squeezes the camera."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.camera = nn.Sequential(
            nn.Linear(CAMERA_VALUES, channels), nn.ReLU(inplace=True), nn.Linear(channels, channels)
        )
        self.gate = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(inplace=True), nn.Linear(channels, channels))

    def forward(self, feature: Float[Tensor, "M C H W"], camera: Float[Tensor, "M 27"]) -> Float[Tensor, "M C H W"]:
        """Return the scaled features."""
        scale: Tensor = self.gate(self.camera(camera)).sigmoid()
        return feature * scale[:, :, None, None]


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling (Chen et al., arXiv 1706.05587): dilations 1, 6, 12, 18 and the image's mean."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(
                    channels, channels, 3 if rate > 1 else 1, padding=rate if rate > 1 else 0, dilation=rate, bias=False
                ),
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
            )
            for rate in (1, 6, 12, 18)
        )
        self.mean = nn.Sequential(*conv_bn_relu(channels, channels, 1))
        self.join = nn.Sequential(*conv_bn_relu(5 * channels, channels, 1), nn.Dropout(dropout))

    def forward(self, feature: Float[Tensor, "M C H W"]) -> Float[Tensor, "M C H W"]:
        """Return features of the same shape."""
        mean = self.mean(feature.mean(dim=(2, 3), keepdim=True)).expand_as(feature)
        joined: Tensor = self.join(torch.cat([*(branch(feature) for branch in self.branches), mean], dim=1))
        return joined


class CameraAwareDepthNet(nn.Module):
    """BEVDepth's depth network: gates that know the camera, then residual blocks, ASPP and a deformable convolution."""

    def __init__(self, in_channels: int, bins: int, context: int, dropout: float = 0.5) -> None:
        super().__init__()
        width = in_channels
        self.reduce = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.norm = nn.BatchNorm1d(CAMERA_VALUES)
        self.context_gate, self.depth_gate = Gate(width), Gate(width)
        self.context = nn.Conv2d(width, context, 1)
        self.depth = nn.Sequential(
            *(BasicBlock(width, width) for _ in range(3)),
            ASPP(width, dropout),
            DeformConv2d(width, width, groups=4),
            nn.Conv2d(width, bins, 1),
        )

    def forward(
        self, feature: Float[Tensor, "M C H W"], plane: Float[Tensor, "M 2 H W"], camera: Float[Tensor, "M 27"]
    ) -> tuple[Float[Tensor, "M D H W"], Float[Tensor, "M K H W"]]:
        """Return depth logits and context.

        Args:
            plane: not looked at; the camera's values say the same.
            camera: see :func:`camera_vector`.
        """
        del plane
        known = self.norm(camera)
        reduced = self.reduce(feature)
        context = self.context(self.context_gate(reduced, known))
        return self.depth(self.depth_gate(reduced, known)), context


class DepthAggregation(nn.Module):
    """BEVDepth's refinement along depth: 3x3 convolutions over (depth, column) of each image row of lifted features.

    It needs the lifted tensor ``[M, K, D, H, W]`` that the splat otherwise never forms.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Sequential(*conv_bn_relu(channels, channels, 3))
        self.block = nn.Sequential(
            *conv_bn_relu(channels, channels, 3),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.out = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, lifted: Float[Tensor, "M K D H W"]) -> Float[Tensor, "M K D H W"]:
        """Return refined lifted features."""
        M, K, D, H, W = lifted.shape
        rows = self.reduce(lifted.permute(0, 3, 1, 2, 4).reshape(M * H, K, D, W))
        refined: Tensor = self.out(rows + self.block(rows))
        return refined.view(M, H, K, D, W).permute(0, 2, 3, 1, 4)


def depth_targets(
    depth: LidarDepth, images: int, rows: int, columns: int, stride: int, start: float, step: float, bins: int
) -> Int[Tensor, "M H W"]:
    """Return the depth bin of each feature cell: that of the nearest return in it, -1 where there is none in range.

    As in BEVDepth, the bin of depth d is ``floor((d - (start - step)) / step) - 1``: bin k spans ``start + k step`` to
    ``start + (k + 1) step``. A cell whose nearest return lies out of range has no target, whatever else it sees.

    Args:
        depth: in view pixels.
        images: M; ``depth.cameras`` counts over all of them.
        stride: view pixels per cell.
        start, step: of the bins, metres.
    """
    cell = (depth.pixels / stride).floor().long()
    inside = ((cell >= 0) & (cell < cell.new_tensor([columns, rows]))).all(dim=1)
    flat = (depth.cameras * rows + cell[:, 1]) * columns + cell[:, 0]
    nearest = depth.depth_m.new_full((images * rows * columns,), torch.inf)
    nearest.scatter_reduce_(0, flat[inside], depth.depth_m[inside], "amin")
    index = ((nearest - (start - step)) / step).floor() - 1
    return (
        torch.where((index >= 0) & (index < bins), index, -1.0)
        .nan_to_num(-1, -1, -1)
        .long()
        .view(images, rows, columns)
    )


def depth_loss(logits: Float[Tensor, "M D H W"], target: Int[Tensor, "M H W"]) -> Float[Tensor, ""]:
    """Return BEVDepth's depth loss: binary cross entropy of the depth distribution, summed over bins, mean over cells.

    Args:
        logits: of the bins; their softmax is compared with the one-hot target.
        target: bin of each cell, -1 where unknown; those cells add nothing, and none at all gives 0.
    """
    known = target >= 0
    probability = logits.float().softmax(dim=1).permute(0, 2, 3, 1)[known]
    one_hot = nn.functional.one_hot(target[known], logits.shape[1]).to(probability)
    total = nn.functional.binary_cross_entropy(probability, one_hot, reduction="sum")
    return total / known.sum().clamp(min=1)
