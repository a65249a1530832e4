"""The sparse encoder against dense convolutions."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from bevkd.data.collate import Batch
from bevkd.errors import ConfigError
from bevkd.geometry.affine import BEVAffine
from bevkd.grid import BEVGrid
from bevkd.models.encoders.voxel import Config, VoxelEncoder, build
from bevkd.models.sparse import ResidualBlock, down_conv, sparse_tensor, sub_m_conv, to_dense
from bevkd.models.voxelize import voxelize
from bevkd.types import Boxes
from tests.models.dense import Dense

NUSCENES = BEVGrid(x_m=(-54, 54), y_m=(-54, 54), z_m=(-5, 3), cell_m=0.6)
KITTI = BEVGrid(x_m=(0, 70.4), y_m=(-40, 40), z_m=(-3, 1), cell_m=0.4)
SECOND = Config(
    kind="plain", voxel_m=(0.05, 0.05, 0.1), channels=(16, 32, 64, 64), point_features=4, max_points=5, max_voxels=40000
)


def dense_weight(conv: nn.Module) -> Tensor:
    """Return spconv 2's (out, z, y, x, in) weight in the order of ``conv3d``; differentiable."""
    return conv.get_parameter("weight").permute(0, 4, 1, 2, 3)


def dense_down(dense: Dense, layer: nn.Module) -> Dense:
    conv, norm, _ = layer.children()
    stride, padding = (tuple(getattr(conv, name)) for name in ("stride", "padding"))
    return dense.down(dense_weight(conv), stride, padding).norm(norm).relu()


def dense_block(dense: Dense, block: nn.Module) -> Dense:
    if isinstance(block, ResidualBlock):
        out = dense.sub_m(dense_weight(block.conv1)).norm(block.bn1).relu()
        return (out.sub_m(dense_weight(block.conv2)).norm(block.bn2) + dense).relu()
    conv, norm, _ = block.children()
    return dense.sub_m(dense_weight(conv)).norm(norm).relu()


def dense_forward(encoder: VoxelEncoder, batch: Batch) -> Tensor:
    """Return ``bev_low`` by dense convolutions with the encoder's own weights and norms."""
    assert batch.points is not None
    assert batch.point_frame is not None
    config = encoder.config
    points = batch.points[:, : config.point_features]
    features, indices = voxelize(
        points, batch.point_frame, encoder.low_m, config.voxel_m, encoder.voxels, config.max_points
    )
    dense = dense_block(Dense.scatter(features, indices, encoder.shape, len(batch)), encoder.conv_input)
    for index, stage in enumerate(encoder.stages):
        layers = list(stage.children())
        if index > 0:
            dense = dense_down(dense, layers.pop(0))
        for block in layers:
            dense = dense_block(dense, block)
    return dense_down(dense, encoder.conv_out).values.flatten(1, 2)


# ------------------------------------------------------------------------------------------ random scenes


def voxels(seed: int, channels: int = 4, share: float = 0.15) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
    """Return features and indices of a random share of a 2 x 7 x 9 x 8 grid."""
    generator = torch.Generator().manual_seed(seed)
    shape = (7, 9, 8)
    indices = (torch.rand(2, *shape, generator=generator) < share).nonzero()
    return torch.randn(len(indices), channels, generator=generator), indices, shape


def scene(seed: int, points: int = 400) -> Batch:
    """Return two frames of clustered points inside 12.8 m x 9.6 m x 4 m."""
    generator = torch.Generator().manual_seed(seed)
    cluster = torch.rand(8, 3, generator=generator)[torch.randint(0, 8, (points,), generator=generator)]
    place = (cluster + 0.06 * torch.randn(points, 3, generator=generator)) * torch.tensor([12.8, 9.6, 4.0])
    place += torch.tensor([-6.4, -4.8, -3.0])
    rest = torch.rand(points, 2, generator=generator)
    frame = torch.randint(0, 2, (points,), generator=generator)
    return batch_of(torch.cat([place, rest], dim=1), frame)


def batch_of(points: Tensor, frame: Tensor) -> Batch:
    nothing = (Boxes.empty(), Boxes.empty())
    identity = (BEVAffine.identity(), BEVAffine.identity())
    return Batch(("a", "b"), nothing, torch.ones(2, dtype=torch.bool), identity, points=points, point_frame=frame)


def small_encoder(seed: int, kind: Literal["residual", "plain"] = "residual", point_features: int = 5) -> VoxelEncoder:
    torch.manual_seed(seed)
    grid = BEVGrid(x_m=(-6.4, 6.4), y_m=(-4.8, 4.8), z_m=(-3, 1), cell_m=1.6)
    config = Config(
        kind=kind,
        voxel_m=(0.4, 0.4, 0.2),
        channels=(4, 6, 8),
        blocks=2,
        out_channels=8,
        point_features=point_features,
    )
    return build(config, grid)


# ------------------------------------------------------------------------------------------ layers


@pytest.mark.parametrize("seed", range(3))
def test_a_submanifold_convolution_is_a_dense_one_on_the_occupied_voxels(seed: int) -> None:
    features, indices, shape = voxels(seed)
    torch.manual_seed(seed)
    conv = sub_m_conv(4, 6, "key")
    sparse = to_dense(conv(sparse_tensor(features, indices, shape, 2)))
    dense = Dense.scatter(features, indices, shape, 2).sub_m(dense_weight(conv))
    torch.testing.assert_close(sparse, dense.values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [((3, 3, 3), (2, 2, 2), (1, 1, 1)), ((3, 3, 3), (2, 2, 2), (0, 1, 1)), ((3, 1, 1), (2, 1, 1), (0, 0, 0))],
)
def test_a_strided_convolution_is_a_dense_one_on_the_voxels_that_it_reaches(
    kernel: tuple[int, int, int], stride: tuple[int, int, int], padding: tuple[int, int, int]
) -> None:
    features, indices, shape = voxels(5, share=0.05)
    torch.manual_seed(0)
    layer = down_conv(4, 6, "key", kernel, stride, padding).eval()
    conv, norm, _ = layer.children()
    assert [tuple(getattr(conv, name)) for name in ("kernel_size", "stride", "padding")] == [kernel, stride, padding]
    nn.init.constant_(norm.get_parameter("bias"), 5.0)  # makes every occupied voxel positive, and no other
    sparse = to_dense(layer(sparse_tensor(features, indices, shape, 2)))
    dense = Dense.scatter(features, indices, shape, 2).down(dense_weight(conv), stride, padding).norm(norm).relu()
    assert 0 < int(dense.active.sum()) < dense.active.numel()
    assert torch.equal((sparse != 0).any(1), dense.active)
    torch.testing.assert_close(sparse, dense.values, atol=1e-5, rtol=1e-5)


def test_no_convolution_has_a_bias() -> None:
    # spconv refuses a bias on the CPU in eval mode, and a batch norm follows each convolution anyway.
    names = [name for name, _ in small_encoder(0).named_parameters() if "bias" in name]
    modules = dict(small_encoder(0).named_modules())
    assert names
    assert all(isinstance(modules[name.removesuffix(".bias")], nn.BatchNorm1d) for name in names)


# ------------------------------------------------------------------------------------------ the whole encoder


@pytest.mark.parametrize("kind", ["residual", "plain"])
@pytest.mark.parametrize("seed", range(25))
def test_the_encoder_and_its_gradients_equal_the_dense_emulation(seed: int, kind: Literal["residual", "plain"]) -> None:
    encoder, batch = small_encoder(seed, kind, point_features=3 + seed % 3), scene(seed, points=100 + 20 * seed)
    weight = torch.randn(2, encoder.out_channels, 6, 8, generator=torch.Generator().manual_seed(seed))
    outputs, gradients = [], []
    for forward in (encoder, lambda batch: dense_forward(encoder, batch)):
        encoder.zero_grad()
        bev = forward(batch)
        (bev * weight).mean().backward()
        outputs.append(bev.detach())
        gradients.append({name: value.grad for name, value in encoder.named_parameters()})
    assert outputs[0].count_nonzero() > 100
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)
    assert all(gradient is not None for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


def test_the_encoder_equals_the_dense_emulation_in_eval_mode() -> None:
    encoder, batch = small_encoder(7), scene(7)
    encoder(batch)  # moves the running statistics away from their start
    encoder.eval()
    torch.testing.assert_close(encoder(batch), dense_forward(encoder, batch), atol=1e-5, rtol=1e-5)


def test_the_encoder_repeats_itself_bit_by_bit() -> None:
    encoder, batch = small_encoder(1).eval(), scene(1)
    assert torch.equal(encoder(batch), encoder(batch))


def test_a_point_lands_in_row_y_and_column_x() -> None:
    encoder = small_encoder(0).eval()
    nn.init.ones_(encoder.conv_out.get_parameter("1.bias"))
    points = torch.tensor([[4.9, -2.3, -1.0, 0.5, 0.0]])
    bev = encoder(batch_of(points, torch.tensor([1])))
    rows, columns = (bev[1] != 0).any(0).nonzero().unbind(1)
    # The convolutions spread a point over the neighbouring cells; it lies in cell (1, 7).
    assert bev[0].count_nonzero() == 0
    assert abs(rows.float().mean().item() - 1) <= 1
    assert abs(columns.float().mean().item() - 7) <= 1


@pytest.mark.parametrize("training", [True, False])
def test_a_frame_without_points_is_an_empty_map(training: bool) -> None:
    encoder = small_encoder(0).train(training)
    batch = scene(0)
    assert batch.points is not None
    bev = encoder(batch_of(batch.points, torch.ones(len(batch.points), dtype=torch.int64)))
    assert bev[0].count_nonzero() == 0
    assert bev[1].count_nonzero() > 0


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_without_points_in_range_is_an_empty_map(training: bool) -> None:
    encoder = small_encoder(0).train(training)
    bev = encoder(batch_of(torch.full((1, 5), 99.0), torch.tensor([0])))
    assert bev.shape == (2, encoder.out_channels, 6, 8)
    assert bev.count_nonzero() == 0


# ------------------------------------------------------------------------------------------ the published size


def test_the_full_nuscenes_size_gives_the_published_shapes() -> None:
    encoder = build(Config(), NUSCENES)
    assert encoder.shape == (41, 1440, 1440)
    assert encoder.out_channels == 256
    assert NUSCENES.shape == (180, 180)
    sizes: list[list[int]] = []
    for stage in (*encoder.stages, encoder.conv_out):
        stage.register_forward_hook(lambda *arguments: sizes.append(list(arguments[2].spatial_shape)))
    torch.manual_seed(0)
    place = (torch.rand(50, 3) - 0.5) * torch.tensor([100.0, 100.0, 6.0]) + torch.tensor([0.0, 0.0, -1.0])
    points = torch.cat([place, torch.rand(50, 2)], dim=1)
    assert encoder.eval()(batch_of(points, torch.zeros(50, dtype=torch.int64))).shape == (2, 256, 180, 180)
    assert sizes == [[41, 1440, 1440], [21, 720, 720], [11, 360, 360], [5, 180, 180], [2, 180, 180]]


def test_the_encoder_has_as_many_weights_as_openpcdet_but_for_biases_before_norms() -> None:
    # OpenPCDet's residual convolutions have a bias: two per block, two blocks in each of four stages.
    biases_before_norms = 2 * 2 * (16 + 32 + 64 + 128)
    count = sum(weight.numel() for weight in build(Config(), NUSCENES).parameters())
    assert count == 2_695_312 - biases_before_norms


def test_the_full_kitti_size_gives_the_published_shapes() -> None:
    encoder = build(SECOND, KITTI)
    assert encoder.shape == (41, 1600, 1408)
    assert (encoder.out_channels, KITTI.shape) == (256, (200, 176))


def test_second_has_as_many_weights_as_its_layers_say() -> None:
    convolutions = 27 * (4 * 16 + 16 * 16 + 16 * 32 + 2 * 32 * 32 + 32 * 64 + 5 * 64 * 64) + 3 * 64 * 128
    norms = 2 * (16 + 16 + 3 * 32 + 6 * 64 + 128)
    assert sum(weight.numel() for weight in build(SECOND, KITTI).parameters()) == convolutions + norms


def test_points_above_the_range_are_left_out() -> None:
    # The network has one slice more than the range; no point belongs there.
    encoder = small_encoder(0).eval()
    nn.init.ones_(encoder.conv_out.get_parameter("1.bias"))
    above = torch.tensor([[0.1, 0.1, 1.1, 0.5, 0.0]])
    assert encoder(batch_of(above, torch.tensor([0]))).count_nonzero() == 0
    assert encoder(batch_of(above - torch.tensor([0, 0, 0.2, 0, 0]), torch.tensor([0]))).count_nonzero() > 0


@pytest.mark.parametrize(
    ("factor", "channels", "out"),
    [(0.75, (16, 24, 48, 96), 96), (0.5, (8, 16, 32, 64), 64), (0.25, (8, 8, 16, 32), 32)],
)
def test_a_narrower_encoder_has_its_channels_in_multiples_of_8(
    factor: float, channels: tuple[int, ...], out: int
) -> None:
    config = Config().scaled(factor)
    assert (config.channels, config.out_channels, config.point_features) == (channels, out, 5)


def test_a_voxel_that_does_not_fit_the_grid_is_refused_with_the_edge_that_would() -> None:
    with pytest.raises(ConfigError, match=r"voxel_m.*0\.8 m.*Set grid\.cell_m: 0\.8"):
        build(Config(voxel_m=(0.1, 0.1, 0.2)), NUSCENES)


def test_too_few_height_slices_are_refused() -> None:
    with pytest.raises(ConfigError, match="too few in height"):
        build(Config(voxel_m=(0.075, 0.075, 4.0)), NUSCENES)


def test_points_are_required() -> None:
    batch = Batch((), (), torch.zeros(0, dtype=torch.bool), ())
    with pytest.raises(ValueError, match="points"):
        small_encoder(0)(batch)
