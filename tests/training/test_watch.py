"""Diverging losses are told from noisy ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bevkd.errors import TrainingError
from bevkd.progress import Silent
from bevkd.training.tracking import read_log
from bevkd.training.watch import PATIENCE, LossWatch, Reading
from tests.training.kit import TinyFrames, trainer


def diverges(losses: list[float], factor: float | None = 3.0) -> list[int]:
    """Return the steps (from 0) at which a watch speaks up."""
    watch = LossWatch(factor)
    return [step for step, loss in enumerate(losses) if watch.diverges(loss)]


def test_a_loss_that_stays_high_diverges_once_patience_is_over() -> None:
    assert diverges([1.0] * 50 + [3.5] * PATIENCE)[0] == 50 + PATIENCE - 1


def test_peaks_do_not_diverge() -> None:
    assert diverges(([1.0] * 5 + [100.0] * (PATIENCE - 1)) * 4) == []


def test_a_falling_loss_and_one_that_starts_high_do_not_diverge() -> None:
    assert diverges([1000.0] * 5 + [10.0 / (1 + step) for step in range(200)]) == []


def test_without_a_factor_nothing_diverges() -> None:
    assert diverges([1.0] * 50 + [1e9] * 100, None) == []


def test_the_mean_is_over_forward_passes_and_processes() -> None:
    reading = Reading(("a", "b"), [[[1.0, 0.0], [3.0, 0.0]], [[5.0, 1.0], [7.0, 1.0]]], 1.0)
    assert reading.means() == {"a": 4.0, "b": 0.5}


def test_terms_that_are_not_finite_are_found_where_they_are() -> None:
    reading = Reading(("a", "b"), [[[1.0, 0.0]], [[float("inf"), float("nan")]]], 1.0)
    assert reading.not_finite() == {(1, 0): ("a", "b")}


def grow(run: Any, steps: int, factor: float) -> None:
    """Let the loss of a run be ``factor`` times what it is, after some steps."""
    forward, calls = run.objective.forward, [0]

    def grown(batch: Any) -> dict[str, Tensor]:
        calls[0] += 1
        terms: dict[str, Tensor] = forward(batch)
        return {name: value * (factor if calls[0] > steps else 1) for name, value in terms.items()}

    run.objective.forward = grown


def test_a_diverging_run_stops_with_step_frames_and_last_checkpoint(tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=60, diverged=5, checkpoint_every=10)
    grow(run, 25, 1e3)
    with pytest.raises(TrainingError) as caught:
        run.train(TinyFrames(), Silent())
    for part in ("loss diverges", "step 45", "20 steps above 5 times", "frame8, frame9", "checkpoint is of step 40"):
        assert part in str(caught.value)


def test_a_gradient_that_is_not_finite_under_a_finite_loss_stops_the_run(tmp_path: Path) -> None:
    run = trainer(tmp_path)

    def spoil(gradient: Tensor) -> Tensor:
        return gradient * torch.inf

    next(run.objective.parameters()).register_hook(spoil)
    with pytest.raises(TrainingError, match=r"gradient is not finite at step 1.*frame0, frame1.*training.precision"):
        run.train(TinyFrames(), Silent())
    assert read_log(tmp_path) == []


def test_the_norm_of_the_gradient_before_clipping_is_logged(tmp_path: Path) -> None:
    trainer(tmp_path / "a", steps=1).train(TinyFrames(), Silent())
    trainer(tmp_path / "b", steps=1, clip=1e-3).train(TinyFrames(), Silent())
    first, second = (read_log(tmp_path / name)[0]["gradient_norm"] for name in ("a", "b"))
    assert first == second > 1e-3
