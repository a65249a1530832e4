"""Evaluation in the loop keeps the best weights, and leaves no trace in the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bevkd.progress import Silent
from bevkd.training.loop import Trainer
from bevkd.training.result import Validation
from bevkd.training.tracking import read_log
from tests.training.kit import Killed, KilledAt, TinyFrames, trainer, weights

SCORES = {2: 0.3, 4: 0.7, 6: 0.5, 8: 0.7}


class Validate:
    """Scores by the step; draws random numbers and changes modes as a careless evaluation would."""

    def __init__(self, run: Trainer) -> None:
        self.run, self.weights = run, dict[int, dict[str, Tensor]]()

    def __call__(self, step: int) -> Validation:
        torch.rand(7)
        model = self.run.objective.model.eval()
        self.weights[step] = {name: value.clone() for name, value in model.state_dict().items()}
        return Validation(SCORES[step], {"validation/NDS": SCORES[step]})


def validated(folder: Path, **changes: Any) -> tuple[Trainer, Validate]:
    run = trainer(folder, **{"evaluate_every": 2, "ema": 0.9, **changes})
    run.validate = Validate(run)
    return run, run.validate


def figures(run: Path, *names: str) -> list[tuple[Any, ...]]:
    return [tuple(line.get(name) for name in ("step", *names)) for line in read_log(run)]


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_losses_and_weights_are_those_of_a_run_without_it_to_the_bit(tmp_path: Path, ema: float | None) -> None:
    trainer(tmp_path / "plain", ema=ema).train(TinyFrames(), Silent())
    run, _ = validated(tmp_path / "validated", ema=ema)
    run.train(TinyFrames(), Silent())
    assert figures(tmp_path / "validated", "loss", "gradient_norm") == figures(
        tmp_path / "plain", "loss", "gradient_norm"
    )
    assert same(weights(tmp_path / "validated"), weights(tmp_path / "plain"))


def test_the_weights_that_the_run_would_leave_are_evaluated(tmp_path: Path) -> None:
    run, validate = validated(tmp_path)
    run.train(TinyFrames(), Silent())
    assert same(validate.weights[8], weights(tmp_path))
    assert not same(validate.weights[8], dict(run.objective.model.state_dict()))


def test_the_best_weights_are_kept_and_the_result_says_which(tmp_path: Path) -> None:
    run, validate = validated(tmp_path)
    result = run.train(TinyFrames(), Silent())
    assert (result.best_step, result.best_score) == (4, 0.7)
    assert same(load_file(tmp_path / "best.safetensors"), validate.weights[4])
    assert json.loads((tmp_path / "checkpoints/best/checkpoint.json").read_text())["step"] == 4
    assert same(load_file(tmp_path / "checkpoints/best/model.safetensors"), validate.weights[4])


def test_its_figures_stand_in_the_line_of_their_step(tmp_path: Path) -> None:
    run, _ = validated(tmp_path, log_every=5)
    run.train(TinyFrames(), Silent())
    assert figures(tmp_path, "validation/NDS") == [(2, 0.3), (4, 0.7), (5, None), (6, 0.5), (8, 0.7)]


def test_the_last_step_is_evaluated_however_many_there_are(tmp_path: Path) -> None:
    run, validate = validated(tmp_path, steps=8, evaluate_every=6)
    run.train(TinyFrames(), Silent())
    assert list(validate.weights) == [6, 8]


@pytest.mark.parametrize("killed_after", [5, 7])
def test_a_resumed_run_remembers_the_best(tmp_path: Path, killed_after: int) -> None:
    run, _ = validated(tmp_path, checkpoint_every=2)
    with pytest.raises(Killed):
        run.train(TinyFrames(), KilledAt(killed_after))
    resumed, validate = validated(tmp_path, checkpoint_every=2)
    resumed.resume()
    result = resumed.train(TinyFrames(), Silent())
    assert (result.best_step, result.best_score) == (4, 0.7)
    assert 4 not in validate.weights
    assert (tmp_path / "best.safetensors").exists()


def test_a_run_whose_evaluations_find_no_score_has_no_best(tmp_path: Path) -> None:
    run = trainer(tmp_path, evaluate_every=4)
    run.validate = lambda _: Validation(None, {})
    result = run.train(TinyFrames(), Silent())
    assert result.best_step is None
    assert not (tmp_path / "best.safetensors").exists()
