"""Layers of a detector beside their names in a public checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from bevkd.errors import CheckpointError
from bevkd.models.bev_encoder import BEVEncoder
from bevkd.models.detector import Detector
from bevkd.models.encoders.pillar import PillarEncoder
from bevkd.models.encoders.voxel import VoxelEncoder

_ANCHOR = ("cls", "box", "direction")

Pair = tuple[str, str]
"""Names of a convolution and of the batch norm after it."""


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer, and the batch norm that follows it.

    Attributes:
        ours, theirs: name of the layer in our detector and in the file.
        norm: name of the batch norm in both; None if none follows, and the layer then has a bias.
        square: what the file holds where we have a transposed 1x1 convolution, if its shape does not tell.
        outputs: our outputs as a linear map of theirs.
        inputs: their inputs as a linear map of ours.
    """

    ours: str
    theirs: str
    norm: Pair | None = None
    square: Literal["conv", "transposed"] | None = None
    outputs: Float[Tensor, "ours theirs"] | None = None
    inputs: Float[Tensor, "theirs ours"] | None = None


@dataclass(frozen=True)
class Names:
    """How a framework names the parts of a LiDAR detector.

    Attributes:
        conv_input, conv_out: first and last convolution of the sparse encoder.
        down: strided convolution at the head of a stage (from 1).
        block: n-th block of a stage (from 0), residual or plain.
        pillar: layers of the pillar encoder.
        blocks, deblocks: of the BEV encoder.
        first_conv: position of a level's first convolution.
        at_stride_1: what brings a level of the BEV encoder to the grid that is there already.
        shared: of the center head.
        branch: convolution, norm and last convolution of a task's branch.
        branches: a branch's public name by ours.
        anchor: classes, boxes and directions of the anchor head; None if there is no such head.
        bookkeeping: entries of the file that are no weights.
    """

    conv_input: Pair
    conv_out: Pair
    down: Callable[[int], Pair]
    block: Callable[[int, int], str]
    pillar: str
    blocks: str
    deblocks: str
    first_conv: int
    at_stride_1: Literal["conv", "transposed"]
    shared: Pair
    branch: Callable[[int, str], tuple[str, str, str]]
    branches: Mapping[str, str]
    anchor: tuple[str, str, str] | None = None
    bookkeeping: tuple[str, ...] = ()


@dataclass(frozen=True)
class Conventions:
    """What a framework's numbers mean, as linear maps to ours.

    Attributes:
        rot, dim: ours from theirs, of the center head's branches; None where they mean the same.
        points: theirs from ours, of the pillar encoder's inputs; None where they are the same.
        x_major: maps are [C, X, Y], and kernels (x, y, z).
    """

    rot: Float[Tensor, "2 2"] | None = None
    dim: Float[Tensor, "3 3"] | None = None
    points: Float[Tensor, "theirs ours"] | None = None
    x_major: bool = False


NEW_BOXES = Conventions()
"""As here: sizes (length, width, height), (sin, cos) of a yaw counter-clockwise from +x."""

# det3d's yaw is r = -yaw - pi/2: sin yaw = -cos r and cos yaw = -sin r.
OLD_BOXES = Conventions(
    rot=torch.tensor([[0.0, -1.0], [-1.0, 0.0]]),
    dim=torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]),
)
"""As in det3d and in mmdetection3d before 1.0: sizes (width, length, height), yaw clockwise from -y."""


@dataclass(frozen=True)
class Layout:
    """What a file holds.

    Attributes:
        layers: of the detector, all of them.
        x_major: maps are [C, X, Y], and kernels (x, y, z).
        bookkeeping: names that are no weights.
    """

    layers: tuple[Layer, ...]
    x_major: bool
    bookkeeping: tuple[str, ...]


def layout_of(detector: Detector, names: Names, means: Conventions) -> Layout:
    """Return every layer of a detector with its name in a file.

    Raises:
        CheckpointError: the detector is of no kind that public checkpoints hold.
    """
    encoder, bev_encoder, head = detector.encoder, detector.bev_encoder, detector.head
    if not isinstance(bev_encoder, BEVEncoder) or not isinstance(encoder, VoxelEncoder | PillarEncoder):
        raise CheckpointError(
            "teacher.checkpoint is for LiDAR detectors with the encoder voxel or pillar and a BEV encoder of the type "
            f"second, teacher.detector has the encoder '{detector.config.encoder.name}'. Use teacher.weights or "
            "teacher.run for others."
        )
    low = _sparse(encoder, names) if isinstance(encoder, VoxelEncoder) else _pillar(encoder, names, means)
    if detector.config.head.name == "center":
        high = _center(len(head.tasks), names, means)
    elif detector.config.head.name == "anchor" and names.anchor is not None:
        high = (Layer(f"head.{mine}", theirs) for mine, theirs in zip(_ANCHOR, names.anchor, strict=True))
    else:
        raise CheckpointError(f"teacher.checkpoint: its layout has no head like '{detector.config.head.name}'.")
    return Layout((*low, *_bev(bev_encoder, names), *high), means.x_major, names.bookkeeping)


def _sparse(encoder: VoxelEncoder, names: Names) -> Iterator[Layer]:
    yield _conv("encoder.conv_input", names.conv_input)
    for stage, blocks in enumerate(encoder.stages):
        own = f"encoder.stages.{stage}"
        if stage:
            yield _conv(f"{own}.0", names.down(stage))
        shift = min(stage, 1)
        for index in range(len(list(blocks.children())) - shift):
            theirs = names.block(stage, index)
            if encoder.config.kind == "plain":
                yield _conv(f"{own}.{index + shift}", (f"{theirs}.0", f"{theirs}.1"))
                continue
            for half in "12":
                mine = f"{own}.{index + shift}"
                norm = (f"{mine}.bn{half}", f"{theirs}.bn{half}")
                yield Layer(f"{mine}.conv{half}", f"{theirs}.conv{half}", norm)
    yield _conv("encoder.conv_out", names.conv_out)


def _pillar(encoder: PillarEncoder, names: Names, means: Conventions) -> Iterator[Layer]:
    for index in range(len(encoder.layers)):
        ours, theirs = f"encoder.layers.{index}", f"{names.pillar}.{index}"
        norm = (f"{ours}.norm", f"{theirs}.norm")
        yield Layer(f"{ours}.linear", f"{theirs}.linear", norm, inputs=None if index else means.points)


def _bev(bev_encoder: BEVEncoder, names: Names) -> Iterator[Layer]:
    for level, (block, deblock) in enumerate(zip(bev_encoder.blocks, bev_encoder.deblocks, strict=True)):
        for index in range(0, len(list(block.children())), 3):
            ours, theirs = f"bev_encoder.blocks.{level}", f"{names.blocks}.{level}"
            at = index + names.first_conv
            norm = (f"{ours}.{index + 1}", f"{theirs}.{at + 1}")
            yield Layer(f"{ours}.{index}", f"{theirs}.{at}", norm)
        ours, theirs = f"bev_encoder.deblocks.{level}", f"{names.deblocks}.{level}"
        on_grid = getattr(next(deblock.children()), "stride", None) == (1, 1)
        yield Layer(
            f"{ours}.0",
            f"{theirs}.0",
            (f"{ours}.1", f"{theirs}.1"),
            square=names.at_stride_1 if on_grid else None,
        )


def _center(tasks: int, names: Names, means: Conventions) -> Iterator[Layer]:
    yield _conv("head.shared", names.shared)
    maps = {"rot": means.rot, "dim": means.dim}
    for task in range(tasks):
        for branch, public in names.branches.items():
            ours = f"head.tasks.{task}.{branch}"
            conv, norm, last = names.branch(task, public)
            yield Layer(f"{ours}.0", conv, (f"{ours}.1", norm))
            yield Layer(f"{ours}.3", last, outputs=maps.get(branch))


def _conv(ours: str, theirs: Pair) -> Layer:
    return Layer(f"{ours}.0", theirs[0], (f"{ours}.1", theirs[1]))
