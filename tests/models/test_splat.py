"""The splat as a sparse matrix product, against the naive form that places every pixel at every depth."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bevkd.models.splat import _Splat, scatter, splat
from tests.geometry.strategies import seeds


def naive(depth: Tensor, context: Tensor, cells: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the map by adding ``depth * context`` cell by cell, through the frustum tensor that splat avoids."""
    B, P, D = depth.shape
    frustum = depth[..., None] * context[:, :, None]
    maps = []
    for frame in range(B):
        bev = torch.zeros(shape[0] * shape[1] + 1, context.shape[2], dtype=context.dtype)
        target = torch.where(cells[frame] >= 0, cells[frame], shape[0] * shape[1]).reshape(P * D)
        maps.append(bev.index_add(0, target, frustum[frame].reshape(P * D, -1))[:-1].T.reshape(-1, *shape))
    return torch.stack(maps)


def scene(generator: torch.Generator, B: int = 2, P: int = 13, D: int = 5, C: int = 3) -> tuple[Tensor, ...]:
    """Return depth, context and cells of a 4 x 6 grid, about a third of them outside."""
    depth = torch.rand(B, P, D, generator=generator).softmax(-1)
    context = torch.randn(B, P, C, generator=generator)
    cells = torch.randint(-12, 24, (B, P, D), generator=generator).clamp(min=-1)
    return depth, context, cells


@given(seeds(), st.integers(1, 3), st.integers(1, 20), st.integers(1, 6))
def test_it_equals_the_naive_form(generator: torch.Generator, B: int, P: int, D: int) -> None:
    depth, context, cells = scene(generator, B, P, D)
    torch.testing.assert_close(splat(depth, context, cells, (4, 6)), naive(depth, context, cells, (4, 6)))


@given(seeds())
def test_its_gradients_equal_those_of_the_naive_form(generator: torch.Generator) -> None:
    depth, context, cells = scene(generator)
    weight = torch.randn(2, 3, 4, 6, generator=generator)
    gradients = []
    for form in (splat, naive):
        inputs = (depth.clone().requires_grad_(), context.clone().requires_grad_())
        gradients.append(torch.autograd.grad((form(*inputs, cells, (4, 6)) * weight).sum(), inputs))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_its_gradients_equal_finite_differences_in_float64() -> None:
    depth, context, cells = scene(torch.Generator().manual_seed(0), B=1, P=6, D=3, C=2)
    rows = torch.where(cells[0] >= 0, cells[0], 24)
    inputs = (depth[0].double().requires_grad_(), context[0].double().requires_grad_())
    assert torch.autograd.gradcheck(lambda d, c: _Splat.apply(d, c, rows, 24), inputs)


def test_points_outside_the_grid_add_nothing_and_learn_nothing() -> None:
    depth, context, _ = scene(torch.Generator().manual_seed(1))
    depth.requires_grad_()
    context.requires_grad_()
    bev = splat(depth, context, torch.full((2, 13, 5), -1), (4, 6))
    assert bev.shape == (2, 3, 4, 6)
    assert not bev.any()
    bev.sum().backward()
    for gradient in (depth.grad, context.grad):
        assert gradient is not None
        assert not gradient.any()


def test_a_pixel_lands_in_row_y_and_column_x_of_its_own_frame() -> None:
    depth, context = torch.ones(2, 1, 1), torch.tensor([[[3.0]], [[5.0]]])
    cells = torch.tensor([[[2 * 6 + 1]], [[-1]]])
    bev = splat(depth, context, cells, (4, 6))
    assert bev.nonzero().tolist() == [[0, 0, 2, 1]]
    assert bev[0, 0, 2, 1].item() == 3.0


def test_pixels_in_one_cell_add_up() -> None:
    bev = splat(torch.full((1, 4, 2), 0.25), torch.ones(1, 4, 1), torch.zeros(1, 4, 2, dtype=torch.int64), (1, 2))
    assert bev.flatten().tolist() == [2.0, 0.0]


def test_half_precision_is_summed_in_float32() -> None:
    # 3000 pixels of one: a bfloat16 sum would stop growing at 256.
    depth, context = torch.ones(1, 3000, 1).bfloat16(), torch.ones(1, 3000, 1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bev = splat(depth, context, torch.zeros(1, 3000, 1, dtype=torch.int64), (1, 1))
    assert bev.dtype == torch.float32
    assert bev.item() == 3000


@pytest.mark.parametrize("P", [1, 50])
def test_the_same_input_gives_the_same_bits(P: int) -> None:
    inputs = scene(torch.Generator().manual_seed(2), P=P)
    assert torch.equal(splat(*inputs, (4, 6)), splat(*inputs, (4, 6)))


def test_the_forms_for_export_give_the_same_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    depth, context = torch.rand(2, 1500, 5), torch.randn(2, 1500, 3)
    cells = torch.randint(-1, 24, (2, 1500, 5))
    points = depth[..., None] * context[:, :, None]
    wanted = splat(depth, context, cells, (4, 6)), scatter(points, cells, (4, 6))
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    exported = splat(depth, context, cells, (4, 6)), scatter(points, cells, (4, 6))
    for own, other in zip(exported, wanted, strict=True):
        assert not torch.equal(own, torch.zeros_like(own))
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-4)
