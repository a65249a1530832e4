"""Boxes decoded from warped head maps are the warped boxes; no map loses a bit under the eight symmetries."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from bevkd.distill.base import TeacherBatch, sample_at
from bevkd.geometry.affine import BEVAffine
from bevkd.geometry.boxes import nine_points
from bevkd.geometry.sampling import points_of
from bevkd.grid import BEVGrid
from bevkd.models.heads.center import CenterHead, Config, HeadOutput, encode_boxes
from bevkd.types import Boxes, Signals
from tests.geometry.strategies import D4, affines, random_boxes, seeds

GRID = BEVGrid(x_m=(-16, 16), y_m=(-16, 16), cell_m=0.5)
CLASSES = ("car", "truck", "bicycle")
TASKS = (("car", "truck"), ("bicycle",))
REACH = 4
"""Cells around each object whose box code is that of the object."""


def head() -> CenterHead:
    nms = {"type": "circle", "squared_distance": [1.0, 1.0]}
    return CenterHead(Config.model_validate({"tasks": TASKS, "nms": nms}), 4, GRID, CLASSES)


def scene(generator: torch.Generator) -> Boxes:
    """Return boxes well apart from each other, one in each of 16 squares."""
    boxes = random_boxes(16, generator)
    lattice = torch.cartesian_prod(*[torch.arange(4) * 8.0 - 12.0] * 2)
    boxes.values[:, :2] = lattice + 2 * torch.rand(16, 2, generator=generator) - 1
    return boxes


def head_maps(boxes: Boxes) -> HeadOutput:
    """Return what a perfect head would say: a peak per box, and the box's code in all cells around it."""
    heatmap = torch.full((1, len(CLASSES), *GRID.shape), -9.0)
    code = torch.zeros(1, len(TASKS), 10, *GRID.shape)
    rows, columns = (torch.arange(n) for n in GRID.shape)
    cells, codes = encode_boxes(boxes.values, GRID)
    for (row, column), own, label in zip(cells.tolist(), codes, boxes.labels.tolist(), strict=True):
        down, right = torch.meshgrid(rows - row, columns - column, indexing="ij")
        distance2 = (down + 0.5 - own[1]) ** 2 + (right + 0.5 - own[0]) ** 2
        heatmap[0, label] = torch.maximum(heatmap[0, label], 4 - distance2)
        near = (down.abs() <= REACH) & (right.abs() <= REACH)
        here = own[:, None].repeat(1, int(near.sum()))
        here[0] -= right[near]
        here[1] -= down[near]
        code[0, int(label == 2)][:, near] = here
    return HeadOutput(heatmap, code)


def warped_boxes(maps: HeadOutput, affine: BEVAffine) -> tuple[Boxes, Tensor]:
    """Return the boxes of the warped maps in cells that the warped maps cover, and which cells these are."""
    teacher = TeacherBatch(Signals(heatmap=maps.heatmap, box_code=maps.box_code), (affine,), GRID)
    heatmap, covered = teacher.warped("heatmap")
    code, known = teacher.warped("box_code")
    seen = covered & known
    return head().decode(HeadOutput(torch.where(seen, heatmap, -9.0), code))[0], seen[0, 0]


def assert_same(found: Boxes, expected: Boxes, atol: float) -> None:
    """Check that two sets of boxes are the same in any order."""
    order = [boxes.values[:, :2].double() @ torch.tensor([1000.0, 1.0]).double() for boxes in (found, expected)]
    found, expected = found[order[0].argsort()], expected[order[1].argsort()]
    assert found.labels.tolist() == expected.labels.tolist()
    straight = [0, 1, 2, 3, 4, 5, 7, 8]
    torch.testing.assert_close(found.values[:, straight], expected.values[:, straight], atol=atol, rtol=1e-4)
    for function in (torch.sin, torch.cos):
        torch.testing.assert_close(function(found.yaw), function(expected.yaw), atol=atol, rtol=0)


@pytest.mark.parametrize("affine", D4, ids=str)
def test_under_the_eight_symmetries_decoding_and_warping_commute(affine: BEVAffine) -> None:
    boxes = scene(torch.Generator().manual_seed(0))
    maps = head_maps(boxes)
    found, seen = warped_boxes(maps, affine)
    assert seen.all()
    assert_same(found, affine.apply_to_boxes(head().decode(maps)[0]), atol=1e-4)
    assert len(found) == 16


@settings(max_examples=25)
@given(affines(), seeds())
def test_under_any_affine_boxes_of_warped_maps_are_warped_boxes(affine: BEVAffine, generator: torch.Generator) -> None:
    boxes = scene(generator)
    found, seen = warped_boxes(head_maps(boxes), affine)
    moved = affine.apply_to_boxes(boxes)
    # A peak may lie on an uncovered cell; two cells further in, it is found.
    sure = torch.nn.functional.max_pool2d((~seen)[None].float(), 5, 1, 2)[0] == 0
    on_grid = (GRID.to_sampling(moved.center[:, :2]).abs() < 0.9).all(dim=1)
    column, row = GRID.to_cells(moved.center[:, :2]).floor().long().clamp(0, GRID.shape[0] - 1).unbind(1)
    must = moved[on_grid & sure[row, column]]
    partner = torch.cdist(found.center, moved.center).argmin(dim=1)
    assert len(set(partner.tolist())) == len(found), "an object is found twice"
    assert_same(found, moved[partner], atol=5e-3)
    if len(must):
        assert len(found)
        assert torch.cdist(must.center, found.center).amin(dim=1).max() < 5e-3, "an object is lost"


def half(*shape: int, seed: int) -> Tensor:
    """Return values as a cache holds them at best: of half precision."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).half().float()


@pytest.mark.parametrize("affine", D4, ids=str)
def test_every_map_signal_comes_back_bit_for_bit(affine: BEVAffine) -> None:
    code = half(2, 2, 10, *GRID.shape, seed=3)
    code[:, :, :2] = code[:, :, :2].abs().remainder(1)
    known = half(2, *GRID.shape, seed=4) > 0
    signals = Signals(
        bev_low=half(2, 3, *GRID.shape, seed=0),
        bev_high=half(2, 3, *GRID.shape, seed=1),
        heatmap=half(2, 3, *GRID.shape, seed=2),
        box_code=code,
        box_code_known=known,
    )
    there = TeacherBatch(signals, (affine, BEVAffine.identity()), GRID)
    names = ("bev_low", "bev_high", "heatmap", "box_code")
    maps = {name: there.warped(name) for name in names}
    back = TeacherBatch(
        Signals(**{name: values for name, (values, _) in maps.items()}, box_code_known=maps["box_code"][1][:, 0]),
        (affine.inverse(), BEVAffine.identity()),
        GRID,
    )
    for name in names:
        assert torch.equal(back.warped(name)[0], getattr(signals, name)), name
    assert torch.equal(back.warped("box_code")[1][:, 0], known)


@given(affines(), seeds())
def test_points_of_boxes_need_no_warp(affine: BEVAffine, generator: torch.Generator) -> None:
    """The teacher's values at canonical boxes belong to where the boxes went, also of a box that is mirrored."""
    linear = GRID.centers().permute(2, 0, 1)[None]
    boxes = random_boxes(5, generator, reach_m=8)
    boxes.values[:, 3:5].clamp_(max=4)
    teacher = TeacherBatch(Signals(points_low=(points_of(linear[0], boxes, GRID),)), (affine,), GRID)
    held = teacher.points("points_low")[0]
    where = teacher.to_augmented(nine_points(held.boxes), 0)
    at_values = affine.apply_to_points(torch.nn.functional.pad(held.values.flatten(0, 1), (0, 1)))[:, :2]
    torch.testing.assert_close(where.flatten(0, 1), at_values, atol=1e-3, rtol=1e-4)
    back = teacher.to_canonical(where, 0)
    torch.testing.assert_close(back, nine_points(boxes.values[:, :7]), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(sample_at(linear, [back], GRID), held.values, atol=1e-3, rtol=1e-4)
