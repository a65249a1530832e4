"""Exponential moving average of a model's weights."""

from __future__ import annotations

import torch
from torch import nn


class MovingAverage:
    """Exponential moving average of a model's parameters; buffers are copied as they are."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self._parameters = {name for name, _ in model.named_parameters()}

    def update(self, model: nn.Module, step: int) -> None:
        """Move towards ``model``; early steps count more, so that the random start is forgotten."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in model.state_dict().items():
                if name in self._parameters:
                    self.weights[name].lerp_(value.detach(), weight)
                else:
                    self.weights[name].copy_(value)
