"""Writing a cache: block by block, by any number of processes, to be killed and started again at any time.

The protocol. The root ``zarr.json`` with the header is created exclusively, so that all processes agree on it. A block
is written sample by sample to staged shards on a local disk; these are made durable and then published in a fixed
order, which never replaces a file: of two attempts at a block that differ, the one that publishes the first differing
shard goes on and the other waits for its record. The commit record comes last, also created exclusively. A disk keeps
the staged names until the record exists, so that what a killed attempt has published is recognised. An object store
cannot tell a dead attempt from a slow one: there an attempt that has waited in vain replaces the other's shards, and
the record if it comes after all.
"""

from __future__ import annotations

import contextlib
import errno
import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, Self

from bevkd.cache import manifest, shard
from bevkd.cache.arrays import arrays_for, sample_shapes_of
from bevkd.cache.encoding import Encoded, Value
from bevkd.cache.headers import check_same
from bevkd.cache.manifest import (
    COMMITS,
    MANIFEST,
    ROOT,
    BlockRecord,
    Header,
    Manifest,
    SignalStats,
    record_key,
    refuse_foreign,
)
from bevkd.cache.packing import Packed, pack
from bevkd.cache.reader import CacheReader
from bevkd.cache.self_check import SelfCheck
from bevkd.cache.spec import CacheSpec
from bevkd.cache.statistics import ChannelSums, added, statistics_of
from bevkd.cache.store import FileRecord, Store, open_store
from bevkd.config import parse
from bevkd.errors import CacheError, ConfigError

PATIENCE_S = 10.0
"""How long an attempt waits for the record of another attempt that has published its shards."""
REMOTE_PATIENCE_S = 60.0
SLOW_UPLOAD_BYTES_PER_S = 5e6
"""The same where publishing is an upload: so long, and what a slow network takes for the block."""

POLL_S, REMOTE_POLL_S = 0.05, 1.0
"""Pauses between two looks for that record; a look at an object store is a request per array."""

_TYPICAL_RATIO = {"float16": 0.9, "uint8": 0.4, "int8": 0.9, "logits": 0.7, "logit8": 0.6, "root8": 0.5, "sparse": 0.1}
_TYPICAL_ROWS = 0.15
"""How many rows of a ragged array are used."""


def estimate_bytes(spec: CacheSpec, sample_shapes: Mapping[str, tuple[int, ...]], n: int) -> int:
    """Return the bytes that a cache of ``n`` samples will take: an estimate on the safe side for typical maps.

    ReLU'd sparse maps take less (docs/design/0004-encodings.md has measured sizes).
    """
    per_sample = 0.0
    for signal, stored in spec.signals.items():
        for array in arrays_for(signal, stored, sample_shapes.get(signal, ())):
            main = array.name == signal
            ratio = _TYPICAL_RATIO.get(stored.encoding, 0.5) if main else 0.9
            rows = _TYPICAL_ROWS if array.shape and array.shape[0] == stored.capacity else 1.0
            per_sample += array.nbytes * ratio * rows + 16
    return math.ceil(per_sample * n)


class CacheWriter:
    """Writes the blocks of one cache; :meth:`open` creates or resumes it."""

    def __init__(self, store: Store, header: Header) -> None:
        self.store = store
        self.header = header
        self._arrays = header.arrays

    @classmethod
    def open(cls, uri: str | Path, header: Header, sample_shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """Return a writer for a new cache, or for one that was begun with the same header.

        Args:
            uri: where the cache goes: a path, a ``file://`` address or ``s3://bucket/prefix``.
            sample_shapes: shape of one sample per map signal the teacher writes; those not in the spec are ignored.

        Raises:
            CacheSpecError: the spec stores a map that the teacher does not write.
            CacheError: there is something else, or a cache with another header (all differences are named).
        """
        store = open_store(uri)
        header = _with_shapes(header, sample_shapes)
        with _reporting(store):
            refuse_foreign(store)
            store.prepare(())
            if not store.create(ROOT, manifest.to_json(shard.group_metadata(header))):
                existing = manifest.read_header(store)
                check_same(store.uri, existing, header)
                header = existing
            store.prepare((COMMITS, *(array.name for array in header.arrays)))
            for key, data in shard.metadata_files(header).items():
                if not store.exists(key) or (key != ROOT and store.read(key, manifest.MAX_JSON_BYTES) != data):
                    store.replace(key, data)
            writer = cls(store, header)
            store.sweep(writer._folders, everything=False)
        return writer

    def pending(self) -> list[int]:
        """Return the blocks that are not committed."""
        with _reporting(self.store):
            done = manifest.committed(self.store)
        return [block for block in range(self.header.blocks) if block not in done]

    def write_block(
        self, block: int, samples: Iterable[Mapping[str, Value]], pool: Executor | None = None, ahead: int = 4
    ) -> BlockRecord:
        """Write and commit one block; a committed block is left as it is and its record returned.

        Args:
            samples: per token of the block, in order, the signals of the spec: maps [C,Y,X] or [T,10,Y,X], boxes, and
                what else it stores; see ``bevkd.cache.packing.pack``. They are consumed one by one.
            pool: threads that encode and compress; None does so in this one.
            ahead: samples that are in the pool at once.

        Raises:
            CacheError: a sample does not fit the header or its encoding, or the disk is full.
        """
        with _reporting(self.store, self):
            if self._is_committed(block):
                return self._record(block)
        staged: dict[str, Path] = {}
        try:
            with _reporting(self.store, self):
                for array in self._arrays:
                    key = shard.shard_name(array, block)
                    staged[key] = self.store.stage(key)
            stats, sums, files = self._write_shards(block, samples, staged, pool, ahead)
            record = BlockRecord(
                block=block,
                tokens=self.header.block_tokens(block),
                arrays={array.name: files[shard.shard_name(array, block)] for array in self._arrays},
                stats=stats,
                teacher=self.header.teacher.fingerprint,
                versions=manifest.package_versions(),
                sums=sums,
                sums_sha256=manifest.digest_of(sums),
            )
            with _reporting(self.store, self):
                self._commit(record, staged, files)
        finally:
            self._discard(staged, block)
        return self._record(block)

    def seal(self, self_check: Callable[[CacheReader], SelfCheck] | None = None) -> Manifest:
        """Return the manifest, written now unless the cache is sealed already.

        Args:
            self_check: scores the boxes in a cache that is complete but not sealed. It has to be a pure function of
                content, so that all processes that seal the cache write the same manifest.

        Raises:
            CacheError: blocks are missing, or shards do not fit their records.
        """
        with _reporting(self.store, self):
            if self.store.exists(MANIFEST):
                return manifest.read_manifest(self.store)
            if pending := self.pending():
                raise CacheError(
                    f"{self.store.uri} cannot be sealed: {self.header.blocks - len(pending)} of {self.header.blocks} "
                    f"blocks are committed, the next is block {pending[0]}. Write the missing blocks first."
                )
            records = tuple(self._record(block) for block in range(self.header.blocks))
            self._check_shards(records)
            self.store.sweep(self._folders, everything=True)
            data = self.header.model_dump(mode="json")
            data["records"] = [record.model_dump(mode="json", exclude={"sums"}) for record in records]
            found = statistics_of(record.sums for record in records)
            data["statistics"] = {name: each.model_dump(mode="json") for name, each in found.items()}
            data["files"] = {
                key: self.store.record(key).model_dump(mode="json") for key in shard.metadata_files(self.header)
            }
            if self_check is not None:
                data["self_check"] = self_check(self._reader(data)).model_dump(mode="json")
            data["name"] = manifest.name_of(data)
            self.store.replace(MANIFEST, manifest.to_json(data))
            return manifest.read_manifest(self.store)

    def _reader(self, data: Mapping[str, Any]) -> CacheReader:
        """Return a reader of the cache whose manifest, not yet written, is ``data``."""
        return CacheReader(self.store, parse(Manifest, {**data, "name": manifest.name_of(data)}, self.store.uri))

    def missing_bytes(self) -> int:
        """Return about how many bytes the pending blocks will take, from the committed ones if there are any."""
        pending = self.pending()
        done = [self._record(block) for block in manifest.committed(self.store)]
        samples = sum(len(self.header.block_tokens(block)) for block in pending)
        if not done:
            return estimate_bytes(self.header.spec, dict(self.header.sample_shapes), samples)
        written = sum(entry.bytes for record in done for entry in record.arrays.values())
        return math.ceil(written / sum(len(record.tokens) for record in done) * samples)

    @property
    def _folders(self) -> tuple[str, ...]:
        return ("", COMMITS, *(array.name for array in self._arrays))

    def _write_shards(
        self,
        block: int,
        samples: Iterable[Mapping[str, Value]],
        staged: Mapping[str, Path],
        pool: Executor | None,
        ahead: int,
    ) -> tuple[dict[str, SignalStats], dict[str, ChannelSums], dict[str, FileRecord]]:
        stats: dict[str, SignalStats] = {}
        sums: dict[str, ChannelSums] | None = None
        with contextlib.ExitStack() as stack:
            with _reporting(self.store, self):
                shards = {
                    key.partition("/")[0]: stack.enter_context(shard.ShardWriter(temp, self.header.spec.block))
                    for key, temp in staged.items()
                }
            for packed in self._packed(block, samples, pool, ahead):
                with _reporting(self.store, self):
                    for name, data in packed.arrays.items():
                        shards[name].append(data)
                for signal, encoded in packed.stats.items():
                    stats[signal] = _worst(stats.get(signal), encoded)
                sums = packed.sums if sums is None else added(sums, packed.sums)
            with _reporting(self.store, self):
                return stats, sums or {}, {key: shards[key.partition("/")[0]].finish() for key in staged}

    def _packed(
        self, block: int, samples: Iterable[Mapping[str, Value]], pool: Executor | None, ahead: int
    ) -> Iterator[Packed]:
        """Yield the samples of a block in order, packed, ``ahead`` of them at once in the pool."""
        tokens, taken = self.header.block_tokens(block), 0
        running: deque[Future[Packed]] = deque()
        try:
            for sample in samples:
                if taken == len(tokens):
                    raise CacheError(f"block {block} got more than its {len(tokens)} samples; give one per token.")
                taken += 1
                if pool is None:
                    yield pack(self.header, sample, tokens[taken - 1])
                    continue
                running.append(pool.submit(pack, self.header, sample, tokens[taken - 1]))
                if len(running) >= ahead:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()
        if taken < len(tokens):
            raise CacheError(f"block {block} got {taken} samples for {len(tokens)} tokens; give one per token.")

    def _commit(self, record: BlockRecord, staged: Mapping[str, Path], files: Mapping[str, FileRecord]) -> None:
        deadline = time.monotonic() + self._patience(files)
        while not self._is_committed(record.block):
            if time.monotonic() > deadline:
                self._seize(record, staged, files)
            elif self.store.publish(staged, files):
                self.store.create(record_key(record.block), manifest.to_json(record))
            else:
                time.sleep(REMOTE_POLL_S if self.store.remote else POLL_S)

    def _seize(self, record: BlockRecord, staged: Mapping[str, Path], files: Mapping[str, FileRecord]) -> None:
        """Take a block from an attempt that seems dead: replace its shards, and its record if it comes after all.

        An attempt that has begun to replace shards must end with its own record beside them, whoever else writes.
        """
        key, text = record_key(record.block), manifest.to_json(record)
        while True:
            if self.store.publish(staged, files, seize=True):
                if not self.store.create(key, text):
                    self.store.replace(key, text)
                if self.store.publish(staged, files) and self._record(record.block) == record:
                    return
            # Another attempt seizes too: one of them has to come second.
            time.sleep(random.SystemRandom().uniform(1, 10) * POLL_S)

    def _patience(self, files: Mapping[str, FileRecord]) -> float:
        if not self.store.remote:
            return PATIENCE_S
        return REMOTE_PATIENCE_S + sum(file.bytes for file in files.values()) / SLOW_UPLOAD_BYTES_PER_S

    def _discard(self, staged: Mapping[str, Path], block: int) -> None:
        try:
            committed = self._is_committed(block)
        except OSError:  # storage is out of reach: what was published may be needed, what was staged is not
            committed = True
        self.store.discard(staged, committed)

    def _is_committed(self, block: int) -> bool:
        return self.store.exists(record_key(block))

    def _record(self, block: int) -> BlockRecord:
        key = record_key(block)
        place = self.store.place(key)
        record = manifest.parse_json(BlockRecord, manifest.read_json(self.store, key), place)
        if found := record.faults(self.header, block):
            raise CacheError(f"{place}: {'; '.join(found)}. Delete this record to have the block written again.")
        return record

    def _check_shards(self, records: tuple[BlockRecord, ...]) -> None:
        """Check size and index of every shard; a remote store's sizes alone, which one listing tells."""
        for array in self._arrays:
            sizes = self.store.sizes(array.name) if self.store.remote else {}
            for record in records:
                key, size = shard.shard_name(array, record.block), record.arrays[array.name].bytes
                try:
                    if self.store.remote and sizes.get(key.rpartition("/")[2]) != size:
                        raise CacheError(f"shard {self.store.place(key)} is missing or has not {size} bytes")
                    if not self.store.remote:
                        used = len(record.tokens)
                        shard.read_index(self.store, key, self.header.spec.block, used, size, array.nbytes)
                except CacheError as error:
                    raise CacheError(
                        f"{error}. Delete {self.store.place(record_key(record.block))} and that shard, and run again: "
                        "the block is written anew."
                    ) from error


def _with_shapes(header: Header, sample_shapes: Mapping[str, tuple[int, ...]]) -> Header:
    shapes = sample_shapes_of(header.spec, sample_shapes, header.teacher.name)
    data = header.model_dump(mode="json") | {"sample_shapes": {name: list(shape) for name, shape in shapes.items()}}
    try:
        return parse(Header, data, "the header of the cache")
    except ConfigError as error:
        raise CacheError(f"{error}\nMake teacher, grid and class list agree.") from error


def _worst(before: SignalStats | None, encoded: Encoded) -> SignalStats:
    error, cosine = (float(f"{value:.6g}") for value in (encoded.error, encoded.cosine))
    if before is None:
        return SignalStats(error_max=error, cosine_min=cosine)
    return SignalStats(error_max=max(before.error_max, error), cosine_min=min(before.cosine_min, cosine))


@contextlib.contextmanager
def _reporting(store: Store, writer: CacheWriter | None = None) -> Iterator[None]:
    """Turn failures of the storage into errors that say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            what = error.strerror or str(error)
            raise CacheError(
                f"cannot write the cache {store.uri}: {what}. Check the address and its rights."
            ) from error
        needed = f"about {writer.missing_bytes():,}" if writer else "a few thousand"
        free = store.free_bytes()
        where = f"the disk of {store.uri} is full" if free is not None else "the disk for temporary files is full"
        raise CacheError(
            f"{where}: {needed} more bytes are needed{'' if free is None else f', {free:,} are free'}. "
            "Committed blocks are safe: make room and run the same command again, which resumes."
        ) from error
