from __future__ import annotations

import numpy as np
import pytest
import shapely
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bevkd.geometry.boxes import bev_corners
from bevkd.geometry.iou import bev_iou, bev_iou_matrix, circle_nms, iou_3d, iou_3d_matrix, rotated_nms
from tests.geometry.strategies import random_boxes, seeds


def shapely_iou(a: Tensor, b: Tensor) -> Tensor:
    of_a, of_b = (shapely.polygons(bev_corners(boxes.double()).numpy()) for boxes in (a, b))
    shared = shapely.area(shapely.intersection(of_a, of_b))
    union = shapely.area(of_a) + shapely.area(of_b) - shared
    return torch.from_numpy(np.asarray(shared / union)).float()


def box(x: float, y: float, length: float, width: float, yaw: float = 0.0) -> Tensor:
    return torch.tensor([[x, y, 0.0, length, width, 2.0, yaw]])


@given(seeds())
def test_iou_equals_shapely_far_from_the_origin(generator: torch.Generator) -> None:
    a, b = (random_boxes(200, generator, reach_m=4).values for _ in range(2))
    a[:, :2] += 45
    b[:, :2] += 45
    torch.testing.assert_close(bev_iou(a, b), shapely_iou(a, b), atol=1e-5, rtol=0)


@given(seeds(), st.sampled_from([0.0, 1e-7, 1e-4, np.pi / 2, np.pi, -np.pi]), st.sampled_from([0.0, 1e-6, 1e-3]))
def test_iou_equals_shapely_for_nearly_equal_boxes(generator: torch.Generator, turn: float, shift: float) -> None:
    a = random_boxes(100, generator).values
    b = a.clone()
    b[:, 6] += turn
    b[:, 0] += shift
    torch.testing.assert_close(bev_iou(a, b), shapely_iou(a, b), atol=1e-5, rtol=0)


def pairs(count: int) -> tuple[Tensor, Tensor]:
    """Return random pairs in double precision; one in eight each is touching, contained, equal, crossing or flat."""
    generator = torch.Generator().manual_seed(0)
    a, b = (random_boxes(count, generator, reach_m=3).values.double() for _ in range(2))
    touching, contained, equal, crossing, flat = (slice(k, None, 8) for k in range(5))
    for part in (touching, contained, equal, crossing):
        b[part, :7] = a[part, :7]
    ahead = torch.stack([a[touching, 6].cos(), a[touching, 6].sin()], dim=1)
    b[touching, :2] += ahead * a[touching, 3:4]
    b[contained, 3:6] *= 0.1 + 0.8 * torch.rand(len(a[contained]), 3, generator=generator)
    b[crossing, 6] += torch.pi / 2
    b[flat, 3] = 0
    return a, b


def test_iou_equals_shapely_on_10000_pairs() -> None:
    a, b = pairs(10_000)
    of_a, of_b = (shapely.polygons(bev_corners(boxes).numpy()) for boxes in (a, b))
    # Without a grid GEOS takes some boxes that share an edge for equal.
    shared = torch.from_numpy(np.asarray(shapely.area(shapely.intersection(of_a, of_b, grid_size=1e-9))))
    union = a[:, 3] * a[:, 4] + b[:, 3] * b[:, 4] - shared
    torch.testing.assert_close(bev_iou(a, b), shared / union, atol=1e-6, rtol=0)

    low, high = (torch.stack([box[:, 2] + side * box[:, 5] / 2 for box in (a, b)]) for side in (-1, 1))
    volume = shared * (high.amin(0) - low.amax(0)).clamp(min=0)
    union = a[:, 3:6].prod(1) + b[:, 3:6].prod(1) - volume
    torch.testing.assert_close(iou_3d(a, b), volume / union, atol=1e-6, rtol=0)
    assert ((shared > 0.01) & (volume > 0.01)).sum() > 4000


@given(seeds())
def test_a_box_overlaps_itself_fully(generator: torch.Generator) -> None:
    boxes = random_boxes(50, generator).values
    torch.testing.assert_close(bev_iou(boxes, boxes), torch.ones(50))
    torch.testing.assert_close(iou_3d(boxes, boxes), torch.ones(50))


@pytest.mark.parametrize("yaw", [0.0, 0.4, np.pi / 2])
def test_boxes_that_share_an_edge_do_not_overlap(yaw: float) -> None:
    a = box(0, 0, 4, 2, yaw)
    b = box(float(4 * np.cos(yaw)), float(4 * np.sin(yaw)), 4, 2, yaw)
    assert bev_iou(a, b).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (box(0, 0, 4, 2), box(1, 0, 2, 2), 0.5),  # shares three edges
        (box(0, 0, 4, 4), box(0, 0, 1, 1, 0.7), 1 / 16),  # lies inside
        (box(0, 0, 4, 4), box(3, 3, 4, 4), 1 / 31),
        (box(0, 0, 2, 2), box(0, 0, 2, 2, np.pi / 4), 8 * (2**0.5 - 1) / (8 - 8 * (2**0.5 - 1))),
        (box(0, 0, 2, 2), box(2, 2, 2, 2), 0.0),  # touches in a corner
        (box(0, 0, 0, 2), box(0, 0, 0, 2), 0.0),  # has no area
        (box(0, 0, 0, 0), box(0, 0, 4, 2), 0.0),
    ],
)
def test_iou_of_special_pairs_is_exact(a: Tensor, b: Tensor, expected: float) -> None:
    assert bev_iou(a, b).item() == pytest.approx(expected, abs=1e-6)
    assert bev_iou(b, a).item() == pytest.approx(expected, abs=1e-6)


@given(seeds())
def test_the_matrix_holds_the_iou_of_every_pair(generator: torch.Generator) -> None:
    a, b = random_boxes(12, generator, reach_m=10).values, random_boxes(7, generator, reach_m=10).values
    every_a, every_b = a[:, None].expand(-1, 7, -1), b[None].expand(12, -1, -1)
    torch.testing.assert_close(bev_iou_matrix(a, b), bev_iou(every_a, every_b), atol=1e-6, rtol=0)
    torch.testing.assert_close(iou_3d_matrix(a, b), iou_3d(every_a, every_b), atol=1e-6, rtol=0)


def test_volume_iou_counts_the_shared_height() -> None:
    a = torch.tensor([[0.0, 0.0, 0.0, 4.0, 2.0, 2.0, 0.0]])
    b = torch.tensor([[0.0, 0.0, 1.0, 4.0, 2.0, 2.0, 0.0], [0.0, 0.0, 2.0, 4.0, 2.0, 2.0, 0.0]])
    torch.testing.assert_close(iou_3d(a.expand(2, -1), b), torch.tensor([1 / 3, 0.0]))


def test_an_empty_side_gives_an_empty_matrix() -> None:
    assert bev_iou_matrix(torch.zeros(0, 7), box(0, 0, 1, 1)).shape == (0, 1)


def greedy(clash: Tensor, scores: Tensor, post: int) -> list[int]:
    kept: list[int] = []
    for index in scores.argsort(descending=True, stable=True).tolist():
        if not any(clash[other, index] for other in kept):
            kept.append(index)
    return kept[:post]


@given(seeds(), st.sampled_from([0.01, 0.1, 0.5]), st.sampled_from([5, 100]))
def test_rotated_nms_keeps_what_one_by_one_suppression_keeps(
    generator: torch.Generator, threshold: float, post: int
) -> None:
    boxes, scores = random_boxes(60, generator, reach_m=12).values, torch.rand(60, generator=generator)
    clash = bev_iou_matrix(boxes, boxes) > threshold
    assert rotated_nms(boxes, scores, threshold, pre=1000, post=post).tolist() == greedy(clash, scores, post)


@given(seeds(), st.sampled_from([0.2, 4.0, 30.0]))
def test_circle_nms_keeps_what_one_by_one_suppression_keeps(generator: torch.Generator, squared: float) -> None:
    centers, scores = torch.rand(60, 2, generator=generator) * 20, torch.rand(60, generator=generator)
    clash = (centers[:, None] - centers[None]).square().sum(-1) <= squared
    assert circle_nms(centers, scores, squared, post=20).tolist() == greedy(clash, scores, 20)


def test_circle_nms_compares_squared_distances() -> None:
    centers, scores = torch.tensor([[0.0, 0.0], [3.0, 0.0]]), torch.tensor([0.9, 0.8])
    assert circle_nms(centers, scores, squared_distance=4.0, post=10).tolist() == [0, 1]
    assert circle_nms(centers, scores, squared_distance=10.0, post=10).tolist() == [0]


def test_nms_looks_at_the_best_boxes_only() -> None:
    boxes = torch.cat([box(10 * k, 0, 1, 1) for k in range(4)])
    kept = rotated_nms(boxes, torch.tensor([0.1, 0.4, 0.3, 0.2]), 0.2, pre=2, post=10)
    assert kept.tolist() == [1, 2]


def test_nms_of_no_boxes_keeps_none() -> None:
    assert rotated_nms(torch.zeros(0, 7), torch.zeros(0), 0.2, pre=10, post=10).tolist() == []
    assert circle_nms(torch.zeros(0, 2), torch.zeros(0), 4.0, post=10).tolist() == []


def test_nms_of_many_overlapping_boxes_is_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    boxes, scores = random_boxes(200, generator, reach_m=8).values, torch.rand(200, generator=generator)
    whole = rotated_nms(boxes, scores, 0.1, pre=200, post=200)
    monkeypatch.setattr("bevkd.geometry.iou._PAIRS", 7)
    assert torch.equal(rotated_nms(boxes, scores, 0.1, pre=200, post=200), whole)
