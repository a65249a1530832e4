"""The log of a run has each step once, however often the run was killed."""

from __future__ import annotations

from pathlib import Path

from bevkd.training.tracking import Tracker, read_log


def write(run: Path, start: int, steps: range, value: float) -> None:
    tracker = Tracker(run, start)
    for step in steps:
        tracker.log(step, {"loss": value})
    tracker.close()


def test_figures_are_read_back_as_written(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 4), 0.5)
    assert read_log(tmp_path) == [{"step": step, "loss": 0.5} for step in (1, 2, 3)]
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_lines_after_the_checkpoint_are_dropped_on_resume(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 6), 1.0)
    write(tmp_path, 3, range(4, 7), 2.0)
    assert [(line["step"], line["loss"]) for line in read_log(tmp_path)] == [
        *((step, 1.0) for step in (1, 2, 3)),
        *((step, 2.0) for step in (4, 5, 6)),
    ]


def test_a_half_written_last_line_is_dropped_on_resume(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 3), 1.0)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    write(tmp_path, 2, range(3, 4), 1.0)
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2, 3]


def test_a_fresh_start_in_the_same_folder_begins_a_new_log(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 4), 1.0)
    write(tmp_path, 0, range(1, 2), 2.0)
    assert read_log(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_a_run_without_a_log_has_no_lines(tmp_path: Path) -> None:
    assert read_log(tmp_path) == []
