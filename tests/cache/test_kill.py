"""Writers that are killed, and writers that work at the same time."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import pytest

from bevkd.cache.manifest import MANIFEST
from bevkd.cache.verify import verify
from tests.cache import kit

HEADER = kit.header(24, block=4, signals={name: kit.SIGNALS[name] for name in ("bev_low", "heatmap", "boxes")})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole") / "cache"
    kit.write(folder, HEADER)
    return kit.tree(folder)


def start(context: ForkServerContext, target: Callable[..., object], *arguments: object) -> ForkServerProcess:
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_a_writer_killed_at_random_moments_leaves_what_a_rerun_completes(
    tmp_path: Path, context: ForkServerContext, whole: dict[str, bytes], kills: int
) -> None:
    begin = time.monotonic()
    process = start(context, kit.write, tmp_path / "timing", HEADER)
    process.join()
    duration = time.monotonic() - begin
    chance, interrupted = random.Random(5), 0
    for turn in range(6 * kills):
        folder = tmp_path / str(turn)
        process = start(context, kit.write, folder, HEADER)
        time.sleep(chance.uniform(0, duration))
        process.kill()
        process.join()
        interrupted += process.exitcode == -signal.SIGKILL and folder.exists() and not (folder / MANIFEST).exists()
        kit.write(folder, HEADER)
        assert kit.tree(folder) == whole
        if interrupted == kills:
            break
    assert interrupted == kills


@pytest.mark.parametrize("call", ["link", "fsync", "unlink", "replace", "mkdir"])
def test_a_writer_that_dies_at_any_call_to_the_file_system_leaves_what_a_rerun_completes(
    tmp_path: Path, context: ForkServerContext, call: str
) -> None:
    header = kit.header(4, block=2, signals={"boxes": kit.SIGNALS["boxes"]})
    kit.write(tmp_path / "whole", header)
    whole, died = kit.tree(tmp_path / "whole"), 0
    for count in range(200):
        folder = tmp_path / str(count)
        process = start(context, kit.write_and_die, folder, header, call, count)
        process.join()
        if process.exitcode == 0:
            break
        died += 1
        assert process.exitcode == kit.DIED
        kit.write(folder, header)
        assert kit.tree(folder) == whole
    assert died >= 1


@pytest.mark.parametrize("call", ["rename", "unlink"])
def test_a_rerun_that_dies_while_it_cleans_up_leaves_what_another_rerun_completes(
    tmp_path: Path, context: ForkServerContext, call: str
) -> None:
    header = kit.header(2, block=2, signals={name: kit.SIGNALS[name] for name in ("bev_low", "boxes")})
    kit.write(tmp_path / "whole", header)
    whole, links = kit.tree(tmp_path / "whole"), 3  # the links of the root and of the first two shards
    for count in range(3):
        folder = tmp_path / str(count)
        for dying, at in (("link", links), (call, count)):
            process = start(context, kit.write_and_die, folder, header, dying, at)
            process.join()
            assert process.exitcode == kit.DIED
        kit.write(folder, header)
        assert kit.tree(folder) == whole


@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize("orders", [(1, -1), (1, 1, -1)])
def test_writers_at_the_same_time_write_the_same_cache(
    tmp_path: Path, context: ForkServerContext, whole: dict[str, bytes], orders: tuple[int, ...], rounds: int
) -> None:
    for turn in range(rounds):
        folder = tmp_path / str(turn)
        processes = [start(context, kit.write, folder, HEADER, order) for order in orders]
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * len(orders)
        kit.write(folder, HEADER)
        assert kit.tree(folder) == whole
        assert verify(folder, deep=True) == []
