"""BEV augmentation as one affine that acts on rigs, points, boxes and cached maps alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from bevkd.config import StrictModel
from bevkd.errors import ContractError
from bevkd.geometry.boxes import wrap_angle
from bevkd.grid import BEVGrid
from bevkd.types import Boxes

_EXACT = 1e-6

_UNMOVED = torch.eye(2, dtype=torch.float64)

EDGE_TOLERANCE_CELLS = 1e-6
"""How far outside the map a bilinear sample may reach by rounding and still count as inside."""


class BEVAffineConfig(StrictModel):
    """Ranges that :meth:`BEVAffine.sample` draws from; the default is no augmentation.

    ``flip`` and ``quarter_turns`` are exact on cached maps of a symmetric grid. Published ranges: see
    ``bevkd.data.augment.PRESETS``.

    Attributes:
        flip: mirror x and y, each with probability 0.5; "x" or "y" mirrors that one only, as grids that lie ahead want.
        quarter_turns: turn by 0, 90, 180 or 270 degrees.
        rotation_deg: range of a uniform angle, counter-clockwise.
        scale: range of a uniform factor.
        translation_std_m: standard deviation of a normal shift of x, y and z.
    """

    flip: bool | Literal["x", "y"] = False
    quarter_turns: bool = False
    rotation_deg: tuple[float, float] = (0.0, 0.0)
    scale: tuple[float, float] = (1.0, 1.0)
    translation_std_m: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> BEVAffineConfig:
        for name, (low, high) in (("rotation_deg", self.rotation_deg), ("scale", self.scale)):
            if low > high:
                raise ValueError(f"{name} must be [low, high] with low <= high, got [{low}, {high}]")
        if self.scale[0] <= 0:
            raise ValueError(f"scale must be positive, got {list(self.scale)}")
        return self


@dataclass(frozen=True)
class BEVAffine:
    """``augmented_from_canonical``: rotate, then scale, then translate, then flip (UniDistill's order).

    BEVDepth's order, without translation, is the same map.

    Attributes:
        flip_x: x becomes -x, after everything else.
        flip_y: y becomes -y, after everything else.
        rotation_rad: counter-clockwise about the origin.
        scale: factor on x, y and z.
        translation_m: shift of x, y, z.
    """

    flip_x: bool = False
    flip_y: bool = False
    rotation_rad: float = 0.0
    scale: float = 1.0
    translation_m: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @classmethod
    def identity(cls) -> BEVAffine:
        """Return the affine that changes nothing."""
        return cls()

    @classmethod
    def sample(cls, config: BEVAffineConfig, generator: torch.Generator) -> BEVAffine:
        """Return a random affine; it always draws the same count of numbers, whatever the config."""
        uniform = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
        normal = torch.randn(3, generator=generator, dtype=torch.float64).tolist()
        low, high = config.rotation_deg
        quarters = int(uniform[2] * 4) if config.quarter_turns else 0
        return cls(
            flip_x=config.flip in (True, "x") and uniform[0] < 0.5,
            flip_y=config.flip in (True, "y") and uniform[1] < 0.5,
            rotation_rad=quarters * (math.pi / 2) + math.radians(low + (high - low) * uniform[3]),
            scale=config.scale[0] + (config.scale[1] - config.scale[0]) * uniform[4],
            translation_m=(
                normal[0] * config.translation_std_m,
                normal[1] * config.translation_std_m,
                normal[2] * config.translation_std_m,
            ),
        )

    @classmethod
    def from_matrix(cls, matrix: Float[Tensor, "n n"]) -> BEVAffine:
        """Return the affine of a 4x4 ``augmented_from_canonical`` in metres, or of a 3x3 one without shift.

        Rotations within a microradian of quarter turns, and scales that near to 1, are taken for exact ones.

        Raises:
            ContractError: the matrix shears, tilts, or scales axes differently: maps cannot follow it.
        """
        values = torch.eye(4, dtype=torch.float64)
        values[: len(matrix), : len(matrix)] = matrix.detach().to("cpu", torch.float64)
        scale, flip = float(values[2, 2]), bool(values[:2, :2].det() < 0)
        cos, sin = (-values[0, 0] if flip else values[0, 0]), values[1, 0]
        angle, one = math.atan2(float(sin), float(cos)), abs(scale - 1) < _EXACT
        quarter = round(angle / (math.pi / 2)) * (math.pi / 2)
        x, y, z = values[:3, 3].tolist()
        found = cls(
            flip_x=flip,
            rotation_rad=quarter if abs(angle - quarter) < _EXACT else angle,
            scale=1.0 if one else scale,
            translation_m=(-x if flip else x, y, z),
        )
        if len(matrix) not in (3, 4) or scale <= 0 or not torch.allclose(found.matrix(), values, rtol=0, atol=1e-4):
            raise ContractError(
                "a BEV augmentation must be a 3x3 or 4x4 matrix that turns about z, scales all axes alike, mirrors "
                f"and shifts; this one is {matrix.tolist()}. Leave shears and tilts out of the augmentation."
            )
        return found

    def inverse(self) -> BEVAffine:
        """Return ``canonical_from_augmented`` in the same form."""
        mirrored = self.flip_x != self.flip_y
        cos, sin = self._cos_sin()
        x, y, z = (-shift / self.scale for shift in self.translation_m)
        x, y = x * cos + y * sin, y * cos - x * sin
        # The form flips last, so the shift of the inverse is given before the flip.
        shift = (-x if self.flip_x else x, -y if self.flip_y else y, z)
        angle = self.rotation_rad if mirrored else -self.rotation_rad
        return BEVAffine(self.flip_x, self.flip_y, angle, 1 / self.scale, shift)

    def matrix(self) -> Float[Tensor, "4 4"]:
        """Return ``augmented_from_canonical`` in metres (float64)."""
        (a, b), (c, d) = self._directions()
        s, (x, y, z) = self.scale, self.translation_m
        x, y = -x if self.flip_x else x, -y if self.flip_y else y
        rows = [[s * a, s * b, 0, x], [s * c, s * d, 0, y], [0, 0, s, z], [0, 0, 0, 1]]
        return torch.tensor(rows, dtype=torch.float64)

    def is_grid_exact(self, grid: BEVGrid) -> bool:
        """Return whether cells of ``grid`` map onto cells, so that maps warp without resampling."""
        cos, sin = self._cos_sin()
        (a, _), (_, d) = self._directions()
        square = {cos, sin} <= {-1.0, 0.0, 1.0}
        if not square or self.scale != 1 or self.translation_m[0] != 0 or self.translation_m[1] != 0:
            return False
        if cos == 0:
            return grid.symmetric
        return (a > 0 or grid.x_m[0] == -grid.x_m[1]) and (d > 0 or grid.y_m[0] == -grid.y_m[1])

    def apply_to_points(self, points: Float[Tensor, "P c"]) -> Float[Tensor, "P c"]:
        """Return points with x, y, z moved and all further values kept."""
        matrix = self.matrix().to(points)
        return torch.cat([points[:, 0:3] @ matrix[:3, :3].T + matrix[:3, 3], points[:, 3:]], dim=1)

    def apply_to_vectors(self, vectors: Float[Tensor, "*n 2"]) -> Float[Tensor, "*n 2"]:
        """Return velocities or offsets (x, y) turned, mirrored and scaled, not shifted; NaN stays NaN."""
        return vectors @ self.matrix()[:2, :2].to(vectors).T

    def apply_to_boxes(self, boxes: Boxes) -> Boxes:
        """Return boxes with centre, size, yaw (within [-pi, pi)) and velocity moved."""
        yaw = boxes.yaw + self.rotation_rad
        yaw = math.pi - yaw if self.flip_x else yaw
        yaw = -yaw if self.flip_y else yaw
        parts = [
            self.apply_to_points(boxes.center),
            boxes.size * self.scale,
            wrap_angle(yaw)[:, None],
            self.apply_to_vectors(boxes.velocity),
        ]
        return Boxes(torch.cat(parts, dim=1), boxes.labels, boxes.scores)

    def warp_map(
        self, canonical: Float[Tensor, "C Y X"], grid: BEVGrid
    ) -> tuple[Float[Tensor, "C Y X"], Bool[Tensor, "1 Y X"]]:
        """Return the map as the augmented frame sees it, and which cells were filled from inside the map.

        Flips and quarter turns on a symmetric grid are exact, bit for bit; anything else is one bilinear resample
        (zeros outside), valid where all four samples lie inside the map.
        """
        if self.is_grid_exact(grid):
            everywhere = torch.ones(1, *grid.shape, dtype=torch.bool, device=canonical.device)
            return self._rearrange(canonical), everywhere
        source, valid = self._source_cells(grid)
        rows, columns = grid.shape
        sampling = source / source.new_tensor([columns, rows]) * 2 - 1
        warped = functional.grid_sample(
            canonical[None].float(), sampling[None].to(canonical.device, torch.float32), align_corners=False
        )
        return warped[0].to(canonical.dtype), valid[None].to(canonical.device)

    def warp_box_code(
        self, canonical: Float[Tensor, "T 10 Y X"], grid: BEVGrid
    ) -> tuple[Float[Tensor, "T 10 Y X"], Bool[Tensor, "1 Y X"]]:
        """Return box codes as the augmented frame sees them, and which cells were filled from inside the map.

        Cells are fetched as in :meth:`warp_map`, but from the nearest cell: a mean of two boxes is no box. Values
        change too: offsets are taken anew from the cell they land in (slightly outside [0, 1) where cells do not map
        onto cells, so decoding them is exact), z is scaled and shifted, log sizes gain ``log(scale)``, (sin, cos)
        and velocity are turned and mirrored.

        Args:
            canonical: offset 2 (x, y in cells), z 1, log size 3, (sin, cos) 2, velocity 2 per task.
        """
        if self.is_grid_exact(grid):
            fetched, residual = self._rearrange(canonical), None
            valid = torch.ones(1, *grid.shape, dtype=torch.bool, device=canonical.device)
        else:
            fetched, residual, valid = self._fetch_nearest(canonical, grid)
        code = fetched.float()
        linear = self.matrix()[:2, :2].to(code)
        offset = torch.einsum("ij,tjyx->tiyx", linear, code[:, 0:2] - 0.5) + 0.5
        z = code[:, 2:3] * self.scale + self.translation_m[2]
        log_size = code[:, 3:6] + math.log(self.scale)
        cos_sin = torch.einsum("ij,tjyx->tiyx", linear / self.scale, code[:, [7, 6]])
        velocity = torch.einsum("ij,tjyx->tiyx", linear, code[:, 8:10])
        if residual is not None:
            offset = offset + residual
        warped = torch.cat([offset, z, log_size, cos_sin.flip(1), velocity], dim=1)
        return warped.to(canonical.dtype), valid

    def warp_cells(self, canonical: Bool[Tensor, "Y X"], grid: BEVGrid) -> Bool[Tensor, "Y X"]:
        """Return which cells of the augmented frame take their box code from a marked cell."""
        if self.is_grid_exact(grid):
            return self._rearrange(canonical)
        fetched, _, hit = self._fetch_nearest(canonical, grid)
        return fetched & hit[0]

    def _cos_sin(self) -> tuple[float, float]:
        """Return cosine and sine, exact for quarter turns."""
        quarters = round(self.rotation_rad / (math.pi / 2))
        if abs(self.rotation_rad - quarters * (math.pi / 2)) < 1e-9:
            return ((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0))[quarters % 4]
        return math.cos(self.rotation_rad), math.sin(self.rotation_rad)

    def _directions(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Return the rows of the 2x2 flip @ rotation, without scale."""
        cos, sin = self._cos_sin()
        x, y = (-1.0 if self.flip_x else 1.0), (-1.0 if self.flip_y else 1.0)
        return (x * cos, -x * sin), (y * sin, y * cos)

    def _rearrange(self, maps: Tensor) -> Tensor:
        """Return ``[*, Y, X]`` maps with their cells moved; only for affines that are exact on the grid.

        A quarter turn is a transposition and a flip, so that one copy at most is made.
        """
        quarters = round(self.rotation_rad / (math.pi / 2)) % 4
        flips = ((-1, self.flip_x != (quarters in (1, 2))), (-2, self.flip_y != (quarters in (2, 3))))
        dims = [dim for dim, flip in flips if flip]
        turned = maps.mT if quarters % 2 else maps
        return turned.flip(dims) if dims else turned

    def _source_cells(self, grid: BEVGrid) -> tuple[Float[Tensor, "Y X 2"], Bool[Tensor, "Y X"]]:
        """Return where each augmented cell centre lies in the canonical map, in cells (column, row), and if inside.

        Inside means that all four neighbours of a bilinear sample are cells of the map.
        """
        matrix = self.inverse().matrix()
        rows, columns = grid.shape
        row, column = (torch.arange(n, dtype=torch.float64) + 0.5 for n in (rows, columns))
        centers = grid.to_metres(torch.cartesian_prod(row, column).flip(-1)).view(rows, columns, 2)
        source = grid.to_cells(centers @ matrix[:2, :2].T + matrix[:2, 3])
        high = source.new_tensor([columns, rows]) - 0.5
        inside = (source >= 0.5 - EDGE_TOLERANCE_CELLS) & (source <= high + EDGE_TOLERANCE_CELLS)
        return source, inside.all(dim=-1)

    def _fetch_nearest(self, maps: Tensor, grid: BEVGrid) -> tuple[Tensor, Tensor, Tensor]:
        """Return maps with the value of each cell's nearest source cell, where that cell's centre lands, and validity.

        The second is the augmented source centre minus the centre of the cell it is fetched into, in cells
        (column, row) ``[2, Y, X]``.
        """
        source, inside = self._source_cells(grid)
        rows, columns = grid.shape
        column = source[..., 0].floor().long().clamp(0, columns - 1)
        row = source[..., 1].floor().long().clamp(0, rows - 1)
        # The affine is linear, so the miss in the source frame times its 2x2 is the miss in the augmented frame.
        miss = torch.stack([column, row], dim=-1) + 0.5 - source
        residual = self.apply_to_vectors(miss).permute(2, 0, 1).to(maps.device, torch.float32)
        fetched = maps[..., row.to(maps.device), column.to(maps.device)]
        hit = inside[None].to(maps.device)
        return fetched, residual, hit


def warp_maps(
    canonical: Float[Tensor, "B C Y X"], affines: Sequence[BEVAffine], grid: BEVGrid
) -> tuple[Float[Tensor, "B C Y X"], Bool[Tensor, "B 1 Y X"]]:
    """Return each sample's map warped by its own affine, and validity; see :meth:`BEVAffine.warp_map`.

    Where no affine moves a cell this is ``canonical`` itself.
    """
    if all(affine.is_grid_exact(grid) and affine.matrix()[:2, :2].equal(_UNMOVED) for affine in affines):
        return canonical, canonical.new_ones(len(canonical), 1, *grid.shape, dtype=torch.bool)
    warped = [affine.warp_map(sample, grid) for affine, sample in zip(affines, canonical, strict=True)]
    return torch.stack([maps for maps, _ in warped]), torch.stack([valid for _, valid in warped])


def warp_box_codes(
    canonical: Float[Tensor, "B T 10 Y X"], affines: Sequence[BEVAffine], grid: BEVGrid
) -> tuple[Float[Tensor, "B T 10 Y X"], Bool[Tensor, "B 1 Y X"]]:
    """Return each sample's box codes warped by its own affine, and validity; see :meth:`BEVAffine.warp_box_code`."""
    warped = [affine.warp_box_code(sample, grid) for affine, sample in zip(affines, canonical, strict=True)]
    return torch.stack([maps for maps, _ in warped]), torch.stack([valid for _, valid in warped])


def warp_cells(
    canonical: Bool[Tensor, "B Y X"], affines: Sequence[BEVAffine], grid: BEVGrid
) -> Bool[Tensor, "B 1 Y X"]:
    """Return each sample's marked cells under its own affine; see :meth:`BEVAffine.warp_cells`."""
    warped = [affine.warp_cells(cells, grid) for affine, cells in zip(affines, canonical, strict=True)]
    return torch.stack(warped)[:, None]
