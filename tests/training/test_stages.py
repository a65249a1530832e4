"""Parts of a model that are frozen, or learn at a rate of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bevkd.errors import CheckpointError, ConfigError
from bevkd.progress import Silent
from bevkd.training.objective import Objective
from bevkd.training.stages import freeze, named_weights
from tests.training.kit import TinyDetector, TinyFrames, trainer


def objective() -> Objective:
    return Objective(TinyDetector(), [], {})  # type: ignore[arg-type]


def state(run: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in run.objective.model.state_dict().items()}


def moved(run: Any, before: dict[str, Tensor]) -> set[str]:
    """Return the names of what has changed since."""
    return {name for name, value in state(run).items() if not torch.equal(value, before[name])}


def test_a_frozen_part_keeps_its_weights_and_its_statistics_to_the_bit(tmp_path: Path) -> None:
    run = trainer(tmp_path, frozen=("encoder",))
    before = state(run)
    run.train(TinyFrames(), Silent())
    changed = moved(run, before)
    assert not any(name.startswith("encoder.") for name in changed)
    assert "head.shared.0.weight" in changed
    assert "head.shared.1.running_mean" in changed


def test_a_frozen_part_still_drops_out(tmp_path: Path) -> None:
    run = trainer(tmp_path, frozen=("encoder",))
    run.train(TinyFrames(), Silent())
    encoder: Any = run.objective.model.encoder
    assert not encoder[1].training
    assert encoder[3].training


def test_a_frozen_part_stays_frozen_after_an_evaluation_that_set_the_mode_of_all(tmp_path: Path) -> None:
    run = trainer(tmp_path, frozen=("encoder",), evaluate_every=2)

    def validate(step: int) -> None:
        del step
        run.objective.model.eval()
        run.objective.model.train()

    run.validate = validate
    before = state(run)
    run.train(TinyFrames(), Silent())
    assert not any(name.startswith("encoder.") for name in moved(run, before))


def test_a_prefix_ends_where_a_name_ends() -> None:
    weights = named_weights(objective())
    with pytest.raises(ConfigError):
        freeze(objective(), ["enc"])
    assert "encoder.0.weight" in weights


def test_a_prefix_of_no_part_is_refused_with_those_that_are_near() -> None:
    with pytest.raises(ConfigError, match=r"training.frozen(.|\n)*'encoder.00' is no part .* encoder.0(.|\n)*'heads'"):
        freeze(objective(), ["encoder.00", "heads", "head.shared"])


def test_freezing_everything_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing is left to train"):
        freeze(objective(), ["encoder", "head"])


def test_weights_of_losses_have_names_of_their_own() -> None:
    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

    made = Objective(TinyDetector(), [("kd", "teacher", Adapter())], {})  # type: ignore[arg-type, list-item]
    assert {"adapters.0.conv.weight", "encoder.0.weight"} < set(named_weights(made))


def test_the_longest_prefix_gives_the_rate(tmp_path: Path) -> None:
    run = trainer(tmp_path, learning_rates={"head": 0.1, "head.shared": 2.0}, schedule="constant", warmup=0)
    run.train(TinyFrames(), Silent())
    names = {id(weight): name for name, weight in run.objective.model.named_parameters()}
    rates = {names[id(weight)]: group["lr"] for group in run.optimizer.param_groups for weight in group["params"]}
    assert rates["encoder.0.weight"] == pytest.approx(0.01)
    assert rates["head.shared.0.weight"] == pytest.approx(0.02)
    assert rates["head.tasks.0.reg.0.weight"] == pytest.approx(0.001)
    assert len(rates) == len(names)


def test_a_rate_for_no_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training.learning_rates(.|\n)*'encodr' .* encoder"):
        trainer(tmp_path, learning_rates={"encodr": 0.1})


def test_a_checkpoint_with_other_groups_of_rates_is_refused_with_the_way_out(tmp_path: Path) -> None:
    trainer(tmp_path, steps=2).train(TinyFrames(), Silent())
    with pytest.raises(CheckpointError, match=r"step_00000002.*does not fit this run.*another --out"):
        trainer(tmp_path, steps=4, learning_rates={"head": 0.1}).resume()
