"""The dense oracle of sparse convolutions: spconv is a cross-correlation like torch (methods.md 6.5)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

Triple = tuple[int, int, int]


class Dense:
    """A dense map and which of its cells are occupied; every operation of a sparse encoder, done densely."""

    def __init__(self, values: Tensor, active: Tensor) -> None:
        self.values, self.active = values * active[:, None], active

    @classmethod
    def scatter(cls, features: Tensor, indices: Tensor, shape: Triple, batch: int) -> Dense:
        frame, *place = indices.long().unbind(1)
        values = torch.zeros(batch, *shape, features.shape[1], dtype=features.dtype)
        values = values.index_put((frame, *place), features)
        active = torch.zeros(batch, *shape, dtype=torch.bool)
        active[frame, place[0], place[1], place[2]] = True
        return cls(values.permute(0, 4, 1, 2, 3), active)

    def sub_m(self, weight: Tensor, bias: Tensor | None = None) -> Dense:
        """Return a submanifold convolution: dense, then masked to the cells that were occupied."""
        return Dense(functional.conv3d(self.values, weight, bias, padding=1), self.active)

    def down(self, weight: Tensor, stride: Triple, padding: Triple) -> Dense:
        """Return a strided convolution: dense; occupied is what any occupied cell reaches."""
        ones = torch.ones(1, 1, *weight.shape[2:])
        reach = functional.conv3d(self.active[:, None].float(), ones, None, stride, padding)
        return Dense(functional.conv3d(self.values, weight, None, stride, padding), reach[:, 0] > 0)

    def norm(self, norm: nn.Module) -> Dense:
        """Return a batch norm over occupied cells only."""
        channels_last = self.values.permute(0, 2, 3, 4, 1)
        normed = torch.zeros_like(channels_last).index_put(
            self.active.nonzero(as_tuple=True), norm(channels_last[self.active])
        )
        return Dense(normed.permute(0, 4, 1, 2, 3), self.active)

    def relu(self) -> Dense:
        return Dense(self.values.relu(), self.active)

    def __add__(self, other: Dense) -> Dense:
        return Dense(self.values + other.values, self.active)
