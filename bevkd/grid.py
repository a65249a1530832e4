"""The bird's-eye-view grid: the only place that knows range, cell size and shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:  # a manifest holds a grid, and listing caches should not take torch's second to start
    import torch
    from jaxtyping import Float
    from torch import Tensor


MAX_CELLS = 65_536
"""Most cells along an axis: far more than any detector has, and few enough to be counted exactly."""


class BEVGrid(BaseModel):
    """A regular grid over the ground plane of the BEV frame.

    Maps on it are ``[C, Y, X]``: row ``i`` is y, column ``j`` is x, and the centre of cell ``(i, j)`` is
    ``(x_min + (j + .5) cell, y_min + (i + .5) cell)``.

    Attributes:
        x_m, y_m: lower and upper bound in metres.
        z_m: height range in metres, used by encoders that cut points or frustums.
        cell_m: edge of a square cell in metres; must divide both ranges.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    x_m: tuple[float, float]
    y_m: tuple[float, float]
    z_m: tuple[float, float] = (-5.0, 3.0)
    cell_m: float = Field(gt=0)

    @model_validator(mode="after")
    def _check(self) -> BEVGrid:
        for name, (low, high) in (("x_m", self.x_m), ("y_m", self.y_m), ("z_m", self.z_m)):
            if not low < high:
                raise ValueError(f"{name} must be [low, high] with low < high, got [{low}, {high}]")
        for name, (low, high) in (("x_m", self.x_m), ("y_m", self.y_m)):
            cells = (high - low) / self.cell_m
            if not 0.5 < cells < MAX_CELLS:
                raise ValueError(f"{name} spans {high - low} m, cell_m is {self.cell_m}: give 1 to {MAX_CELLS} cells")
            if abs(cells - round(cells)) > 1e-4:
                raise ValueError(f"{name} spans {high - low} m, which is not a whole number of {self.cell_m} m cells")
        return self

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns ``(Y, X)``."""
        return (
            round((self.y_m[1] - self.y_m[0]) / self.cell_m),
            round((self.x_m[1] - self.x_m[0]) / self.cell_m),
        )

    @property
    def symmetric(self) -> bool:
        """Whether flips and quarter turns about the origin map cells onto cells."""
        return self.x_m == self.y_m and self.x_m[0] == -self.x_m[1]

    def to_cells(self, xy_m: Float[Tensor, "*n 2"]) -> Float[Tensor, "*n 2"]:
        """Return continuous ``(column, row)`` coordinates; cell ``j`` covers ``[j, j + 1)``."""
        return (xy_m - xy_m.new_tensor([self.x_m[0], self.y_m[0]])) / self.cell_m

    def to_metres(self, cells: Float[Tensor, "*n 2"]) -> Float[Tensor, "*n 2"]:
        """Return metres for continuous ``(column, row)`` coordinates; the inverse of :meth:`to_cells`."""
        return cells * self.cell_m + cells.new_tensor([self.x_m[0], self.y_m[0]])

    def to_sampling(self, xy_m: Float[Tensor, "*n 2"]) -> Float[Tensor, "*n 2"]:
        """Return ``grid_sample`` coordinates in [-1, 1] (``align_corners=False``) of points in metres."""
        rows, columns = self.shape
        return self.to_cells(xy_m) / xy_m.new_tensor([columns, rows]) * 2 - 1

    def centers(self, device: torch.device | str = "cpu") -> Float[Tensor, "Y X 2"]:
        """Return the ``(x, y)`` centre of every cell in metres."""
        import torch

        rows, columns = self.shape
        row, column = torch.meshgrid(
            torch.arange(rows, device=device) + 0.5, torch.arange(columns, device=device) + 0.5, indexing="ij"
        )
        return self.to_metres(torch.stack([column, row], dim=-1))

    def contains(self, xy_m: Float[Tensor, "*n 2"]) -> Tensor:
        """Return a boolean per point: inside the x / y range."""
        x, y = xy_m.unbind(-1)
        return (x >= self.x_m[0]) & (x < self.x_m[1]) & (y >= self.y_m[0]) & (y < self.y_m[1])

    def __str__(self) -> str:
        rows, columns = self.shape
        return f"x {list(self.x_m)} m, y {list(self.y_m)} m, cell {self.cell_m} m ({rows} x {columns})"
