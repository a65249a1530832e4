"""The camera encoder's geometry: pixels and cells meet where the rig says, whatever the view and the BEV affine."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from bevkd.data.collate import Batch
from bevkd.data.images import ImageView
from bevkd.errors import CheckpointError, ConfigError
from bevkd.geometry.affine import BEVAffine
from bevkd.grid import BEVGrid
from bevkd.models.backbone import BackboneConfig
from bevkd.models.encoders.lift_splat import (
    Config,
    DepthBins,
    LiftSplatEncoder,
    _rays,
    build,
)
from bevkd.types import Boxes, LidarDepth
from tests.geometry.strategies import affines, seeds

GRID = BEVGrid(x_m=(-16, 16), y_m=(-12, 12), z_m=(-5, 3), cell_m=1.0)
BACKBONE = BackboneConfig(
    options={
        "embedding_size": 4,
        "hidden_sizes": [4, 8],
        "depths": [1, 1],
        "layer_type": "basic",
        "out_features": ["stage1", "stage2"],
    }
)
K = torch.tensor([[60.0, 0, 48], [0, 60, 20], [0, 0, 1]])
FORWARD = torch.tensor([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])
"""BEV axes of the camera that looks along +x: its z is x, its -x is y, its -y is z."""


def config(**changes: Any) -> Config:
    values: dict[str, Any] = {
        "backbone": BACKBONE,
        "image_height": 64,
        "image_width": 96,
        "stride": 8,
        "neck_channels": 4,
        "channels": 5,
        "depth": DepthBins(start=1.0, stop=15.0, step=0.5),
    }
    return Config(**{**values, **changes})


def encoder(**changes: Any) -> LiftSplatEncoder:
    torch.manual_seed(0)
    return build(config(**changes), GRID).eval()


def camera(yaw: float, z: float = 1.6) -> Tensor:
    """Return ``bev_from_camera`` of a camera above the origin, turned counter-clockwise from +x."""
    pose = torch.eye(4)
    turn = torch.tensor([[math.cos(yaw), -math.sin(yaw), 0], [math.sin(yaw), math.cos(yaw), 0], [0, 0, 1]])
    pose[:3, :3] = turn @ FORWARD
    pose[2, 3] = z
    return pose


def batch_of(images: Tensor, poses: Tensor, intrinsics: Tensor | None = None) -> Batch:
    B, N = images.shape[:2]
    return Batch(
        tokens=tuple(map(str, range(B))),
        boxes=tuple(Boxes.empty() for _ in range(B)),
        labelled=torch.ones(B, dtype=torch.bool),
        affines=tuple(BEVAffine.identity() for _ in range(B)),
        images=images,
        intrinsics=K.expand(B, N, 3, 3) if intrinsics is None else intrinsics,
        bev_from_camera=poses.expand(B, N, 4, 4),
        view_from_original=torch.eye(3).expand(B, N, 3, 3),
    )


def bev_of(model: LiftSplatEncoder, batch: Batch) -> Tensor:
    bev: Tensor = model(batch)[0]
    return bev


def photos(cameras: int, seed: int = 0, frames: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, cameras, 3, 64, 96), generator=generator, dtype=torch.uint8)


def project(points: Tensor, intrinsics: Tensor, bev_from_camera: Tensor) -> tuple[Tensor, Tensor]:
    """Return pixel and depth of points of the BEV frame."""
    own = torch.linalg.inv(bev_from_camera.double())
    seen = points.double() @ own[:3, :3].T + own[:3, 3]
    flat = seen @ intrinsics.double().T
    return flat[:, :2] / flat[:, 2:], seen[:, 2]


# ---------------------------------------------------------------------------------------------- depth bins


def test_the_published_bins_are_the_112_depths_from_2_to_57_and_a_half_metres() -> None:
    depths = DepthBins(start=2.0, stop=58.0, step=0.5).values()
    assert (len(depths), depths[0].item(), depths[-1].item()) == (112, 2.0, 57.5)
    assert DepthBins() == DepthBins(start=2.0, stop=58.0, step=0.5)


@given(st.integers(1, 200), st.sampled_from([0.1, 0.25, 0.5, 0.75, 1.0]))
def test_the_stop_is_not_a_bin(count: int, step: float) -> None:
    assert len(DepthBins(start=2.0, stop=2.0 + count * step, step=step).values()) == count


def test_bins_that_end_before_they_start_are_refused() -> None:
    with pytest.raises(ValidationError, match="stop"):
        DepthBins(start=10.0, stop=5.0)


# ---------------------------------------------------------------------------------------------- geometry


def published(frustum: str) -> LiftSplatEncoder:
    three_stages = {"hidden_sizes": [4, 8, 8], "depths": [1, 1, 1], "out_features": ["stage1", "stage3"]}
    backbone = BackboneConfig(options={**BACKBONE.options, **three_stages})
    return encoder(backbone=backbone, image_height=256, image_width=704, stride=16, depth=DepthBins(), frustum=frustum)


def test_the_frustum_of_bevdepth_ends_at_the_edges_of_the_image() -> None:
    model = published("stretched")
    pixels = model._pixels(16, 44)
    cells = model._cells(_rays(pixels, K[None]), camera(0.0)[None])
    assert cells.shape == (1, 16 * 44, 112)
    assert [*pixels[0].tolist(), model.depths[0].item()] == [0.0, 0.0, 2.0]
    assert [*pixels[-1].tolist(), model.depths[-1].item()] == [703.0, 255.0, 57.5]
    torch.testing.assert_close(pixels[:44, 0], torch.linspace(0, 703, 44))
    torch.testing.assert_close(pixels[::44, 1], torch.linspace(0, 255, 16))


def test_by_default_a_feature_cell_looks_from_its_centre() -> None:
    pixels = published("centres")._pixels(16, 44)
    assert pixels[0].tolist() == [8.0, 8.0]
    assert pixels[-1].tolist() == [696.0, 248.0]


def cases() -> st.SearchStrategy[tuple[float, float, BEVAffine]]:
    return st.tuples(st.floats(-math.pi, math.pi), st.floats(0.5, 2.0), affines())


@given(cases())
def test_a_pixel_at_a_depth_lands_in_the_cell_that_projects_back_onto_it(case: tuple[float, float, BEVAffine]) -> None:
    yaw, height, affine = case
    model = encoder()
    pose = (affine.matrix() @ camera(yaw, height).double()).float()
    pixels = model._pixels(8, 12)
    cells = model._cells(_rays(pixels, K[None]), pose[None])[0]
    rays = _rays(pixels, K[None])[0].double()
    for pixel, bin_index in ((0, 4), (40, 10), (95, 27), (13, 2)):
        depth = float(model.depths[bin_index])
        point = pose[:3, :3].double() @ (rays[pixel] * depth) + pose[:3, 3].double()
        back, seen_depth = project(point[None], K, pose)
        torch.testing.assert_close(back[0], pixels[pixel].double(), atol=1e-3, rtol=0)
        assert seen_depth.item() == pytest.approx(depth, abs=1e-4)
        cell = int(cells[pixel, bin_index])
        clear_of_faces = (GRID.to_cells(point[:2]) - GRID.to_cells(point[:2]).round()).abs().min() > 1e-3
        inside = bool(GRID.contains(point[:2])) and GRID.z_m[0] <= point[2] < GRID.z_m[1]
        if clear_of_faces and min(abs(point[2] - GRID.z_m[0]), abs(point[2] - GRID.z_m[1])) > 1e-3:
            assert (cell >= 0) == inside
            if inside:
                row, column = divmod(cell, GRID.shape[1])
                offset = point[:2] - GRID.centers()[row, column].double()
                assert offset.abs().max() <= GRID.cell_m / 2


def test_cells_ahead_of_a_camera_project_back_into_their_pixel() -> None:
    # The optical axis lies in the ground plane: every cell along +x at y in (0, 1) shows in the columns left of it.
    model = encoder()
    centers = GRID.centers()[12, 20:30]
    points = torch.cat([centers, torch.full((10, 1), 1.6)], dim=1)
    pixels, depth = project(points, K, camera(0.0))
    assert bool((pixels[:, 0] < 48).all())
    rays = _rays(pixels.float(), K[None])
    model.register_buffer("depths", depth.float(), persistent=False)
    cells = model._cells(rays, camera(0.0)[None])[0].diagonal()
    assert cells.tolist() == [12 * 32 + column for column in range(20, 30)]


@given(seeds(), st.floats(0.3, 1.2), st.integers(-40, 200), st.integers(-40, 100), st.booleans())
def test_a_view_changes_where_a_ray_is_seen_but_not_where_it_goes(
    generator: torch.Generator, scale: float, left: int, top: int, flip: bool
) -> None:
    view = ImageView(64, 96, scale, left, top, flip)
    original = torch.rand(20, 2, generator=generator) * torch.tensor([160.0, 90.0])
    homogeneous = torch.cat([original, torch.ones(20, 1)], dim=1)
    seen = (homogeneous @ view.matrix().T)[:, :2]
    before, after = _rays(original, K[None]), _rays(seen, (view.matrix() @ K)[None])
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_a_mirrored_image_with_its_rig_gives_the_same_cells_in_mirrored_order() -> None:
    model, view = encoder(), ImageView(64, 96, 1.0, flip=True)
    pixels = model._pixels(8, 12)
    plain = model._cells(_rays(pixels, K[None]), camera(0.3)[None]).view(8, 12, -1)
    flipped = model._cells(_rays(pixels, (view.matrix() @ K)[None]), camera(0.3)[None]).view(8, 12, -1)
    assert (flipped.flip(1) == plain).float().mean() > 0.99  # rounding may move a point on a face


# ---------------------------------------------------------------------------------------------- the encoder


def test_the_map_has_the_grids_shape_and_the_configured_channels() -> None:
    bev = bev_of(encoder(), batch_of(photos(2, frames=3), torch.stack([camera(0.0), camera(2.0)])))
    assert bev.shape == (3, 5, 24, 32)


def test_a_camera_writes_only_what_it_faces() -> None:
    model = encoder()
    poses = torch.stack([camera(0.0), camera(math.pi)])
    both = photos(2)
    other = both.clone()
    other[:, 0] = photos(1, seed=1)[:, 0]
    changed = (bev_of(model, batch_of(both, poses)) != bev_of(model, batch_of(other, poses))).any(1)[0]
    x = GRID.centers()[..., 0]
    assert bool(changed[x > 1].any())
    assert not bool(changed[x < 0].any())


def test_a_camera_that_sees_nothing_of_the_grid_writes_nothing() -> None:
    far = camera(0.0)
    far[0, 3] = 100.0
    assert not bev_of(encoder(), batch_of(photos(1), far[None])).any()


def test_the_order_of_cameras_does_not_matter() -> None:
    model, poses, images = encoder(), torch.stack([camera(0.0), camera(2.0)]), photos(2)
    torch.testing.assert_close(
        bev_of(model, batch_of(images.flip(1), poses.flip(0))),
        bev_of(model, batch_of(images, poses)),
        atol=1e-5,
        rtol=1e-4,
    )


def test_turning_the_rig_by_a_quarter_turns_the_map() -> None:
    square = BEVGrid(x_m=(-12, 12), y_m=(-12, 12), cell_m=1.0)
    torch.manual_seed(0)
    model = build(config(), square).eval()
    affine = BEVAffine(rotation_rad=math.pi / 2)
    turned = (affine.matrix() @ camera(0.2).double()).float()
    expected, _ = affine.warp_map(bev_of(model, batch_of(photos(1), camera(0.2)[None]))[0], square)
    found = bev_of(model, batch_of(photos(1), turned[None]))[0]
    # A point on a face may fall to either side, which moves a few cells' worth of the sum.
    assert ((found - expected).abs() > 1e-4).float().mean() < 0.02


def test_the_norm_is_off_unless_asked_for() -> None:
    assert sum(1 for name, _ in encoder(norm=True).named_parameters() if name.startswith("norm")) == 2
    assert sum(1 for name, _ in encoder().named_parameters() if name.startswith("norm")) == 0


def test_every_weight_learns() -> None:
    model = encoder().train()
    bev = bev_of(model, batch_of(photos(2), torch.stack([camera(0.0), camera(2.0)])))
    (bev * torch.randn(bev.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    idle = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert idle == []


def test_half_precision_gives_a_float32_map() -> None:
    model, batch = encoder(), batch_of(photos(2), torch.stack([camera(0.0), camera(2.0)]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = bev_of(model, batch)
    full = bev_of(model, batch)
    assert half.dtype == torch.float32
    assert ((half - full).norm() / full.norm()).item() < 0.05


# ---------------------------------------------------------------------------------------------- what it refuses


def test_images_are_required() -> None:
    batch = Batch(("a",), (Boxes.empty(),), torch.ones(1, dtype=torch.bool), (BEVAffine.identity(),))
    with pytest.raises(ValueError, match="images"):
        bev_of(encoder(), batch)


@pytest.mark.parametrize(("name", "size"), [("image_height", 100), ("image_width", 0)])
def test_image_sizes_that_the_backbone_cannot_halve_are_refused(name: str, size: int) -> None:
    with pytest.raises(ValidationError, match=name):
        config(**{name: size})


def test_a_stride_that_the_backbone_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"stride.*4, 8"):
        encoder(stride=12)


def test_missing_backbone_weights_are_named(tmp_path: Any) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        encoder(backbone=BackboneConfig(weights=tmp_path / "nowhere"))


def test_backbone_weights_come_from_a_local_folder(tmp_path: Any) -> None:
    model = encoder()
    model.backbone.save_pretrained(tmp_path)
    torch.manual_seed(1)
    loaded = build(config(backbone=BACKBONE.model_copy(update={"weights": tmp_path})), GRID)
    torch.testing.assert_close(dict(loaded.backbone.state_dict()), dict(model.backbone.state_dict()))


def test_backbone_weights_that_lack_a_stage_are_refused(tmp_path: Any) -> None:
    encoder().backbone.save_pretrained(tmp_path)
    wider = {**BACKBONE.options, "hidden_sizes": [4, 8, 8], "depths": [1, 1, 1]}
    with pytest.raises(CheckpointError, match=r"stages\.2"):
        build(config(backbone=BackboneConfig(options=wider, weights=tmp_path)), GRID)


# ---------------------------------------------------------------------------------------------- BEVDepth


def two_key_frames(images: Tensor, now: Tensor, before: Tensor) -> Batch:
    return batch_of(images, torch.stack([now, before]))


def test_two_key_frames_stand_side_by_side_and_each_is_the_map_of_its_images() -> None:
    double, single = encoder(key_frames=2), encoder()
    assert double.out_channels == 2 * single.out_channels
    single.load_state_dict(double.state_dict())
    images, now, before = photos(2), camera(0.0), camera(0.0)
    before[0, 3] = -3.0  # the car stood three metres behind where it is now
    both = bev_of(double, two_key_frames(images, now, before))
    torch.testing.assert_close(both[:, :5], bev_of(single, batch_of(images[:, :1], now[None])))
    torch.testing.assert_close(both[:, 5:], bev_of(single, batch_of(images[:, 1:], before[None])))


def test_what_stands_still_lies_at_the_same_cells_in_both_key_frames() -> None:
    model, image = encoder(key_frames=2), photos(1)
    there = camera(0.0)
    both = bev_of(model, two_key_frames(image.expand(1, 2, 3, 64, 96), there, there))
    assert torch.equal(both[:, :5], both[:, 5:])


def test_no_gradient_flows_through_the_earlier_key_frame() -> None:
    model = encoder(key_frames=2)
    bev = bev_of(model, two_key_frames(photos(2), camera(0.0), camera(0.0)))
    bev[:, 5:].sum().requires_grad_() if not bev.requires_grad else bev[:, 5:].sum().backward()
    assert all(each.grad is None or not each.grad.any() for each in model.parameters())


def test_two_key_frames_ask_for_the_camera_before_and_depth_for_lidar() -> None:
    assert config().sensors == {"camera"}
    assert config(key_frames=2).sensors == {"camera", "previous_camera"}
    assert config().supervision == frozenset()
    assert config(depth_weight=3.0).supervision == {"lidar_depth"}


def test_depth_is_learned_from_the_lidar_of_each_frame_and_camera() -> None:
    model = encoder(depth_weight=3.0)
    logits = torch.zeros(2, 3, 28, 8, 12)
    logits[1, 2, 4, 5, 6] = 100.0  # frame 1, camera 2, row 5, column 6: bin 4 is 3.0 to 3.5 m
    here = LidarDepth(torch.tensor([2]), torch.tensor([[6.5 * 8, 5.5 * 8]]), torch.tensor([3.2]))
    nowhere = LidarDepth(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2), torch.zeros(0))
    assert model.depth_loss(logits, [nowhere, here]).item() == pytest.approx(0.0, abs=1e-5)
    assert model.depth_loss(logits, [here, nowhere]).item() > 3.0


def test_aggregation_that_changes_nothing_gives_the_map_of_the_splat() -> None:
    plain, refined = encoder(), encoder(aggregation=True)
    refined.load_state_dict(plain.state_dict(), strict=False)
    refined.aggregation = torch.nn.Identity()  # type: ignore[assignment]
    batch = batch_of(photos(2), torch.stack([camera(0.0), camera(2.0)]))
    torch.testing.assert_close(bev_of(refined, batch), bev_of(plain, batch), rtol=1e-4, atol=1e-5)


def test_every_weight_of_the_whole_bevdepth_learns() -> None:
    model = encoder(depth_net="camera_aware", aggregation=True, depth_weight=3.0, key_frames=2).train()
    bev, depth, _ = model(batch_of(photos(4), torch.stack([camera(0.0), camera(0.3), camera(0.1), camera(0.4)])))
    (bev.square().sum() + depth.square().sum()).backward()
    assert [name for name, each in model.named_parameters() if each.grad is None] == []
