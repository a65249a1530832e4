"""BEVDepth's BEV encoder."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from bevkd.models.bev_resnet import BEVResNet, BEVResNetConfig

SMALL = BEVResNetConfig(stem_channels=4, layers=(1, 1), strides=(1, 2), channels=(6, 8), up_channels=(2, 3, 4))


def test_the_published_sizes_give_256_channels_at_the_input_s_resolution() -> None:
    model = BEVResNet(BEVResNetConfig(), in_channels=160)
    assert model.out_channels == 256
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 160, 128, 128)).shape == (1, 256, 128, 128)
    # Stem, two blocks per stage, a projection where width and resolution change.
    assert sum(isinstance(each, torch.nn.Conv2d) for each in model.modules()) == 1 + 3 * 2 * 2 + 2


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (15, 17), (9, 10)])
def test_any_size_comes_back_at_its_size(rows: int, columns: int) -> None:
    assert BEVResNet(SMALL, 3)(torch.randn(2, 3, rows, columns)).shape == (2, 9, rows, columns)


def test_every_weight_learns() -> None:
    model = BEVResNet(SMALL, 3)
    model(torch.randn(2, 3, 16, 16)).square().sum().backward()
    assert [name for name, each in model.named_parameters() if each.grad is None] == []


def test_widths_are_multiples_of_eight() -> None:
    half = BEVResNetConfig().scaled(0.5)
    assert (half.stem_channels, half.channels, half.up_channels) == (80, (80, 160, 320), (32, 32, 32, 32))


def test_up_channels_need_an_entry_for_the_input() -> None:
    with pytest.raises(ValidationError, match="one more"):
        BEVResNetConfig(up_channels=(64, 64, 64))
