"""Terms of distillation under control: schedules, balance, warnings, measured gradients."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from bevkd.data.collate import collate
from bevkd.distill.base import DistillLossConfig, TermSchedule
from bevkd.progress import Silent
from bevkd.training.config import BalanceConfig, TrainingConfig
from bevkd.training.gradients import gradient_norms, shared_weights
from bevkd.training.terms import LIMIT, PATIENCE, RATE, Terms
from bevkd.training.tracking import read_log
from tests.training.kit import Killed, KilledAt, PullConfig, TinyFrames, trainer, weights

DETECTION = {"detection/heatmap": 3.0, "detection/box": 1.0}


def log(run: Path) -> list[dict[str, float]]:
    return [{name: value for name, value in line.items() if name != "seconds"} for line in read_log(run)]


def equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def terms(balance: BalanceConfig | None = None, **config: Any) -> Terms:
    return Terms({"pull": PullConfig(**config)}, balance, steps=100)


class Notes(Silent):
    """Progress that keeps its notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


# ---------------------------------------------------------------------------------------------- schedules


def test_a_schedule_rises_stays_and_falls_on_lines() -> None:
    schedule = TermSchedule(warmup=0.2, decay_from=0.6, decay_to=0.5)
    found = [schedule.factor(progress) for progress in (0, 0.1, 0.2, 0.4, 0.6, 0.8, 1)]
    assert found == pytest.approx([0, 0.5, 1, 1, 1, 0.75, 0.5])


def test_without_a_schedule_every_factor_is_exactly_1() -> None:
    names = [*DETECTION, "pull/feature", "pull/output_low"]
    assert [terms().factors(names, step) for step in (0, 99)] == [[1.0] * 4] * 2
    assert {TermSchedule().factor(step / 10) for step in range(11)} == {1.0}


def test_a_schedule_acts_on_all_terms_of_its_weight_and_on_no_other() -> None:
    scheduled = terms(schedule={"output": {"warmup": 0.5}})
    assert scheduled.factors(["pull/feature", "pull/output_low", "pull/output_high", "detection/box"], 25) == [
        *(1.0, 0.5, 0.5),
        1.0,
    ]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"heat": {"warmup": 0.1}}, "heat is no weight of 'pull'; its weights are: feature, output"),
        ({"feature": {"warmup": 0.5, "decay_from": 0.4}}, "lies within warmup"),
    ],
)
def test_a_schedule_that_cannot_be_meant_is_refused(schedule: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PullConfig(schedule=schedule)  # type: ignore[arg-type]


def test_the_log_shows_terms_as_they_join_the_loss(tmp_path: Path) -> None:
    trainer(tmp_path / "plain", PullConfig(), steps=4, learning_rate=1e-9).train(TinyFrames(), Silent())
    scheduled = PullConfig(schedule={"output": TermSchedule(warmup=0.5)})
    trainer(tmp_path / "scheduled", scheduled, steps=4, learning_rate=1e-9).train(TinyFrames(), Silent())
    for plain, line, factor in zip(log(tmp_path / "plain"), log(tmp_path / "scheduled"), (0, 0.5, 1, 1), strict=True):
        assert line["pull/output_low"] == pytest.approx(factor * plain["pull/output_low"], rel=1e-4)
        assert line["pull/feature"] == pytest.approx(plain["pull/feature"], rel=1e-4)
        assert line["loss"] == pytest.approx(sum(value for name, value in line.items() if "/" in name))


# ---------------------------------------------------------------------------------------------- balance


def balance_of(controlled: Terms, feature: float, steps: int) -> list[float]:
    """Return the balance of the feature term after each of ``steps`` equal ones."""
    values = {**DETECTION, "pull/feature": feature, "pull/output_low": 1.0, "pull/output_high": 1.0}
    return [controlled.take(values, step)["balance/pull/feature"] for step in range(steps)]


@pytest.mark.parametrize(("value", "joins"), [(400.0, 4.0), (0.01, 0.4), (2.0, 2.0)])
def test_the_first_values_bring_a_term_between_its_bounds_at_once(value: float, joins: float) -> None:
    assert balance_of(terms(BalanceConfig()), value, 1)[0] * value == pytest.approx(joins)


def test_afterwards_the_balance_moves_slowly() -> None:
    controlled = terms(BalanceConfig())
    before = balance_of(controlled, 400.0, 60)[-1]
    moved = balance_of(controlled, 4.0, 200)
    assert moved[0] == before  # the median is still the old one
    ratios = [after / earlier for earlier, after in zip([before, *moved], moved, strict=False)]
    assert max(ratios) == pytest.approx(math.exp(RATE))
    assert moved[-1] * 4.0 == pytest.approx(0.4)  # no further than to the nearer bound


def test_the_terms_of_one_weight_keep_their_proportion() -> None:
    controlled = terms(BalanceConfig())
    controlled.take({**DETECTION, "pull/output_low": 30.0, "pull/output_high": 10.0}, 0)
    assert controlled.factors(["pull/output_low", "pull/output_high"], 0) == pytest.approx([0.1, 0.1])


def test_with_no_lower_bound_no_term_is_raised() -> None:
    assert set(balance_of(terms(BalanceConfig(least=0)), 1e-3, 30)) == {1.0}


def test_a_term_that_vanishes_is_not_raised_without_limit() -> None:
    assert balance_of(terms(BalanceConfig()), 1e-9, 3) == [LIMIT] * 3


def test_steps_without_labels_or_objects_say_nothing() -> None:
    controlled = terms(BalanceConfig())
    before = balance_of(controlled, 400.0, 10)[-1]
    nothing = {"detection/heatmap": 0.0, "detection/box": 0.0, "pull/feature": 0.0}
    for step in range(60):
        assert controlled.take(nothing, step)["balance/pull/feature"] == before
    assert terms(BalanceConfig()).take({**nothing, "pull/feature": 5.0}, 0) == {}


def test_bounds_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(ValidationError, match="above most"):
        BalanceConfig(least=2)


def test_a_balanced_run_holds_a_term_that_would_outgrow_detection(tmp_path: Path) -> None:
    run = trainer(tmp_path, PullConfig(feature=100, output=1e-3), BalanceConfig(), steps=30)
    run.train(TinyFrames(), Silent())
    for line in log(tmp_path)[1:]:
        detection = line["detection/heatmap"] + line["detection/box"]
        assert line["pull/feature"] < 2 * detection
        assert line["pull/output_low"] + line["pull/output_high"] > 0.02 * detection
    assert set(run.terms.warnings) == set()


@pytest.mark.parametrize("killed_after", [3, 6])
def test_a_balanced_run_that_is_killed_and_resumed_equals_an_uninterrupted_one_bit_by_bit(
    tmp_path: Path, killed_after: int
) -> None:
    config = PullConfig(feature=30, schedule={"output": TermSchedule(warmup=0.6)})
    settings: dict[str, Any] = {"checkpoint_every": 2, "gradient_norms": 3}
    trainer(tmp_path / "whole", config, BalanceConfig(), **settings).train(TinyFrames(), Silent())
    with pytest.raises(Killed):
        trainer(tmp_path / "killed", config, BalanceConfig(), **settings).train(TinyFrames(), KilledAt(killed_after))
    resumed = trainer(tmp_path / "killed", config, BalanceConfig(), **settings)
    assert resumed.resume() == killed_after // 2 * 2
    resumed.train(TinyFrames(), Silent())
    assert log(tmp_path / "killed") == log(tmp_path / "whole")
    assert equal(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


def test_a_checkpoint_of_a_version_without_controlled_terms_can_be_resumed(tmp_path: Path) -> None:
    run = trainer(tmp_path, checkpoint_every=4)
    with pytest.raises(Killed):
        run.train(TinyFrames(), KilledAt(5))
    path = run.checkpoints.path(4)
    state = torch.load(path, weights_only=True)
    del state["terms"]
    torch.save(state, path)
    assert trainer(tmp_path).resume() == 4


# ---------------------------------------------------------------------------------------------- warnings


def warned(controlled: Terms, feature: float, steps: int = PATIENCE) -> list[str]:
    for step in range(steps):
        controlled.take({**DETECTION, "pull/feature": feature, "pull/output_low": 1.0}, step)
    return controlled.unsaid()


def test_a_term_above_twice_the_detection_loss_is_warned_of_once_with_what_to_change() -> None:
    controlled = terms(feature=80)
    (message,) = warned(controlled, 40.0)
    for part in (
        "step 20: pull/feature is 10 times the detection loss",
        "Lower distill.losses.0.feature from 80 to about 8",
        "set distill.losses.0.standardise: true",
        "set distill.balance: {}",
    ):
        assert part in message
    assert warned(controlled, 40.0, 100) == []
    assert len(controlled.warnings) == 1


def test_terms_up_to_twice_the_detection_loss_and_short_peaks_are_no_reason_to_warn() -> None:
    assert warned(terms(), 7.9, 100) == []
    assert warned(terms(), 40.0, PATIENCE - 1) == []


def test_a_standardised_loss_is_not_told_to_standardise() -> None:
    (message,) = warned(terms(standardise=True), 40.0)
    assert "standardise" not in message


def test_a_schedule_that_makes_a_term_small_enough_is_no_reason_to_warn() -> None:
    assert warned(terms(schedule={"feature": {"warmup": 1.0}}), 20.0, 30) == []


def test_a_gradient_above_that_of_detection_is_warned_of() -> None:
    controlled = terms(feature=50)
    norms = {"detection": 2.0, "pull/feature": 10.0, "pull/output": 1.0}
    assert controlled.take_gradients(norms, 9) == {
        "gradient/detection": 2.0,
        "gradient/pull/feature": 10.0,
        "gradient/pull/output": 1.0,
    }
    assert controlled.unsaid() == []
    for step in (19, 29, 39):
        controlled.take_gradients(norms, step)
    (message,) = controlled.unsaid()
    assert "step 30: the gradient of pull/feature is 5 times that of detection" in message
    assert "Lower distill.losses.0.feature from 50 to about 10" in message


@pytest.mark.parametrize(
    ("value", "remedy"), [(400.0, "most from 1 to about 0.2"), (0.01, "least from 0.1 to about 0.02")]
)
def test_of_a_balanced_term_the_bound_that_holds_it_is_what_to_change(value: float, remedy: str) -> None:
    controlled = terms(BalanceConfig(), standardise=True)
    balance_of(controlled, value, 1)
    for step in range(3):
        controlled.take_gradients({"detection": 2.0, "pull/feature": 10.0}, step)
    (message,) = controlled.unsaid()
    assert message.endswith(f"Lower distill.balance.{remedy}.")


def test_a_gradient_that_overflows_is_left_out() -> None:
    assert terms().take_gradients({"detection": math.inf, "pull/feature": 1.0}, 0) == {"gradient/pull/feature": 1.0}


def test_a_run_says_its_warnings_and_keeps_them(tmp_path: Path) -> None:
    notes, run = Notes(), trainer(tmp_path, PullConfig(feature=1000), steps=25, checkpoint_every=22)
    with pytest.raises(Killed):
        run.train(TinyFrames(), KilledAt(23))
    again = trainer(tmp_path, PullConfig(feature=1000), steps=25)
    assert again.resume() == 22
    result = again.train(TinyFrames(), notes)
    assert notes.notes == []  # said before
    (message,) = result.warnings
    assert "pull/feature" in message
    run = trainer(tmp_path / "whole", PullConfig(feature=1000), steps=25)
    assert run.train(TinyFrames(), notes).warnings == (message,)
    assert notes.notes == [f"warning: {message}"]


# ---------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("accumulation", [1, 2])
def test_measuring_gradients_changes_no_bit_of_a_run(tmp_path: Path, accumulation: int) -> None:
    settings: dict[str, Any] = {"accumulation": accumulation, "ema": 0.9}
    for name, every in (("without", 0), ("with", 2)):
        trainer(tmp_path / name, PullConfig(), gradient_norms=every, **settings).train(TinyFrames(), Silent())
    measured = [{n: v for n, v in line.items() if not n.startswith("gradient/")} for line in log(tmp_path / "with")]
    assert measured == log(tmp_path / "without")
    assert equal(weights(tmp_path / "with"), weights(tmp_path / "without"))


def test_measured_steps_are_logged_with_the_norm_of_each_part(tmp_path: Path) -> None:
    trainer(tmp_path, PullConfig(), gradient_norms=3, log_every=4).train(TinyFrames(), Silent())
    measured = {line["step"]: {name for name in line if name.startswith("gradient/")} for line in log(tmp_path)}
    parts = {"gradient/detection", "gradient/pull/feature", "gradient/pull/output"}
    assert measured == {3: parts, 4: set(), 6: parts, 8: set()}


def test_the_norms_are_those_of_each_parts_gradient_on_all_weights_but_the_heads(tmp_path: Path) -> None:
    run = trainer(tmp_path, PullConfig(feature=2))
    shared = shared_weights(run.objective.model)
    names = {name for name, weight in run.objective.model.named_parameters() if any(weight is each for each in shared)}
    assert names == {name for name, _ in run.objective.model.named_parameters() if not name.startswith("head.")}
    frames = TinyFrames()
    values = run.objective(collate([frames[0], frames[1]]))  # type: ignore[arg-type]
    parts = run.terms.parts(values)
    found = gradient_norms(parts, shared, scale=64.0)
    assert all(weight.grad is None for weight in run.objective.parameters())
    for part, norm in zip(parts, found, strict=True):
        run.objective.zero_grad()
        parts[part].backward(retain_graph=True)
        wanted = math.sqrt(sum(float(weight.grad.square().sum()) for weight in shared if weight.grad is not None))
        assert norm.item() == pytest.approx(wanted, rel=1e-4)


def test_gradients_of_compiled_parts_cannot_be_measured() -> None:
    with pytest.raises(ValidationError, match="set compile: false or gradient_norms: 0"):
        TrainingConfig(steps=1, compile=True, gradient_norms=10)


def test_a_loss_that_names_no_weights_is_one_part_per_term() -> None:
    class Nameless(DistillLossConfig):
        name: str = "nameless"

    controlled = Terms({"nameless": Nameless()}, BalanceConfig(), 10)
    assert controlled.part_of("nameless/map") == "nameless/map"
    assert controlled.take({**DETECTION, "nameless/map": 40.0}, 0) == {"balance/nameless/map": 0.1}
    assert json.dumps(controlled.state())
