"""Encoders of other frameworks in plain torch: their parameter names and shapes, computed densely."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.models.dense import Dense, Triple

Kernels = Literal["spconv1", "spconv2", "native"]


@dataclass(frozen=True)
class Sizes:
    """Of a detector; the defaults are the published ones of CenterPoint on nuScenes."""

    kind: Literal["residual", "plain", "pillar"] = "residual"
    points: int = 5
    channels: tuple[int, ...] = (16, 32, 64, 128)
    out: int = 128
    low: int = 256
    layers: tuple[int, ...] = (5, 5)
    strides: tuple[int, ...] = (1, 2)
    widths: tuple[int, ...] = (128, 256)
    ups: tuple[int, ...] = (256, 256)
    fineness: int = 1
    shared: int = 64
    tasks: tuple[int, ...] = (1, 2, 2, 1, 2, 2)
    offsets: int = 3
    anchors: int = 0


# ------------------------------------------------------------------------------------------ layers


class Sparse(nn.Module):
    """A sparse convolution with its kernel in one of spconv's orders, computed densely."""

    def __init__(
        self,
        ins: int,
        outs: int,
        kernels: Kernels,
        kernel: Triple = (3, 3, 3),
        stride: Triple | None = None,
        padding: Triple = (1, 1, 1),
        bias: bool = False,
    ) -> None:
        super().__init__()
        shape = {"spconv1": (*kernel, ins, outs), "spconv2": (outs, *kernel, ins), "native": (*kernel, outs, ins)}
        self.weight = nn.Parameter(torch.randn(shape[kernels]) * (2 / (ins * math.prod(kernel))) ** 0.5)
        self.bias = nn.Parameter(torch.randn(outs) * 0.3) if bias else None
        self.kernels, self.stride, self.padding = kernels, stride, padding

    def forward(self, dense: Dense) -> Dense:
        order = {"spconv1": (4, 3, 0, 1, 2), "spconv2": (0, 4, 1, 2, 3), "native": (3, 4, 0, 1, 2)}[self.kernels]
        weight = self.weight.permute(order)
        if self.stride is None:
            return dense.sub_m(weight, self.bias)
        return dense.down(weight, self.stride, self.padding)


class Norm(nn.BatchNorm1d):
    """A batch norm over the occupied voxels."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3)

    def forward(self, dense: Any) -> Any:
        return dense.norm(super().forward) if isinstance(dense, Dense) else super().forward(dense)


class Relu(nn.Module):
    def forward(self, dense: Dense) -> Dense:
        return dense.relu()


class Residual(nn.Module):
    def __init__(self, channels: int, kernels: Kernels, bias: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = Sparse(channels, channels, kernels, bias=bias), Norm(channels)
        self.conv2, self.bn2 = Sparse(channels, channels, kernels, bias=bias), Norm(channels)

    def forward(self, dense: Dense) -> Dense:
        return (self.bn2(self.conv2(self.bn1(self.conv1(dense)).relu())) + dense).relu()


def tree(**parts: nn.Module) -> nn.Sequential:
    """Return modules by name that run one after another."""
    return nn.Sequential(OrderedDict(parts))


class Pfn(nn.Module):
    """One layer of a pillar feature net on [V, P, C] slots, empty ones included."""

    def __init__(self, ins: int, outs: int, last: bool) -> None:
        super().__init__()
        self.last, units = last, outs if last else outs // 2
        self.linear, self.norm = nn.Linear(ins, units, bias=False), nn.BatchNorm1d(units, eps=1e-3)

    def forward(self, slots: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.linear(slots).permute(0, 2, 1)).permute(0, 2, 1))
        largest = x.max(dim=1, keepdim=True).values
        return largest if self.last else torch.cat([x, largest.repeat(1, slots.shape[1], 1)], dim=2)


def pfn(sizes: Sizes) -> nn.ModuleList:
    widths = (sizes.points + 3 + sizes.offsets, *sizes.channels)
    last = len(widths) - 2
    return nn.ModuleList(Pfn(widths[i], widths[i + 1], i == last) for i in range(last + 1))


class Names(nn.Module):
    """A named group that is not run by itself."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


# ------------------------------------------------------------------------------------------ sparse encoders


class Block:
    """How a framework builds sparse layers: order of kernels, axes, biases."""

    def __init__(self, kernels: Kernels, bias: bool, x_major: bool = False) -> None:
        self.kernels, self.bias, self.x_major = kernels, bias, x_major

    def axes(self, zyx: Triple) -> Triple:
        return (zyx[2], zyx[1], zyx[0]) if self.x_major else zyx

    def conv(self, ins: int, outs: int) -> list[nn.Module]:
        return [Sparse(ins, outs, self.kernels), Norm(outs), Relu()]

    def down(self, ins: int, outs: int, last: bool) -> list[nn.Module]:
        padding = self.axes((0, 1, 1)) if last else (1, 1, 1)
        return [Sparse(ins, outs, self.kernels, stride=(2, 2, 2), padding=padding), Norm(outs), Relu()]

    def out(self, ins: int, outs: int) -> nn.Sequential:
        kernel, stride = self.axes((3, 1, 1)), self.axes((2, 1, 1))
        return nn.Sequential(Sparse(ins, outs, self.kernels, kernel, stride, (0, 0, 0)), Norm(outs), Relu())

    def body(self, sizes: Sizes, width: int, first: bool) -> list[nn.Module]:
        if sizes.kind == "residual":
            return [Residual(width, self.kernels, self.bias) for _ in range(2)]
        return [nn.Sequential(*self.conv(width, width)) for _ in range(1 if first else 2)]


def pcdet_sparse(sizes: Sizes, block: Block) -> nn.Sequential:
    widths = sizes.channels
    stages: dict[str, nn.Module] = {"conv_input": nn.Sequential(*block.conv(sizes.points, widths[0]))}
    for index, width in enumerate(widths):
        down = [nn.Sequential(*block.down(widths[index - 1], width, index == len(widths) - 1))] if index else []
        stages[f"conv{index + 1}"] = nn.Sequential(*down, *block.body(sizes, width, not index))
    return tree(**stages, conv_out=block.out(widths[-1], sizes.out))


def det3d_sparse(sizes: Sizes, block: Block) -> nn.Sequential:
    widths = sizes.channels
    stages: dict[str, nn.Module] = {"conv_input": nn.Sequential(*block.conv(sizes.points, widths[0]))}
    for index, width in enumerate(widths):
        down = block.down(widths[index - 1], width, index == len(widths) - 1) if index else []
        stages[f"conv{index + 1}"] = nn.Sequential(*down, *block.body(sizes, width, not index))
    return tree(**stages, extra_conv=block.out(widths[-1], sizes.out))


def mmdet_sparse(sizes: Sizes, block: Block) -> nn.Sequential:
    widths, layers = sizes.channels, OrderedDict[str, nn.Module]()
    for index, width in enumerate(widths):
        downs = [
            nn.Sequential(*block.down(widths[i], widths[i + 1], i == len(widths) - 2)) for i in range(len(widths) - 1)
        ]
        before = downs[index - 1 : index] if index and sizes.kind == "plain" else []
        after = downs[index : index + 1] if sizes.kind == "residual" else []
        layers[f"encoder_layer{index + 1}"] = nn.Sequential(*before, *block.body(sizes, width, not index), *after)
    return tree(
        conv_input=nn.Sequential(*block.conv(sizes.points, widths[0])),
        encoder_layers=nn.Sequential(layers),
        conv_out=block.out(widths[-1], sizes.out),
    )
