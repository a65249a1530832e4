"""The smallest config of every plug-in that ships with bevkd: a new plug-in needs one entry here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from bevkd.config import parse
from bevkd.data.source import Sensor
from bevkd.models.segmenter import Segmenter, SegmenterConfig
from bevkd.models.weights import save_weights
from bevkd.testing.losses import STUDENT

CLASSES = ("car", "truck", "pedestrian")
CAMERA: dict[str, Any] = {name: value for name, value in STUDENT["encoder"].items() if name != "name"}
GRID = {"x_m": [-12.8, 12.8], "y_m": [-12.8, 12.8], "z_m": [-5, 3], "cell_m": 1.6}
TASKS = [["car", "truck"], ["pedestrian"]]
VOXEL = {"voxel_m": [0.8, 0.8, 1.0], "channels": [8, 8], "blocks": 1, "out_channels": 8}
DETECTOR = {
    "grid": GRID,
    "encoder": {"name": "voxel", **VOXEL},
    "bev_encoder": STUDENT["bev_encoder"],
    "head": STUDENT["head"],
}


@dataclass(frozen=True)
class SourceCase:
    """How a source's config is found, and what the data set has.

    Attributes:
        config: given the folder of a generated world and that of real samples (None where there are none).
    """

    config: Callable[[Path, Path | None], dict[str, Any] | None]
    sensors: frozenset[Sensor] = field(default_factory=lambda: frozenset({"lidar", "camera", "radar"}))


SIZES = {"car": (4.0, 1.8, 1.6), "truck": (6.0, 2.4, 2.5), "pedestrian": (1.0, 0.8, 1.8)}


def anchor(length_m: float, width_m: float, height_m: float) -> dict[str, Any]:
    """Return the anchors of a class."""
    return {"size_m": [length_m, width_m, height_m], "bottom_m": -1.8, "matched": 0.35, "unmatched": 0.2}


ENCODERS: Mapping[str, dict[str, Any]] = {
    "fusion": {"camera": {"name": "lift_splat", **CAMERA}, "lidar": {"name": "voxel", **VOXEL}, "channels": 8},
    "lift_splat": CAMERA,
    "pillar": {"pillar_m": 0.8, "channels": [8, 8]},
    "radar": {"channels": [8, 8]},
    "voxel": VOXEL,
}

HEADS: Mapping[str, dict[str, Any]] = {
    "anchor": {"anchors": {name: anchor(*size) for name, size in SIZES.items()}},
    "center": {"tasks": TASKS, "channels": 8, "min_radius": 1, "nms": {"type": "circle", "squared_distance": [4, 1]}},
}


def segmenter_run(folder: Path, classes: tuple[str, ...] = CLASSES) -> dict[str, Any]:
    """Return the config of a segmenter whose run, untrained, is written to ``folder``."""
    config = {
        "backbone": CAMERA["backbone"],
        "image_height": 32,
        "image_width": 64,
        "stride": 4,
        "neck_channels": 8,
        "head": {"channels": 8, "layers": 1},
    }
    torch.manual_seed(0)
    segmenter = Segmenter(parse(SegmenterConfig, config, "the segmenter"), classes)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"segmenter": config, "data": {"classes": list(classes)}}))
    save_weights(folder / "model.safetensors", segmenter.state_dict(), {})
    return {"run": str(folder), "grid": GRID}


def mask2former_folder(folder: Path) -> dict[str, Any]:
    """Return the config of a Mask2Former that is written to ``folder``."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    backbone = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=6,
        id2label=dict(enumerate(("car", "truck", "person"))),
    )  # fmt: skip
    torch.manual_seed(0)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    return {"folder": str(folder), "grid": GRID, "image_height": 32, "image_width": 64, "score_threshold": 0.0}


TEACHERS: Mapping[str, Callable[[Path], dict[str, Any]]] = {
    "detector": lambda _: {"detector": DETECTOR},
    "mask2former": mask2former_folder,
    "segmenter": segmenter_run,
    "synthetic": lambda _: {"grid": GRID, "bev_low": 8, "bev_high": 8, "tasks": 2, "boxes": 10, "lidar": True},
}
"""By teacher, what its config is, given a folder for the files that it needs."""

LOSSES: Mapping[str, tuple[dict[str, Any], ...]] = {
    "soft": ({},),
    "x3kd": (
        {"score": 0.1},
        {"heatmap": "quality"},
        {"feature": 1.0, "empty": 0.1, "adversarial": 0.1, "ramp": 10},
        {"output": 0, "feature": 1.0, "standardise": True},
        {"output": 0, "instance": 1.0},
    ),
    "unidistill": (
        {},
        {"adapter": True, "pseudo_score": 0.3},
        {"adapter": "conv"},
        {"source": "points"},
        {"adapter": True, "standardise": True},
    ),
    "rdd": ({}, {"region": "box", "box": True, "rule": "soft"}, {"rule": "topk", "logit_region": "peak"}),
    "itkd": ({}, {"variant": "paper", "code": 4, "standardise": True}),
    "bevdistill": ({},),
    "crkd": ({"sizes": (4, 2)}, {"stage": "bev_high"}),
    "distillbev": ({}, {"false_positive": 0}),
    "labeldistill": ({}, {"stages": ["bev_low", "bev_high"], "stride": 1}),
    "tigbev": ({"side": 6},),
}

_WORLD = {"name": "nuscenes", "version": "v1.0-world", "sweeps": 2}

SOURCES: Mapping[str, SourceCase] = {
    "concat": SourceCase(
        lambda world, _: {
            "sources": [_WORLD | {"root": str(world), "split": f"world_{split}"} for split in ("train", "val")]
        }
    ),
    "kitti": SourceCase(
        lambda _, real: real and {"root": str(real / "kitti"), "split": "trainval"}, frozenset({"lidar", "camera"})
    ),
    "nuscenes": SourceCase(
        lambda world, _: {"root": str(world), "version": "v1.0-world", "split": "world_train", "sweeps": 2}
    ),
}
