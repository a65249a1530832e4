"""What the processes of the tests do: small runs of the tiny detector."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bevkd.errors import BevkdError
from bevkd.progress import Silent
from bevkd.training.config import BalanceConfig
from tests.training.kit import PullConfig, TinyFrames, trainer


def rank() -> int:
    """Return the number of this process."""
    return int(os.environ.get("RANK", "0"))


def train(run: str, settings: dict[str, Any], changes: dict[str, Any] | None = None) -> None:
    """Train in ``run``, resuming if there is a checkpoint, and keep what this process saw.

    Args:
        settings: of the training.
        changes: ``dropout`` of the model; ``pulled`` has a loss of distillation, balanced; ``labelled`` is the
            number of frames with labels; ``nan`` is the process whose
            loss is not a number at step 3.
    """
    changes = changes or {}
    distilled = {"pulled": PullConfig(feature=30), "balance": BalanceConfig()} if "pulled" in changes else {}
    made = trainer(Path(run), **distilled, **settings)  # type: ignore[arg-type]
    for module in made.objective.modules():
        if isinstance(module, nn.Dropout):
            module.p = changes.get("dropout", module.p)
    if changes.get("nan") == rank():
        _break(made)
    made.resume()
    frames = TinyFrames(changes.get("labelled", 10))
    draws: list[float] = []
    made.objective.model.encoder[3].register_forward_hook(  # type: ignore[index, union-attr]
        lambda *arguments: draws.append(float((arguments[2] == 0).float().mean()))
    )
    try:
        made.train(frames, Silent())  # type: ignore[arg-type]
    except BevkdError as error:
        (Path(run) / f"error{rank()}.txt").write_text(f"{type(error).__name__}: {error}")
        raise SystemExit(3) from error
    (Path(run) / f"seen{rank()}.json").write_text(json.dumps({"positions": frames.seen, "dropped": draws}))


def _break(made: Any) -> None:
    forward, calls = made.objective.forward, [0]

    def broken(batch: Any) -> dict[str, Tensor]:
        calls[0] += 1
        terms: dict[str, Tensor] = forward(batch)
        return terms | {"detection/box": terms["detection/box"] * (torch.nan if calls[0] == 3 else 1)}

    made.objective.forward = broken
