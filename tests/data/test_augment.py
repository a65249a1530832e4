"""Augmentation moves everything of a frame together, and is drawn from its generator alone."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bevkd.config import read_yaml
from bevkd.data.augment import PRESETS, AugmentConfig, ImageAugment, apply_affine, draw_view, scale_brightness
from bevkd.data.images import ImageView
from bevkd.data.source import Sensor
from bevkd.geometry.affine import BEVAffine
from bevkd.geometry.boxes import corners_3d, points_in_boxes
from bevkd.grid import BEVGrid
from bevkd.testing.frames import MadeUpFrames
from bevkd.types import Boxes, Frame, Rig
from tests.geometry.strategies import affines, random_boxes, seeds


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rig(source: torch.Generator) -> Rig:
    """Return two cameras at random poses."""
    poses = torch.eye(4).repeat(2, 1, 1)
    for pose in poses:
        rotation, _ = torch.linalg.qr(torch.randn(3, 3, generator=source))
        pose[:3, :3] = rotation * torch.linalg.det(rotation)
        pose[:3, 3] = torch.randn(3, generator=source)
    intrinsics = torch.tensor([[800.0, 0, 400], [0, 800, 200], [0, 0, 1]]).repeat(2, 1, 1)
    return Rig(("left", "right"), intrinsics, poses, torch.eye(3).expand(2, 3, 3))


def frame(source: torch.Generator) -> Frame:
    boxes = random_boxes(4, source, reach_m=20)
    inside = boxes.center[:, None] + 0.1 * torch.randn(4, 5, 3, generator=source)
    points = torch.cat([inside.flatten(0, 1), torch.rand(20, 2, generator=source)], dim=1)
    images = torch.randint(0, 256, (2, 3, 4, 6), generator=source, dtype=torch.uint8)
    return Frame("a", 0, points, images, rig(source), boxes=boxes)


def pixels(corners: Tensor, cameras: Rig, index: int) -> tuple[Tensor, Tensor]:
    """Return where a camera sees points of the BEV frame, and at which depth."""
    camera_from_lidar = torch.linalg.inv(cameras.lidar_from_camera[index].double())
    seen = corners.double() @ camera_from_lidar[:3, :3].T + camera_from_lidar[:3, 3]
    flat = seen @ cameras.intrinsics[index].double().T
    return flat[..., :2] / flat[..., 2:], seen[..., 2]


@given(seeds(), affines())
def test_a_box_corner_stays_on_its_pixel_and_at_its_depth(source: torch.Generator, affine: BEVAffine) -> None:
    before = frame(source)
    after = apply_affine(before, affine)
    assert before.boxes is not None
    assert after.boxes is not None
    assert before.rig is not None
    assert after.rig is not None
    corners = corners_3d(before.boxes.values)
    matrix = affine.matrix()
    moved = corners.double() @ matrix[:3, :3].T + matrix[:3, 3]
    for camera in range(2):
        old, depth = pixels(corners, before.rig, camera)
        new, new_depth = pixels(moved, after.rig, camera)
        clear = depth.abs() > 0.5  # nearer to the camera's plane a pixel is anywhere
        torch.testing.assert_close(new[clear], old[clear], atol=0.5, rtol=1e-3)
        torch.testing.assert_close(new_depth, depth, atol=1e-3, rtol=1e-4)
    # The corners of the moved boxes are the moved corners, listed in another order if mirrored.
    distance = torch.cdist(corners_3d(after.boxes.values).double(), moved)
    assert distance.min(dim=2).values.max() < 1e-3


@given(seeds(), affines())
def test_points_stay_in_their_boxes_and_keep_intensity_and_time(source: torch.Generator, affine: BEVAffine) -> None:
    before = frame(source)
    after = apply_affine(before, affine)
    assert before.points is not None
    assert before.boxes is not None
    assert after.points is not None
    assert after.boxes is not None
    grown = before.boxes.values.clone()
    grown[:, 3:6] += 0.01
    shrunk = after.boxes.values.clone()
    shrunk[:, 3:6] += 0.02 * affine.scale
    inside = points_in_boxes(before.points, grown)
    assert not bool((inside & ~points_in_boxes(after.points, shrunk)).any())
    assert torch.equal(after.points[:, 3:], before.points[:, 3:])


def test_images_and_intrinsics_stay_as_they_are() -> None:
    before = frame(generator())
    after = apply_affine(before, BEVAffine(flip_x=True, rotation_rad=1.0))
    assert before.rig is not None
    assert after.rig is not None
    assert after.images is before.images
    assert after.rig.intrinsics is before.rig.intrinsics
    assert after.rig.names == before.rig.names


def test_absent_sensors_and_labels_stay_absent() -> None:
    after = apply_affine(Frame("a", 0), BEVAffine(flip_x=True))
    assert (after.points, after.boxes, after.rig, after.images) == (None, None, None, None)


def test_an_empty_frame_stays_labelled_and_empty() -> None:
    after = apply_affine(Frame("a", 0, points=torch.zeros(0, 5), boxes=Boxes.empty()), BEVAffine(rotation_rad=1.0))
    assert after.points is not None
    assert after.boxes is not None
    assert (len(after.points), len(after.boxes)) == (0, 0)


# ---------------------------------------------------------------------------------------------- image views


def test_without_augmentation_the_view_covers_the_image() -> None:
    assert draw_view((900, 1600), 256, 704, ImageAugment(), generator()) == ImageView.cover((900, 1600), 256, 704)


@given(seeds(), st.floats(1, 1.3), st.booleans(), st.booleans())
def test_every_view_lies_inside_the_image_and_shows_its_bottom(
    source: torch.Generator, zoom: float, shift: bool, flip: bool
) -> None:
    view = draw_view((900, 1600), 256, 704, ImageAugment(zoom=(1, zoom), shift=shift, flip=flip), source)
    assert 0 <= view.left <= round(1600 * view.scale) - 704
    assert view.top + 256 == round(900 * view.scale)
    assert view.flip in {False, flip}


def test_shift_and_flip_reach_all_that_they_may() -> None:
    source, config = generator(), ImageAugment(zoom=(1.01, 1.01), shift=True, flip=True)
    views = [draw_view((900, 1600), 256, 704, config, source) for _ in range(200)]
    spare = round(1600 * views[0].scale) - 704
    assert {view.left for view in views} == set(range(spare + 1))
    assert 60 < sum(view.flip for view in views) < 140


def test_views_are_a_function_of_the_generator() -> None:
    config = ImageAugment(zoom=(0.8, 1.2), shift=True, flip=True)
    first, again = ([draw_view((900, 1600), 256, 704, config, generator(5))] for _ in range(2))
    assert first == again


def test_turns_reach_the_whole_range_and_change_nothing_else() -> None:
    plain = ImageAugment(zoom=(0.8, 1.2), shift=True, flip=True)
    turning = plain.model_copy(update={"rotation_deg": (-5.4, 5.4)})
    views = [draw_view((900, 1600), 256, 704, turning, generator(seed)) for seed in range(200)]
    degrees = [math.degrees(view.rotation_rad) for view in views]
    assert -5.4 <= min(degrees) < -5
    assert 5 < max(degrees) <= 5.4
    upright = [replace(view, rotation_rad=0.0) for view in views]
    assert upright == [draw_view((900, 1600), 256, 704, plain, generator(seed)) for seed in range(200)]


IMAGE_SIZE, VIEW_SIZE = (90, 160), (48, 96)
VIEWS = AugmentConfig.model_validate("unidistill").image


@given(seeds(), affines())
def test_what_a_camera_sees_of_points_and_radar_moves_with_its_image(
    source: torch.Generator, affine: BEVAffine
) -> None:
    grid = BEVGrid(x_m=(-40, 40), y_m=(-40, 40), cell_m=1)
    frames = MadeUpFrames(("car",), grid, points=200, cameras=3, image_size=IMAGE_SIZE)
    sensors: frozenset[Sensor] = frozenset({"camera", "previous_camera", "lidar", "radar"})
    views = {name: draw_view(size, *VIEW_SIZE, VIEWS, source) for name, size in frames.image_sizes("frame-0").items()}
    before = frames.load("frame-0", sensors)
    after = apply_affine(frames.load("frame-0", sensors, views), affine)
    assert before.rig is not None
    assert after.rig is not None
    assert len(after.rig.names) == 6
    for kind in ("points", "radar"):
        for camera, name in enumerate(after.rig.names):
            old, depth = pixels(getattr(before, kind)[:, :3], before.rig, camera)
            new, new_depth = pixels(getattr(after, kind)[:, :3], after.rig, camera)
            matrix = views[name.removesuffix("@-1")].matrix().double()
            clear = depth > 1.0
            expected = old @ matrix[:2, :2].T + matrix[:2, 2]
            torch.testing.assert_close(new[clear], expected[clear], atol=0.05, rtol=1e-3)
            torch.testing.assert_close(new_depth, depth, atol=1e-3, rtol=1e-4)


# ---------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize(
    ("recipe", "preset"),
    [
        ("nuscenes_bevdepth", "bevdepth"),
        ("nuscenes_bevdepth_r101", "bevdepth"),
        ("nuscenes_student", "unidistill"),
        ("nuscenes_fusion", "unidistill"),
    ],
)
def test_a_preset_is_what_the_recipe_of_its_paper_spells_out(recipe: str, preset: str) -> None:
    path = Path(__file__).parents[2] / "pipeline" / "recipes" / f"{recipe}.yaml"
    assert AugmentConfig.model_validate(read_yaml(path)["augment"]) == AugmentConfig.model_validate(preset)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_preset_resolves_to_its_values(preset: str) -> None:
    resolved = AugmentConfig.model_validate(preset).model_dump(mode="json")
    assert set(resolved) == {"bev", "image"}
    assert AugmentConfig.model_validate(resolved) == AugmentConfig.model_validate(preset)


def test_an_unknown_preset_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="'d5' is no preset; there are none, d4, bevdepth, unidistill"):
        AugmentConfig.model_validate("d5")


@pytest.mark.parametrize(
    "values",
    [
        {"paste": {"car": 2}},
        {"gt_paste": True},
        {"gt_sampling": {}},
        {"copy_paste": 1},
        {"image": {"mosaic": True}},
        {"bev": {"mixup": 0.2}},
    ],
    ids=str,
)
def test_mixing_frames_is_refused_with_the_reason(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="A cache holds what the teacher saw in each frame alone"):
        AugmentConfig.model_validate(values)


def test_other_unknown_keys_are_faults_as_everywhere() -> None:
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        AugmentConfig.model_validate({"image": {"blur": 1}})


# ---------------------------------------------------------------------------------------------- brightness


def test_brightness_multiplies_each_image_by_its_own_factor() -> None:
    images = torch.full((3, 3, 4, 4), 100, dtype=torch.uint8)
    scaled = scale_brightness(images, ImageAugment(brightness=(0.5, 1.5)), generator())
    levels = [image.unique().tolist() for image in scaled]
    assert all(len(level) == 1 and 50 <= level[0] <= 150 for level in levels)
    assert len({level[0] for level in levels}) == 3
    assert scaled.dtype == torch.uint8


@pytest.mark.parametrize(("factor", "expected"), [(3.0, 255), (0.0, 0)])
def test_brightness_saturates(factor: float, expected: int) -> None:
    images = torch.full((1, 3, 2, 2), 200, dtype=torch.uint8)
    assert scale_brightness(images, ImageAugment(brightness=(factor, factor)), generator()).unique().tolist() == [
        expected
    ]


def test_without_brightness_images_are_untouched() -> None:
    images = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    assert scale_brightness(images, ImageAugment(), generator()) is images


@pytest.mark.parametrize(
    "values", [{"zoom": (1.2, 0.8)}, {"brightness": (1.0, -1.0)}, {"zoom": (0.0, 1.0)}, {"rotation_deg": (3.0, -3.0)}]
)
def test_ranges_that_are_none_are_refused(values: dict[str, tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        AugmentConfig(image=ImageAugment(**values))  # type: ignore[arg-type]
