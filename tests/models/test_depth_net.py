"""Depth and context of image features: BEVDepth's values, and what its parts must do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bevkd.geometry.affine import BEVAffine
from bevkd.models.deform_conv import DeformConv2d, deform_conv2d
from bevkd.models.depth_net import (
    CAMERA_VALUES,
    CameraAwareDepthNet,
    DepthAggregation,
    PlainDepthNet,
    camera_vector,
    depth_loss,
    depth_targets,
)
from bevkd.types import LidarDepth
from tests.golden import T


def returns(*rows: tuple[int, int, int, float]) -> LidarDepth:
    """Return depths from (camera, row, column, metres), each at the centre of its pixel."""
    table = torch.tensor(rows).view(-1, 4)
    return LidarDepth(table[:, 0].long(), table[:, [2, 1]] + 0.5, table[:, 3])


PUBLISHED = returns(
    (0, 3, 5, 2.0),
    (0, 9, 40, 10.25),
    (0, 10, 41, 9.9),
    (1, 20, 2, 57.99),
    (1, 21, 20, 58.4),
    (1, 5, 5, 70),
    (1, 30, 47, 1.7),
)


def published_targets(depth: LidarDepth = PUBLISHED) -> Tensor:
    return depth_targets(depth, images=2, rows=2, columns=3, stride=16, start=2.0, step=0.5, bins=112)


def test_targets_are_those_of_bevdepth() -> None:
    expected = torch.full((2, 2, 3), -1)
    expected[0, 0, 0], expected[0, 0, 2], expected[1, 1, 0] = 0, 15, 111
    assert torch.equal(published_targets(), expected)


def test_the_loss_is_that_of_bevdepth() -> None:
    logits = T(2, 112, 2, 3, k=0.3)
    assert 3 * depth_loss(logits, published_targets()).item() == pytest.approx(18.32507324, rel=1e-4)


def test_the_nearest_return_of_a_cell_counts_whatever_their_order() -> None:
    near_last = returns((0, 1, 1, 30.0), (0, 2, 2, 10.0))
    near_first = returns((0, 2, 2, 10.0), (0, 1, 1, 30.0))
    assert torch.equal(published_targets(near_last), published_targets(near_first))
    assert published_targets(near_last)[0, 0, 0] == 16


def test_no_returns_give_a_zero_loss_with_a_gradient() -> None:
    logits = torch.randn(2, 112, 2, 3, requires_grad=True)
    target = published_targets(returns())
    loss = depth_loss(logits, target)
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_only_cells_with_a_return_get_a_gradient() -> None:
    logits = torch.zeros(2, 112, 2, 3, requires_grad=True)
    depth_loss(logits, published_targets()).backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad.abs().sum(1) > 0, published_targets() >= 0)


# ---------------------------------------------------------------------------------------------- camera vector


def test_the_camera_vector_does_not_see_augmentation_in_lens_and_pose() -> None:
    torch.manual_seed(0)
    lens = torch.tensor([[1200.0, 0, 800], [0, 1250, 450], [0, 0, 1]])
    view = torch.tensor([[0.44, 0, -10.0], [0, 0.44, -140], [0, 0, 1]])
    pose, affine = torch.eye(4), BEVAffine(rotation_rad=0.3, scale=1.05, flip_y=True)
    pose[:3, 3] = torch.tensor([1.0, 2, 3])
    matrix = affine.matrix().float()
    vector = camera_vector((view @ lens)[None], view[None], (matrix @ pose)[None], matrix[None])[0]
    assert len(vector) == CAMERA_VALUES
    torch.testing.assert_close(vector[:4], torch.tensor([1200.0, 1250, 800, 450]), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(vector[4:10], view[:2].flatten())
    torch.testing.assert_close(vector[10:15], torch.cat([matrix[:2, :2].flatten(), matrix[2, 2:3]]))
    torch.testing.assert_close(vector[15:], pose[:3].flatten(), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------- networks


def network(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind(8, 6, 5)


@pytest.mark.parametrize("kind", [PlainDepthNet, CameraAwareDepthNet])
def test_depth_and_context_have_their_channels_and_every_weight_learns(kind: type[nn.Module]) -> None:
    model = network(kind).train()
    depth, context = model(torch.randn(4, 8, 6, 7), torch.randn(4, 2, 6, 7), torch.randn(4, CAMERA_VALUES))
    assert depth.shape == (4, 6, 6, 7)
    assert context.shape == (4, 5, 6, 7)
    (depth.square().sum() + context.square().sum()).backward()
    assert [name for name, each in model.named_parameters() if each.grad is None] == []


def test_only_the_camera_aware_network_looks_at_the_camera() -> None:
    feature, plane = torch.randn(2, 8, 6, 7), torch.randn(2, 2, 6, 7)
    one, other = torch.zeros(2, CAMERA_VALUES), torch.ones(2, CAMERA_VALUES)
    for kind, same in ((PlainDepthNet, True), (CameraAwareDepthNet, False)):
        model = network(kind).eval()
        pairs = zip(model(feature, plane, one), model(feature, plane, other), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) is same


def test_aggregation_moves_along_depth_and_columns_but_not_between_image_rows() -> None:
    torch.manual_seed(0)
    model = DepthAggregation(4).eval()
    lifted = torch.randn(1, 4, 6, 3, 5)
    changed = lifted.clone()
    changed[0, :, 2, 1, 2] += 1
    difference = (model(changed) != model(lifted)).any(dim=1)[0]
    assert difference[:, 1].any(dim=0).sum() > 1
    assert difference[:, 1].any(dim=1).sum() > 1
    assert not difference[:, [0, 2]].any()


# ---------------------------------------------------------------------------------------------- deformable convolution


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_without_offsets_it_is_an_ordinary_convolution(groups: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 8, 5, 7), torch.randn(12, 8 // groups, 3, 3)
    expected = nn.functional.conv2d(x, weight, padding=1, groups=groups)
    torch.testing.assert_close(
        deform_conv2d(x, torch.zeros(2, 18, 5, 7), weight, groups), expected, rtol=1e-4, atol=1e-4
    )


def test_a_whole_offset_moves_the_taps_of_its_cell_down_and_right() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 3, 8, 9), torch.randn(2, 3, 3, 3)
    down_right = torch.tensor([1.0, 2.0]).repeat(9)[None, :, None, None].expand(1, 18, 8, 9)
    ordinary = nn.functional.conv2d(x, weight, padding=1)
    moved = deform_conv2d(x, down_right, weight)
    torch.testing.assert_close(moved[..., 1:-2, 1:-3], ordinary[..., 2:-1, 3:-1], rtol=1e-4, atol=1e-4)


def test_each_tap_has_its_own_offset_and_half_offsets_interpolate() -> None:
    x, weight = torch.arange(35.0).view(1, 1, 5, 7), torch.zeros(1, 1, 3, 3)
    weight[0, 0, 0, 2] = 1.0  # the tap above and to the right
    offset = torch.zeros(1, 18, 5, 7)
    offset[:, 4], offset[:, 5] = 0.5, -1.0  # of tap 2: half a row down, one column left
    found = deform_conv2d(x, offset, weight)
    assert found[0, 0, 2, 3].item() == pytest.approx((x[0, 0, 1, 3] + x[0, 0, 2, 3]).item() / 2)


def test_offsets_start_at_zero_and_learn() -> None:
    torch.manual_seed(0)
    layer, x = DeformConv2d(4, 4, groups=2), torch.randn(1, 4, 6, 6)
    torch.testing.assert_close(
        layer(x), nn.functional.conv2d(x, layer.weight, padding=1, groups=2), rtol=1e-4, atol=1e-4
    )
    layer(x).square().sum().backward()
    assert layer.offset.weight.grad is not None
    assert layer.offset.weight.grad.abs().sum() > 0
