"""Copying and removing caches: between folders and object stores, in any direction, resumed after anything."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bevkd.cache import manifest, shard
from bevkd.cache.manifest import (
    COMMITS,
    MANIFEST,
    MAX_JSON_BYTES,
    RESTORE,
    ROOT,
    BlockRecord,
    Manifest,
    open_manifest,
    record_key,
    refuse_foreign,
)
from bevkd.cache.store import FileRecord, Store, open_store
from bevkd.errors import CacheError
from bevkd.progress import Progress

STREAMS = 4
"""Blocks that are copied at once."""


def copy(source: str | Path, target: str | Path, progress: Progress) -> Manifest:
    """Copy a sealed cache; blocks that an interrupted copy has brought over stay.

    Every file is compared with its checksum as it is read. The target is sealed last, so nobody reads half a copy.
    What the target's storage makes of it afterwards is for ``verify`` to say.

    Raises:
        CacheError: the source is not whole, or the target holds something else.
    """
    origin, goal = open_store(source), open_store(target)
    sealed = open_manifest(origin)
    try:
        if _already_there(goal, sealed):
            return sealed
        _begin(origin, goal, sealed)
        _copy_blocks(origin, goal, sealed, progress)
        goal.sweep(_folders(sealed), everything=True)
        goal.create(MANIFEST, origin.read(MANIFEST, MAX_JSON_BYTES))
    except OSError as error:
        raise CacheError(
            f"cannot copy {origin.uri} to {goal.uri}: {error.strerror or error}. What is copied stays: run the same "
            "command again to go on."
        ) from error
    return sealed


def _already_there(goal: Store, sealed: Manifest) -> bool:
    if not goal.exists(MANIFEST):
        return False
    there = manifest.read_manifest(goal)
    if there.name != sealed.name:
        raise CacheError(
            f"{goal.uri} holds another cache, {there.name[:12]}, not {sealed.name[:12]}. Choose another target; "
            "'bevkd cache diff' says how they differ."
        )
    return True


def _begin(origin: Store, goal: Store, sealed: Manifest) -> None:
    refuse_foreign(goal)
    goal.prepare(())
    root = origin.read(ROOT, MAX_JSON_BYTES)
    if not goal.create(ROOT, root) and goal.read(ROOT, MAX_JSON_BYTES) != root:
        raise CacheError(f"{goal.uri} holds the beginning of another cache. Choose another target.")
    goal.prepare(_folders(sealed))
    for key in sealed.files:
        goal.replace(key, origin.read(key, MAX_JSON_BYTES))
    goal.sweep(_folders(sealed), everything=False)


def _copy_blocks(origin: Store, goal: Store, sealed: Manifest, progress: Progress) -> None:
    done = manifest.committed(goal)
    missing = [record for record in sealed.records if record.block not in done]
    pool = ThreadPoolExecutor(STREAMS)
    with progress.task("copy", len(sealed.records), "block", len(done)) as task:
        try:
            for size in pool.map(lambda record: _copy_block(origin, goal, record, sealed), missing):
                task.advance(gigabytes=size / 1e9)
        finally:
            pool.shutdown(cancel_futures=True)


def _copy_block(origin: Store, goal: Store, record: BlockRecord, sealed: Manifest) -> int:
    """Copy the shards of a block, then its commit record; return the bytes copied."""
    files = {shard.shard_name(array, record.block): record.arrays[array.name] for array in sealed.arrays}
    staged: dict[str, Path] = {}
    committed = False
    try:
        for key, wanted in files.items():
            staged[key] = goal.stage(key)
            _fetch(origin, key, staged[key], wanted)
        if not goal.publish(staged, files):
            raise CacheError(
                f"{goal.uri} holds other shards of block {record.block} than {origin.uri}. Delete {', '.join(files)} "
                "there, and run again."
            )
        goal.create(record_key(record.block), manifest.to_json(_committed(origin, record)))
        committed = True
    finally:
        goal.discard(staged, committed)
    return sum(entry.bytes for entry in files.values())


def _committed(origin: Store, record: BlockRecord) -> BlockRecord:
    """Return the commit record of a block, which also holds what the manifest leaves out."""
    key = record_key(record.block)
    place = origin.place(key)
    found = manifest.parse_json(BlockRecord, manifest.read_json(origin, key), place)
    if found.sealed != record:
        raise CacheError(f"{place} is not the record in the manifest. {RESTORE}.")
    return found


def _fetch(origin: Store, key: str, path: Path, wanted: FileRecord) -> None:
    found = origin.fetch(key, path, wanted.bytes)
    if found != wanted:
        raise CacheError(
            f"shard {origin.place(key)} is damaged: {found.bytes:,} bytes with CRC-32C {found.crc32c}, its record says "
            f"{wanted.bytes:,} and {wanted.crc32c}. {RESTORE}; 'bevkd cache verify' lists all damage."
        )
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _folders(header: manifest.Header) -> tuple[str, ...]:
    return ("", COMMITS, *(array.name for array in header.arrays))


def contents(uri: str | Path) -> tuple[int, int]:
    """Return how many files of a cache :func:`remove` would remove, and their bytes.

    Raises:
        CacheError: there is no cache.
    """
    store = open_store(uri)
    try:
        found = _own_files(store, manifest.read_header(store))
    except OSError as error:
        raise CacheError(f"cannot read {store.uri}: {error.strerror}. Check the address and its rights.") from error
    return len(found), sum(found.values())


def remove(uri: str | Path) -> list[str]:
    """Remove a cache, sealed or not, and return the files that lie there but are not its own, which stay.

    The manifest goes first, so that a removal that is interrupted leaves no cache that looks whole.

    Raises:
        CacheError: there is no cache, or its header is damaged, so that it cannot be told what belongs to it.
    """
    store = open_store(uri)
    try:
        header = manifest.read_header(store)
        own = _own_files(store, header)
        order = sorted(own, key=lambda key: (key != MANIFEST, not key.startswith(COMMITS), key == ROOT))
        for key in order:
            store.remove(key)
        store.sweep(_folders(header), everything=True)
        left = [f"{folder}/{name}" if folder else name for folder in _folders(header) for name in store.sizes(folder)]
        store.remove_folders((*_folders(header)[1:], ""))
    except OSError as error:
        raise CacheError(f"cannot remove {store.uri}: {error.strerror or error}. Check the rights.") from error
    return left


def _own_files(store: Store, header: manifest.Header) -> dict[str, int]:
    """Return the bytes of each file that a cache of this header may have, and has."""
    possible = {MANIFEST, ROOT, *(f"{array.name}/{ROOT}" for array in header.arrays)}
    for block in range(header.blocks):
        possible |= {record_key(block), *(shard.shard_name(array, block) for array in header.arrays)}
    found = {}
    for folder in _folders(header):
        for name, size in store.sizes(folder).items():
            key = f"{folder}/{name}" if folder else name
            if key in possible:
                found[key] = size
    return found
