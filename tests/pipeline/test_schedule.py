"""Stage 1 on dask workers: real worker processes, killed ones, failing blocks."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bevkd.cache.manifest import COMMITS
from bevkd.cache.reader import CacheReader
from bevkd.errors import CacheError
from bevkd.progress import Silent
from pipeline import schedule
from pipeline.recipe import load_cache
from tests.pipeline import dask_work, kit
from tests.pipeline.kit import Bevkd, Synthetic

if TYPE_CHECKING:
    from distributed import Client


@pytest.fixture(scope="module")
def cluster(bevkd: Bevkd) -> Iterator[str]:
    """Return the address of a scheduler with two workers; a block that kills two of them is given up."""
    import dask

    with pytest.MonkeyPatch.context() as patch, dask.config.set({"distributed.scheduler.allowed-failures": 1}):
        patch.setenv("XDG_CACHE_HOME", str(bevkd.home))
        with schedule.local_cluster(2) as address:
            yield address


@pytest.fixture
def client(cluster: str) -> Iterator[Client]:
    with schedule.connect(cluster) as client:
        client.wait_for_workers(2)
        yield client


# ---------------------------------------------------------------------------------------------- whole caches


def test_a_cluster_makes_the_cache_of_a_single_run_from_relative_paths(
    bevkd: Bevkd, cluster: str, world: Path, synthetic: Synthetic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "world").symlink_to(world)
    kit.write(tmp_path / "spec.yaml", kit.spec(block=1))
    recipe = kit.write(tmp_path / "cache.yaml", kit.synthetic_recipe(Path("world"), Path("spec.yaml"), loaders=1))
    outcome = bevkd.well("cache-teacher", recipe.name, "--out", "cache", "--scheduler", cluster, "--json")
    assert outcome.json["written"] == 4
    assert outcome.json["name"] == CacheReader.open(synthetic.cache).manifest.name
    assert kit.tree(tmp_path / "cache") == kit.tree(synthetic.cache)


def test_local_workers_finish_what_a_single_run_began(bevkd: Bevkd, synthetic: Synthetic, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    bevkd.well("cache-teacher", synthetic.recipe, "--out", folder, "--shard", "1/4")
    outcome = bevkd.well("cache-teacher", synthetic.recipe, "--out", folder, "--workers", "1", "--json")
    assert outcome.json["written"] == 3
    assert kit.tree(folder) == kit.tree(synthetic.cache)
    assert bevkd.well("cache-teacher", synthetic.recipe, "--out", folder, "--workers", "1").code == 0  # starts none


def test_a_killed_worker_costs_the_block_that_it_was_writing_and_no_other(
    bevkd: Bevkd, cluster: str, client: Client, synthetic: Synthetic, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    workers = list(client.run(os.getpid).values())
    before: dict[str, int] = {}

    def kill() -> None:
        while not list(folder.glob(f"{COMMITS}/*.json")):
            time.sleep(0.01)
        time.sleep(0.2)  # into the next blocks
        before.update(commits(folder))
        os.kill(workers[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    slow = ("--set", "teacher.seconds_per_frame=0.6")
    outcome = bevkd.well("cache-teacher", synthetic.recipe, "--out", folder, "--scheduler", cluster, *slow, "--json")
    killer.join()
    assert 0 < len(before) < 4
    assert before.items() <= commits(folder).items()  # the very same files
    assert outcome.json["written"] == 4
    assert kit.tree(folder) == kit.tree(synthetic.cache)
    client.wait_for_workers(2)


def commits(folder: Path) -> dict[str, int]:
    """Return the commit records that are there, and the identity of each file."""
    return {path.name: path.stat().st_ino for path in folder.glob(f"{COMMITS}/*.json")}


def test_a_block_that_bevkd_refuses_is_named_and_the_others_are_written(
    bevkd: Bevkd, cluster: str, synthetic: Synthetic, tmp_path: Path
) -> None:
    errors = {
        path.stem: json.loads(path.read_bytes())["stats"]["bev_low"]["error_max"]
        for path in (synthetic.cache / COMMITS).iterdir()
    }
    second, worst = sorted(errors, key=lambda block: errors[block])[-2:]
    spec = kit.spec(block=1)
    spec["signals"]["bev_low"] = {"encoding": "uint8", "max_error": (errors[second] + errors[worst]) / 2}
    path = kit.write(tmp_path / "spec.yaml", spec)
    arguments = ("cache-teacher", synthetic.recipe, "--out", tmp_path / "cache", "--set", f"spec={path}")
    outcome = bevkd(*arguments, "--scheduler", cluster)
    assert outcome.code == 1
    assert f"block {worst}: CacheError: bev_low of sample" in outcome.err
    assert "1 of 4 blocks" in outcome.err
    assert "run the same command again" in outcome.err
    assert set(commits(tmp_path / "cache")) == {f"{block}.json" for block in errors if block != worst}


# ---------------------------------------------------------------------------------------------- the loop


def test_a_block_that_kills_every_worker_is_given_up_and_the_others_are_written(client: Client) -> None:
    spare = 16  # so that the workers that die hold other blocks too
    failed = dict(schedule.run_blocks(client, dask_work.die, range(4), Silent(), spare))
    assert set(failed) == {1}
    assert "every worker that tried it died" in failed[1]
    client.wait_for_workers(2)


def test_an_error_of_the_machine_is_tried_again(client: Client, tmp_path: Path) -> None:
    work = partial(dask_work.fail_once, marks=str(tmp_path))
    assert list(schedule.run_blocks(client, work, range(3), Silent())) == []
    assert len(list(tmp_path.iterdir())) == 3


def test_few_blocks_are_with_the_scheduler_at_a_time_and_hopeless_ones_are_not_all_tried(client: Client) -> None:
    failed = dict(schedule.run_blocks(client, dask_work.fail, range(60), Silent()))
    assert set(failed) == set(range(60))
    assert "no way to write 0" in failed[0]
    assert list(failed.values()).count("not tried") == 60 - 8 - 1  # one more was with the other worker


# ---------------------------------------------------------------------------------------------- wrong usage


def test_a_scheduler_that_is_not_there(
    bevkd: Bevkd, synthetic: Synthetic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "_PATIENCE_S", 0.3)
    outcome = bevkd("cache-teacher", synthetic.recipe, "--out", tmp_path / "cache", "--scheduler", "tcp://127.0.0.1:9")
    assert outcome.code == 1
    assert "no dask scheduler answers at tcp://127.0.0.1:9" in outcome.err


def test_a_cache_that_workers_cannot_see(client: Client, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="All machines must see --out"):
        schedule.check_workers(client, str(tmp_path / "only here"), Silent())


def test_a_worker_refuses_to_go_on_with_another_teacher(bevkd: Bevkd, synthetic: Synthetic) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(bevkd.home))
        recipe = schedule.portable(load_cache(str(synthetic.recipe), []))
        answer = schedule.cache_block(recipe, str(synthetic.cache), "0" * 64, 0)
    assert "is not the one that began" in answer["error"]


def test_ways_to_share_the_work_exclude_each_other(bevkd: Bevkd, synthetic: Synthetic, tmp_path: Path) -> None:
    outcome = bevkd("cache-teacher", synthetic.recipe, "--out", tmp_path, "--workers", "2", "--shard", "0/2")
    assert outcome.code == 2
    assert "at most one of" in outcome.err


def test_a_sent_recipe_has_absolute_paths_and_leaves_the_choice_of_the_gpu_to_the_worker(
    synthetic: Synthetic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = ["data.root=here", "spec=own/spec.yaml", "device=cuda:3", "data.labels=tokens.txt"]
    sent = json.loads(schedule.portable(load_cache(str(synthetic.recipe), overrides)))
    assert sent["data"]["root"] == str(tmp_path / "here")
    assert sent["data"]["labels"] == str(tmp_path / "tokens.txt")
    assert sent["spec"] == str(tmp_path / "own" / "spec.yaml")
    assert sent["device"] == "cuda"
    named = json.loads(schedule.portable(load_cache(str(synthetic.recipe), ["spec=boxes"])))
    assert named["spec"] == "boxes"


# ---------------------------------------------------------------------------------------------- what it is worth


@pytest.mark.slow
def test_two_workers_are_nearly_twice_as_fast_as_one(tmp_path: Path) -> None:
    assert schedule.dask_speedup(tmp_path).ratio > 1.8
