"""Commands that are killed at random moments, and started again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bevkd.cache.manifest import COMMITS, MANIFEST
from bevkd.cache.verify import verify
from tests.pipeline import kit
from tests.pipeline.kit import Bevkd

PATIENCE_S = 120.0
STEPS = 8
KILLS = [3, pytest.param(10, marks=pytest.mark.slow)]

_SERVER = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
import accelerate, spconv.pytorch, torch, torch._dynamo, torch.utils.tensorboard
import transformers.models.resnet.modeling_resnet
import cli, pipeline.cache_teacher, pipeline.train_student
torch.set_num_threads(1)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        sys.argv = json.loads(line)
        cli.main()
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forks:
    """Commands in processes of their own, forked from one that has imported the slow libraries."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self._server = server

    def start(self, *arguments: object) -> int:
        """Start a command and return its process id; one at a time."""
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(["bevkd", *map(str, arguments)]) + "\n")
        self._server.stdin.flush()
        return self._answer()

    def exit_code(self) -> int:
        """Return the exit code of the command that was started last, once it has ended."""
        return self._answer()

    def _answer(self) -> int:
        assert self._server.stdout is not None
        return int(self._server.stdout.readline())

    def kill_when(self, ready: Callable[[], bool], delay_s: float, *arguments: object) -> bool:
        """Start a command and kill it ``delay_s`` after ``ready``; return whether it was still at work."""
        process = self.start(*arguments)
        wait_for(lambda: ready() or not alive(process))
        time.sleep(delay_s)
        if alive(process):
            os.kill(process, signal.SIGKILL)
        return self.exit_code() == -signal.SIGKILL


def wait_for(ready: Callable[[], bool]) -> float:
    """Return the moment at which ``ready`` became true."""
    deadline = time.monotonic() + PATIENCE_S
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return time.monotonic()


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def forks(bevkd: Bevkd) -> Iterator[Forks]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(bevkd.home), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        cwd=kit.ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        yield Forks(server)


# ---------------------------------------------------------------------------------------------- cache-teacher


@pytest.fixture(scope="module")
def blocks_recipe(world: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a recipe that writes every frame as a block of its own."""
    folder = tmp_path_factory.mktemp("recipes")
    spec = kit.write(folder / "spec.yaml", kit.spec(block=1))
    return kit.write(folder / "cache.yaml", kit.cache_recipe(world, teacher, spec))


@pytest.fixture(scope="module")
def whole_cache(bevkd: Bevkd, blocks_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "cache"
    bevkd.well("cache-teacher", blocks_recipe, "--out", folder)
    assert len(list((folder / COMMITS).iterdir())) == 4
    return folder


@pytest.mark.parametrize("kills", KILLS)
def test_a_killed_cache_teacher_started_again_writes_the_same_bytes(
    bevkd: Bevkd, forks: Forks, blocks_recipe: Path, whole_cache: Path, tmp_path: Path, kills: int
) -> None:
    arguments = ("cache-teacher", blocks_recipe, "--out")
    begun, sealed = tmp_path / "timing", tmp_path / "timing" / MANIFEST
    forks.start(*arguments, begun)
    moments = [wait_for(path.exists) for path in (begun, sealed)]
    assert forks.exit_code() == 0
    writing_s, chance, interrupted = moments[1] - moments[0], random.Random(3), 0
    for turn in range(10 * kills):
        folder = tmp_path / str(turn)
        killed = forks.kill_when(folder.exists, chance.uniform(0, writing_s), *arguments, folder)
        interrupted += killed and not (folder / MANIFEST).exists()
        bevkd.well(*arguments, folder)
        assert kit.tree(folder) == kit.tree(whole_cache)
        if interrupted == kills:
            break
    assert interrupted == kills


def test_a_cache_teacher_killed_again_and_again_ends_with_the_same_bytes(
    bevkd: Bevkd, forks: Forks, blocks_recipe: Path, whole_cache: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    for committed in (1, 2, 3):

        def ready(count: int = committed) -> bool:
            return len(list(folder.glob(f"{COMMITS}/?.json"))) >= count

        forks.kill_when(ready, 0, "cache-teacher", blocks_recipe, "--out", folder)
    bevkd.well("cache-teacher", blocks_recipe, "--out", folder)
    assert kit.tree(folder) == kit.tree(whole_cache)
    assert verify(folder, deep=True) == []


def test_a_cache_teacher_killed_before_its_seal_goes_on_with_the_blocks_that_are_there(
    bevkd: Bevkd, forks: Forks, blocks_recipe: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    first = folder / COMMITS / "0.json"
    assert forks.kill_when(first.exists, 0, "cache-teacher", blocks_recipe, "--out", folder)
    there = len(list((folder / COMMITS).glob("?.json")))
    summary = bevkd.well("cache-teacher", blocks_recipe, "--out", folder, "--json").json
    assert summary["written"] == 4 - there < 4


# ---------------------------------------------------------------------------------------------- train-student


@pytest.fixture(scope="module")
def long_recipe(world: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the recipe of a distilled student with augmentation, moving average and a checkpoint every 2 steps."""
    training = {**kit.TRAINING, "steps": STEPS, "checkpoint_every": 2, "ema": 0.9}
    recipe = kit.distilled(kit.train_recipe(world, kit.STUDENT, training=training), cache)
    recipe["augment"] = {"bev": {"flip": True, "quarter_turns": True}, "image": {"zoom": [1.0, 1.1], "shift": True}}
    return kit.write(tmp_path_factory.mktemp("recipes") / "long.yaml", recipe)


@pytest.fixture(scope="module")
def whole_run(bevkd: Bevkd, long_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    bevkd.well("train-student", long_recipe, "--out", run)
    return run


def logged(run: Path, step: int) -> Callable[[], bool]:
    """Return a question: does the log of ``run`` show ``step``?"""
    path = run / "log.jsonl"
    return lambda: path.exists() and path.read_bytes().count(b"\n") >= step


@pytest.mark.parametrize("kills", KILLS)
def test_a_killed_student_that_resumes_has_the_same_losses_and_the_same_weights(
    bevkd: Bevkd, forks: Forks, long_recipe: Path, whole_run: Path, tmp_path: Path, kills: int
) -> None:
    chance, interrupted = random.Random(7), 0
    for turn in range(10 * kills):
        run = tmp_path / str(turn)
        arguments = ("train-student", long_recipe, "--out", run)
        killed = forks.kill_when(logged(run, chance.randrange(1, STEPS)), chance.uniform(0, 0.02), *arguments)
        interrupted += killed and not (run / "model.safetensors").exists()
        bevkd.well("train-student", long_recipe, "--out", run, "--resume")
        assert kit.losses(run) == kit.losses(whole_run)
        assert (run / "model.safetensors").read_bytes() == (whole_run / "model.safetensors").read_bytes()
        if interrupted == kills:
            break
    assert interrupted == kills


def test_a_student_killed_twice_in_one_run_still_ends_with_the_same_weights(
    bevkd: Bevkd, forks: Forks, long_recipe: Path, whole_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for step, resume in ((3, ()), (6, ("--resume",))):
        assert forks.kill_when(logged(run, step), 0, "train-student", long_recipe, "--out", run, *resume)
    bevkd.well("train-student", long_recipe, "--out", run, "--resume")
    assert kit.losses(run) == kit.losses(whole_run)
    assert (run / "model.safetensors").read_bytes() == (whole_run / "model.safetensors").read_bytes()


def test_a_student_killed_before_its_first_step_starts_anew(
    bevkd: Bevkd, forks: Forks, long_recipe: Path, whole_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert forks.kill_when((run / "recipe.yaml").exists, 0, "train-student", long_recipe, "--out", run)
    bevkd.well("train-student", long_recipe, "--out", run, "--resume")
    assert kit.losses(run) == kit.losses(whole_run)


def test_a_run_killed_while_it_wrote_its_recipe_can_be_started_again(
    bevkd: Bevkd, long_recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / ".recipe.yaml.123.tmp").write_text("data:")
    bevkd.well("train-student", long_recipe, "--out", run)
