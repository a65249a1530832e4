"""Writes a whole world: scenes in parallel, tables last, so that a killed run is never taken for a complete one."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import Any

from bevkd.errors import WorldError
from bevkd.world.config import TEST_SPLIT, TRAIN_SPLIT, VAL_SPLIT, VERSION_FOLDER, WorldConfig
from bevkd.world.record import record_scene
from bevkd.world.rig import RIG
from bevkd.world.tables import MASK_TABLE, TABLE_NAMES, Tables, constant_tables

SEAL = "world.json"
_UNSEALED = "world.json.partial"
_UNSEALED_TABLES = f"{VERSION_FOLDER}.partial"

Progress = Callable[[int, int], None]
"""Called with (scenes done, scenes in all) after each scene."""


def write_world(
    config: WorldConfig, out_dir: Path | str, workers: int | None = None, progress: Progress | None = None
) -> Path:
    """Write the world of ``config`` into ``out_dir`` and return the folder, to be opened with nuscenes-devkit.

    A folder that already holds this very world is left as it is; an interrupted run of the same world is completed.
    The bytes do not depend on ``workers``.

    Args:
        config: what to write.
        out_dir: a new or empty folder, or one of an earlier run with the same config.
        workers: processes to use; by default one per usable core, and none besides this one for a small world.
        progress: called after each scene.

    Raises:
        WorldError: the folder holds anything else, or writing failed.
    """
    out = Path(out_dir)
    if _is_complete(config, out):
        return out
    try:
        for mount in RIG:
            for folder in ("samples", "sweeps"):
                (out / folder / mount.channel).mkdir(parents=True, exist_ok=True)
        (out / "maps").mkdir(exist_ok=True)
        _write_json(out / _UNSEALED, config.record(), indent=2)
        shutil.rmtree(out / _UNSEALED_TABLES, ignore_errors=True)
        shutil.rmtree(out / VERSION_FOLDER, ignore_errors=True)
        scenes: list[Tables | None] = [None] * config.scenes
        for done, (index, tables) in enumerate(_record_all(config, out, workers), start=1):
            scenes[index] = tables
            if progress is not None:
                progress(done, config.scenes)
        _write_tables(config, out, [tables for tables in scenes if tables is not None])
        (out / _UNSEALED).rename(out / SEAL)
    except BrokenProcessPool as error:
        raise WorldError(
            f"a worker died while writing {out}, perhaps for lack of memory. Run again to go on."
        ) from error
    except OSError as error:
        raise WorldError(f"cannot write the world to {out}: {error}. Free space or choose another folder.") from error
    return out


def _is_complete(config: WorldConfig, out: Path) -> bool:
    """Return whether the folder holds this world already; raise if it holds anything else."""
    if out.exists() and not out.is_dir():
        raise WorldError(f"{out} is a file. Choose a folder for the world.")
    if not out.exists() or not any(out.iterdir()):
        return False
    for name in (SEAL, _UNSEALED):
        path = out / name
        if not path.exists():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            # The marker itself was cut off while being written: nothing else can be there yet.
            found = config.record() if name == _UNSEALED else None
        if found == config.record():
            return name == SEAL
        raise WorldError(
            f"{out} holds another world ({_difference(found, config.record())}). "
            "Choose another folder, or remove this one."
        )
    raise WorldError(f"{out} is not empty and holds no world. Choose a new or empty folder.")


def _difference(found: Any, wanted: dict[str, Any]) -> str:
    if not isinstance(found, dict) or not isinstance(found.get("config"), dict):
        return f"its {SEAL} is unreadable"
    if found.get("generator") != wanted["generator"]:
        return f"written by generator {found.get('generator')}, this is {wanted['generator']}"
    return ", ".join(
        f"{key}: {found['config'].get(key)!r}, wanted {value!r}"
        for key, value in wanted["config"].items()
        if found["config"].get(key) != value
    )


def _record_all(config: WorldConfig, out: Path, workers: int | None) -> Iterator[tuple[int, Tables]]:
    """Yield (index, rows) of all scenes, in the order in which they are done."""
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # Starting a process costs more than a few scenes.
        workers = 1 if config.scenes < 8 else workers
    if workers < 1:
        raise WorldError(f"workers={workers}: at least one is needed.")
    if workers == 1:
        for index in range(config.scenes):
            yield index, record_scene(config, index, out)
        return
    # Spawned, not forked: the caller may run threads (torch), and a fork copies their locks.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, config.scenes), mp_context=context) as pool:
        pending = {pool.submit(record_scene, config, index, out): index for index in range(config.scenes)}
        try:
            for future in as_completed(pending):
                yield pending[future], future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _write_tables(config: WorldConfig, out: Path, scenes: list[Tables]) -> None:
    tables = constant_tables(config)
    for name in (*TABLE_NAMES, MASK_TABLE):
        if name not in tables:
            tables[name] = [row for scene in scenes for row in scene.get(name, [])]
    folder = out / _UNSEALED_TABLES
    folder.mkdir()
    for name, rows in tables.items():
        _write_json(folder / f"{name}.json", rows)
    names = [scene["scene"][0]["name"] for scene in scenes]
    counts = {TRAIN_SPLIT: config.scenes_train, VAL_SPLIT: config.scenes_val, TEST_SPLIT: config.scenes_test}
    left = iter(names)
    splits = {name: list(islice(left, count)) for name, count in counts.items() if count}
    _write_json(folder / "splits.json", splits, indent=1)
    folder.rename(out / VERSION_FOLDER)


def _write_json(path: Path, value: Any, indent: int | None = None) -> None:
    path.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")
