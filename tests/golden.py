"""The input generator of the golden tests: formulas, so that no data file is needed."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def T(*shape: int, k: float = 1.0, ph: float = 0.0) -> Tensor:  # noqa: N802  the name of the published numbers
    """Return ``sin(0.7 k n + ph)`` over the flat C-order index ``n``, computed in float64, as float32."""
    n = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(k * 0.7 * n + ph).float().reshape(shape)
