"""Public checkpoints load into the same detector: the same maps and boxes as in their own framework, or a refusal."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bevkd.config import parse
from bevkd.data.collate import Batch
from bevkd.errors import CheckpointError, ConfigError
from bevkd.geometry.affine import BEVAffine
from bevkd.models.detector import Detector, DetectorConfig
from bevkd.models.heads.center import decode_boxes
from bevkd.models.voxelize import group_points, voxelize
from bevkd.teachers.checkpoints import load_checkpoint
from bevkd.teachers.detector import Config, build
from bevkd.types import Boxes
from tests.teachers.public import (
    Public,
    Sizes,
    Sparse,
    anchor_boxes,
    boxes_of,
    encode_pillars,
    encode_voxels,
    randomise,
)

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


# ------------------------------------------------------------------------------------------ what loads


@pytest.mark.parametrize("name", CASES)
def test_a_public_detector_gives_the_same_maps_and_boxes_here(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    public = Public(case.style, case.sizes, case.kernels)
    detector, _ = case.load(randomise(public, 1), tmp_path)  # type: ignore[arg-type]
    compare(detector, public, case.decode, scene(1 if case.sizes.kind == "pillar" else 2))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.sizes is VOXEL])
def test_the_same_weights_in_each_layout_are_the_same_detector(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    source = randomise(Public("mmdet3d", VOXEL), 5)
    reference, _ = CASES["mmdet3d_1"].load(source, tmp_path)  # type: ignore[arg-type]
    public = Public(case.style, VOXEL, case.kernels).eval()
    rewrite(source, public, case.decode)  # type: ignore[arg-type]
    detector, _ = case.load(public, tmp_path)
    expected = reference.state_dict()
    for key, value in detector.state_dict().items():
        torch.testing.assert_close(
            value, expected[key], atol=1e-6, rtol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
        )
    with torch.no_grad():
        ours, theirs = detector(scene()), reference(scene())
    torch.testing.assert_close(ours.head.heatmap, theirs.head.heatmap, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.head.box_code, theirs.head.box_code, atol=1e-5, rtol=1e-5)


def rewrite(source: Public, target: Public, decode: str) -> None:
    """Write the weights of mmdetection3d 1.x names into another layout; both run their layers in the same order."""
    kinds = (Sparse, nn.Conv2d, nn.ConvTranspose2d, nn.modules.batchnorm._BatchNorm)
    pairs = [
        [
            module
            for part in (*public.parts[:4], *_branches(public))
            for module in part.modules()
            if isinstance(module, kinds)
        ]
        for public in (source, target)
    ]
    biases: Tensor | None = None
    with torch.no_grad():
        for ours, theirs in zip(*pairs, strict=True):
            if isinstance(theirs, nn.modules.batchnorm._BatchNorm):
                theirs.load_state_dict(ours.state_dict())
                if biases is not None:
                    theirs.running_mean += biases  # a bias before a norm moves what it subtracts
                biases = None
                continue
            theirs.weight.copy_(_weight(ours, theirs, target.x_major))
            if ours.bias is None and theirs.bias is not None:
                biases = torch.randn_like(theirs.bias)
                theirs.bias.copy_(biases)
            elif theirs.bias is not None:
                theirs.bias.copy_(ours.bias)
        for task in target.parts[4]:
            _reword(task.get_submodule(target.parts[5]["rot"]), task.get_submodule(target.parts[5]["dim"]), decode)


def _branches(public: Public) -> list[nn.Module]:
    return [task.get_submodule(name) for task in public.parts[4] for name in public.parts[5].values()]


def _weight(ours: nn.Module, theirs: nn.Module, x_major: bool) -> Tensor:
    weight = ours.get_parameter("weight")
    if isinstance(theirs, Sparse):
        weight = weight.permute(0, 3, 2, 1, 4) if x_major else weight  # (out, z, y, x, in)
        return weight.permute(
            {"spconv1": (1, 2, 3, 4, 0), "spconv2": (0, 1, 2, 3, 4), "native": (1, 2, 3, 0, 4)}[theirs.kernels]
        )
    if type(ours) is not type(theirs):
        weight = weight.transpose(0, 1)
    return weight.transpose(2, 3) if x_major else weight


def _reword(rot: nn.Module, dim: nn.Module, decode: str) -> None:
    """Turn the last layers of ``rot`` and ``dim`` from (sin, cos) and (l, w, h) into a framework's own."""
    if decode == "mmdet3d1":
        return
    rot, dim = rot[-1], dim[-1]  # type: ignore[index]
    for values in (rot.weight, rot.bias):
        sin, cos = values[0].clone(), values[1].clone()
        # cos r = -sin yaw and sin r = -cos yaw for r = -yaw - pi / 2.
        values[0], values[1] = (cos, sin) if decode == "openpcdet" else (-cos, -sin)
    if decode != "openpcdet":
        for values in (dim.weight, dim.bias):
            values[[0, 1]] = values[[1, 0]].clone()


def test_parallel_training_and_missing_counters_change_nothing(tmp_path: Path) -> None:
    public = randomise(Public("openpcdet", VOXEL), 1)
    plain, wrapped = detector_of(VOXEL), detector_of(VOXEL)
    load_checkpoint(saved(public, tmp_path, "model_state"), plain)
    state = {f"module.{k}": v for k, v in public.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save({"model_state": state}, tmp_path / "parallel.pth")
    assert load_checkpoint(tmp_path / "parallel.pth", wrapped) == "OpenPCDet"
    torch.testing.assert_close(dict(wrapped.state_dict()), dict(plain.state_dict()), atol=0, rtol=0)


def test_kernels_that_could_be_of_two_orders_are_told_by_the_others(tmp_path: Path) -> None:
    public = randomise(Public("openpcdet", VOXEL, "native"), 1)
    shapes = {tuple(v.shape) for k, v in public.state_dict().items() if v.dim() == 5}
    assert (3, 3, 3, 8, 8) in shapes  # native or spconv 1
    assert (3, 3, 3, 6, 4) in shapes  # (z, y, x, out, in) only
    compare(CASES["openpcdet_native"].load(public, tmp_path)[0], public, "openpcdet", scene())  # type: ignore[arg-type]


ALIKE = replace(VOXEL, channels=(5, 5, 5), out=5, low=10)  # five point values too: as many channels in as out


@pytest.mark.parametrize("kernels", ["spconv1", "native"])
def test_kernels_that_nothing_tells_apart_are_asked_for(kernels: Any, tmp_path: Path) -> None:
    public = randomise(Public("openpcdet", ALIKE, kernels), 1)
    path = saved(public, tmp_path, "model_state")
    with pytest.raises(CheckpointError, match=r"fit native and spconv1.*teacher\.checkpoint_kernels"):
        load_checkpoint(path, detector_of(ALIKE))
    detector = detector_of(ALIKE)
    load_checkpoint(path, detector, kernels=kernels)
    compare(detector, public, "openpcdet", scene())  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------ anchor heads

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


@pytest.mark.parametrize("sizes", [SECOND, POINT_PILLARS], ids=["second", "point_pillars"])
@pytest.mark.parametrize(("style", "offset"), [("openpcdet", 0.78539), ("mmdet3d", -math.pi / 2)])
def test_a_public_anchor_detector_gives_the_same_maps_and_boxes_here(
    style: Any, offset: float, sizes: Sizes, tmp_path: Path
) -> None:
    public = randomise(Public(style, sizes, "spconv1", prefix=""), 1)
    detector, batch = with_anchors(sizes, offset), scene(1)
    load_checkpoint(saved(public, tmp_path, mmdet3d_version="1.0.0"), detector)
    with torch.no_grad():
        ours, theirs = detector(batch), public(encode_of(sizes, batch))
    torch.testing.assert_close(ours.bev_low, theirs.bev_low, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.bev_high, theirs.bev_high, atol=1e-5, rtol=1e-5)
    scores, boxes = anchor_boxes(theirs.anchors, list(ANCHORS.values()), GRID["x_m"], GRID["y_m"], -1.78, offset)
    torch.testing.assert_close(ours.head.heatmap[0], scores.view(6, 8, 3).movedim(2, 0), atol=1e-5, rtol=1e-5)
    cells = torch.cartesian_prod(torch.arange(6), torch.arange(8))
    for task in range(3):
        decoded = decode_boxes(ours.head.box_code[0, task].flatten(1).T, cells, detector.config.grid)[:, :7]
        turn = decoded[:, 6] - boxes[:, task, 6]
        decoded[:, 6] = boxes[:, task, 6] + torch.atan2(turn.sin(), turn.cos())
        torch.testing.assert_close(decoded, boxes[:, task], atol=2e-5, rtol=1e-5)


def test_anchor_detectors_of_old_mmdetection3d_are_refused(tmp_path: Path) -> None:
    path = saved(Public("mmdet3d", SECOND, prefix=""), tmp_path)
    with pytest.raises(CheckpointError, match=r"before 1\.0.*v1\.0\.0_models"):
        load_checkpoint(path, with_anchors(SECOND, -math.pi / 2), version="0.x")


def test_directions_that_begin_elsewhere_are_refused(tmp_path: Path) -> None:
    path = saved(Public("mmdet3d", SECOND, prefix=""), tmp_path)
    with pytest.raises(CheckpointError, match=r"direction_offset_rad: -1\.5708"):
        load_checkpoint(path, with_anchors(SECOND, 0.78539), version="1.x")


def test_classes_in_another_order_are_refused(tmp_path: Path) -> None:
    state = {
        "state_dict": Public("mmdet3d", SECOND, prefix="").state_dict(),
        "meta": {"CLASSES": ("car", "bus", "truck")},
    }
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"Set data\.classes: \[car, bus, truck\]"):
        load_checkpoint(tmp_path / "other.pth", with_anchors(SECOND, -math.pi / 2), version="1.x")


# ------------------------------------------------------------------------------------------ published sizes


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_reference_detectors_have_the_published_counts() -> None:
    # golden.md 1.11, from OpenPCDet itself.
    public = Public("openpcdet", Sizes())
    assert (count(public.backbone_3d), len(public.backbone_3d.state_dict())) == (2_695_312, 142)
    assert count(public.backbone_2d) == 4_576_768
    assert (count(public.dense_head), len(public.dense_head.state_dict())) == (1_669_510, 331)
    assert count(Public("openpcdet", NUSCENES_PILLAR).backbone_2d) == 4_388_608


NUSCENES_PILLAR = Sizes(
    kind="pillar",
    channels=(64, 64),
    low=64,
    layers=(3, 5, 5),
    strides=(2, 2, 2),
    widths=(64, 128, 256),
    ups=(128, 128, 128),
    fineness=4,
)


@pytest.mark.parametrize("style", ["openpcdet", "det3d"])
@pytest.mark.parametrize("sizes", [Sizes(), NUSCENES_PILLAR], ids=["voxel", "pillar"])
def test_a_published_size_differs_from_ours_by_the_biases_before_norms_alone(
    style: Any, sizes: Sizes, tmp_path: Path
) -> None:
    public = Public(style, sizes)
    biases = {
        f"{name}.bias": module.bias.numel()
        for name, module in public.named_modules()
        if isinstance(module, Sparse | nn.Conv2d) and module.bias is not None and not name.endswith(LAST[style])
    }
    pillar = sizes.kind == "pillar"
    encoder = {"name": "pillar", "pillar_m": 0.2} if pillar else {"name": "voxel"}
    bev = {"layers": sizes.layers, "strides": sizes.strides, "channels": sizes.widths, "up_channels": sizes.ups}
    names = [f"c{i}" for i in range(10)]
    tasks = [names[:1], names[1:3], names[3:5], names[5:6], names[6:8], names[8:]]
    reach, cell = (51.2, 0.8) if pillar else (54, 0.6)
    config = {
        "grid": {"x_m": [-reach, reach], "y_m": [-reach, reach], "z_m": [-5, 3], "cell_m": cell},
        "encoder": encoder,
        "bev_encoder": bev,
        "head": {"name": "center", "tasks": tasks},
    }
    detector = Detector(DetectorConfig.model_validate(config), tuple(names))
    extra = len([name for name in public.state_dict() if name == "global_step"])
    assert count(detector) == count(public) - sum(biases.values())
    assert len(detector.state_dict()) == len(public.state_dict()) - len(biases) - extra
    load_checkpoint(saved(public, tmp_path), detector)


LAST = {"openpcdet": tuple(f"{name}.1" for name in ("center", "center_z", "dim", "rot", "vel", "hm")), "det3d": (".3",)}


# ------------------------------------------------------------------------------------------ what is refused


def faulty(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> str:
    """Return the message that refuses a changed checkpoint, and check that the detector stayed as it was."""
    state = dict(randomise(Public("openpcdet", VOXEL), 1).state_dict())
    change(state)
    torch.save({"model_state": state}, folder / "faulty.pth")
    detector = detector_of(VOXEL)
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder / "faulty.pth", detector)
    torch.testing.assert_close(dict(detector.state_dict()), before, atol=0, rtol=0)
    return str(caught.value)


def test_every_missing_extra_and_misshapen_tensor_is_named_at_once(tmp_path: Path) -> None:
    def change(state: dict[str, Tensor]) -> None:
        del state["backbone_2d.blocks.0.2.running_var"]
        del state["dense_head.heads_list.1.vel.1.bias"]
        state["backbone_3d.conv9.weight"] = torch.zeros(2, 2)
        state["backbone_2d.blocks.1.1.weight"] = torch.zeros(12, 6, 5, 5)
        state["backbone_3d.conv2.0.0.weight"] = torch.zeros(7, 3, 3, 3, 4)
        state["backbone_3d.conv1.0.conv1.bias"] = torch.zeros(9)

    message = faulty(tmp_path, change)
    assert "missing: backbone_2d.blocks.0.2.running_var" in message
    assert "missing: dense_head.heads_list.1.vel.1.bias" in message
    assert "not in the model: backbone_3d.conv9.weight [2, 2]" in message
    assert "shape of backbone_2d.blocks.1.1.weight: [12, 6, 5, 5]" in message
    assert "the model wants [12, 6, 3, 3]" in message
    assert "shape of backbone_3d.conv2.0.0.weight: [7, 3, 3, 3, 4]" in message
    assert "shape of backbone_3d.conv1.0.conv1.bias" in message


def test_a_pillar_network_with_another_number_of_inputs_says_where_to_set_it(tmp_path: Path) -> None:
    path = saved(randomise(Public("det3d", replace(PILLAR, offsets=2)), 1), tmp_path)
    with pytest.raises(CheckpointError, match=r"\[4, 10\].*\[4, 11\].*center_offsets"):
        load_checkpoint(path, detector_of(PILLAR))


class Executes:
    """What a malicious file would hold: unpickling it calls a function."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (os.mkdir, ("executed",))


def test_a_checkpoint_that_would_execute_code_is_refused_and_executes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model_state": Public("openpcdet", VOXEL).state_dict(), "hook": Executes()}, "bad.pth")
    with pytest.raises(CheckpointError, match=r"run code.*mkdir.*save the tensors alone"):
        load_checkpoint(tmp_path / "bad.pth", detector_of(VOXEL))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut off"])
def test_a_damaged_file_is_called_damaged(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bad\.pth (is damaged|holds more than tensors)"):
        load_checkpoint(tmp_path / "bad.pth", detector_of(VOXEL))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*none\.pth"):
        load_checkpoint(tmp_path / "none.pth", detector_of(VOXEL))


def test_a_file_without_weights_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_checkpoint(tmp_path / "empty.pth", detector_of(VOXEL))


def test_an_unknown_layout_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    torch.save({"state_dict": {"net.a": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"no layout that bevkd knows.*OpenPCDet.*1 tensors: net\.a"):
        load_checkpoint(tmp_path / "other.pth", detector_of(VOXEL))


def test_mmdetection3d_without_a_version_is_asked_for_it(tmp_path: Path) -> None:
    public = randomise(Public("mmdet3d", VOXEL), 1)
    path = saved(public, tmp_path)
    with pytest.raises(CheckpointError, match=r"teacher\.checkpoint_version"):
        load_checkpoint(path, detector_of(VOXEL))
    detector = detector_of(VOXEL)
    load_checkpoint(path, detector, version="0.x")
    compare(detector, public, "mmdet3d0", scene())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("extra", "reason"),
    [("encoders.camera.backbone.weight", "reads cameras"), ("heads.object.heatmap_head.0.weight", "TransFusion head")],
)
def test_other_models_of_bevfusion_are_refused_with_the_reason(extra: str, reason: str, tmp_path: Path) -> None:
    state = {**Public("bevfusion", VOXEL).state_dict(), extra: torch.zeros(1)}
    torch.save({"state_dict": state}, tmp_path / "fusion.pth")
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(tmp_path / "fusion.pth", detector_of(VOXEL))


# ------------------------------------------------------------------------------------------ as a teacher


def test_a_teacher_says_which_file_and_layout_it_came_from(tmp_path: Path) -> None:
    path = saved(randomise(Public("openpcdet", PILLAR), 1), tmp_path, "model_state")
    config = parse(Config, {"name": "detector", "detector": config_of(PILLAR), "checkpoint": str(path)}, "recipe")
    teacher = build(config, CLASSES, torch.device("cpu"))
    assert teacher.identity.origin == "public.pth, converted from OpenPCDet"
    assert "checkpoint" not in teacher.identity.architecture
    other = saved(randomise(Public("openpcdet", PILLAR), 2), tmp_path, "model_state")
    assert build(config, CLASSES, torch.device("cpu")).identity.weights_sha256 != teacher.identity.weights_sha256
    assert other == path


def test_weights_and_checkpoint_exclude_each_other() -> None:
    values = {"name": "detector", "detector": config_of(VOXEL), "weights": "a.safetensors", "checkpoint": "b.pth"}
    with pytest.raises(ConfigError, match="either 'weights'"):
        parse(Config, values, "recipe")
