"""A batch holds its samples side by side, and loses track of none."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bevkd.data.collate import Sample, collate
from bevkd.geometry.affine import BEVAffine
from bevkd.types import Boxes, Frame, LidarDepth, Rig


def boxes(count: int) -> Boxes:
    return Boxes(torch.full((count, 9), float(count)), torch.arange(count), torch.ones(count))


def rig(value: float) -> Rig:
    return Rig(("a", "b"), torch.full((2, 3, 3), value), torch.full((2, 4, 4), value), torch.full((2, 3, 3), value))


def sample(token: str, points: int | None = None, images: float | None = None, labels: int | None = 0) -> Sample:
    frame = Frame(
        token,
        0,
        points=None if points is None else torch.full((points, 5), float(points)),
        images=None if images is None else torch.full((2, 3, 4, 6), int(images), dtype=torch.uint8),
        rig=None if images is None else rig(float(images)),
        boxes=None if labels is None else boxes(labels),
    )
    stored = {"teacher": {"bev_low": torch.full((2, 3), float(len(token)))}}
    return Sample(frame, BEVAffine(rotation_rad=float(len(token))), stored)


def test_points_say_whose_they_are() -> None:
    batch = collate([sample("a", points=2), sample("bb", points=0), sample("ccc", points=3)])
    assert batch.points is not None
    assert batch.point_frame is not None
    assert batch.points[:, 0].tolist() == [2.0, 2.0, 3.0, 3.0, 3.0]
    assert batch.point_frame.tolist() == [0, 0, 2, 2, 2]
    assert batch.point_frame.dtype == torch.int64


def test_images_and_rigs_stand_side_by_side() -> None:
    batch = collate([sample("a", images=1), sample("bb", images=2)])
    assert batch.images is not None
    assert batch.intrinsics is not None
    assert batch.bev_from_camera is not None
    assert batch.images[:, 0, 0, 0, 0].tolist() == [1, 2]
    assert batch.intrinsics[:, 0, 0, 0].tolist() == [1.0, 2.0]
    assert batch.bev_from_camera.shape == (2, 2, 4, 4)


def test_no_labels_is_not_no_boxes() -> None:
    batch = collate([sample("a", labels=None), sample("b", labels=0), sample("c", labels=2)])
    assert batch.labelled.tolist() == [False, True, True]
    assert [len(each) for each in batch.boxes] == [0, 0, 2]


def test_sensors_that_no_sample_has_are_absent() -> None:
    batch = collate([sample("a"), sample("b")])
    assert (batch.points, batch.point_frame, batch.images, batch.intrinsics) == (None, None, None, None)


def test_tokens_affines_and_stored_signals_keep_their_order() -> None:
    batch = collate([sample("bb"), sample("a")])
    assert batch.tokens == ("bb", "a")
    assert [affine.rotation_rad for affine in batch.affines] == [2.0, 1.0]
    assert batch.stored is not None
    assert batch.stored["teacher"]["bev_low"][:, 0, 0].tolist() == [2.0, 1.0]
    assert len(batch) == 2


def test_moving_a_batch_moves_every_tensor() -> None:
    depth = LidarDepth(torch.zeros(1, dtype=torch.int64), torch.zeros(1, 2), torch.ones(1))
    batch = replace(collate([sample("a", points=2, images=1, labels=1)]), lidar_depth=(depth,)).to("meta")
    assert batch.lidar_depth is not None
    tensors: list[Tensor | None] = [batch.labelled, batch.points, batch.point_frame, batch.images, batch.intrinsics]
    tensors += [batch.view_from_original, batch.lidar_depth[0].pixels, batch.lidar_depth[0].depth_m]
    tensors += [batch.bev_from_camera, batch.boxes[0].values, batch.boxes[0].labels, batch.boxes[0].scores]
    assert batch.stored is not None
    tensors.append(batch.stored["teacher"]["bev_low"])
    assert {str(tensor.device) for tensor in tensors if tensor is not None} == {"meta"}
    assert None not in tensors
    assert batch.tokens == ("a",)
    assert batch.affines == (BEVAffine(rotation_rad=1.0),)
