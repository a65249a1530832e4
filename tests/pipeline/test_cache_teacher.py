"""Stage 1: loading, teacher, encoding and writing side by side, in one process or several."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bevkd.cache.local import LocalStore
from bevkd.cache.manifest import COMMITS, MANIFEST
from bevkd.cache.writer import CacheWriter
from bevkd.errors import CacheError, ConfigError
from pipeline import cache_teacher
from pipeline.cache_teacher import Share
from pipeline.overlap import Handover, SampleQueue, encoding_threads, write_overlapped
from tests.cache import kit as cache_kit
from tests.pipeline import kit
from tests.pipeline.kit import Bevkd, Outcome, Synthetic

SAMPLES, BLOCK = 11, 4

# ---------------------------------------------------------------------------------------------- side by side


def made(stop_at: int | None = None, error: BaseException | None = None) -> Iterator[Handover]:
    """Yield the samples of the header, up to the one at which the teacher fails."""
    for index, token in enumerate(cache_kit.header(SAMPLES, BLOCK).tokens):
        if index == stop_at and error is not None:
            raise error
        yield lambda name=token: cache_kit.sample(name)


def open_writer(folder: Path) -> CacheWriter:
    return CacheWriter.open(folder, cache_kit.header(SAMPLES, BLOCK), cache_kit.SHAPES)


def write(folder: Path, samples: Iterator[Handover]) -> None:
    writer = open_writer(folder)
    write_overlapped(writer, writer.pending(), samples, SampleQueue(2))
    writer.seal()


def committed(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / COMMITS).iterdir())


def assert_finishable(folder: Path) -> None:
    """Check that nothing of a failed run is left behind, and that a second run ends with the usual bytes."""
    assert not list(folder.rglob(".tmp-*"))
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith(("write", "encode"))] == []
    done = len(committed(folder)) * BLOCK
    write(folder, (sample for index, sample in enumerate(made()) if index >= done))
    cache_kit.write(folder.with_name("whole"), cache_kit.header(SAMPLES, BLOCK))
    assert kit.tree(folder) == kit.tree(folder.with_name("whole"))


def test_a_cache_has_the_same_bytes_as_one_that_is_written_sample_by_sample(tmp_path: Path) -> None:
    write(tmp_path / "overlapped", made())
    cache_kit.write(tmp_path / "plain", cache_kit.header(SAMPLES, BLOCK))
    assert kit.tree(tmp_path / "overlapped") == kit.tree(tmp_path / "plain")


def test_a_teacher_that_fails_ends_the_run_with_its_error_after_the_blocks_that_were_complete(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the teacher broke"):
        write(tmp_path / "cache", made(6, ValueError("the teacher broke")))
    assert committed(tmp_path / "cache") == ["0.json"]
    assert_finishable(tmp_path / "cache")


def test_an_interrupt_ends_the_run_at_once(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cache", made(9, KeyboardInterrupt()))
    assert time.monotonic() - started < 5
    assert set(committed(tmp_path / "cache")) <= {"0.json", "1.json"}
    assert_finishable(tmp_path / "cache")


def test_a_writer_that_fails_ends_the_run_before_the_teacher_makes_the_rest(tmp_path: Path) -> None:
    count = 0

    def counted() -> Iterator[Handover]:
        nonlocal count
        for sample in made():
            count += 1
            yield (lambda: {"boxes": 1}) if count == 5 else sample  # the first sample of block 1

    with pytest.raises(CacheError, match="token-004"):
        write(tmp_path / "cache", counted())
    assert count <= 5 + 2 + encoding_threads() + 2  # the queue, those being encoded, and one in either hand
    assert committed(tmp_path / "cache") == ["0.json"]
    assert_finishable(tmp_path / "cache")


def test_a_teacher_that_is_faster_than_the_disk_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, most, count = 0, 0, 0

    def slow(*arguments: Any) -> None:
        nonlocal taken
        for _sample in arguments[2]:
            taken += 1
            time.sleep(0.01)

    def counted() -> Iterator[Handover]:
        nonlocal count, most
        for sample in made():
            count += 1
            most = max(most, count - taken)
            yield sample

    monkeypatch.setattr(CacheWriter, "write_block", slow)
    writer = open_writer(tmp_path / "cache")
    queue = SampleQueue(2)
    write_overlapped(writer, writer.pending(), counted(), queue)
    assert (count, taken) == (SAMPLES, SAMPLES)
    assert most <= 2 + 1 + 2  # the queue, one that waits to get in, and one in the hand of each writer
    assert queue.waited_s > 0.04


def test_a_block_is_committed_while_the_next_one_is_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_block, next_began, overlapped = CacheWriter.write_block, threading.Event(), []

    def slow(self: CacheWriter, block: int, samples: Iterator[Any], *rest: Any) -> object:
        def seen() -> Iterator[Any]:
            for sample in samples:
                if block == 1:
                    next_began.set()
                yield sample

        record = write_block(self, block, seen(), *rest)
        if block == 0:
            overlapped.append(next_began.wait(10))
        return record

    monkeypatch.setattr(CacheWriter, "write_block", slow)
    write(tmp_path / "cache", made())
    assert overlapped == [True]


def test_a_block_that_somebody_else_commits_meanwhile_does_not_shift_the_samples_of_the_next(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "cache")
    pending = writer.pending()
    other = open_writer(tmp_path / "cache")
    other.write_block(1, cache_kit.samples(other.header.block_tokens(1)))
    write_overlapped(writer, pending, made(), SampleQueue(2))
    writer.seal()
    cache_kit.write(tmp_path / "plain", cache_kit.header(SAMPLES, BLOCK))
    assert kit.tree(tmp_path / "cache") == kit.tree(tmp_path / "plain")


# ---------------------------------------------------------------------------------------------- shares


@given(st.integers(1, 9), st.integers(0, 40))
def test_every_block_belongs_to_exactly_one_share(count: int, blocks: int) -> None:
    shares = [Share(index, count).of(range(blocks)) for index in range(count)]
    assert sorted(block for share in shares for block in share) == list(range(blocks))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("text", ["3/3", "1", "1/0", "-1/2", "a/b", "/2", "1/2/3"])
def test_a_share_that_is_none_is_refused_with_the_way_to_write_it(text: str) -> None:
    with pytest.raises(ConfigError, match="SLURM_ARRAY_TASK_ID"):
        Share.parse(text)


# ---------------------------------------------------------------------------------------------- the command


def test_a_made_up_cache_says_so(bevkd: Bevkd, synthetic: Synthetic) -> None:
    assert "MADE UP" in str(bevkd.well("cache", "info", synthetic.cache, "--json").json)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_shares_in_any_order_make_the_cache_of_a_single_run_and_the_last_one_seals_it(
    bevkd: Bevkd, synthetic: Synthetic, tmp_path: Path, order: tuple[int, ...]
) -> None:
    folder = tmp_path / "cache"
    told = [
        bevkd.well("cache-teacher", synthetic.recipe, "--out", folder, "--shard", f"{index}/3", "--json").json
        for index in order
    ]
    assert [summary["name"] is None for summary in told] == [True, True, False]
    assert [summary["written"] for summary in told] == [{0: 2, 1: 1, 2: 1}[index] for index in order]
    assert told[-1]["missing"] == 0
    assert kit.tree(folder) == kit.tree(synthetic.cache)


def test_a_share_that_is_done_says_how_much_is_left_to_others(
    bevkd: Bevkd, synthetic: Synthetic, tmp_path: Path
) -> None:
    said = bevkd.well("cache-teacher", synthetic.recipe, "--out", tmp_path / "cache", "--shard", "0/2").out
    assert "2 of 4 frames" in said
    assert "seals" in said


def test_two_shares_at_once_of_which_one_is_killed_and_started_again(
    bevkd: Bevkd, synthetic: Synthetic, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    shares = [start_share(bevkd, synthetic.recipe, folder, index, "teacher.seconds_per_frame=0.5") for index in (0, 1)]
    try:
        wait_for((folder / COMMITS / "1.json").exists)
        shares[1].send_signal(signal.SIGKILL)
        assert shares[0].wait(60) == 0
    finally:
        for share in shares:
            share.kill()
            share.wait()
    assert not (folder / MANIFEST).exists()
    outcome = bevkd.well("cache-teacher", synthetic.recipe, "--out", folder, "--shard", "1/2", "--json").json
    assert outcome["written"] == 1
    assert kit.tree(folder) == kit.tree(synthetic.cache)


def start_share(bevkd: Bevkd, recipe: Path, folder: Path, index: int, override: str) -> subprocess.Popen[bytes]:
    arguments = ["cache-teacher", recipe, "--out", folder, "--shard", f"{index}/2", "--set", override]
    code = "import cli; cli.main()"
    environment = {**os.environ, "XDG_CACHE_HOME": str(bevkd.home), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], cwd=kit.ROOT, env=environment)


def wait_for(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_loader_process_that_fails_ends_the_run_with_the_name_of_the_file_after_the_blocks_before(
    bevkd: Bevkd, world: Path, synthetic: Synthetic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = kit.copy(world, tmp_path / "world")
    changes = [
        "--set",
        f"data.root={own}",
        "--set",
        "teacher.lidar=true",
        "--set",
        "loaders=1",
        "--set",
        "batch_size=1",
    ]
    arguments = ("cache-teacher", synthetic.recipe, "--out", tmp_path / "cache", *changes)
    third = sorted((own / "samples" / "LIDAR_TOP").iterdir())[2]
    monkeypatch.setattr(cache_teacher, "check_files", lambda *_: third.unlink())  # it vanishes after the check
    outcome: Outcome = bevkd(*arguments)
    assert outcome.code == 1
    assert str(third) in outcome.err
    assert "defect" not in outcome.err
    assert 0 < len(committed(tmp_path / "cache")) < 4


def test_a_cache_that_does_not_fit_is_refused_with_both_numbers_before_the_teacher_works(
    bevkd: Bevkd, synthetic: Synthetic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalStore, "free_bytes", lambda _: 1234)
    arguments = ("cache-teacher", synthetic.recipe, "--out", tmp_path / "cache")
    outcome = bevkd(*arguments)
    assert outcome.code == 1
    assert "more bytes, its disk has 1,234 free" in outcome.err
    assert "cache plan" in outcome.err
    assert committed(tmp_path / "cache") == []
    bevkd.well(*arguments, "--no-space-check")
    assert kit.tree(tmp_path / "cache") == kit.tree(synthetic.cache)
    bevkd.well(*arguments)  # a complete cache needs no space


def test_the_number_of_loaders_does_not_change_the_bytes(bevkd: Bevkd, synthetic: Synthetic, tmp_path: Path) -> None:
    for loaders in (0, 2):
        folder = tmp_path / str(loaders)
        bevkd.well("cache-teacher", synthetic.recipe, "--out", folder, "--set", f"loaders={loaders}")
        assert kit.tree(folder) == kit.tree(synthetic.cache)
