"""Gradient checkpointing changes memory and time, and nothing else; so does compilation, but for rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bevkd.errors import ConfigError
from bevkd.models.backbone import BackboneConfig, build_backbone
from bevkd.training.recompute import recompute_backbone
from tests.training.kit import TinyDetector

OPTIONS = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2], "layer_type": "basic"}


class Camera(nn.Module):
    """An image backbone where camera encoders have it, and dropout after it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone: Any = build_backbone(BackboneConfig(options={**OPTIONS, "out_features": ["stage1", "stage2"]}))[
            0
        ]

    def forward(self, images: Tensor) -> Tensor:
        maps: list[Tensor] = list(self.backbone(images).feature_maps)
        return torch.stack([(each.float() ** 2).mean() for each in maps]).sum()


def trained(recompute: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], list[int]]:
    """Return gradients and state of a model after two passes, and the bytes that each pass kept for gradients."""
    model, kept = Camera(), list[int]()
    if recompute:
        recompute_backbone(model)
    for images in torch.rand(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(1)):
        held: dict[int, int] = {}

        def hold(tensor: Tensor, held: dict[int, int] = held) -> Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            loss = model(images)
        kept.append(sum(held.values()))
        loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return gradients, dict(model.state_dict()), kept


def test_gradients_and_statistics_are_the_same_to_the_bit_and_less_is_kept_for_gradients() -> None:
    (gradients, state, kept), (expected, expected_state, plain) = trained(recompute=True), trained(recompute=False)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    assert gradients.keys() == expected.keys()
    assert state.keys() == expected_state.keys()
    assert all(torch.equal(state[name], expected_state[name]) for name in expected_state)
    assert max(kept) < 0.7 * min(plain)


def test_a_model_without_an_image_backbone_is_refused() -> None:
    with pytest.raises(ConfigError, match="gradient_checkpointing"):
        recompute_backbone(TinyDetector())
