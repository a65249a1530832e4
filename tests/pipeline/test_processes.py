"""Students that train in two processes, and what becomes of them when one is killed."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipeline import kit
from tests.pipeline.kit import Bevkd
from tests.processes import PATIENCE_S, ROOT, Processes, alive, processes, wait_for

STEPS = 8
KILLS = [3, pytest.param(20, marks=pytest.mark.slow)]
MODULES = ["cli", "pipeline.train_student", "transformers.models.resnet.modeling_resnet"]


@pytest.fixture(scope="module")
def pair(bevkd: Bevkd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with processes(tmp_path_factory.mktemp("pair"), MODULES, XDG_CACHE_HOME=str(bevkd.home)) as started:
        yield started


@pytest.fixture(scope="module")
def recipe(world: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the recipe of a distilled student with augmentation, moving average and accumulation."""
    training = {**kit.TRAINING, "steps": STEPS, "batch_size": 1, "accumulation": 2, "checkpoint_every": 2, "ema": 0.9}
    values = kit.distilled(kit.train_recipe(world, kit.STUDENT, training=training), cache)
    values["augment"] = {"bev": {"flip": True, "quarter_turns": True}, "image": {"zoom": [1.0, 1.1], "shift": True}}
    return kit.write(tmp_path_factory.mktemp("recipes") / "pair.yaml", values)


@pytest.fixture(scope="module")
def whole_run(pair: Processes, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    train(pair, recipe, run)
    return run


def train(pair: Processes, recipe: Path, run: Path) -> None:
    pair.run(2, "tests.processes:command", "train-student", recipe, "--out", run, "--resume")


def lines(run: Path) -> int:
    path = run / "log.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def assert_equal(run: Path, whole_run: Path) -> None:
    """The log has every step once, with the same figures, and the weights are the same to the bit."""
    assert [line["step"] for line in kit.losses(run)] == list(range(1, STEPS + 1))
    assert kit.losses(run) == kit.losses(whole_run)
    for name in ("model.safetensors", "checkpoints/step_00000008/model.safetensors"):
        assert (run / name).read_bytes() == (whole_run / name).read_bytes()


def kill_when(run: Path, step: int, delay_s: float, process: int) -> None:
    """Kill a process ``delay_s`` after its run has logged ``step``, if it is still alive."""
    wait_for(lambda: lines(run) >= step or not alive(process))
    time.sleep(delay_s)
    if alive(process):
        os.kill(process, signal.SIGKILL)


@pytest.mark.parametrize("kills", KILLS)
def test_two_processes_of_which_one_is_killed_end_and_resume_with_the_same_losses_and_weights(
    pair: Processes, recipe: Path, whole_run: Path, tmp_path: Path, kills: int
) -> None:
    chance, interrupted = random.Random(11), 0
    for turn in range(5 * kills):
        run = tmp_path / str(turn)
        begun = time.monotonic()
        pids = pair.start(2, "tests.processes:command", "train-student", recipe, "--out", run)
        moment, victim = chance.randrange(STEPS), chance.randrange(2)
        kill_when(run, moment, chance.uniform(0, 0.1), pids[victim])
        codes = pair.wait()
        assert time.monotonic() - begun < PATIENCE_S
        interrupted += codes[victim] == -signal.SIGKILL and not (run / "model.safetensors").exists()
        train(pair, recipe, run)
        assert_equal(run, whole_run)
        if interrupted == kills:
            break
    assert interrupted == kills


def test_only_the_first_process_prints(pair: Processes, recipe: Path, tmp_path: Path) -> None:
    pair.run(2, "tests.processes:command", "train-student", recipe, "--out", tmp_path / "run")
    assert len(re.findall("s per step", pair.output.read_text())) == 1


@pytest.mark.slow
def test_processes_whose_torchrun_is_killed_end_and_can_be_resumed(
    bevkd: Bevkd, pair: Processes, recipe: Path, whole_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(bevkd.home), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "output.txt").open("wb") as output:
        torchrun = subprocess.Popen(
            [*launcher, "-m", "cli", "train-student", str(recipe), "--out", str(run)],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=output,
        )
    wait_for(lambda: lines(run) >= 3 or torchrun.poll() is not None)
    ranks = children(torchrun.pid)
    torchrun.kill()
    torchrun.wait()
    assert len(ranks) == 2, (tmp_path / "output.txt").read_text()
    wait_for(lambda: not any(alive(rank) for rank in ranks))
    assert lines(run) < STEPS
    train(pair, recipe, run)
    assert_equal(run, whole_run)


def children(process: int) -> list[int]:
    """Return the processes that a process has started."""
    return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
