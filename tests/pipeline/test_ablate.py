"""A grid of terms is trained run by run, whatever happens to one of them, and can be gone on with."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bevkd.errors import ConfigError, ContractError, TrainingError
from bevkd.progress import Silent
from pipeline.ablate import Planned, Point, check, chosen_terms, grid_of, outlook, plan
from pipeline.jobs import Job, cuda_devices, run_jobs
from pipeline.recipe import DistillConfig, StudentRecipe
from pipeline.terms import Term, terms_text, with_terms
from tests.pipeline import kit
from tests.pipeline.kit import Bevkd

A, B, C = Term("x3kd", "output"), Term("x3kd", "feature"), Term("unidistill", "response")
NOWHERE = Path("nowhere")
STEPS = 12
"""Enough for a run to be stopped on its way."""

LOSSES = (
    {"name": "x3kd", "teacher": "lidar", "output": 1.0, "feature": 0.5},
    {"name": "unidistill", "teacher": "lidar", "feature": 0, "relation": 0, "response": 2.0},
)


def recipe(world: Path = NOWHERE, cache: Path = NOWHERE, losses: Any = LOSSES, **changes: Any) -> StudentRecipe:
    """Return the recipe of a distilled student with an evaluation."""
    values = kit.evaluated(kit.distilled(kit.train_recipe(world, kit.STUDENT), cache, losses), world)
    return StudentRecipe.model_validate({**values, **changes})


def names(points: Sequence[Point]) -> list[str]:
    return [point.job.name for point in points]


# ---------------------------------------------------------------------------------------------- grids


def test_each_term_stands_alone_between_none_and_all() -> None:
    assert grid_of([A, B, C], ["each"]) == [(), (A,), (B,), (C,), (A, B, C)]


def test_terms_are_added_one_at_a_time() -> None:
    assert grid_of([A, B, C], ["add"]) == [(), (A,), (A, B), (A, B, C)]


def test_each_term_is_left_out_once() -> None:
    assert grid_of([A, B, C], ["drop"]) == [(), (B, C), (A, C), (A, B), (A, B, C)]


def test_all_selections_are_as_many_as_subsets() -> None:
    grid = grid_of([A, B, C], ["all"])
    assert grid == [(), (A,), (B,), (C,), (A, B), (A, C), (B, C), (A, B, C)]


def test_kinds_together_repeat_no_selection() -> None:
    assert grid_of([A, B, C], ["each", "add", "drop"]) == [(), (A,), (B,), (C,), (A, B), (B, C), (A, C), (A, B, C)]
    assert grid_of([A], ["each", "add", "drop", "all"]) == [(), (A,)]


def test_a_switched_off_term_reads_nothing_and_a_loss_without_terms_goes() -> None:
    distill = recipe().distill
    assert distill is not None
    (only,) = with_terms(distill.losses, [B])
    assert only.signals() == ("bev_low",)
    assert (only.output, only.feature) == (0.0, 0.5)  # type: ignore[attr-defined]
    assert terms_text(distill.losses, [A, C]) == "x3kd.output + unidistill.response"


# ---------------------------------------------------------------------------------------------- terms


def distilled(*losses: dict[str, Any]) -> DistillConfig:
    return DistillConfig.model_validate({"losses": losses or LOSSES})


def test_without_names_every_term_in_use_takes_part() -> None:
    assert chosen_terms(distilled(), []) == (A, B, C)


def test_terms_are_named_one_by_one_or_by_their_loss_in_any_order() -> None:
    assert chosen_terms(distilled(), ["unidistill.response", "x3kd.output"]) == (C, A)
    assert chosen_terms(distilled(), ["unidistill", "x3kd"]) == (C, A, B)


def test_a_second_loss_of_a_name_is_called_as_in_the_log() -> None:
    twice = distilled(LOSSES[0], {**LOSSES[0], "teacher": "other"})
    assert chosen_terms(twice, ["x3kd-2.output"]) == (Term("x3kd-2", "output"),)


def test_unknown_terms_and_terms_that_are_off_are_named() -> None:
    with pytest.raises(ConfigError) as refused:
        chosen_terms(distilled(), ["x3kd.outptu", "unidistill.feature", "x3kd"])
    assert "'x3kd.outptu' is none of: x3kd.output, x3kd.feature, x3kd.adversarial" in str(refused.value)
    assert "'unidistill.feature' has the weight 0 in the recipe: give it one with --set" in str(refused.value)


def test_a_recipe_whose_terms_are_all_off_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to ablate"):
        chosen_terms(distilled({**LOSSES[1], "response": 0}), [])


# ---------------------------------------------------------------------------------------------- the plan


def test_the_plan_has_every_method_of_a_seed_before_the_next_seed(tmp_path: Path) -> None:
    points = plan(recipe(), tmp_path, ["x3kd"], ["each"], [3, 5])
    of_seed = ["plain", "x3kd.output", "x3kd.feature", "x3kd.output+feature"]
    assert names(points) == [f"{method}-{seed}" for seed in (3, 5) for method in of_seed]
    assert [point.recipe.training.seed for point in points] == [3] * 4 + [5] * 4
    assert points[0].recipe.distill is None
    rest = [point.recipe.model_dump(exclude={"distill": True, "training": {"seed"}}) for point in points]
    assert all(each == rest[0] for each in rest)


def test_there_is_no_plain_student_without_labels(tmp_path: Path) -> None:
    whole = recipe()
    unlabelled = whole.model_copy(update={"data": whole.data.model_copy(update={"labels": 0.0})})  # type: ignore[attr-defined]
    assert names(plan(unlabelled, tmp_path, ["x3kd.output"], ["each"], [0])) == ["x3kd.output-0"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill": None}, "has no 'distill'"),
        ({"evaluation": None}, "has no 'evaluation'"),
        ({"distill": {"teacher": "online", "losses": list(LOSSES)}}, "distill.teacher: cached"),
    ],
)
def test_recipes_that_cannot_be_ablated_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(recipe(**changes), tmp_path, [], ["each"], [0])


def test_contracts_of_all_points_are_checked_before_anything_is_written(
    bevkd: Bevkd, world: Path, cache: Path, tmp_path: Path
) -> None:
    losses = [LOSSES[0], {"name": "unidistill", "teacher": "lidar", "source": "points"}]
    values = kit.evaluated(kit.distilled(kit.train_recipe(world, kit.STUDENT), cache, losses), world)
    path = kit.write(tmp_path / "recipe.yaml", values)
    refused = bevkd("ablate", path, "--out", tmp_path / "out", "--terms", "x3kd.output,unidistill.feature")
    assert refused.code == 1
    assert "this grid cannot be trained" in refused.err
    assert "unidistill.feature: " in refused.err
    assert "points_low" in refused.err
    assert "- x3kd.output: " not in refused.err
    assert not (tmp_path / "out").exists()


def test_runs_of_another_recipe_in_the_folder_are_refused_by_name(world: Path, cache: Path, tmp_path: Path) -> None:
    points = plan(recipe(world, cache), tmp_path, ["x3kd.output"], ["each"], [0])
    other = points[1].recipe.model_dump(mode="json")
    other["training"]["learning_rate"] = 9.0
    points[1].job.run.mkdir(parents=True)
    kit.write(points[1].job.run / "recipe.yaml", other)
    with pytest.raises(TrainingError) as refused:
        check(points, Silent())
    assert f"{points[1].job.run}: training.learning_rate: 9.0 there, 0.003 here" in str(refused.value)
    assert str(points[0].job.run) not in str(refused.value)


# ---------------------------------------------------------------------------------------------- jobs

_WORK = """
import json, os, pathlib, sys, time
run, steps, extra = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
run.mkdir(parents=True, exist_ok=True)
print("device", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
for step in range(steps):
    with (run / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": step + 1}) + chr(10))
exec(extra)
(run / "result.json").write_text("{}")
"""


def job(folder: Path, name: str, extra: str = "", steps: int = 3) -> Job:
    """Return a job that trains nothing, and runs ``extra`` before it has finished."""
    command = (sys.executable, "-c", _WORK, str(folder / name), str(steps), extra)
    return Job(name, command, folder / name, folder / f"{name}.log", steps)


def test_a_failing_job_does_not_stop_the_others(tmp_path: Path) -> None:
    jobs = [job(tmp_path, "a"), job(tmp_path, "b", "sys.exit('out of luck')"), job(tmp_path, "c")]
    failed = run_jobs(jobs, 1, [], Silent())
    assert [each.name for each in failed] == ["b"]
    assert failed[0].last_words.endswith("out of luck")
    assert [each.finished for each in jobs] == [True, False, True]


def test_jobs_share_the_devices(tmp_path: Path) -> None:
    jobs = [job(tmp_path, str(number), "time.sleep(0.5)") for number in range(2)]
    assert run_jobs(jobs, 2, ["4", "7"], Silent()) == []
    assert {each.log.read_text().split()[1] for each in jobs} == {"4", "7"}


def test_visible_gpus_are_shared_unless_another_device_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert cuda_devices(None) == cuda_devices("cuda") == ["2", "5"]
    assert cuda_devices("cpu") == []


def test_a_step_is_read_from_a_log_that_is_being_written(tmp_path: Path) -> None:
    each = job(tmp_path, "a")
    assert each.step == 0
    each.run.mkdir()
    (each.run / "log.jsonl").write_text('{"step": 20, "loss": 1.0}\n{"step": 40, "lo')
    assert each.step == 20


_DRIVER = """
import pathlib, sys
from bevkd.progress import Silent
from pipeline.jobs import Job, cuda_devices, run_jobs
name, run, log, *command = sys.argv[1:]
run_jobs([Job(name, tuple(command), pathlib.Path(run), pathlib.Path(log), 3)], 1, [], Silent())
"""


def driver(folder: Path) -> subprocess.Popen[str]:
    """Return a process that runs a job of a minute, once the job has begun."""
    slow = job(folder, "slow", "time.sleep(60)")
    arguments = [slow.name, str(slow.run), str(slow.log), *slow.command]
    process = subprocess.Popen(
        [sys.executable, "-c", _DRIVER, *arguments], cwd=kit.ROOT, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: slow.step == slow.steps or process.poll() is not None)
    assert process.poll() is None
    return process


def wait_until(ready: Any) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_stopped_ablation_leaves_no_process_behind(tmp_path: Path) -> None:
    process = driver(tmp_path)
    process.send_signal(signal.SIGTERM)
    assert "KeyboardInterrupt" in process.communicate(timeout=60)[1]
    assert "KeyboardInterrupt" in job(tmp_path, "slow").last_words
    assert not job(tmp_path, "slow").finished
    assert run_jobs([job(tmp_path, "slow")], 1, [], Silent()) == []


def test_runs_that_outlive_a_killed_ablation_are_not_started_again(tmp_path: Path) -> None:
    process = driver(tmp_path)
    process.kill()
    process.communicate()
    with pytest.raises(TrainingError, match="processes of an earlier call still train these runs") as refused:
        run_jobs([job(tmp_path, "slow")], 1, [], Silent())
    assert str(tmp_path / "slow") in str(refused.value)
    processes = (entry for entry in Path("/proc").iterdir() if entry.name.isdigit())
    (survivor,) = [int(entry.name) for entry in processes if str(tmp_path) in words(entry)]
    os.kill(survivor, signal.SIGKILL)

    def starts() -> bool:
        with contextlib.suppress(TrainingError):
            return run_jobs([job(tmp_path, "slow")], 1, [], Silent()) == []
        return False

    wait_until(starts)


def words(process: Path) -> str:
    try:
        return (process / "cmdline").read_text()
    except OSError:
        return ""


# ---------------------------------------------------------------------------------------------- all of it


class Trained(NamedTuple):
    """A grid of a plain and a distilled run, the second of which was stopped on its way, and then gone on with.

    Attributes:
        listed: by ``--dry-run`` at the very start.
        left: what was still to do then.
        kept: when the result of the first run was written, before and after.
        document: printed by the ablation that went on.
    """

    arguments: list[str]
    out: Path
    points: list[Point]
    listed: Any
    left: list[Planned]
    kept: tuple[int, int]
    document: Any


@pytest.fixture(scope="module")
def trained(bevkd: Bevkd, world: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    out = tmp_path_factory.mktemp("ablation") / "out"
    whole = recipe(world, cache, training={**kit.TRAINING, "checkpoint_every": 1, "steps": STEPS})
    path = kit.write(out.parent / "recipe.yaml", whole.model_dump(mode="json"))
    arguments = ["ablate", str(path), "--out", str(out), "--terms", "x3kd.output", "--seed-list", "0", "--json"]
    points = plan(whole, out, ["x3kd.output"], ["each"], [0])
    listed = bevkd.well(*arguments, "--dry-run").json
    assert not out.exists()
    first, second = (point.job for point in points)

    ended = threading.Event()

    def stop() -> None:
        wait_until(lambda: second.step > 0 or ended.is_set())
        if not ended.is_set():
            os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=stop)
    watcher.start()
    outcome = bevkd(*arguments)
    ended.set()
    watcher.join()
    assert outcome.code == 130, outcome.err
    left, before = outlook(points), (first.run / "result.json").stat().st_mtime_ns
    document = bevkd.well(*arguments).json
    kept = before, (first.run / "result.json").stat().st_mtime_ns
    return Trained(arguments, out, points, listed, left, kept, document)


def test_a_dry_run_lists_the_runs_and_trains_none(trained: Trained) -> None:
    assert [(each["method"], each["steps"], each["step"], each["seconds"]) for each in trained.listed] == [
        ("plain", STEPS, 0, None),
        ("x3kd.output", STEPS, 0, None),
    ]


def test_a_stopped_ablation_knows_what_is_left(trained: Trained) -> None:
    plain, distilled = trained.left
    assert (plain.step, plain.seconds) == (STEPS, 0)
    assert 0 < distilled.step < STEPS
    assert distilled.seconds is not None
    assert distilled.seconds > 0


def test_what_is_finished_is_not_trained_again(trained: Trained) -> None:
    assert trained.kept[0] == trained.kept[1]


def test_a_run_that_was_stopped_has_the_weights_of_one_that_was_not(
    bevkd: Bevkd, trained: Trained, tmp_path: Path
) -> None:
    stopped = trained.points[1].job
    assert [line["step"] for line in kit.losses(stopped.run)] == [*range(1, STEPS + 1)]
    bevkd.well("train-student", trained.out / "recipes" / f"{stopped.name}.yaml", "--out", tmp_path / "whole")
    assert kit.weights_of(tmp_path / "whole") == kit.weights_of(stopped.run)


def test_the_runs_are_compared_when_all_are_done(trained: Trained) -> None:
    document = trained.document
    assert document["failed"] == []
    assert [row["method"] for row in document["rows"]] == ["plain", "x3kd.output"]
    assert document["summary"][1]["gain"]["pairs"] == 1
    assert document["rows"][1]["cache_bytes_per_frame"] > 0
    assert {file.name for file in trained.out.glob("table.*")} == {"table.md", "table.json", "table.png"}


def test_the_end_of_a_failed_runs_log_is_shown_and_the_others_are_compared(
    bevkd: Bevkd, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained.out, tmp_path / "out")
    lost = tmp_path / "out" / "runs" / "x3kd.output-0"
    (lost / "result.json").unlink()
    monkeypatch.setattr("pipeline.ablate.run_jobs", lambda jobs, *_: list(jobs))
    arguments = [str(tmp_path / "out") if each == str(trained.out) else each for each in trained.arguments]
    outcome = bevkd(*arguments)
    assert outcome.code == 1
    assert outcome.json["failed"] == [str(lost)]
    assert [row["method"] for row in outcome.json["rows"]] == ["plain"]
    assert f"the end of {tmp_path / 'out' / 'logs' / 'x3kd.output-0.log'}" in outcome.err


@pytest.mark.parametrize("option", [("--grid", "each,every"), ("--seed-list", "0,x")])
def test_wrong_options_are_usage_errors(bevkd: Bevkd, tmp_path: Path, option: tuple[str, str]) -> None:
    refused = bevkd("ablate", "demo_student_distilled", "--out", tmp_path, *option)
    assert refused.code == 2
    assert option[0] in refused.err


def test_a_contract_is_told_by_method(world: Path, cache: Path, tmp_path: Path) -> None:
    losses = [{**LOSSES[0], "teacher": "camera"}]
    with pytest.raises(ContractError, match=r"x3kd.output: .*\n.*the cache 'camera'"):
        check(plan(recipe(world, cache, losses), tmp_path, ["x3kd.output"], ["each"], [0]), Silent())
