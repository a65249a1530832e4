"""Several processes train as one does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bevkd.training.tracking import read_log
from tests.processes import Processes, processes
from tests.training.kit import weights

TRAIN = "tests.training.work:train"
NO_CHANCE = {"dropout": 0.0}
PULLED = {"pulled": True}


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with processes(tmp_path_factory.mktemp("processes"), ["tests.training.work"]) as started:
        yield started


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_log(run)]


def seen(run: Path, count: int) -> list[dict[str, Any]]:
    return [json.loads((run / f"seen{process}.json").read_text()) for process in range(count)]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_one_two_and_four_processes_see_the_same_frames_in_the_same_order(
    several: Processes, tmp_path: Path, accumulation: int
) -> None:
    steps, frames = 3, 4
    for count in (1, 2, 4):
        run, batch = tmp_path / str(count), frames // count
        several.run(count, TRAIN, run, {"steps": steps, "batch_size": batch, "accumulation": accumulation})
        own = [each["positions"] for each in seen(run, count)]
        dealt = [
            position
            for passed in range(steps * accumulation)
            for process in range(count)
            for position in own[process][passed * batch : (passed + 1) * batch]
        ]
        assert dealt == list(range(steps * accumulation * frames))


@pytest.mark.parametrize(("count", "synced"), [(2, True), (4, True)])
def test_processes_with_a_part_of_the_batch_each_follow_one_with_all_of_it(
    several: Processes, tmp_path: Path, count: int, synced: bool
) -> None:
    settings = {"steps": 10, "sync_batch_norm": synced}
    several.run(1, TRAIN, tmp_path / "one", {**settings, "batch_size": 8}, NO_CHANCE)
    several.run(count, TRAIN, tmp_path / "all", {**settings, "batch_size": 8 // count}, NO_CHANCE)
    assert losses(tmp_path / "all") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_without_synchronised_batch_norms_processes_stay_near_one(several: Processes, tmp_path: Path) -> None:
    several.run(1, TRAIN, tmp_path / "one", {"steps": 10, "batch_size": 8}, NO_CHANCE)
    several.run(2, TRAIN, tmp_path / "two", {"steps": 10, "batch_size": 4}, NO_CHANCE)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert two == pytest.approx(one, rel=0.1)
    assert two != pytest.approx(one, rel=1e-4)


def test_each_process_drops_out_other_units(several: Processes, tmp_path: Path) -> None:
    several.run(2, TRAIN, tmp_path, {"steps": 4})
    first, second = (each["dropped"] for each in seen(tmp_path, 2))
    assert len(first) == len(second) == 4
    assert first != second


def test_a_resumed_run_restores_the_random_state_of_every_process(several: Processes, tmp_path: Path) -> None:
    settings = {
        "steps": 6,
        "batch_size": 2,
        "ema": 0.9,
        "accumulation": 2,
        "checkpoint_every": 3,
        "schedule": "constant",
    }
    several.run(2, TRAIN, tmp_path / "whole", settings)
    several.run(2, TRAIN, tmp_path / "parts", {**settings, "steps": 3, "warmup": 0.6})
    several.run(2, TRAIN, tmp_path / "parts", settings)
    assert [each["dropped"] for each in seen(tmp_path / "parts", 2)] == [
        each["dropped"][6:] for each in seen(tmp_path / "whole", 2)
    ]
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    left, expected = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert all(torch.equal(left[name], expected[name]) for name in expected)


def test_a_checkpoint_of_another_number_of_processes_is_refused(several: Processes, tmp_path: Path) -> None:
    several.run(1, TRAIN, tmp_path, {"steps": 2})
    several.start(2, TRAIN, tmp_path, {"steps": 4})
    assert several.wait() == [1, 1]
    assert "processes: 1 there, 2 here" in several.output.read_text()


@pytest.mark.parametrize("broken", [0, 1])
def test_a_loss_that_is_not_finite_stops_every_process_with_the_same_error(
    several: Processes, tmp_path: Path, broken: int
) -> None:
    several.start(2, TRAIN, tmp_path, {"steps": 8, "checkpoint_every": 2}, {"nan": broken})
    assert several.wait() == [3, 3]
    first, second = ((tmp_path / f"error{process}.txt").read_text() for process in (0, 1))
    assert first == second
    # Of the third step's eighth to eleventh frame, those of the process where it happened.
    frames = ("frame8, frame9", "frame0, frame1")[broken]
    for part in ("TrainingError", "step 3", "terms: detection/box", f"frames: {frames}", "checkpoint is of step 2"):
        assert part in first
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_measuring_gradients_changes_no_bit_of_what_processes_do(
    several: Processes, tmp_path: Path, accumulation: int
) -> None:
    settings = {"steps": 4, "batch_size": 2, "accumulation": accumulation, "sync_batch_norm": True}
    for name, every in (("without", 0), ("with", 2)):
        several.run(2, TRAIN, tmp_path / name, {**settings, "gradient_norms": every}, PULLED)
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    left, expected = weights(tmp_path / "with"), weights(tmp_path / "without")
    assert all(torch.equal(left[name], expected[name]) for name in expected)


def test_processes_measure_the_gradients_of_their_mean_and_balance_alike(several: Processes, tmp_path: Path) -> None:
    settings = {"steps": 4, "sync_batch_norm": True, "gradient_norms": 2, "learning_rate": 1e-6}
    for count in (1, 2):
        changed = {**settings, "batch_size": 8 // count}
        several.run(count, TRAIN, tmp_path / str(count), changed, {**PULLED, **NO_CHANCE})
    one, two = (read_log(tmp_path / str(count)) for count in (1, 2))
    for alone, together in zip(one, two, strict=True):
        assert together["balance/pull/feature"] == pytest.approx(alone["balance/pull/feature"], rel=1e-3)
        assert alone.keys() == together.keys()
    # A process has a half of the frames: its own gradient is another, but of the same size.
    assert two[1]["gradient/pull/feature"] == pytest.approx(one[1]["gradient/pull/feature"], rel=0.3)


def test_a_balanced_run_of_processes_is_resumed_bit_by_bit(several: Processes, tmp_path: Path) -> None:
    settings = {"steps": 6, "batch_size": 2, "checkpoint_every": 3, "schedule": "constant"}
    several.run(2, TRAIN, tmp_path / "whole", settings, PULLED)
    several.run(2, TRAIN, tmp_path / "parts", {**settings, "steps": 3, "warmup": 0.6}, PULLED)
    several.run(2, TRAIN, tmp_path / "parts", settings, PULLED)
    whole, parts = ([line["balance/pull/feature"] for line in read_log(tmp_path / name)] for name in ("whole", "parts"))
    assert parts == whole
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.parametrize("labelled", [0, 1])
def test_processes_train_on_frames_of_which_none_or_one_has_labels(
    several: Processes, tmp_path: Path, labelled: int
) -> None:
    settings = {"steps": 4, "batch_size": 2, "sync_batch_norm": True, "gradient_norms": 1}
    several.run(2, TRAIN, tmp_path, settings, {**PULLED, "labelled": labelled})
    for line in read_log(tmp_path):
        assert line["pull/feature"] > 0
        assert (line["gradient/detection"] > 0) == (line["detection/heatmap"] > 0)
    assert sum(line["detection/heatmap"] > 0 for line in read_log(tmp_path)) == 2 * labelled
