from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional

from bevkd.errors import ContractError
from bevkd.geometry.affine import BEVAffine, BEVAffineConfig, warp_box_codes, warp_maps
from bevkd.geometry.boxes import bev_corners
from bevkd.grid import BEVGrid
from bevkd.models.heads.center import decode_boxes
from bevkd.types import Boxes
from tests.geometry.strategies import D4, affines, random_boxes, seeds

GRID = BEVGrid(x_m=(-6, 6), y_m=(-6, 6), cell_m=0.5)
ROWS, COLUMNS = GRID.shape


def assert_same_boxes(ours: Boxes, expected: Boxes, atol: float = 1e-4) -> None:
    torch.testing.assert_close(
        ours.values[:, [0, 1, 2, 3, 4, 5, 7, 8]], expected.values[:, [0, 1, 2, 3, 4, 5, 7, 8]], atol=atol, rtol=1e-5
    )
    for function in (torch.sin, torch.cos):
        torch.testing.assert_close(function(ours.yaw), function(expected.yaw), atol=atol, rtol=0)


def test_maps_of_frames_that_stay_are_not_copied() -> None:
    maps = torch.randn(2, 3, ROWS, COLUMNS)
    lifted = BEVAffine(translation_m=(0.0, 0.0, 1.0))
    warped, valid = warp_maps(maps, [BEVAffine.identity(), lifted], GRID)
    assert warped is maps
    assert valid.all()
    assert warp_maps(maps, [BEVAffine.identity(), BEVAffine(flip_x=True)], GRID)[0] is not maps


def random_code(generator: torch.Generator, tasks: int = 2) -> Tensor:
    """Return box codes whose offsets lie in [0, 1)."""
    code = torch.randn(tasks, 10, ROWS, COLUMNS, generator=generator).clamp(-3, 3)
    code[:, 0:2] = torch.rand(tasks, 2, ROWS, COLUMNS, generator=generator)
    return code


def decode(code: Tensor) -> Boxes:
    """Return the box of every cell and task, row by row."""
    cells = torch.cartesian_prod(torch.arange(ROWS), torch.arange(COLUMNS)).repeat(len(code), 1)
    values = decode_boxes(code.permute(0, 2, 3, 1).reshape(-1, 10), cells, GRID)
    return Boxes(values, torch.zeros(len(values), dtype=torch.int64), torch.ones(len(values)))


def sample(maps: Tensor, xy_m: Tensor) -> Tensor:
    return functional.grid_sample(maps[None], GRID.to_sampling(xy_m)[None, None], align_corners=False)[0, :, 0]


def test_the_order_is_rotate_scale_translate_flip() -> None:
    affine = BEVAffine(flip_x=True, rotation_rad=math.pi / 2, scale=2.0, translation_m=(10.0, 0.0, 1.0))
    moved = affine.apply_to_points(torch.tensor([[1.0, 0.0, 3.0, 7.0]]))
    assert moved.tolist() == [[-10.0, 2.0, 7.0, 7.0]]


@given(affines(), seeds())
def test_corners_of_moved_boxes_are_the_moved_corners(affine: BEVAffine, generator: torch.Generator) -> None:
    boxes = random_boxes(10, generator)
    corners = bev_corners(boxes.values).reshape(-1, 2)
    moved = affine.apply_to_points(functional.pad(corners, (0, 1)))[:, :2].reshape(10, 4, 2)
    ours = bev_corners(affine.apply_to_boxes(boxes).values)
    # A reflection reverses the order of corners, so each corner is looked up.
    assert torch.cdist(moved, ours).amin(dim=-1).max() < 1e-3


@given(affines(), seeds())
def test_a_moved_box_heads_where_its_moved_heading_points(affine: BEVAffine, generator: torch.Generator) -> None:
    boxes = random_boxes(10, generator)
    heading = torch.stack([boxes.yaw.cos(), boxes.yaw.sin()], dim=1)
    yaw = affine.apply_to_boxes(boxes).yaw
    torch.testing.assert_close(
        torch.stack([yaw.cos(), yaw.sin()], dim=1) * affine.scale, affine.apply_to_vectors(heading), atol=1e-5, rtol=0
    )


@given(affines(), seeds())
def test_moving_on_for_a_while_commutes_with_augmentation(affine: BEVAffine, generator: torch.Generator) -> None:
    boxes = random_boxes(10, generator)
    later = boxes.center + functional.pad(boxes.velocity, (0, 1)) * 0.5
    moved = affine.apply_to_boxes(boxes)
    torch.testing.assert_close(
        moved.center + functional.pad(moved.velocity, (0, 1)) * 0.5, affine.apply_to_points(later), atol=1e-3, rtol=1e-5
    )


def test_an_unknown_velocity_stays_unknown() -> None:
    boxes = Boxes(torch.tensor([[1.0, 2, 0, 4, 2, 1, 0.3, math.nan, math.nan]]), torch.tensor([0]), torch.ones(1))
    assert BEVAffine(flip_y=True, rotation_rad=0.3).apply_to_boxes(boxes).velocity.isnan().all()


@given(affines())
def test_the_inverse_undoes_the_affine(affine: BEVAffine) -> None:
    product = affine.inverse().matrix() @ affine.matrix()
    torch.testing.assert_close(product, torch.eye(4, dtype=torch.float64), atol=1e-12, rtol=0)


@given(affines(), seeds())
def test_boxes_come_back_through_the_inverse(affine: BEVAffine, generator: torch.Generator) -> None:
    boxes = random_boxes(10, generator)
    assert_same_boxes(affine.inverse().apply_to_boxes(affine.apply_to_boxes(boxes)), boxes, atol=1e-3)


@pytest.mark.parametrize("affine", D4, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_flips_and_quarter_turns_of_maps_come_back_bit_for_bit(affine: BEVAffine, dtype: torch.dtype) -> None:
    maps = (torch.randn(3, ROWS, COLUMNS) * 30).to(dtype)
    warped, valid = affine.warp_map(maps, GRID)
    assert valid.all()
    assert torch.equal(affine.inverse().warp_map(warped, GRID)[0], maps)


@pytest.mark.parametrize("affine", D4, ids=str)
def test_the_eight_symmetries_move_a_map_of_coordinates_like_points(affine: BEVAffine) -> None:
    canonical_xy = GRID.centers().permute(2, 0, 1)
    warped, _ = affine.warp_map(canonical_xy, GRID)
    at_centers = functional.pad(warped.flatten(1).T, (0, 1))
    torch.testing.assert_close(affine.apply_to_points(at_centers)[:, :2], GRID.centers().reshape(-1, 2))


@pytest.mark.parametrize("affine", D4, ids=str)
def test_exact_warps_agree_with_resampling(affine: BEVAffine) -> None:
    maps = torch.randn(2, ROWS, COLUMNS)
    nearly = BEVAffine(affine.flip_x, affine.flip_y, affine.rotation_rad + 1e-8, affine.scale)
    assert not nearly.is_grid_exact(GRID)
    resampled, valid = nearly.warp_map(maps, GRID)
    assert valid.all()
    torch.testing.assert_close(affine.warp_map(maps, GRID)[0], resampled, atol=1e-4, rtol=0)


@pytest.mark.parametrize("affine", D4, ids=str)
def test_a_teacher_sampled_at_boxes_equals_the_warped_teacher_sampled_at_moved_boxes(affine: BEVAffine) -> None:
    generator = torch.Generator().manual_seed(0)
    maps, boxes = torch.randn(4, ROWS, COLUMNS, generator=generator), random_boxes(30, generator, reach_m=7)
    moved = affine.apply_to_boxes(boxes)
    torch.testing.assert_close(
        sample(affine.warp_map(maps, GRID)[0], moved.center[:, :2]),
        sample(maps, boxes.center[:, :2]),
        atol=1e-4,
        rtol=0,
    )


@given(affines())
def test_a_linear_map_is_resampled_exactly_wherever_it_is_valid(affine: BEVAffine) -> None:
    warped, valid = affine.warp_map(GRID.centers().permute(2, 0, 1), GRID)
    moved = affine.apply_to_points(functional.pad(warped.flatten(1).T, (0, 1)))[:, :2]
    inside = valid.flatten()
    torch.testing.assert_close(moved[inside], GRID.centers().reshape(-1, 2)[inside], atol=1e-3, rtol=0)


@given(affines())
def test_validity_ends_where_zero_padding_leaks_in(affine: BEVAffine) -> None:
    warped, valid = affine.warp_map(torch.ones(1, ROWS, COLUMNS), GRID)
    assert (warped[valid] > 1 - 1e-4).all()
    assert valid[warped > 1 - 1e-7].all()


def test_cells_that_a_shift_uncovers_are_invalid_and_zero() -> None:
    warped, valid = BEVAffine(translation_m=(1.0, 0.0, 0.0)).warp_map(torch.ones(1, ROWS, COLUMNS), GRID)
    assert not valid[:, :, :2].any()
    assert valid[:, :, 2:].all()
    assert warped[:, :, :2].abs().max() < 1e-4


def test_each_sample_of_a_batch_is_warped_by_its_own_affine() -> None:
    maps, codes = torch.randn(2, 3, ROWS, COLUMNS), torch.randn(2, 1, 10, ROWS, COLUMNS)
    both = [BEVAffine(flip_x=True), BEVAffine(rotation_rad=0.3)]
    warped, valid = warp_maps(maps, both, GRID)
    warped_codes, valid_codes = warp_box_codes(codes, both, GRID)
    for index, affine in enumerate(both):
        assert torch.equal(warped[index], affine.warp_map(maps[index], GRID)[0])
        assert torch.equal(warped_codes[index], affine.warp_box_code(codes[index], GRID)[0])
    assert torch.equal(valid, valid_codes)
    assert [mask.all().item() for mask in valid] == [True, False]


@pytest.mark.parametrize("affine", D4, ids=str)
def test_decoding_a_warped_map_equals_warping_the_decoded_boxes(affine: BEVAffine) -> None:
    code = random_code(torch.Generator().manual_seed(1))
    warped, valid = affine.warp_box_code(code, GRID)
    assert valid.all()
    moved = affine.apply_to_boxes(decode(code)).values.reshape(2, ROWS, COLUMNS, 9).permute(0, 3, 1, 2)
    expected = torch.stack([affine.warp_map(task, GRID)[0] for task in moved]).permute(0, 2, 3, 1).reshape(-1, 9)
    assert_same_boxes(
        decode(warped), Boxes(expected, torch.zeros(len(expected)).long(), torch.ones(len(expected))), 1e-5
    )
    assert warped[:, 0:2].min() >= 0
    assert warped[:, 0:2].max() <= 1


@given(affines(), seeds())
def test_every_decoded_box_of_any_warp_is_a_moved_box_of_the_nearest_cell(
    affine: BEVAffine, generator: torch.Generator
) -> None:
    code = random_code(generator, tasks=1)
    warped, valid = affine.warp_box_code(code, GRID)
    source = affine.inverse().apply_to_points(functional.pad(GRID.centers().reshape(-1, 2), (0, 1)))[:, :2]
    cell = GRID.to_cells(source)
    # Cells whose source lies on the border of two cells may take either.
    clear = ((cell - cell.round()).abs() > 1e-3).all(dim=1) & valid.flatten()
    column, row = cell[clear].floor().long().unbind(1)
    expected = affine.apply_to_boxes(decode(code)[row * COLUMNS + column])
    assert_same_boxes(decode(warped)[clear], expected)


def test_offsets_of_a_turned_map_stay_near_their_cell() -> None:
    code = random_code(torch.Generator().manual_seed(2))
    warped, valid = BEVAffine(rotation_rad=0.5).warp_box_code(code, GRID)
    inside = warped[:, 0:2][valid.expand(2, 2, -1, -1)]
    assert inside.min() > -1
    assert inside.max() < 2


@pytest.mark.parametrize(
    ("affine", "exact"),
    [
        (BEVAffine(flip_y=True), True),
        (BEVAffine(flip_x=True), False),
        (BEVAffine(rotation_rad=math.pi / 2), False),
        (BEVAffine(rotation_rad=math.pi), False),
        (BEVAffine(flip_x=True, rotation_rad=math.pi), True),  # is the same map as flip_y
        (BEVAffine(translation_m=(0.0, 0.0, 1.0)), True),
        (BEVAffine(), True),
    ],
    ids=str,
)
def test_a_grid_ahead_of_the_car_is_exact_only_under_a_left_right_mirror(affine: BEVAffine, exact: bool) -> None:
    ahead = BEVGrid(x_m=(0, 8), y_m=(-4, 4), cell_m=0.5)
    assert affine.is_grid_exact(ahead) == exact
    warped, _ = affine.warp_map(ahead.centers().permute(2, 0, 1), ahead)
    if exact:
        moved = affine.apply_to_points(functional.pad(warped.flatten(1).T, (0, 1)))[:, :2]
        torch.testing.assert_close(moved, ahead.centers().reshape(-1, 2))


def test_scale_or_shift_is_not_grid_exact() -> None:
    assert not BEVAffine(scale=1.1).is_grid_exact(GRID)
    assert not BEVAffine(translation_m=(0.5, 0.0, 0.0)).is_grid_exact(GRID)


def test_flips_and_quarter_turns_draw_all_eight_symmetries() -> None:
    config, generator = BEVAffineConfig(flip=True, quarter_turns=True), torch.Generator().manual_seed(0)
    drawn = [BEVAffine.sample(config, generator) for _ in range(100)]
    assert all(affine.is_grid_exact(GRID) for affine in drawn)
    assert len({tuple(affine.matrix().flatten().tolist()) for affine in drawn}) == 8


@given(seeds())
def test_samples_stay_within_the_configured_ranges(generator: torch.Generator) -> None:
    config = BEVAffineConfig(rotation_deg=(-45, 45), scale=(0.9, 1.1), translation_std_m=0.5)
    affine = BEVAffine.sample(config, generator)
    assert abs(affine.rotation_rad) <= math.pi / 4
    assert 0.9 <= affine.scale <= 1.1
    assert not affine.flip_x
    assert any(shift != 0 for shift in affine.translation_m)


def test_the_default_config_changes_nothing() -> None:
    affine = BEVAffine.sample(BEVAffineConfig(), torch.Generator().manual_seed(0))
    assert affine == BEVAffine.identity()


def test_the_same_seed_draws_the_same_affine() -> None:
    config = BEVAffineConfig(flip=True, rotation_deg=(-45, 45), translation_std_m=0.5)
    first, second = (BEVAffine.sample(config, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    "wrong",
    [{"scale": (1.1, 0.9)}, {"scale": (0.0, 1.0)}, {"rotation_deg": (5, -5)}, {"translation_std_m": -1}],
    ids=str,
)
def test_impossible_ranges_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        BEVAffineConfig.model_validate(wrong)


def test_the_symmetries_of_a_square_are_eight() -> None:
    matrices = [affine.matrix() for affine in D4]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(matrices, 2))


@pytest.mark.parametrize(
    ("flip", "drawn"), [("x", {(False, False), (True, False)}), ("y", {(False, False), (False, True)})]
)
def test_a_grid_that_lies_ahead_is_mirrored_in_one_axis_only(flip: str, drawn: set[tuple[bool, bool]]) -> None:
    config, generator = BEVAffineConfig.model_validate({"flip": flip}), torch.Generator().manual_seed(0)
    found = [BEVAffine.sample(config, generator) for _ in range(40)]
    assert {(affine.flip_x, affine.flip_y) for affine in found} == drawn


# ---------------------------------------------------------------------------------------------- foreign matrices


@given(affines())
def test_an_affine_is_found_again_from_its_matrix(affine: BEVAffine) -> None:
    found = BEVAffine.from_matrix(affine.matrix())
    torch.testing.assert_close(found.matrix(), affine.matrix(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("affine", D4)
def test_symmetries_given_in_single_precision_stay_exact_on_maps(affine: BEVAffine) -> None:
    linear = affine.matrix()[:3, :3].float() * (1 + 1e-7)
    found = BEVAffine.from_matrix(linear)
    assert found.is_grid_exact(GRID)
    maps = torch.rand(1, ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.warp_map(maps, GRID)[0], affine.warp_map(maps, GRID)[0])


@pytest.mark.parametrize(
    "change",
    [(0, 1, 0.1), (2, 2, 1.2), (0, 2, 0.1), (2, 0, 0.1), (3, 0, 1.0), (2, 2, -1.0)],
    ids=["shear", "height scaled alone", "tilt", "tilt", "perspective", "upside down"],
)
def test_matrices_that_maps_cannot_follow_are_refused(change: tuple[int, int, float]) -> None:
    matrix = BEVAffine(rotation_rad=0.4, translation_m=(1.0, 2.0, 0.5)).matrix()
    matrix[change[0], change[1]] = change[2]
    with pytest.raises(ContractError, match="Leave shears and tilts out"):
        BEVAffine.from_matrix(matrix)
