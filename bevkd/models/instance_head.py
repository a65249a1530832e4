"""A single-stage head for instance masks: centre heatmap, box, and a mask network of each object's own.

Centres are those of CenterNet (arXiv 1904.07850), the mask networks those of CondInst (arXiv 2003.05664, section 3):
the feature at an object's centre is turned into the weights of three 1x1 convolutions that run over a map all objects
share, and that see positions relative to the object. Unlike CondInst's they run only on a grid over the object's box:
a hundred objects cost little, and small ones are seen as finely as the map allows.

The head knows nothing of backbones: it maps feature maps of images to instances in pixels of these images, and serves
the segmenter as well as a student that learns from a segmentation teacher (X-IS of X3KD).

Shape letters: M images, C channels, K classes, H W cells of the feature map, h w cells of the mask map, n instances, R
rows and columns of the grid over a box.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from bevkd.config import StrictModel
from bevkd.geometry.gaussian import draw_gaussians, gaussian_radius
from bevkd.geometry.masks import STORED, pixel_grid, shrink, tighten
from bevkd.models.bev_encoder import conv_bn_relu
from bevkd.models.heads.center import gaussian_focal_loss
from bevkd.types import Instances, ViewInstances

_LOG_LIMIT = 6.0
"""Predicted log distances are cut to this, so that an untrained head yields finite boxes."""

_BOX_START = 1.0
"""Log distance, in cells, that training starts from."""

_REACH = 1.3
"""The grid of a mask is the predicted box, enlarged by this: boxes are less exact than masks."""

_TRUSTED_IOU = 0.5
"""From this overlap on, a mask is learned in the predicted box, which it will be seen in; below in the right one."""


class InstanceHeadConfig(StrictModel):
    """Config of the instance head.

    Attributes:
        channels: width of the convolutions that all outputs share.
        layers: number of these 3x3 convolutions.
        mask_channels: of the shared mask map and of the mask networks.
        fineness: cells of the mask map per cell of the feature map, along an axis.
        resolution: rows and columns of the grid over a box.
        min_overlap: IoU that sets the Gaussian radius of a target.
        box_weight, mask_weight: loss weights beside the heatmap loss.
        heatmap_bias: initial bias of the class logits.
        score_threshold: instances must score above it.
        max_instances: kept per image.
    """

    channels: int = Field(default=128, gt=0)
    layers: int = Field(default=2, ge=1)
    mask_channels: int = Field(default=8, gt=0)
    fineness: int = Field(default=2, ge=1)
    resolution: int = Field(default=32, ge=8)
    min_overlap: float = Field(default=0.7, gt=0, lt=1)
    box_weight: float = Field(default=1.0, ge=0)
    mask_weight: float = Field(default=1.0, ge=0)
    heatmap_bias: float = -2.19
    score_threshold: float = Field(default=0.05, ge=0, lt=1)
    max_instances: int = Field(default=100, gt=0)


@dataclass(frozen=True)
class InstanceOutput:
    """What the head says about every cell.

    Attributes:
        heatmap: class logits of object centres.
        distances: log distances, in cells, of a box's left, top, right and bottom edge. Each is measured from the
            opposite edge of the cell that holds the box's centre, and so is positive for boxes of any size.
        code: what mask networks are made from.
        mask_map: the map that they run over.
    """

    heatmap: Float[Tensor, "M K H W"]
    distances: Float[Tensor, "M 4 H W"]
    code: Float[Tensor, "M C H W"]
    mask_map: Float[Tensor, "M D h w"]


@dataclass(frozen=True)
class InstanceTargets:
    """What the head should say.

    Attributes:
        heatmap: Gaussians; exactly 1 at the cell of an object.
        cells: (image, row, column) of each object.
        boxes: left, top, right, bottom in pixels.
        masks: spread over the boxes.
    """

    heatmap: Float[Tensor, "M K H W"]
    cells: Int[Tensor, "n 3"]
    boxes: Float[Tensor, "n 4"]
    masks: Float[Tensor, "n s s"]


class InstanceHead(nn.Module):
    """Maps feature maps to instances, and knows their targets, loss and decoding.

    Args:
        in_channels: of the feature maps.
        stride: pixels per cell of the feature maps; any that ``config.fineness`` divides.
        classes: how many there are.
    """

    def __init__(self, config: InstanceHeadConfig, in_channels: int, stride: int, classes: int) -> None:
        super().__init__()
        if stride % config.fineness:
            raise ValueError(f"fineness {config.fineness} does not divide the stride {stride}")
        self.config, self.stride, self.classes = config, stride, classes
        width, masks = config.channels, config.mask_channels
        layers = conv_bn_relu(in_channels, width, 3)
        for _ in range(config.layers - 1):
            layers += conv_bn_relu(width, width, 3)
        self.shared = nn.Sequential(*layers)
        self.heatmap = nn.Conv2d(width, classes, 3, padding=1)
        self.distances = nn.Conv2d(width, 4, 3, padding=1)
        self.mask_map = nn.Sequential(
            *conv_bn_relu(width, width, 3),
            nn.Conv2d(width, masks * config.fineness**2, 1),
            nn.PixelShuffle(config.fineness),
        )
        self._sizes = ((masks + 2) * masks, masks, masks * masks, masks, masks, 1)
        self.controller = nn.Linear(width, sum(self._sizes))
        nn.init.normal_(self.heatmap.weight, std=0.01)
        nn.init.constant_(self.heatmap.bias, config.heatmap_bias)  # type: ignore[arg-type]
        nn.init.normal_(self.distances.weight, std=0.01)
        nn.init.constant_(self.distances.bias, _BOX_START)  # type: ignore[arg-type]

    def forward(self, features: Float[Tensor, "M F H W"]) -> InstanceOutput:
        """Return the head's maps."""
        code = self.shared(features)
        return InstanceOutput(self.heatmap(code), self.distances(code), code, self.mask_map(code))

    def targets(self, instances: Instances | ViewInstances, images: int, height: int, width: int) -> InstanceTargets:
        """Return the targets of ``images`` images.

        Args:
            instances: in pixels of these images, see ``bevkd.geometry.masks``: ``move_instances`` and ``in_views``;
                their camera is the number of the image.
            height, width: of the images, pixels.
        """
        rows, columns = height // self.stride, width // self.stride
        boxes = instances.boxes
        centre = (boxes[:, :2] + boxes[:, 2:]) / 2 / self.stride
        last = centre.new_tensor([columns - 1, rows - 1])
        column_row = torch.minimum(centre.floor(), last).long()
        size = (boxes[:, 2:] - boxes[:, :2]) / self.stride
        heatmap = draw_gaussians(
            (images * self.classes, rows, columns),
            instances.cameras * self.classes + instances.labels,
            column_row.flip(-1),
            gaussian_radius(size[:, 1], size[:, 0], self.config.min_overlap).long(),
        )
        if isinstance(instances.masks, Tensor):
            masks = instances.masks.to(boxes)
        else:
            masks = boxes.new_zeros(len(instances), STORED, STORED)
            for stored, mask in zip(masks, instances.masks, strict=True):
                stored.copy_(shrink(mask, STORED, STORED))
        cells = torch.cat([instances.cameras[:, None], column_row.flip(-1)], dim=1)
        return InstanceTargets(heatmap.view(images, self.classes, rows, columns), cells, boxes, masks)

    def loss(self, output: InstanceOutput, targets: InstanceTargets) -> dict[str, Tensor]:
        """Return the ``heatmap``, ``box`` and ``mask`` losses in float32; the last two are means over objects."""
        n = max(len(targets.cells), 1)
        boxes = self.boxes_at(output, targets.cells)
        giou, iou = box_overlap(boxes, targets.boxes)
        grids = enlarged(torch.where(iou[:, None] > _TRUSTED_IOU, boxes.detach(), targets.boxes))
        masks = self.masks_at(output, targets.cells, grids)
        return {
            "heatmap": gaussian_focal_loss(output.heatmap, targets.heatmap),
            "box": self.config.box_weight * (1 - giou).sum() / n,
            "mask": self.config.mask_weight * dice_loss(masks, self._masks_in(targets, grids)).sum() / n,
        }

    def _masks_in(self, targets: InstanceTargets, grids: Float[Tensor, "n 4"]) -> Float[Tensor, "n R R"]:
        """Return the target masks on grids over boxes."""
        size = targets.boxes[:, 2:] - targets.boxes[:, :2]
        positions = (self._grid_points(grids) - targets.boxes[:, None, None, :2]) / size[:, None, None] * 2 - 1
        return functional.grid_sample(targets.masks[:, None], positions, align_corners=False)[:, 0]

    def _grid_points(self, grids: Float[Tensor, "n 4"]) -> Float[Tensor, "n R R 2"]:
        """Return the position (u, v), in pixels, of each cell of grids over boxes."""
        steps = (torch.arange(self.config.resolution, device=grids.device) + 0.5) / self.config.resolution
        corners = grids[:, None, :2] + steps[:, None] * (grids[:, None, 2:] - grids[:, None, :2])
        u, v = corners.unbind(-1)
        side = self.config.resolution
        return torch.stack([u[:, None, :].expand(-1, side, -1), v[:, :, None].expand(-1, -1, side)], dim=-1)

    def boxes_at(self, output: InstanceOutput, cells: Int[Tensor, "n 3"]) -> Float[Tensor, "n 4"]:
        """Return the box that stands at each (image, row, column): left, top, right, bottom in pixels."""
        image, row, column = cells.unbind(1)
        left, top, right, bottom = output.distances[image, :, row, column].float().clamp(max=_LOG_LIMIT).exp().unbind(1)
        edges = [column + 1 - left, row + 1 - top, column + right, row + bottom]
        return torch.stack(edges, dim=1) * self.stride

    def masks_at(
        self, output: InstanceOutput, cells: Int[Tensor, "n 3"], grids: Float[Tensor, "n 4"]
    ) -> Float[Tensor, "n R R"]:
        """Return the mask logits of the objects at (image, row, column) cells, in float32.

        Args:
            grids: left, top, right, bottom of the grid over each object, pixels.
        """
        image, row, column = cells.unbind(1)
        masks, side = self.config.mask_channels, self.config.resolution
        with torch.autocast(grids.device.type, enabled=False):
            weights = self.controller(output.code[image, :, row, column].float())
            w1, b1, w2, b2, w3, b3 = weights.split(self._sizes, dim=1)
            hidden = self._shared_at(output.mask_map.float(), image, grids).flatten(2)
            hidden = torch.baddbmm(b1[:, :, None], w1.view(-1, masks, masks + 2), hidden).relu()
            hidden = torch.baddbmm(b2[:, :, None], w2.view(-1, masks, masks), hidden).relu()
            return torch.baddbmm(b3[:, :, None], w3.view(-1, 1, masks), hidden).view(-1, side, side)

    def _shared_at(
        self, mask_map: Float[Tensor, "M D h w"], image: Int[Tensor, "n"], grids: Float[Tensor, "n 4"]
    ) -> Float[Tensor, "n D+2 R R"]:
        """Return the shared map on the grid of each object, and positions relative to the object."""
        side, cell_px = self.config.resolution, self.stride // self.config.fineness
        extent = grids.new_tensor([mask_map.shape[3], mask_map.shape[2]]) * cell_px
        positions = self._grid_points(grids) / extent * 2 - 1
        relative = torch.linspace(-_REACH, _REACH, side, device=grids.device)
        across = torch.stack(torch.meshgrid(relative, relative, indexing="xy"))
        # One call for all images: the grids of an image lie below each other, and there is room for the most.
        earlier = functional.one_hot(image, len(mask_map)).cumsum(dim=0)
        slot = earlier.gather(1, image[:, None]).squeeze(1) - 1
        most = int(slot.max()) + 1 if len(slot) else 1
        stacked = positions.new_zeros(len(mask_map), most, side, side, 2)
        stacked[image, slot] = positions
        found = functional.grid_sample(mask_map, stacked.flatten(1, 2), padding_mode="border", align_corners=False)
        shared = found.view(*mask_map.shape[:2], most, side, side).transpose(1, 2)[image, slot]
        return torch.cat([shared, across.expand(len(grids), -1, -1, -1)], dim=1)

    @torch.no_grad()
    def decode(self, output: InstanceOutput) -> Instances:
        """Return the instances of all images, image by image, best first; boxes fit their masks.

        The camera of an instance is the number of its image. Its score is that of its centre times the mean
        probability of its mask.
        """
        found = [self._decode_image(output, image) for image in range(len(output.heatmap))]
        return Instances(
            torch.cat([each.cameras for each in found]),
            torch.cat([each.boxes for each in found]),
            torch.cat([each.labels for each in found]),
            torch.cat([each.scores for each in found]),
            tuple(mask for each in found for mask in each.masks),
        )

    def _decode_image(self, output: InstanceOutput, image: int) -> Instances:
        cells, labels, scores = self._peaks(output.heatmap[image].float().sigmoid(), image)
        grids = enlarged(self.boxes_at(output, cells))
        logits = self.masks_at(output, cells, grids)
        height, width = (side * self.stride for side in output.heatmap.shape[-2:])
        kept, tight, masks, sure = [], [], [], []
        for index, (mask, box) in enumerate(zip(logits, grids.tolist(), strict=True)):
            left, top, grid = pixel_grid(box, (height, width))
            soft = functional.grid_sample(
                mask[None, None], grid[None].to(mask), padding_mode="border", align_corners=False
            )[0, 0].sigmoid()
            found = tighten(soft >= 0.5, left, top)
            if found is not None:
                kept.append(index)
                masks.append(found[0])
                tight.append(found[1])
                sure.append(soft[soft >= 0.5].mean())
        rows = torch.tensor(kept, dtype=torch.int64, device=scores.device)
        final = scores[rows] * torch.stack(sure) if sure else scores[rows]
        order = final.argsort(descending=True, stable=True)
        found_all = Instances(cells[rows, 0], grids.new_tensor(tight).view(-1, 4), labels[rows], final, tuple(masks))
        return found_all[order]

    def _peaks(
        self, scores: Float[Tensor, "K H W"], image: int
    ) -> tuple[Int[Tensor, "n 3"], Int[Tensor, "n"], Float[Tensor, "n"]]:
        """Return cells, labels and scores of the local maxima, best first."""
        highest = functional.max_pool2d(scores[None], 3, stride=1, padding=1)[0]
        candidates = torch.where(scores == highest, scores, 0.0).flatten()
        best = candidates.topk(min(self.config.max_instances, len(candidates)))
        above = best.values > self.config.score_threshold
        index = best.indices[above]
        columns = scores.shape[2]
        cells = index % (scores.shape[1] * columns)
        cells = torch.stack([torch.full_like(cells, image), cells // columns, cells % columns], dim=1)
        return cells, index // (scores.shape[1] * columns), best.values[above]


def enlarged(boxes: Float[Tensor, "n 4"]) -> Float[Tensor, "n 4"]:
    """Return boxes with what may belong to their objects around them."""
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2 * _REACH
    return torch.cat([centre - half, centre + half], dim=1)


def box_overlap(
    boxes: Float[Tensor, "n 4"], others: Float[Tensor, "n 4"]
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """Return the generalised IoU (arXiv 1902.09630) and the IoU of pairs of boxes (left, top, right, bottom)."""

    def area(low: Tensor, high: Tensor) -> Tensor:
        return (high - low).clamp(min=0).prod(dim=1)

    inside = area(torch.maximum(boxes[:, :2], others[:, :2]), torch.minimum(boxes[:, 2:], others[:, 2:]))
    hull = area(torch.minimum(boxes[:, :2], others[:, :2]), torch.maximum(boxes[:, 2:], others[:, 2:]))
    union = area(boxes[:, :2], boxes[:, 2:]) + area(others[:, :2], others[:, 2:]) - inside
    iou = inside / union.clamp(min=1e-6)
    return iou - (hull - union) / hull.clamp(min=1e-6), iou


def dice_loss(logits: Float[Tensor, "n R R"], masks: Float[Tensor, "n R R"]) -> Float[Tensor, "n"]:
    """Return the dice loss of each mask (V-Net, arXiv 1606.04797, section 3)."""
    p, target = logits.sigmoid().flatten(1), masks.flatten(1)
    squares = p.square().sum(dim=1) + target.square().sum(dim=1)
    return 1 - 2 * (p * target).sum(dim=1) / squares.clamp(min=1e-6)
