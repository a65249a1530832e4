"""Checking every byte of a cache against its manifest."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bevkd.cache import shard
from bevkd.cache.encoding import ArraySpec
from bevkd.cache.manifest import BlockRecord, parse_json, read_json, record_key
from bevkd.cache.reader import CacheReader
from bevkd.errors import CacheError


def verify(path: str | Path, deep: bool = False) -> list[str]:
    """Return every fault of the cache at ``path``; no fault means that each file is what was sealed.

    Args:
        deep: decompress every sample as well, which finds faults of the writer rather than of the disk.
    """
    try:
        reader = CacheReader.open(path)
    except CacheError as error:
        return [str(error)]
    faults = []
    for block, record in enumerate(reader.manifest.records):
        faults += _check_record(reader, record)
        for signal in sorted(reader.manifest.spec.signals):
            for array in reader.arrays([signal]):
                faults += _check_shard(reader, array, block)
        if deep and not faults:
            faults += _check_samples(reader, record)
    return faults


def _check_record(reader: CacheReader, record: BlockRecord) -> list[str]:
    key = record_key(record.block)
    place = reader.store.place(key)
    try:
        found = parse_json(BlockRecord, read_json(reader.store, key), place)
    except CacheError as error:
        return [str(error)]
    return [] if found == record else [f"{place} is not the record in the manifest"]


def _check_shard(reader: CacheReader, array: ArraySpec, block: int) -> list[str]:
    key = shard.shard_name(array, block)
    place = reader.store.place(key)
    try:
        reader.check_index(array, block)
        found = reader.store.record(key)
    except CacheError as error:
        return [str(error)]
    except OSError as error:
        return [f"shard {place} cannot be read: {error.strerror}"]
    wanted = reader.manifest.records[block].arrays[array.name]
    return [] if found == wanted else [f"shard {place} has CRC-32C {found.crc32c}, its record says {wanted.crc32c}"]


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
