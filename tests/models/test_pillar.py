"""The pillar encoder against loops over pillars and slots, as public implementations run it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bevkd.data.collate import Batch
from bevkd.errors import ConfigError
from bevkd.geometry.affine import BEVAffine
from bevkd.grid import BEVGrid
from bevkd.models.bev_encoder import BEVEncoder, BEVEncoderConfig
from bevkd.models.encoders.pillar import Config, PillarEncoder, build
from bevkd.types import Boxes

GRID = BEVGrid(x_m=(-6.4, 6.4), y_m=(-4.8, 4.8), z_m=(-3, 1), cell_m=1.6)
NUSCENES = BEVGrid(x_m=(-51.2, 51.2), y_m=(-51.2, 51.2), z_m=(-5, 3), cell_m=0.8)
KITTI = BEVGrid(x_m=(0, 69.12), y_m=(-39.68, 39.68), z_m=(-3, 1), cell_m=0.32)


def batch_of(points: Tensor, frame: Tensor, frames: int = 2) -> Batch:
    nothing, identity = (Boxes.empty(),) * frames, (BEVAffine.identity(),) * frames
    tokens = tuple("abcdef"[:frames])
    return Batch(tokens, nothing, torch.ones(frames, dtype=torch.bool), identity, points=points, point_frame=frame)


def scene(seed: int, count: int = 300) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    cluster = torch.rand(12, 3, generator=generator)[torch.randint(0, 12, (count,), generator=generator)]
    place = (cluster + 0.05 * torch.randn(count, 3, generator=generator)) * torch.tensor([13.5, 10.0, 4.2])
    points = torch.cat([place - torch.tensor([6.8, 5.0, 3.1]), torch.rand(count, 2, generator=generator)], dim=1)
    return batch_of(points, torch.randint(0, 2, (count,), generator=generator))


def encoder_of(seed: int, **changes: Any) -> PillarEncoder:
    """Return a small encoder in eval mode whose norms are no identity, with zeros that come out positive."""
    encoder = build(Config.model_validate({"pillar_m": 0.4, "channels": (6,), "max_points": 3, **changes}), GRID).eval()
    generator = torch.Generator().manual_seed(seed)
    for tensor in encoder.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(
                torch.randn(tensor.shape, generator=generator).abs_() * 0.5 + 0.1
                if tensor.dim() == 1
                else torch.randn(tensor.shape, generator=generator) * 0.5
            )
    return encoder


def brute_force(encoder: PillarEncoder, batch: Batch) -> Tensor:
    """Return ``bev_low`` by walking over points, pillars, slots and layers; empty slots are zeros and take part."""
    assert batch.points is not None
    assert batch.point_frame is not None
    config, edge = encoder.config, 0.4
    rows, columns = 24, 32
    members: dict[tuple[int, int, int], list[Tensor]] = {}
    for point, frame in zip(batch.points, batch.point_frame.tolist(), strict=True):
        x, y, z = point[:3].tolist()
        column, row = math.floor((x + 6.4) / edge), math.floor((y + 4.8) / edge)
        if 0 <= column < columns and 0 <= row < rows and (config.dynamic or -3 <= z < 1):
            members.setdefault((frame, row, column), []).append(point[: config.point_features])
    out = torch.zeros(len(batch), encoder.out_channels, rows, columns)
    for place, (key, all_points) in enumerate(members.items()):
        if config.max_pillars is not None and place >= config.max_pillars:
            continue
        points = all_points if config.dynamic else all_points[: config.max_points]
        mean = torch.stack(points)[:, :3].mean(0)
        center = torch.tensor([-6.4 + (key[2] + 0.5) * edge, -4.8 + (key[1] + 0.5) * edge, -1.0])
        slots = [torch.cat([p, p[:3] - mean, (p[:3] - center)[: config.center_offsets]]) for p in points]
        slots += [] if config.dynamic else [torch.zeros_like(slots[0])] * (config.max_points - len(points))
        for index, layer in enumerate(encoder.layers):
            assert isinstance(layer.linear, nn.Linear)
            assert isinstance(layer.norm, nn.BatchNorm1d)
            slots = [layer.norm(layer.linear(slot[None]))[0].relu() for slot in slots]
            largest = torch.stack(slots).amax(0)
            if index < len(encoder.layers) - 1:
                slots = [torch.cat([slot, largest]) for slot in slots]
        out[key[0], :, key[1], key[2]] = largest
    return out


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"channels": (8, 6)},
        {"point_features": 4, "channels": (6,)},
        {"center_offsets": 2, "channels": (8, 6)},
        {"max_points": 1},
        {"max_points": 50, "channels": (8, 8, 4)},
        {"dynamic": True, "channels": (8, 6)},
    ],
    ids=str,
)
def test_it_equals_a_loop_over_slots_empty_ones_included(seed: int, changes: dict[str, Any]) -> None:
    encoder, batch = encoder_of(seed, **changes), scene(seed)
    with torch.no_grad():
        ours, expected = encoder(batch), brute_force(encoder, batch)
    assert 200 < expected.count_nonzero() < expected.numel()
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_the_pillars_that_got_a_point_first_are_kept() -> None:
    encoder, batch = encoder_of(1, max_pillars=20), scene(1)
    assert batch.points is not None
    one = batch_of(batch.points, torch.zeros(len(batch.points), dtype=torch.int64), frames=1)
    with torch.no_grad():
        ours, expected = encoder(one), brute_force(encoder, one)
    assert int((expected != 0).any(1).sum()) == 20
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_gradients_reach_every_weight_and_no_empty_place() -> None:
    encoder = encoder_of(0, channels=(8, 6)).train()
    encoder(scene(0)).square().sum().backward()
    assert [name for name, weight in encoder.named_parameters() if weight.grad is None or not weight.grad.any()] == []


def test_a_batch_without_points_in_range_is_an_empty_map() -> None:
    bev = encoder_of(0)(batch_of(torch.full((1, 5), 99.0), torch.tensor([0])))
    assert bev.shape == (2, 6, 24, 32)
    assert bev.count_nonzero() == 0


def test_a_point_lands_in_row_y_and_column_x() -> None:
    bev = encoder_of(0)(batch_of(torch.tensor([[5.3, -4.7, 0.0, 0.5, 0.0]]), torch.tensor([1])))
    assert (bev != 0).any(1).nonzero().tolist() == [[1, 0, 29]]


@pytest.mark.parametrize(
    ("config", "grid", "fineness", "size"),
    [
        (Config(), NUSCENES, 4, (1, 512, 512)),
        (Config(pillar_m=0.16, channels=(64,), point_features=4, max_points=32), KITTI, 2, (1, 496, 432)),
    ],
    ids=["nuscenes", "kitti"],
)
def test_the_published_sizes_have_pillars_finer_than_the_grid(
    config: Config, grid: BEVGrid, fineness: int, size: tuple[int, int, int]
) -> None:
    encoder = build(config, grid)
    assert (encoder.fineness, encoder.pillars, encoder.out_channels) == (fineness, size, 64)


def test_the_public_networks_have_11_inputs_on_nuscenes_and_10_on_kitti() -> None:
    def shape(config: Config, grid: BEVGrid) -> list[tuple[int, ...]]:
        return [tuple(value.shape) for name, value in build(config, grid).named_parameters() if "linear" in name]

    assert shape(Config(), NUSCENES) == [(32, 11), (64, 64)]
    assert shape(Config(center_offsets=2), NUSCENES) == [(32, 10), (64, 64)]
    assert shape(Config(pillar_m=0.16, channels=(64,), point_features=4), KITTI) == [(64, 10)]


def test_the_bev_encoder_brings_fine_pillars_to_the_grid() -> None:
    config = BEVEncoderConfig(layers=(3, 5, 5), strides=(2, 2, 2), channels=(64, 128, 256), up_channels=(128,) * 3)
    encoder = BEVEncoder(config, 64, fineness=4)
    assert sum(weight.numel() for weight in encoder.parameters()) == 4_388_608  # golden.md 1.11
    layers = [(type(next(level.children())), next(level.children()).stride) for level in encoder.deblocks]
    assert layers == [(nn.Conv2d, (2, 2)), (nn.ConvTranspose2d, (1, 1)), (nn.ConvTranspose2d, (2, 2))]
    assert encoder(torch.zeros(1, 64, 64, 96)).shape == (1, 384, 16, 24)


def test_a_level_that_does_not_fit_the_pillars_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"bev_encoder\.strides: a level of total stride 3"):
        BEVEncoder(BEVEncoderConfig(strides=(3, 1)), 64, fineness=4)


def test_a_pillar_that_does_not_fit_the_grid_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"pillar_m is 0\.3 m.*Set grid\.cell_m: 0\.9"):
        build(Config(pillar_m=0.3), NUSCENES)


def test_a_narrower_encoder_has_its_channels_in_multiples_of_8() -> None:
    narrow = Config().scaled(0.3)
    assert (narrow.channels, narrow.point_features) == ((16, 16), 5)
    bev = BEVEncoderConfig().scaled(0.25)
    assert (bev.channels, bev.up_channels, bev.layers) == ((32, 64), (64, 64), (5, 5))


def test_points_are_required() -> None:
    with pytest.raises(ValueError, match="points"):
        encoder_of(0)(Batch((), (), torch.zeros(0, dtype=torch.bool), ()))
