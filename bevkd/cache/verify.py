"""Checking every byte of a cache against its manifest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bevkd.cache import shard
from bevkd.cache.arrays import ArraySpec
from bevkd.cache.manifest import MANIFEST, BlockRecord, digest_of, parse_json, read_json, record_key
from bevkd.cache.reader import CacheReader
from bevkd.cache.statistics import ChannelSums, statistics_of
from bevkd.errors import CacheError
from bevkd.progress import Progress, Silent

_SHOWN = 3


def verify(uri: str | Path, deep: bool = False, progress: Progress | None = None) -> list[str]:
    """Return every fault of the cache at ``uri``; no fault means that each file is what was sealed.

    Args:
        deep: decompress every sample as well, which finds faults of the writer rather than of the disk.
    """
    try:
        reader = CacheReader.open(uri)
    except CacheError as error:
        return [str(error)]
    faults: list[str] = []
    sums: list[dict[str, ChannelSums]] = []
    with (progress or Silent()).task("verify", reader.manifest.blocks, "block") as task:
        for record in reader.manifest.records:
            committed = _committed(reader, record)
            found = [committed] if isinstance(committed, str) else []
            sums += [] if isinstance(committed, str) else [committed.sums]
            for array in reader.arrays(sorted(reader.manifest.spec.signals)):
                found += _check_shard(reader, array, record)
            if deep and not found:
                found = _check_samples(reader, record)
            faults += found
            task.advance(faults=len(faults))
    if len(sums) == reader.manifest.blocks and statistics_of(sums) != reader.manifest.statistics:
        faults.append(f"the statistics in {reader.store.place(MANIFEST)} are not those of the commit records")
    return faults


def _committed(reader: CacheReader, record: BlockRecord) -> BlockRecord | str:
    """Return the commit record of a block, or what is wrong with it."""
    key = record_key(record.block)
    place = reader.store.place(key)
    try:
        found = parse_json(BlockRecord, read_json(reader.store, key), place)
    except CacheError as error:
        return str(error)
    whole = found.sealed == record and record.sums_sha256 in (None, digest_of(found.sums))
    return found if whole else f"{place} is not the record in the manifest"


def _check_shard(reader: CacheReader, array: ArraySpec, record: BlockRecord) -> list[str]:
    key, wanted = shard.shard_name(array, record.block), record.arrays[array.name]
    place = reader.store.place(key)
    try:
        reader.check_index(array, record.block)
        found = reader.store.record(key)
    except CacheError as error:
        return [f"{error}; it holds {_named(record.tokens)}"]
    except OSError as error:
        return [f"shard {place} cannot be read: {error.strerror}; it holds {_named(record.tokens)}"]
    if found == wanted:
        return []
    damaged = [token for token in record.tokens if not _decodes(reader, array, token)]
    what = (
        _named(damaged) if damaged else "no sample: every one of them decodes, but one may be another than was sealed"
    )
    return [f"shard {place} has CRC-32C {found.crc32c}, its record says {wanted.crc32c}; the damage is in {what}"]


def _decodes(reader: CacheReader, array: ArraySpec, token: str) -> bool:
    try:
        reader.read_array(token, array)
    except CacheError:
        return False
    return True


def _named(tokens: Sequence[str]) -> str:
    some = ", ".join(f"'{token}'" for token in tokens[:_SHOWN])
    return f"sample {some}" if len(tokens) == 1 else f"{len(tokens)} samples: {some}{', ...' * (len(tokens) > _SHOWN)}"


def _check_samples(reader: CacheReader, record: BlockRecord) -> list[str]:
    faults = []
    for token in record.tokens:
        for signal, spec in reader.manifest.spec.signals.items():
            try:
                stored = reader.read(token, [signal])
            except CacheError as error:
                faults.append(str(error))
                continue
            if spec.encoding == "boxes":
                count = int(stored[f"{signal}_count"])
                if not 0 <= count <= spec.capacity:
                    faults.append(f"sample '{token}' of cache {reader.uri} states {count} boxes")
            elif not all(np.isfinite(array).all() for array in stored.values()):
                faults.append(f"{signal} of sample '{token}' of cache {reader.uri} holds non-finite values")
    return faults
