"""A symmetry and what is left of an affine make up the affine."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bevkd.cache.variants import VARIANTS
from bevkd.geometry.affine import BEVAffine, BEVAffineConfig
from bevkd.geometry.symmetries import SYMMETRIES, nearest_symmetry, symmetries_of
from bevkd.grid import BEVGrid
from tests.geometry.strategies import D4, affines

SQUARE = BEVGrid(x_m=(-6, 6), y_m=(-6, 6), cell_m=0.5)
WIDE = BEVGrid(x_m=(-6, 6), y_m=(-4, 4), cell_m=0.5)
AHEAD = BEVGrid(x_m=(0, 8), y_m=(-4, 4), cell_m=0.5)


def test_the_names_are_those_of_the_cache_format() -> None:
    assert tuple(SYMMETRIES) == VARIANTS


def test_a_name_says_its_turn_and_whether_it_mirrors_x_then() -> None:
    point = torch.tensor([[3.0, 1.0, 0.0]])
    assert SYMMETRIES["r90"].apply_to_points(point).tolist() == [[-1, 3, 0]]
    assert SYMMETRIES["r90x"].apply_to_points(point).tolist() == [[1, 3, 0]]


@pytest.mark.parametrize(
    ("grid", "quarter_turns", "expected"),
    [
        (SQUARE, True, VARIANTS),
        (SQUARE, False, ("", "r180", "x", "r180x")),
        (WIDE, True, ("", "r180", "x", "r180x")),
        (AHEAD, True, ("", "r180x")),
    ],
)
def test_a_grid_has_the_symmetries_that_map_its_cells_onto_cells(
    grid: BEVGrid, quarter_turns: bool, expected: tuple[str, ...]
) -> None:
    assert symmetries_of(grid, quarter_turns) == expected


@given(affines(), st.sets(st.sampled_from(VARIANTS)))
def test_symmetry_and_rest_make_up_the_affine(affine: BEVAffine, names: set[str]) -> None:
    name, rest = nearest_symmetry(affine, {"", *names})
    assert name in {"", *names}
    torch.testing.assert_close(rest.matrix() @ SYMMETRIES[name].matrix(), affine.matrix(), atol=1e-12, rtol=0)


@given(affines())
def test_with_all_eight_nothing_is_left_to_mirror_and_at_most_an_eighth_of_a_turn(affine: BEVAffine) -> None:
    _, rest = nearest_symmetry(affine, VARIANTS)
    assert not rest.flip_x
    assert not rest.flip_y
    assert abs(rest.rotation_rad) <= math.pi / 4 + 1e-9


@pytest.mark.parametrize("affine", D4, ids=str)
def test_with_all_eight_nothing_is_left_of_flips_and_quarter_turns(affine: BEVAffine) -> None:
    assert nearest_symmetry(affine, VARIANTS)[1] == BEVAffine.identity()


def test_what_a_config_of_flips_and_quarter_turns_draws_is_among_the_eight() -> None:
    generator = torch.Generator().manual_seed(0)
    config = BEVAffineConfig(flip=True, quarter_turns=True)
    drawn = [nearest_symmetry(BEVAffine.sample(config, generator), VARIANTS) for _ in range(200)]
    assert {name for name, _ in drawn} == set(VARIANTS)
    assert all(rest == BEVAffine.identity() for _, rest in drawn)


def test_flips_are_taken_where_small_turns_come_with_them() -> None:
    name, rest = nearest_symmetry(BEVAffine(flip_y=True, rotation_rad=0.3), ("", "r180", "x", "r180x"))
    assert name == "r180x"
    assert rest.rotation_rad == pytest.approx(-0.3)
