"""itKD against the values of its released classes (golden.md, 1.2 and 1.3), and closed forms."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from bevkd.data.collate import Batch
from bevkd.distill import itkd
from bevkd.distill.base import DistillContext, TeacherBatch
from bevkd.distill.itkd import ITKD, ChannelAutoencoder, Config, HeadAttention, channel_attention, interchange_losses
from bevkd.geometry.affine import BEVAffine
from bevkd.grid import BEVGrid
from bevkd.models.detector import Detector, DetectorOutput
from bevkd.models.heads.center import HeadOutput
from bevkd.types import Boxes, Signals
from tests.golden import T

EVERYWHERE = torch.ones(2, 1, 10, 10, dtype=torch.bool)
CELLS = torch.tensor([[0, 0, 5], [0, 3, 7], [1, 9, 9]])
"""Frame, row and column of the three objects: the flat indices 5 and 37, and 99."""


def fill(parameters: Sequence[nn.Parameter], first: int, scale: float = 0.1) -> None:
    with torch.no_grad():
        for index, parameter in enumerate(parameters, first):
            parameter.copy_(scale * T(*parameter.shape, k=0.9, ph=0.1 * index))


def networks(config: Config, student: int = 8, teacher: int = 24) -> ChannelAutoencoder:
    torch.manual_seed(0)
    found = ChannelAutoencoder(student, teacher, config)
    fill([*found.buffer.parameters(), *found.encoder.parameters(), *found.decoder.parameters()], first=2)
    return found


def maps() -> tuple[Tensor, Tensor]:
    return T(2, 8, 10, 10, k=1.2, ph=0.3), T(2, 24, 10, 10)


def test_interchange_and_compression_have_the_released_values() -> None:
    config = Config(code=4, slots=3)
    losses = interchange_losses(networks(config), *maps(), EVERYWHERE, CELLS, config)
    assert losses["feature_to_teacher"].item() == pytest.approx(0.63935870 + 0.25987160, rel=1e-4)
    assert losses["feature_to_student"].item() == pytest.approx(0.65791440 + 0.28203475, rel=1e-4)
    assert losses["feature_compressed"].item() == pytest.approx(0.00106378, rel=1e-3)
    assert torch.stack([*losses.values()]).sum().item() == pytest.approx(1.84024334, rel=1e-4)


def attention() -> HeadAttention:
    found = HeadAttention((3, 2, 1, 3, 2), slots=3)
    fill([found.fuse.weight, found.fuse.bias], first=0)  # type: ignore[list-item]
    return found


def objects(maps: Tensor) -> Tensor:
    frame, row, column = CELLS.unbind(1)
    return torch.zeros(2, 3, 11).index_put((frame, torch.tensor([0, 1, 0])), maps[frame, :, row, column])


def test_head_attention_has_the_released_value() -> None:
    student, teacher = T(2, 11, 10, 10), T(2, 11, 10, 10, k=1.3, ph=0.4)
    assert attention().loss(objects(student), objects(teacher), 3).item() == pytest.approx(2.84044433, rel=1e-4)


def test_attention_does_not_depend_on_empty_slots() -> None:
    values = objects(T(2, 11, 10, 10))
    more = torch.cat([values, torch.zeros(2, 4, 11)], dim=1)
    torch.testing.assert_close(channel_attention(more, 3)[:, :3], channel_attention(values, 3))


def test_equal_heads_have_no_attention_loss() -> None:
    values = objects(T(2, 11, 10, 10))
    assert attention().loss(values, values, 3).item() == 0


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_cells_without_teacher_add_nothing(variant: str) -> None:
    config = Config(code=4, slots=3, variant=variant)  # type: ignore[arg-type]
    autoencoder = networks(config)
    student, teacher = maps()
    covered = EVERYWHERE.clone()
    covered[:, :, 4:6] = False
    cells = CELLS[:2]
    spoilt = torch.where(covered, teacher, 100.0)
    for name, value in interchange_losses(autoencoder, student, teacher, covered, cells, config).items():
        assert interchange_losses(autoencoder, student, spoilt, covered, cells, config)[name] == value, name


def test_the_paper_compares_codes_at_objects_and_decodes_to_the_teacher() -> None:
    config = Config(code=4, slots=3, variant="paper")
    autoencoder = networks(config)
    student, teacher = maps()
    lifted = autoencoder.buffer(student)
    own, theirs = autoencoder.encoder(lifted), autoencoder.encoder(teacher)
    frame, row, column = CELLS.unbind(1)
    losses = interchange_losses(autoencoder, student, teacher, EVERYWHERE, CELLS, config)
    torch.testing.assert_close(losses["feature_compressed"], (own - theirs)[frame, :, row, column].abs().mean())
    error = autoencoder.decoder(theirs) - lifted
    expected = error.abs().mean() + error[frame, :, row, column].square().sum() / (2 * 3 * 24)
    torch.testing.assert_close(losses["feature_to_student"], expected)


def test_frames_without_objects_keep_the_dense_terms() -> None:
    config = Config(code=4, slots=3)
    losses = interchange_losses(networks(config), *maps(), EVERYWHERE, CELLS[:0], config)
    assert losses["feature_to_teacher"].item() == pytest.approx(0.63935870, rel=1e-4)


def test_the_published_autoencoder_adds_a_tenth_of_a_million_parameters() -> None:
    published = ChannelAutoencoder(96, 384, Config())
    count = sum(parameter.numel() for parameter in published.parameters())
    assert 0.1e6 < count < 0.15e6


# ----------------------------------------------------------------------------------------- the attention of a batch

UNMOVED = BEVAffine.identity()
GRID = BEVGrid(x_m=(-8, 8), y_m=(-8, 8), cell_m=1.0)


def attention_of(count: int, affine: BEVAffine = UNMOVED, **config: Any) -> Tensor:
    """Return the attention loss of a frame with ``count`` objects in a row, the first at x = -7.5 m."""
    torch.manual_seed(0)
    student = SimpleNamespace(head=SimpleNamespace(labels_of_task=((0,), (1, 2))), config=SimpleNamespace(grid=GRID))
    loss = ITKD(Config(feature=0, **config), DistillContext(cast("Detector", student), {"box_code": (2, 10, 16, 16)}))
    values = torch.zeros(count, 9)
    values[:, 0], values[:, 3:6] = torch.arange(count) - 7.5, 1.0
    boxes = Boxes(values, torch.ones(count, dtype=torch.int64), torch.ones(count))
    own, theirs = ((torch.randn(1, 3, 16, 16), torch.randn(1, 2, 10, 16, 16)) for _ in range(2))
    nothing = torch.zeros(1, 1, 16, 16)
    batch = Batch(("a",), (boxes,), torch.ones(1, dtype=torch.bool), (affine,))
    teacher = TeacherBatch(Signals(heatmap=theirs[0], box_code=theirs[1]), (affine,), GRID)
    return loss(DetectorOutput(nothing, nothing, HeadOutput(*own)), teacher, batch)["attention"]


def test_objects_beyond_the_slots_are_left_out() -> None:
    torch.testing.assert_close(attention_of(9, slots=4), attention_of(4, slots=4))
    assert attention_of(9, slots=9) != attention_of(4, slots=9)


def test_objects_outside_the_teachers_map_are_left_out() -> None:
    """Moved by six metres, the six objects nearest to the edge have come from outside of the map."""
    assert attention_of(6, BEVAffine(translation_m=(6.0, 0.0, 0.0))) == 0
    assert attention_of(7, BEVAffine(translation_m=(6.0, 0.0, 0.0))) > 0


def test_signals_follow_the_weights() -> None:
    assert itkd.Config(attention=0).signals() == ("bev_high",)
    assert itkd.Config(feature=0).signals() == ("heatmap", "box_code")
