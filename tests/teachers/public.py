"""LiDAR detectors of other frameworks in plain torch: their parameter names and shapes, their conventions, dense maps.

Nothing here comes from bevkd but the voxel indices that go in. Maps inside are [C, Y, X], those of BEVFusion [C, X, Y].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.models.dense import Dense, Triple
from tests.teachers.public_layers import (
    Block,
    Kernels,
    Names,
    Sizes,
    det3d_sparse,
    mmdet_sparse,
    pcdet_sparse,
    pfn,
)

# ------------------------------------------------------------------------------------------ BEV encoder and heads


def bev_blocks(sizes: Sizes, pad_layer: bool) -> nn.ModuleList:
    blocks, before = nn.ModuleList(), sizes.low
    for depth, stride, width in zip(sizes.layers, sizes.strides, sizes.widths, strict=True):
        first = nn.Conv2d(before, width, 3, stride, 0 if pad_layer else 1, bias=False)
        layers = [nn.ZeroPad2d(1), first] if pad_layer else [first]
        layers += [nn.BatchNorm2d(width, eps=1e-3), nn.ReLU()]
        for _ in range(depth):
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width, eps=1e-3), nn.ReLU()]
        blocks.append(nn.Sequential(*layers))
        before = width
    return blocks


def bev_deblocks(sizes: Sizes, conv_at_1: bool) -> nn.ModuleList:
    deblocks, total = nn.ModuleList(), 1
    for stride, width, up in zip(sizes.strides, sizes.widths, sizes.ups, strict=True):
        total *= stride
        finer = sizes.fineness // total
        if total > sizes.fineness or (total == sizes.fineness and not conv_at_1):
            factor = total // sizes.fineness
            layer: nn.Module = nn.ConvTranspose2d(width, up, factor, factor, bias=False)
        else:
            layer = nn.Conv2d(width, up, finer, finer, bias=False)
        deblocks.append(nn.Sequential(layer, nn.BatchNorm2d(up, eps=1e-3), nn.ReLU()))
    return deblocks


def run_bev(bev_low: Tensor, blocks: nn.ModuleList, deblocks: nn.ModuleList) -> Tensor:
    ups = []
    for block, deblock in zip(blocks, deblocks, strict=True):
        bev_low = block(bev_low)
        ups.append(deblock(bev_low))
    return torch.cat(ups, dim=1)


OUTS = {"reg": 2, "height": 1, "dim": 3, "rot": 2, "vel": 2}
PCDET = {"reg": "center", "height": "center_z", "dim": "dim", "rot": "rot", "vel": "vel", "heatmap": "hm"}
DET3D = {**{name: name for name in OUTS}, "heatmap": "hm"}
MMDET = {**{name: name for name in OUTS}, "heatmap": "heatmap"}


class ConvModule(nn.Module):
    """Convolution, norm and ReLU as mmcv names them."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(ins, outs, 3, padding=1, bias=False), nn.BatchNorm2d(outs)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)))


def biased(ins: int, outs: int) -> list[nn.Module]:
    return [nn.Conv2d(ins, outs, 3, padding=1), nn.BatchNorm2d(outs), nn.ReLU()]


def branch(style: str, width: int, outs: int) -> nn.Sequential:
    last = nn.Conv2d(width, outs, 3, padding=1)
    if style == "openpcdet":
        return nn.Sequential(nn.Sequential(*biased(width, width)), last)
    return (
        nn.Sequential(*biased(width, width), last)
        if style == "det3d"
        else nn.Sequential(ConvModule(width, width), last)
    )


def tasks_of(sizes: Sizes, style: str, names: dict[str, str]) -> nn.ModuleList:
    return nn.ModuleList(
        Names(**{names[name]: branch(style, sizes.shared, outs) for name, outs in {**OUTS, "heatmap": classes}.items()})
        for classes in sizes.tasks
    )


def run_center(
    bev_high: Tensor, shared: nn.Module, tasks: nn.ModuleList, names: dict[str, str]
) -> list[dict[str, Tensor]]:
    feature = shared(bev_high)
    return [{name: task.get_submodule(public)(feature) for name, public in names.items()} for task in tasks]


# ------------------------------------------------------------------------------------------ whole detectors


@dataclass(frozen=True)
class Maps:
    """What a public detector computes, with its maps brought to [C, Y, X]; values as the framework means them."""

    bev_low: Tensor
    bev_high: Tensor
    tasks: list[dict[str, Tensor]]
    anchors: tuple[Tensor, ...] = ()


class Public(nn.Module):
    """A detector with the names of one framework.

    Args:
        style: of the names and conventions.
        prefix: ``pts_`` of mmdetection3d's multi-modal detectors.
    """

    def __init__(
        self,
        style: Literal["openpcdet", "det3d", "mmdet3d", "bevfusion"],
        sizes: Sizes,
        kernels: Kernels = "spconv2",
        prefix: str = "pts_",
    ) -> None:
        super().__init__()
        self.style, self.sizes = style, sizes
        self.legacy_points = style == "mmdet3d" and not prefix
        self.x_major = style == "bevfusion"
        block = Block(kernels, bias=style in ("openpcdet", "det3d"), x_major=self.x_major)
        pillar = sizes.kind == "pillar"
        pads = style in ("openpcdet", "det3d")
        blocks = bev_blocks(sizes, pads)
        deblocks = bev_deblocks(sizes, conv_at_1=style != "openpcdet" and not sizes.anchors)
        names = {"openpcdet": PCDET, "det3d": DET3D}.get(style, MMDET)
        shared = (
            ConvModule(sum(sizes.ups), sizes.shared)
            if names is MMDET
            else nn.Sequential(*biased(sum(sizes.ups), sizes.shared))
        )
        tasks = nn.ModuleList() if sizes.anchors else tasks_of(sizes, style, names)
        builder = {"openpcdet": pcdet_sparse, "det3d": det3d_sparse}.get(style, mmdet_sparse)
        low = pfn(sizes) if pillar else builder(sizes, block)
        # In a tuple, so that only the public names hold parameters.
        self.parts: tuple[Any, ...] = (low, blocks, deblocks, shared, tasks, names)
        self.anchor: tuple[nn.Module, ...] = _anchor_convs(sizes)
        heads = dict(zip(("conv_cls", "conv_box", "conv_dir_cls"), self.anchor, strict=False))
        if style == "openpcdet":
            self.add_module("vfe" if pillar else "backbone_3d", Names(pfn_layers=low) if pillar else low)
            self.backbone_2d = Names(blocks=blocks, deblocks=deblocks)
            self.dense_head = Names(**heads) if heads else Names(shared_conv=shared, heads_list=tasks)
            self.register_buffer("global_step", torch.zeros(1, dtype=torch.int64))
        elif style == "det3d":
            self.add_module("reader" if pillar else "backbone", Names(pfn_layers=low) if pillar else low)
            self.neck = Names(blocks=blocks, deblocks=deblocks)
            self.bbox_head = Names(shared_conv=shared, tasks=tasks)
        else:
            heads = dict(zip(("conv_cls", "conv_reg", "conv_dir_cls"), self.anchor, strict=False))
            head = Names(**heads) if heads else Names(shared_conv=shared, task_heads=tasks)
            backbone, neck = Names(blocks=blocks), Names(deblocks=deblocks)
            if style == "bevfusion":
                self.encoders = Names(lidar=Names(backbone=low))
                self.decoder = Names(backbone=backbone, neck=neck)
                self.heads = Names(object=head)
            else:
                at = f"{prefix}voxel_encoder" if pillar else f"{prefix}middle_encoder"
                self.add_module(at, Names(pfn_layers=low) if pillar else low)
                self.add_module(f"{prefix}backbone", backbone)
                self.add_module(f"{prefix}neck", neck)
                self.add_module(f"{prefix}bbox_head", head)

    def forward(self, encode: Callable[[Public], Tensor]) -> Maps:
        """Return all maps.

        Args:
            encode: returns ``bev_low`` in the framework's own axes.
        """
        _, blocks, deblocks, shared, tasks, names = self.parts
        low = encode(self)
        high = run_bev(low, blocks, deblocks)
        heads = run_center(high, shared, tasks, names) if len(tasks) else []
        if self.x_major:
            low, high = low.transpose(2, 3), high.transpose(2, 3)
            heads = [{name: value.transpose(2, 3) for name, value in head.items()} for head in heads]
        return Maps(low, high, heads, tuple(conv(high) for conv in self.anchor))


def _anchor_convs(sizes: Sizes) -> tuple[nn.Module, ...]:
    if not sizes.anchors:
        return ()
    ins, classes = sum(sizes.ups), sizes.anchors // 2
    return tuple(nn.Conv2d(ins, sizes.anchors * values, 1) for values in (classes, 7, 2))


def encode_voxels(features: Tensor, indices: Tensor, shape: Triple, frames: int) -> Callable[[Public], Tensor]:
    """Return what runs a framework's sparse encoder on voxels (frame, z, y, x), densely, in its own axes."""

    def encode(public: Public) -> Tensor:
        if not public.x_major:
            return public.parts[0](Dense.scatter(features, indices, shape, frames)).values.flatten(1, 2)
        dense = Dense.scatter(features, indices[:, [0, 3, 2, 1]], (shape[2], shape[1], shape[0]), frames)
        out = public.parts[0](dense).values  # [B, C, X, Y, Z]
        return out.permute(0, 1, 4, 2, 3).flatten(1, 2)

    return encode


def encode_pillars(
    slots: Tensor,
    counts: Tensor,
    indices: Tensor,
    low_m: Sequence[float],
    edges_m: Sequence[float],
    rows: int,
    columns: int,
) -> Callable[[Public], Tensor]:
    """Return what runs a framework's pillar encoder on one frame.

    Args:
        slots: V x P x F points, zeros where a pillar has none left.
        counts: points of each pillar.
        indices: (y, x) of each pillar.
    """

    def encode(public: Public) -> Tensor:
        n = public.sizes.offsets
        mean = slots[:, :, :3].sum(1, keepdim=True) / counts[:, None, None]
        place = torch.stack([indices[:, 1], indices[:, 0], torch.zeros_like(indices[:, 0])], dim=1)
        center = place * torch.tensor(edges_m) + torch.tensor(
            [low + edge / 2 for low, edge in zip(low_m, edges_m, strict=True)]
        )
        offset = slots[:, :, :n] - center[:, None, :n]
        points = slots.clone()
        if public.legacy_points:
            points[:, :, :n] = offset
        x = torch.cat([points, slots[:, :, :3] - mean, offset], dim=2)
        x = x * (torch.arange(slots.shape[1])[None] < counts[:, None])[:, :, None]
        for layer in public.parts[0]:
            x = layer(x)
        canvas = torch.zeros(x.shape[2], rows, columns)
        canvas[:, indices[:, 0], indices[:, 1]] = x[:, 0].T
        return canvas[None]

    return encode


def boxes_of(maps: dict[str, Tensor], style: str, low_m: Sequence[float], cell_m: float) -> Tensor:
    """Return n x 9 standard boxes, one per cell of the first frame, decoded as each framework does.

    Args:
        style: ``openpcdet`` has (cos, sin); ``det3d`` widths before lengths and yaw r = -yaw - pi / 2, as have
            ``mmdet3d0`` and ``bevfusion``; ``mmdet3d1`` is as here.
    """
    m = {name: value[0].flatten(1) for name, value in maps.items()}
    rows, columns = maps["reg"].shape[2:]
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    x = low_m[0] + (column.flatten() + m["reg"][0]) * cell_m
    y = low_m[1] + (row.flatten() + m["reg"][1]) * cell_m
    sizes = m["dim"].exp()
    if style == "openpcdet":
        yaw = torch.atan2(m["rot"][1], m["rot"][0])
    elif style == "mmdet3d1":
        yaw = torch.atan2(m["rot"][0], m["rot"][1])
    else:
        yaw = -torch.atan2(m["rot"][0], m["rot"][1]) - math.pi / 2
        sizes = sizes[[1, 0, 2]]
    yaw = torch.remainder(yaw + math.pi, 2 * math.pi) - math.pi
    return torch.stack([x, y, m["height"][0], *sizes, yaw, *m["vel"]], dim=1)


def anchor_boxes(
    maps: Sequence[Tensor],
    sizes_m: Sequence[tuple[float, float, float]],
    x_m: Sequence[float],
    y_m: Sequence[float],
    bottom_m: float,
    offset: float,
) -> tuple[Tensor, Tensor]:
    """Return logit and box (x, y, z, l, w, h, yaw) of the best of each class's two anchors at each cell.

    Anchors stand from edge to edge of the range, class by class, at 0 and 1.57 rad each.
    """
    cls, box, direction = (value[0].permute(1, 2, 0) for value in maps)
    rows, columns, _ = cls.shape
    classes = len(sizes_m)
    scores, boxes = torch.zeros(rows * columns, classes), torch.zeros(rows * columns, classes, 7)
    for row in range(rows):
        for column in range(columns):
            for label, (length, width, height) in enumerate(sizes_m):
                logits = cls[row, column].view(-1, classes)[2 * label : 2 * label + 2, label]
                best = int(logits.argmax())
                code = box[row, column].view(-1, 7)[2 * label + best]
                diagonal = math.hypot(length, width)
                x = x_m[0] + column * (x_m[1] - x_m[0]) / (columns - 1) + code[0] * diagonal
                y = y_m[0] + row * (y_m[1] - y_m[0]) / (rows - 1) + code[1] * diagonal
                z = bottom_m + height / 2 + code[2] * height
                size = [side * code[3 + axis].exp() for axis, side in enumerate((length, width, height))]
                yaw = code[6] + 1.57 * best - offset
                half = int(direction[row, column].view(-1, 2)[2 * label + best].argmax())
                yaw = yaw - torch.floor(yaw / math.pi) * math.pi + offset + math.pi * half
                at = row * columns + column
                scores[at, label], boxes[at, label] = logits[best], torch.stack([x, y, z, *size, yaw])
    return scores, boxes


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Return ``model`` with weights, norms and running statistics that all matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if name.endswith("running_var") or (tensor.dim() == 1 and name.endswith("weight")):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        elif tensor.dim() == 1:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
        else:
            spread = (tensor.numel() / max(tensor.shape[0], 1)) ** -0.5 * 1.1
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * spread)
    return model.eval()
