"""Inverses of small matrices by cofactors: sums and products alone, which every runtime that a model may be exported to
knows and rounds alike."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def product_3x3(matrix: Float[Tensor, "*m 3 3"], vectors: Float[Tensor, "*n 3"]) -> Float[Tensor, "*n 3"]:
    """Return ``matrix @ vector`` of each vector, summed from left to right without fused steps.

    Args:
        matrix: its leading dimensions broadcast against those of the vectors.
    """
    x, y, z = vectors.unbind(dim=-1)
    rows = [matrix[..., i, 0] * x + matrix[..., i, 1] * y + matrix[..., i, 2] * z for i in range(3)]
    return torch.stack(rows, dim=-1)


def inverse_3x3(matrix: Float[Tensor, "*n 3 3"]) -> Float[Tensor, "*n 3 3"]:
    """Return the inverse: cross products of the rows as columns, over the determinant."""
    a, b, c = matrix.unbind(dim=-2)
    first = _cross(b, c)
    x, y, z = (a * first).unbind(dim=-1)
    columns = torch.stack([first, _cross(c, a), _cross(a, b)], dim=-1)
    return columns / (x + y + z)[..., None, None]


def inverse_affine(matrix: Float[Tensor, "*n 4 4"]) -> Float[Tensor, "*n 4 4"]:
    """Return the inverse of a matrix whose last row is (0, 0, 0, 1)."""
    linear = inverse_3x3(matrix[..., :3, :3])
    shift = -(linear @ matrix[..., :3, 3:])
    return torch.cat([torch.cat([linear, shift], dim=-1), matrix[..., 3:, :]], dim=-2)


def _cross(a: Float[Tensor, "*n 3"], b: Float[Tensor, "*n 3"]) -> Float[Tensor, "*n 3"]:
    (ax, ay, az), (bx, by, bz) = a.unbind(dim=-1), b.unbind(dim=-1)
    return torch.stack([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx], dim=-1)
