"""Small public detectors and their twins here, for the tests of checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bevkd.data.collate import Batch
from bevkd.geometry.affine import BEVAffine
from bevkd.models.detector import Detector, DetectorConfig
from bevkd.models.heads.center import decode_boxes
from bevkd.models.voxelize import group_points, voxelize
from bevkd.teachers.checkpoints import load_checkpoint
from bevkd.types import Boxes
from tests.teachers.public import Public, boxes_of, encode_pillars, encode_voxels
from tests.teachers.public_layers import Sizes

GRID = {"x_m": [-6.4, 6.4], "y_m": [-4.8, 4.8], "z_m": [-3, 1], "cell_m": 1.6}  # 6 x 8: nothing is square
CLASSES = ("bus", "car", "truck")  # in another order than in the tasks
TASKS = [["car"], ["truck", "bus"]]
VOXEL = Sizes(
    channels=(4, 6, 8), out=8, low=16, layers=(1, 1), widths=(6, 12), ups=(6, 10), shared=8, tasks=(1, 2), points=5
)
PILLAR = replace(
    VOXEL,
    kind="pillar",
    channels=(8, 8),
    low=8,
    layers=(1, 0, 1),
    strides=(2, 2, 2),
    widths=(4, 6, 6),
    ups=(5, 6, 7),
    fineness=4,
)
SLOTS = 3  # points per pillar, so that some are full and some are not


def config_of(sizes: Sizes) -> dict[str, Any]:
    """Return the recipe's ``detector`` for a public one."""
    encoder: dict[str, Any]
    if sizes.kind == "pillar":
        encoder = {"name": "pillar", "pillar_m": 0.4, "max_points": SLOTS, "center_offsets": sizes.offsets}
    else:
        encoder = {"name": "voxel", "kind": sizes.kind, "voxel_m": [0.4, 0.4, 0.2], "out_channels": sizes.out}
    return {
        "grid": GRID,
        "encoder": {**encoder, "channels": sizes.channels, "point_features": sizes.points},
        "bev_encoder": {
            "layers": sizes.layers,
            "strides": sizes.strides,
            "channels": sizes.widths,
            "up_channels": sizes.ups,
        },
        "head": {"name": "center", "tasks": TASKS, "channels": sizes.shared},
    }


def detector_of(sizes: Sizes) -> Detector:
    torch.manual_seed(99)
    return Detector(DetectorConfig.model_validate(config_of(sizes)), CLASSES).eval()


def saved(public: nn.Module, folder: Path, top: str | None = "state_dict", **meta: str) -> Path:
    state = public.state_dict()
    torch.save(state if top is None else {top: state, "meta": meta, "epoch": 20}, folder / "public.pth")
    return folder / "public.pth"


def scene(frames: int = 2, count: int = 500) -> Batch:
    generator = torch.Generator().manual_seed(3)
    cluster = torch.rand(8, 3, generator=generator)[torch.randint(0, 8, (count,), generator=generator)]
    place = (cluster + 0.06 * torch.randn(count, 3, generator=generator)) * torch.tensor([12.8, 9.6, 4.0])
    points = torch.cat([place - torch.tensor([6.4, 4.8, 3.0]), torch.rand(count, 2, generator=generator)], dim=1)
    frame = torch.randint(0, frames, (count,), generator=generator)
    labelled, affines = torch.ones(frames, dtype=torch.bool), (BEVAffine.identity(),) * frames
    none = (Boxes.empty(),) * frames
    return Batch(tuple("ab"[:frames]), none, labelled, affines, points=points, point_frame=frame)


def encode_of(sizes: Sizes, batch: Batch) -> Callable[[Public], Tensor]:
    """Return what feeds a batch to the encoder of a public detector."""
    assert batch.points is not None
    assert batch.point_frame is not None
    points, low = batch.points[:, : sizes.points], (-6.4, -4.8, -3.0)
    if sizes.kind == "pillar":
        groups = group_points(points, batch.point_frame, low, (0.4, 0.4, 4.0), (1, 24, 32), SLOTS)
        slots = torch.zeros(len(groups.counts), SLOTS, sizes.points)
        rank = torch.arange(len(groups.points)) - groups.starts[groups.voxel_of_point]
        slots[groups.voxel_of_point, rank] = points[groups.points]
        assert 0 < int((groups.counts < SLOTS).sum()) < len(slots)
        return encode_pillars(slots, groups.counts, groups.indices[:, 2:].long(), low, (0.4, 0.4, 4.0), 24, 32)
    features, indices = voxelize(points, batch.point_frame, low, (0.4, 0.4, 0.2), (20, 24, 32), 10)
    return encode_voxels(features, indices, (21, 24, 32), len(batch))


@dataclass(frozen=True)
class Case:
    """A public layout, and how its boxes are decoded."""

    style: Any
    decode: str
    sizes: Sizes = VOXEL
    kernels: Any = "spconv2"
    top: str | None = "state_dict"
    version: str = ""

    def load(self, public: Public, folder: Path) -> tuple[Detector, str]:
        meta = {"mmdet3d_version": self.version} if self.version else {}
        detector = detector_of(self.sizes)
        return detector, load_checkpoint(saved(public, folder, self.top, **meta), detector)


CASES = {
    "openpcdet": Case("openpcdet", "openpcdet", top="model_state"),
    "openpcdet_spconv1": Case("openpcdet", "openpcdet", kernels="spconv1", top="model_state"),
    "openpcdet_native": Case("openpcdet", "openpcdet", kernels="native", top="model_state"),
    "openpcdet_pillar": Case("openpcdet", "openpcdet", PILLAR, top="model_state"),
    "det3d": Case("det3d", "det3d", kernels="spconv1"),
    "det3d_bare": Case("det3d", "det3d", top=None),
    "det3d_pillar": Case("det3d", "det3d", replace(PILLAR, offsets=2)),
    "mmdet3d_0": Case("mmdet3d", "mmdet3d0", kernels="spconv1", version="0.17.1"),
    "mmdet3d_1": Case("mmdet3d", "mmdet3d1", version="1.0.0rc4"),
    "mmdet3d_1_pillar": Case("mmdet3d", "mmdet3d1", PILLAR, version="1.1.0"),
    "bevfusion": Case("bevfusion", "bevfusion", kernels="spconv1"),
}


def compare(detector: Detector, public: Public, decode: str, batch: Batch) -> None:
    """Hold all maps and the boxes at every cell of the first frame against the public detector's."""
    with torch.no_grad():
        ours, theirs = detector(batch), public(encode_of(public.sizes, batch))
    assert theirs.bev_low.count_nonzero() > 150
    torch.testing.assert_close(ours.bev_low, theirs.bev_low, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.bev_high, theirs.bev_high, atol=1e-5, rtol=1e-5)
    labels = [[CLASSES.index(name) for name in task] for task in TASKS]
    for index, maps in enumerate(theirs.tasks):
        torch.testing.assert_close(ours.head.heatmap[:, labels[index]], maps["heatmap"], atol=1e-5, rtol=1e-5)
        cells = torch.cartesian_prod(torch.arange(6), torch.arange(8))
        decoded = decode_boxes(ours.head.box_code[0, index].flatten(1).T, cells, detector.config.grid)
        expected = boxes_of(maps, decode, (-6.4, -4.8), 1.6)
        assert expected[:, 6].std() > 0.2
        turn = decoded[:, 6] - expected[:, 6]
        decoded[:, 6] = expected[:, 6] + torch.atan2(turn.sin(), turn.cos())
        torch.testing.assert_close(decoded, expected, atol=2e-5, rtol=1e-5)


SECOND = replace(VOXEL, kind="plain", points=4, tasks=(), anchors=6)
POINT_PILLARS = replace(PILLAR, channels=(8,), points=4, tasks=(), anchors=6, strides=(4, 1, 2))
ANCHORS = {"bus": (9.0, 2.8, 3.0), "car": (3.9, 1.6, 1.56), "truck": (6.0, 2.2, 2.5)}


def with_anchors(sizes: Sizes, offset: float) -> Detector:
    anchors = {
        name: {"size_m": size, "bottom_m": -1.78, "matched": 0.6, "unmatched": 0.45} for name, size in ANCHORS.items()
    }
    head = {"name": "anchor", "anchors": anchors, "direction_offset_rad": offset}
    torch.manual_seed(99)
    return Detector(DetectorConfig.model_validate({**config_of(sizes), "head": head}), CLASSES).eval()
