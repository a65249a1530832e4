"""What the suites share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from bevkd.data.collate import Batch, collate
from bevkd.data.join import FrameDataset, View
from bevkd.data.source import FrameSource
from bevkd.types import Boxes

TOLERANCE = 1e-4
"""Relative error that another batch or another order of summation may cause."""


def batch_of(source: FrameSource, view: View, tokens: Sequence[str] | None = None) -> Batch:
    """Return frames of a source, all of them by default, as one batch that is not augmented."""
    dataset = FrameDataset(source, source.tokens if tokens is None else tokens, view)
    return collate([dataset[index] for index in range(len(dataset))])


def close(found: Tensor, wanted: Tensor, what: str) -> None:
    """Check that two tensors are the same but for rounding, relative to the largest value."""
    found, wanted = found.detach().float(), wanted.detach().float()
    scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
    torch.testing.assert_close(
        found / scale, wanted / scale, rtol=0, atol=TOLERANCE, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


def same_boxes(found: Boxes, wanted: Boxes) -> None:
    """Check that two sets of boxes hold the same boxes, in any order."""
    assert len(found) == len(wanted), f"{len(found)} boxes instead of {len(wanted)}"
    rows, others = (sorted(boxes.pack().nan_to_num(1e6).tolist()) for boxes in (found, wanted))
    assert rows == others, "other boxes"


def check_terms(terms: Mapping[str, Tensor], least: float | None = None) -> Tensor:
    """Check that each loss term is one finite number and return their sum."""
    assert terms, "no term at all"
    for name, value in terms.items():
        assert value.dim() == 0, f"{name} is no scalar: it has the shape {tuple(value.shape)}"
        assert bool(value.isfinite()), f"{name} is {value.item()}"
        assert least is None or value.item() >= least, f"{name} is {value.item()}"
    return torch.stack([value.float() for value in terms.values()]).sum()


def check_gradients(module: nn.Module, only: Sequence[str] = ()) -> None:
    """Check that a backward pass has reached every parameter, those in ``only`` if given."""
    for name, parameter in module.named_parameters():
        if only and name not in only:
            continue
        assert parameter.grad is not None, f"no gradient reaches {name}"
        assert bool(parameter.grad.isfinite().all()), f"the gradient of {name} is not finite"
