"""Samples of maps against torch's own bilinear sampling."""

from __future__ import annotations

import torch
from torch.nn import functional

from bevkd.geometry.sampling import mean_at, object_gaussians, sample_at
from bevkd.grid import BEVGrid
from bevkd.types import Boxes

GRID = BEVGrid(x_m=(0, 12), y_m=(-4, 4), cell_m=0.5)


def maps() -> torch.Tensor:
    return torch.randn(2, 5, 16, 24, generator=torch.Generator().manual_seed(0))


def points(count: int) -> torch.Tensor:
    """Return positions in the grid and a little beyond."""
    chance = torch.rand(count, 3, 2, generator=torch.Generator().manual_seed(count))
    return chance * torch.tensor([14.0, 10.0]) + torch.tensor([-1.0, -5.0])


def test_samples_are_those_of_grid_sample_frame_by_frame() -> None:
    both = [points(7), points(4)]
    expected = [
        functional.grid_sample(each[None], GRID.to_sampling(where)[None], align_corners=False)[0].permute(1, 2, 0)
        for each, where in zip(maps(), both, strict=True)
    ]
    torch.testing.assert_close(sample_at(maps(), both, GRID), torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_grid_sample() -> None:
    own, other = maps().requires_grad_(), maps().requires_grad_()
    both = [points(7), points(7)]
    sample_at(own, both, GRID).square().sum().backward()
    sampled = functional.grid_sample(other, GRID.to_sampling(torch.stack(both)), align_corners=False)
    sampled.square().sum().backward()
    assert own.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_a_mean_is_over_the_points_of_a_row() -> None:
    where, frame = points(6), torch.tensor([0, 0, 0, 0, 1, 1])
    apart = sample_at(maps(), [where[:4], where[4:]], GRID)
    torch.testing.assert_close(mean_at(maps(), where, frame, GRID), apart.mean(dim=1))


def test_no_points_give_no_samples_but_a_gradient() -> None:
    held = maps().requires_grad_()
    none = torch.zeros(0, 3, 2)
    found = sample_at(held, [none, none], GRID)
    assert found.shape == (0, 3, 5)
    found.sum().backward()
    assert held.grad is not None


def test_gaussians_of_objects_overlap_by_their_maximum_and_never_touch_another_frame() -> None:
    one = Boxes(torch.tensor([[6.0, 0, 0, 4, 2, 1, 0, 0, 0]]), torch.tensor([0]), torch.ones(1))
    two = Boxes(torch.tensor([[6.5, 0, 0, 4, 2, 1, 0, 0, 0]]), torch.tensor([3]), torch.ones(1))
    pair = Boxes(torch.cat([one.values, two.values]), torch.tensor([0, 3]), torch.ones(2))
    apart, together = object_gaussians((one, two), GRID, 0.1), object_gaussians((pair, Boxes.empty()), GRID, 0.1)
    torch.testing.assert_close(together[0], apart.amax(dim=0))
    assert float(together[1].sum()) == 0
    assert float(apart.amax()) == 1
