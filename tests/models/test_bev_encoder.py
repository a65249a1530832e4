"""The BEV encoder keeps the grid and has the published size."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from bevkd.models.bev_encoder import BEVEncoder, BEVEncoderConfig

SMALL = BEVEncoderConfig(layers=(1, 0), strides=(1, 2), channels=(4, 6), up_channels=(3, 5))


def test_the_published_size_has_as_many_weights_as_openpcdet() -> None:
    encoder = BEVEncoder(BEVEncoderConfig(), in_channels=256)
    assert sum(weight.numel() for weight in encoder.parameters()) == 4_576_768
    assert encoder.out_channels == 512


@pytest.mark.parametrize("strides", [(1, 2), (2, 2), (1, 4)])
def test_bev_high_has_the_resolution_of_bev_low(strides: tuple[int, int]) -> None:
    encoder = BEVEncoder(SMALL.model_copy(update={"strides": strides}), in_channels=2)
    assert encoder(torch.zeros(3, 2, 8, 12)).shape == (3, 8, 8, 12)


def test_every_level_sees_the_one_before_and_reaches_the_output() -> None:
    torch.manual_seed(0)
    encoder = BEVEncoder(SMALL, in_channels=2)
    encoder(torch.randn(2, 2, 8, 8)).square().sum().backward()
    assert [name for name, weight in encoder.named_parameters() if weight.grad is None or not weight.grad.any()] == []


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    encoder, bev_low = BEVEncoder(SMALL.model_copy(update={"dropout": 0.5}), in_channels=2), torch.randn(1, 2, 8, 8)
    assert not torch.equal(encoder(bev_low), encoder(bev_low))
    encoder.eval()
    assert torch.equal(encoder(bev_low), encoder(bev_low))


def test_levels_of_different_counts_are_refused() -> None:
    with pytest.raises(ValidationError, match="one entry per level"):
        BEVEncoderConfig(layers=(5,))
