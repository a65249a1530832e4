"""Writing a cache: block by block, by any number of processes, to be killed and started again at any time.

The protocol. The root ``zarr.json`` with the header is created exclusively, so that all processes agree on it. A block
is written sample by sample to temporary shards beside their final names; these are made durable and then given their
final names by hard links in a fixed order. A link never replaces a file: of two attempts at a block that differ, the
one that links the first differing shard goes on and the other waits for its record. The commit record comes last.
The temporary names stay until the record exists, so that links left by a killed attempt are recognised.
"""

from __future__ import annotations

import contextlib
import errno
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Self

from bevkd.cache import files, manifest, shard
from bevkd.cache.encoding import Encoded, Value, all_arrays, encode
from bevkd.cache.manifest import COMMITS, MANIFEST, ROOT, BlockRecord, FileRecord, Header, Manifest, SignalStats
from bevkd.cache.spec import CacheSpec
from bevkd.config import parse
from bevkd.errors import CacheError, CacheSpecError, ConfigError
from bevkd.types import Boxes

PATIENCE_S = 10.0
"""How long an attempt waits for the record of another attempt that has published its shards."""

_POLL_S = 0.05
_TYPICAL_RATIO = {"float16": 0.9, "uint8": 0.4, "int8": 0.9, "logit8": 0.6, "float32": 0.5, "int32": 5.0}


def estimate_bytes(spec: CacheSpec, sample_shapes: Mapping[str, tuple[int, ...]], n: int) -> int:
    """Return the bytes that a cache of ``n`` samples will take: an estimate on the safe side for typical maps.

    ReLU'd sparse maps take less (docs/design/0002-cache.md has measured ratios).
    """
    per_sample = 0.0
    for array in all_arrays(spec, sample_shapes):
        logits = array.name in spec.signals and spec.signals[array.name].encoding == "logit8"
        per_sample += array.nbytes * _TYPICAL_RATIO["logit8" if logits else array.dtype] + 16
    return math.ceil(per_sample * n)


class CacheWriter:
    """Writes the blocks of one cache; :meth:`open` creates or resumes it."""

    def __init__(self, folder: Path, header: Header) -> None:
        self.folder = folder
        self.header = header
        self._arrays = header.arrays

    @classmethod
    def open(cls, path: str | Path, header: Header, sample_shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """Return a writer for a new cache, or for one that was begun with the same header.

        Args:
            path: folder of the cache, or its ``file://`` address.
            sample_shapes: shape of one sample per map signal the teacher writes; those not in the spec are ignored.

        Raises:
            CacheSpecError: the spec stores a map that the teacher does not write.
            CacheError: the folder holds something else, or a cache with another header (all differences are named).
        """
        folder = files.local_path(path)
        header = _with_shapes(header, sample_shapes)
        with _reporting(folder):
            folder.mkdir(parents=True, exist_ok=True)
            root = folder / ROOT
            if not root.exists() and any(files.final_of(entry) is None for entry in folder.iterdir()):
                raise CacheError(f"{folder} is not empty and holds no cache. Give a new or an empty folder.")
            if not files.create(root, manifest.to_json(shard.group_metadata(header))):
                existing = manifest.read_header(folder)
                manifest.check_same(folder, existing, header)
                header = existing
            for name in (COMMITS, *(array.name for array in header.arrays)):
                (folder / name).mkdir(exist_ok=True)
            files.sync_folder(folder)
            for path_in_cache, data in shard.metadata_files(header).items():
                metadata = folder / path_in_cache
                if not metadata.exists() or (metadata != root and metadata.read_bytes() != data):
                    files.replace(metadata, data)
            writer = cls(folder, header)
            writer._clean(everything=False)
        return writer

    def pending(self) -> list[int]:
        """Return the blocks that are not committed."""
        done = manifest.committed(self.folder)
        return [block for block in range(self.header.blocks) if block not in done]

    def write_block(self, block: int, samples: Iterable[Mapping[str, Value]]) -> BlockRecord:
        """Write and commit one block; a committed block is left as it is and its record returned.

        Args:
            samples: per token of the block, in order, the signals of the spec (others are ignored): maps
                [C,Y,X] or [T,10,Y,X], and boxes. They are consumed one by one.

        Raises:
            CacheError: a sample does not fit the header or its encoding, or the disk is full.
        """
        if self._record_path(block).exists():
            return self._record(block)
        temps = {array.name: files.temporary(self.folder / shard.shard_name(array, block)) for array in self._arrays}
        try:
            stats, records = self._write_shards(block, samples, temps)
            record = BlockRecord(
                block=block,
                tokens=self.header.block_tokens(block),
                arrays=records,
                stats=stats,
                teacher=self.header.teacher.fingerprint,
                versions=manifest.package_versions(),
            )
            with _reporting(self.folder, self):
                self._commit(record, temps)
        finally:
            for temp in temps.values():
                self._discard(temp)
        return self._record(block)

    def seal(self) -> Manifest:
        """Return the manifest, written now unless the cache is sealed already.

        Raises:
            CacheError: blocks are missing, or shards do not fit their records.
        """
        if (self.folder / MANIFEST).exists():
            return manifest.read_manifest(self.folder)
        if pending := self.pending():
            raise CacheError(
                f"{self.folder} cannot be sealed: {self.header.blocks - len(pending)} of {self.header.blocks} blocks "
                f"are committed, the next is block {pending[0]}. Write the missing blocks first."
            )
        records = tuple(self._record(block) for block in range(self.header.blocks))
        for record in records:
            self._check_shards(record)
        with _reporting(self.folder, self):
            self._clean(everything=True)
            data = self.header.model_dump(mode="json")
            data["records"] = [record.model_dump(mode="json") for record in records]
            data["files"] = {
                path: shard.file_record(self.folder / path).model_dump(mode="json")
                for path in shard.metadata_files(self.header)
            }
            data["name"] = manifest.name_of(data)
            files.replace(self.folder / MANIFEST, manifest.to_json(data))
        return manifest.read_manifest(self.folder)

    def missing_bytes(self) -> int:
        """Return about how many bytes the pending blocks will take, from the committed ones if there are any."""
        pending = self.pending()
        done = [self._record(block) for block in manifest.committed(self.folder)]
        samples = sum(len(self.header.block_tokens(block)) for block in pending)
        if not done:
            return estimate_bytes(self.header.spec, dict(self.header.sample_shapes), samples)
        written = sum(entry.bytes for record in done for entry in record.arrays.values())
        return math.ceil(written / sum(len(record.tokens) for record in done) * samples)

    def _write_shards(
        self, block: int, samples: Iterable[Mapping[str, Value]], temps: Mapping[str, Path]
    ) -> tuple[dict[str, SignalStats], dict[str, FileRecord]]:
        stats: dict[str, SignalStats] = {}
        tokens = self.header.block_tokens(block)
        with contextlib.ExitStack() as stack:
            with _reporting(self.folder, self):
                shards = {
                    name: stack.enter_context(shard.ShardWriter(temp, self.header.spec.block))
                    for name, temp in temps.items()
                }
            written = 0
            for sample in samples:
                if written == len(tokens):
                    raise CacheError(f"block {block} got more than its {len(tokens)} samples; give one per token.")
                for signal in sorted(self.header.spec.signals):
                    encoded = self._encode(signal, sample, tokens[written])
                    with _reporting(self.folder, self):
                        for name, stored in encoded.arrays.items():
                            shards[name].append(stored)
                    stats[signal] = _worst(stats.get(signal), encoded)
                written += 1
            if written < len(tokens):
                raise CacheError(f"block {block} got {written} samples for {len(tokens)} tokens; give one per token.")
            with _reporting(self.folder, self):
                return stats, {name: writer.finish() for name, writer in shards.items()}

    def _encode(self, signal: str, sample: Mapping[str, Value], token: str) -> Encoded:
        value = sample.get(signal)
        if value is None:
            raise CacheSpecError(
                f"sample '{token}' has no {signal}, only {', '.join(sorted(sample)) or 'nothing'}. Remove "
                f"signals.{signal} from the cache spec, or use a teacher that writes it."
            )
        shape = self.header.sample_shapes.get(signal)
        if not isinstance(value, Boxes) and tuple(value.shape) != shape:
            raise CacheError(
                f"{signal} of sample '{token}' is {list(value.shape)}, the cache was begun with {list(shape or ())}. "
                "Write to a new folder if the teacher was changed."
            )
        if isinstance(value, Boxes) and len(value):
            low, high = int(value.labels.min()), int(value.labels.max())
            if low < 0 or high >= len(self.header.classes):
                raise CacheError(
                    f"{signal} of sample '{token}' has labels from {low} to {high} for {len(self.header.classes)} "
                    "classes. Check the class list of the teacher."
                )
        return encode(signal, self.header.spec.signals[signal], value, token)

    def _publish(self, block: int, temps: Mapping[str, Path], records: Mapping[str, FileRecord]) -> bool:
        """Give all shards their final names; False if another attempt has published a different shard."""
        for array in self._arrays:
            final = self.folder / shard.shard_name(array, block)
            try:
                mine = files.link(temps[array.name], final) or final.samefile(temps[array.name])
                if not mine and shard.file_record(final) != records[array.name]:
                    return False
            except FileNotFoundError:  # another process has withdrawn its shard, or sealed the cache and cleaned up
                return False
            files.sync_folder(final.parent)
        return True

    def _commit(self, record: BlockRecord, temps: Mapping[str, Path]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        path = self._record_path(record.block)
        while not path.exists():
            if self._publish(record.block, temps, record.arrays):
                files.create(path, manifest.to_json(record))
            elif time.monotonic() > deadline:
                names = ", ".join(shard.shard_name(array, record.block) for array in self._arrays)
                raise CacheError(
                    f"block {record.block} of {self.folder} holds shards of another attempt with different content and "
                    "no commit record: the teacher is not deterministic, and that attempt hangs or was killed on "
                    f"another machine. Stop it, delete {names}, and run again."
                )
            else:
                time.sleep(_POLL_S)

    def _record_path(self, block: int) -> Path:
        return self.folder / COMMITS / f"{block}.json"

    def _record(self, block: int) -> BlockRecord:
        path = self._record_path(block)
        record = manifest.parse_json(BlockRecord, manifest.read_json(path), path)
        if found := record.faults(self.header, block):
            raise CacheError(f"{path}: {'; '.join(found)}. Delete this record to have the block written again.")
        return record

    def _check_shards(self, record: BlockRecord) -> None:
        for array in self._arrays:
            path = self.folder / shard.shard_name(array, record.block)
            try:
                shard.read_index(path, self.header.spec.block, len(record.tokens), record.arrays[array.name].bytes)
            except CacheError as error:
                raise CacheError(
                    f"{error}. Delete {self._record_path(record.block)} and that shard, and run again: the block is "
                    "written anew."
                ) from error

    def _clean(self, everything: bool) -> None:
        """Remove abandoned temporary files, and the shards an abandoned attempt has linked without a record."""
        for folder in (self.folder, self.folder / COMMITS):
            for temp in files.claim_abandoned(folder, everything):
                temp.unlink(missing_ok=True)
        for array in self._arrays:
            for temp in files.claim_abandoned(self.folder / array.name, everything):
                self._discard(temp)

    def _discard(self, temp: Path) -> None:
        """Remove a temporary shard; if it was published but its block not committed, the published one as well."""
        final = files.final_of(temp)
        with contextlib.suppress(FileNotFoundError):
            if final is not None and final.samefile(temp):
                block = int(final.name.split(".")[1])
                if not self._record_path(block).exists():
                    final.unlink()
        temp.unlink(missing_ok=True)


def _with_shapes(header: Header, sample_shapes: Mapping[str, tuple[int, ...]]) -> Header:
    maps = {signal for signal in header.spec.signals if signal != "boxes"}
    if missing := sorted(maps - set(sample_shapes)):
        raise CacheSpecError(
            f"spec '{header.spec.name}' stores {', '.join(missing)}, but teacher '{header.teacher.name}' writes only "
            f"{', '.join(sorted(sample_shapes)) or 'boxes'}. Remove signals.{missing[0]} from the spec, or use a "
            "teacher that writes it."
        )
    data = header.model_dump(mode="json") | {"sample_shapes": {name: list(sample_shapes[name]) for name in maps}}
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
def _reporting(folder: Path, writer: CacheWriter | None = None) -> Iterator[None]:
    """Turn failures of the file system into errors that say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise CacheError(f"cannot write the cache {folder}: {error}. Check the folder and its rights.") from error
        needed = f"about {writer.missing_bytes():,}" if writer else "a few thousand"
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        raise CacheError(
            f"the disk of {folder} is full: {needed} more bytes are needed, {free:,} are free. Committed blocks are "
            "safe: make room and run the same command again, which resumes."
        ) from error
