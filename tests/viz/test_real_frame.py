"""Alignment on a real nuScenes frame."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bevkd.data.sources import nuscenes
from bevkd.geometry.boxes import points_in_boxes
from bevkd.types import Frame
from bevkd.viz import FrameHeader, frame_page, save
from bevkd.viz.projection import camera_points, project, visible_edges
from tests.viz.pictures import GRID

TOKEN = "fd8420396768425eabec9bdddf7e64b6"


@pytest.fixture(scope="module")
def real_frame(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Frame:
    config = nuscenes.Config(
        root=real_data / "nuscenes_mini_real",
        split="val",
        scenes=("scene-0003",),
        tokens=(TOKEN,),
        index_dir=tmp_path_factory.mktemp("index"),
    )
    return nuscenes.build(config).load(TOKEN, frozenset({"lidar", "camera"}))


def test_lidar_points_of_a_box_fall_inside_its_drawing(real_frame: Frame) -> None:
    assert real_frame.points is not None
    assert real_frame.boxes is not None
    assert real_frame.images is not None
    assert real_frame.rig is not None
    height, width = real_frame.images.shape[-2:]
    held = points_in_boxes(real_frame.points, real_frame.boxes.values)
    checked = 0
    for intrinsics, pose in zip(real_frame.rig.intrinsics, real_frame.rig.lidar_from_camera, strict=True):
        segments = visible_edges(real_frame.boxes.values, intrinsics, pose, height, width)
        for box in set(segments.box.tolist()):
            ends = segments.ends_px[segments.box == box].reshape(-1, 2)
            in_camera = camera_points(real_frame.points[held[box], :3], pose)
            pixels = project(in_camera[in_camera[:, 2] > 0.5], intrinsics)
            pixels = pixels[((pixels >= 0) & (pixels < torch.tensor([width, height]))).all(dim=1)]
            inside = (pixels >= ends.amin(dim=0) - 1) & (pixels <= ends.amax(dim=0) + 1)
            assert bool(inside.all())
            checked += len(pixels)
    assert checked > 500


def test_the_page_of_a_real_frame_stays_below_its_size(real_frame: Frame, tmp_path: Path) -> None:
    page = frame_page(real_frame, GRID, nuscenes.CLASSES, FrameHeader("nuscenes"))
    assert save(page, tmp_path / "page.png").stat().st_size < 1_500_000
