"""The sparse encoder against dense convolutions: spconv is a cross-correlation like torch (methods.md 6.5)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bevkd.data.collate import Batch
from bevkd.errors import ConfigError
from bevkd.geometry.affine import BEVAffine
from bevkd.grid import BEVGrid
from bevkd.models.encoders.voxel import Config, VoxelEncoder, build
from bevkd.models.sparse import ResidualBlock, down_conv, sparse_tensor, sub_m_conv, to_dense
from bevkd.models.voxelize import voxelize
from bevkd.types import Boxes

NUSCENES = BEVGrid(x_m=(-54, 54), y_m=(-54, 54), z_m=(-5, 3), cell_m=0.6)


# ------------------------------------------------------------------------------------------ the dense oracle


class Dense:
    """A dense map and which of its cells are occupied; every operation of the encoder, done densely."""

    def __init__(self, values: Tensor, active: Tensor) -> None:
        self.values, self.active = values * active[:, None], active

    @classmethod
    def scatter(cls, features: Tensor, indices: Tensor, shape: tuple[int, int, int], batch: int) -> Dense:
        frame, z, y, x = indices.unbind(1)
        values = torch.zeros(batch, *shape, features.shape[1], dtype=features.dtype)
        values = values.index_put((frame, z, y, x), features)
        active = torch.zeros(batch, *shape, dtype=torch.bool)
        active[frame, z, y, x] = True
        return cls(values.permute(0, 4, 1, 2, 3), active)

    def sub_m(self, conv: nn.Module) -> Dense:
        """Return a submanifold convolution: dense, then masked to the cells that were occupied."""
        return Dense(functional.conv3d(self.values, dense_weight(conv), padding=1), self.active)

    def down(self, conv: nn.Module) -> Dense:
        """Return a strided convolution: dense; occupied is what any occupied cell reaches."""
        kernel, stride, padding = (tuple(getattr(conv, name)) for name in ("kernel_size", "stride", "padding"))
        reach = functional.conv3d(self.active[:, None].float(), torch.ones(1, 1, *kernel), None, stride, padding)
        values = functional.conv3d(self.values, dense_weight(conv), None, stride, padding)
        return Dense(values, reach[:, 0] > 0)

    def norm(self, norm: nn.Module) -> Dense:
        """Return a batch norm over occupied cells only."""
        channels_last = self.values.permute(0, 2, 3, 4, 1)
        normed = torch.zeros_like(channels_last).index_put(
            self.active.nonzero(as_tuple=True), norm(channels_last[self.active])
        )
        return Dense(normed.permute(0, 4, 1, 2, 3), self.active)

    def relu(self) -> Dense:
        return Dense(self.values.relu(), self.active)

    def residual(self, block: ResidualBlock) -> Dense:
        out = self.sub_m(block.conv1).norm(block.bn1).relu().sub_m(block.conv2).norm(block.bn2)
        return Dense(out.values + self.values, self.active).relu()


def dense_weight(conv: nn.Module) -> Tensor:
    """Return spconv 2's (out, z, y, x, in) weight in the order of ``conv3d``; differentiable."""
    return conv.get_parameter("weight").permute(0, 4, 1, 2, 3)


def dense_forward(encoder: VoxelEncoder, batch: Batch) -> Tensor:
    """Return ``bev_low`` by dense convolutions with the encoder's own weights and norms."""
    assert batch.points is not None
    assert batch.point_frame is not None
    features, indices = voxelize(
        batch.points, batch.point_frame, encoder.low_m, encoder.config.voxel_m, encoder.shape, encoder.config.max_points
    )
    dense = Dense.scatter(features, indices, encoder.shape, len(batch))
    conv, norm, _ = encoder.conv_input.children()
    dense = dense.sub_m(conv).norm(norm).relu()
    for index, stage in enumerate(encoder.stages):
        layers = list(stage.children())
        if index > 0:
            conv, norm, _ = layers.pop(0).children()
            dense = dense.down(conv).norm(norm).relu()
        for block in layers:
            assert isinstance(block, ResidualBlock)
            dense = dense.residual(block)
    conv, norm, _ = encoder.conv_out.children()
    return dense.down(conv).norm(norm).relu().values.flatten(1, 2)


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


def small_encoder(seed: int) -> VoxelEncoder:
    torch.manual_seed(seed)
    grid = BEVGrid(x_m=(-6.4, 6.4), y_m=(-4.8, 4.8), z_m=(-3, 1), cell_m=1.6)
    return build(Config(voxel_m=(0.4, 0.4, 0.2), channels=(4, 6, 8), blocks=2, out_channels=8), grid)


# ------------------------------------------------------------------------------------------ layers


@pytest.mark.parametrize("seed", range(3))
def test_a_submanifold_convolution_is_a_dense_one_on_the_occupied_voxels(seed: int) -> None:
    features, indices, shape = voxels(seed)
    torch.manual_seed(seed)
    conv = sub_m_conv(4, 6, "key")
    sparse = to_dense(conv(sparse_tensor(features, indices, shape, 2)))
    dense = Dense.scatter(features, indices, shape, 2).sub_m(conv)
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
    dense = Dense.scatter(features, indices, shape, 2).down(conv).norm(norm).relu()
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


@pytest.mark.parametrize("seed", range(3))
def test_the_encoder_and_its_gradients_equal_the_dense_emulation(seed: int) -> None:
    encoder, batch = small_encoder(seed), scene(seed)
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
