"""Inverses by cofactors."""

from __future__ import annotations

import pytest
import torch

from bevkd.geometry.affine import BEVAffine
from bevkd.geometry.inverse import inverse_3x3, inverse_affine, product_3x3


@pytest.fixture
def matrices() -> torch.Tensor:
    """Return matrices that are far from singular."""
    torch.manual_seed(0)
    return torch.randn(5, 2, 3, 3) + 3 * torch.eye(3)


def test_the_inverse_is_that_of_linear_algebra(matrices: torch.Tensor) -> None:
    torch.testing.assert_close(inverse_3x3(matrices), torch.linalg.inv(matrices))


def test_the_inverse_of_pixel_matrices_is_as_exact_as_their_numbers() -> None:
    intrinsics = torch.tensor([[1266.417203, 0.0, 816.2670197], [0.0, 1266.417203, 491.50706579], [0.0, 0.0, 1.0]])
    exact = torch.linalg.inv(intrinsics.double())
    torch.testing.assert_close(inverse_3x3(intrinsics).double(), exact, rtol=3e-7, atol=1e-10)


def test_an_affine_and_its_inverse_give_the_identity() -> None:
    affine = BEVAffine(flip_x=True, rotation_rad=0.7, scale=1.1, translation_m=(2.0, -3.0, 0.5)).matrix()
    torch.testing.assert_close(inverse_affine(affine[None]) @ affine, torch.eye(4, dtype=torch.float64)[None])
    assert torch.equal(inverse_affine(torch.eye(4)), torch.eye(4))


def test_the_product_is_that_of_linear_algebra(matrices: torch.Tensor) -> None:
    vectors = torch.randn(5, 2, 7, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(product_3x3(matrices[:, :, None], vectors), vectors @ matrices.mT)
