"""Public checkpoints load into the same detector: the same maps and boxes as in their own framework."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bevkd.config import parse
from bevkd.errors import CheckpointError, ConfigError
from bevkd.models.detector import Detector, DetectorConfig
from bevkd.models.heads.center import decode_boxes
from bevkd.teachers.checkpoints import load_checkpoint
from bevkd.teachers.detector import Config, build
from tests.teachers.checkpoint_kit import (
    ANCHORS,
    CASES,
    CLASSES,
    GRID,
    PILLAR,
    POINT_PILLARS,
    SECOND,
    VOXEL,
    compare,
    config_of,
    detector_of,
    encode_of,
    saved,
    scene,
    with_anchors,
)
from tests.teachers.public import Public, anchor_boxes, randomise
from tests.teachers.public_layers import Sizes, Sparse

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
