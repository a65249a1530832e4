"""The instance head: what it should say, what that costs, and how it is read."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bevkd.geometry.masks import move_instances
from bevkd.models.instance_head import (
    InstanceHead,
    InstanceHeadConfig,
    InstanceOutput,
    box_overlap,
    dice_loss,
    enlarged,
)
from bevkd.types import Instances
from tests.geometry.kit import paste

STRIDE, H, W = 4, 48, 64


def head(**changes: Any) -> InstanceHead:
    torch.manual_seed(0)
    config = InstanceHeadConfig(**{"channels": 16, "layers": 1, "mask_channels": 4, **changes})
    return InstanceHead(config, in_channels=8, stride=STRIDE, classes=3)


def objects() -> Instances:
    """Return an ellipse and a box in the first of two images, and a small triangle in the second."""
    rows, columns = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    ellipse = ((rows - 20) / 14) ** 2 + ((columns - 18) / 9) ** 2 < 1
    box = (rows > 30) & (rows < 42) & (columns > 34) & (columns < 60)
    triangle = (rows > 10) & (rows < 21) & (columns > 40) & (columns < 30 + rows)
    whole = Instances(
        torch.tensor([0, 0, 1]),
        torch.tensor([[0.0, 0.0, W, H]]).repeat(3, 1),
        torch.tensor([0, 2, 1]),
        torch.ones(3),
        (ellipse, box, triangle),
    )
    return move_instances(whole, torch.eye(3).repeat(2, 1, 1), (H, W))


def silent(module: InstanceHead) -> InstanceOutput:
    return module(torch.zeros(2, 8, H // STRIDE, W // STRIDE))


def perfect(module: InstanceHead) -> InstanceOutput:
    """Return an output that says exactly where the objects are, and nothing of their masks."""
    targets = module.targets(objects(), 2, H, W)
    output = silent(module.eval())
    distances = output.distances.detach().clone()
    for (image, row, column), box in zip(targets.cells.tolist(), targets.boxes.tolist(), strict=True):
        left, top, right, bottom = (edge / STRIDE for edge in box)
        far = torch.tensor([column + 1 - left, row + 1 - top, right - column, bottom - row])
        distances[image, :, row, column] = far.log()
    return InstanceOutput((targets.heatmap * 2 - 1) * 12, distances, output.code, output.mask_map)


def test_targets_stand_at_the_centre_of_each_box() -> None:
    module = head()
    targets = module.targets(objects(), 2, H, W)
    assert targets.cells.tolist() == [[0, 5, 4], [0, 9, 11], [1, 4, 11]]
    peaks = (targets.heatmap == 1).nonzero().tolist()
    assert peaks == [[0, 0, 5, 4], [0, 2, 9, 11], [1, 1, 4, 11]]


def test_a_box_is_read_where_its_target_stands() -> None:
    module = head()
    targets = module.targets(objects(), 2, H, W)
    boxes = module.boxes_at(perfect(module), targets.cells)
    assert torch.allclose(boxes, targets.boxes, atol=1e-4)


def test_even_the_smallest_box_at_the_rim_of_its_cell_has_positive_distances() -> None:
    module = head()
    pixel = Instances(
        torch.zeros(1).long(),
        torch.tensor([[W - 1.0, H - 1.0, W, H]]),
        torch.zeros(1).long(),
        torch.ones(1),
        (torch.ones(1, 1, dtype=torch.bool),),
    )
    targets = module.targets(pixel, 1, H, W)
    assert targets.cells.tolist() == [[0, H // STRIDE - 1, W // STRIDE - 1]]
    column, row = W // STRIDE - 1, H // STRIDE - 1
    right, bottom = W / STRIDE - column, H / STRIDE - row
    assert min(right, bottom, column + 1 - (W - 1) / STRIDE, row + 1 - (H - 1) / STRIDE) > 0


def test_a_perfect_output_costs_nothing_but_its_masks() -> None:
    module = head()
    with torch.no_grad():
        losses = module.loss(perfect(module), module.targets(objects(), 2, H, W))
    assert float(losses["heatmap"]) < 1e-3
    assert float(losses["box"]) < 1e-3
    assert float(losses["mask"]) > 0.05


def test_the_target_mask_of_a_grid_is_the_object_in_that_part_of_the_image() -> None:
    module = head()
    targets = module.targets(objects(), 2, H, W)
    grids = enlarged(targets.boxes)
    found = module._masks_in(targets, grids)
    whole = paste(objects(), H, W).float()
    points = module._grid_points(grids) / torch.tensor([W, H]) * 2 - 1
    expected = functional.grid_sample(whole[:, None], points, align_corners=False)[:, 0]
    agree = ((found > 0.5) == (expected > 0.5)).float().mean()
    assert float(agree) > 0.98


def test_the_mask_networks_are_three_layers_of_convolutions_over_the_shared_map() -> None:
    module = head().eval()
    features = torch.randn(2, 8, H // STRIDE, W // STRIDE)
    output = module(features)
    targets = module.targets(objects(), 2, H, W)
    grids = enlarged(targets.boxes)
    found = module.masks_at(output, targets.cells, grids)
    for n, (image, row, column) in enumerate(targets.cells.tolist()):
        points = module._grid_points(grids[n : n + 1]) / torch.tensor([W, H]) * 2 - 1
        shared = functional.grid_sample(
            output.mask_map[image : image + 1], points, padding_mode="border", align_corners=False
        )
        side = torch.linspace(-1.3, 1.3, 32)
        x = torch.cat([shared, side.expand(1, 1, 32, 32), side[:, None].expand(1, 1, 32, 32)], dim=1)
        weights = module.controller(output.code[image, :, row, column])
        sizes = [(4, 6), (4,), (4, 4), (4,), (1, 4), (1,)]
        w1, b1, w2, b2, w3, b3 = (
            part.view(size) for part, size in zip(weights.split([math.prod(s) for s in sizes]), sizes, strict=True)
        )
        x = functional.conv2d(x, w1[:, :, None, None], b1).relu()
        x = functional.conv2d(x, w2[:, :, None, None], b2).relu()
        x = functional.conv2d(x, w3[:, :, None, None], b3)
        assert torch.allclose(found[n], x[0, 0], atol=1e-5)


def test_images_without_objects_still_teach_the_heatmap() -> None:
    module = head()
    losses = module.loss(silent(module), module.targets(Instances.empty(), 2, H, W))
    assert losses["box"].item() == losses["mask"].item() == 0
    sum(losses.values(), torch.zeros(())).backward()
    gradient = module.heatmap.bias.grad
    assert gradient is not None
    assert float(gradient.abs().sum()) > 0
    assert all(p.grad is not None for p in module.parameters())  # else several processes would wait for each other


def test_it_learns_a_scene_by_heart() -> None:
    module = head(score_threshold=0.3)
    truth = objects()
    features = torch.randn(2, 8, H // STRIDE, W // STRIDE, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    for _ in range(80):
        losses = module.loss(module(features), module.targets(truth, 2, H, W))
        optimizer.zero_grad()
        sum(losses.values(), torch.zeros(())).backward()
        optimizer.step()
    module.train()  # batch norm has not settled in so few steps
    found = module.decode(module(features))
    assert sorted(zip(found.cameras.tolist(), found.labels.tolist(), strict=True)) == [(0, 0), (0, 2), (1, 1)]
    for index in range(len(truth)):
        same = (found.cameras == truth.cameras[index]) & (found.labels == truth.labels[index])
        mine, theirs = paste(found[same], H, W)[0], paste(truth, H, W)[index]
        assert int((mine & theirs).sum()) > 0.75 * int((mine | theirs).sum())


def test_what_is_found_fits_its_box_and_comes_best_first() -> None:
    module = head(score_threshold=0.0, max_instances=20).eval()
    found = module.decode(module(torch.randn(2, 8, H // STRIDE, W // STRIDE)))
    assert len(found) > 4
    for mask, box in zip(found.masks, found.boxes.tolist(), strict=True):
        assert mask.shape == (box[3] - box[1], box[2] - box[0])
        assert 0 <= box[0] < box[2] <= W
        assert 0 <= box[1] < box[3] <= H
        assert mask.any(dim=0).all() or mask.any()
    for image in (0, 1):
        scores = found.scores[found.cameras == image]
        assert torch.equal(scores, scores.sort(descending=True).values)


def test_nothing_above_the_threshold_is_no_instance() -> None:
    module = head(score_threshold=0.9).eval()
    assert len(module.decode(silent(module))) == 0


@pytest.mark.parametrize(
    ("box", "giou", "iou"),
    [
        ([0.0, 0, 4, 4], 1.0, 1.0),
        ([0.0, 0, 4, 2], 0.5, 0.5),
        ([2.0, 0, 6, 4], 1 / 3, 1 / 3),
        ([6.0, 0, 8, 4], -0.25, 0.0),
    ],
)
def test_the_overlap_of_boxes(box: list[float], giou: float, iou: float) -> None:
    found = box_overlap(torch.tensor([box]), torch.tensor([[0.0, 0, 4, 4]]))
    assert [float(each) for each in found] == pytest.approx([giou, iou], abs=1e-6)


def test_dice_is_zero_for_the_mask_itself_and_one_for_its_complement() -> None:
    mask = torch.zeros(1, 8, 8)
    mask[:, 2:5, 3:7] = 1
    sure: Tensor = (mask * 2 - 1) * 40
    assert float(dice_loss(sure, mask)) == pytest.approx(0, abs=1e-6)
    assert float(dice_loss(-sure, mask)) == pytest.approx(1, abs=1e-6)


def test_a_fineness_that_does_not_divide_the_stride_is_refused() -> None:
    with pytest.raises(ValueError, match="fineness 3 does not divide the stride 4"):
        head(fineness=3)
