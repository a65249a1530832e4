"""Zarr v3 on disk: array metadata, and shards of the codec ``sharding_indexed``.

A shard is the compressed samples of a block, one after the other, then the index (offset and size of each slot as
little-endian uint64; both 2^64-1 for the unused slots of the last block), then the CRC-32C of the index.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs.zstd import Zstd

from bevkd.cache.arrays import ArraySpec
from bevkd.cache.manifest import ROOT, Header, to_json
from bevkd.cache.quantise import Array
from bevkd.cache.store import Checksum, FileRecord
from bevkd.errors import CacheError

LEVEL = 1
UNUSED = 2**64 - 1
_CODEC = Zstd(level=LEVEL, checksum=True)
_CRC_BYTES = 4
_MAGIC = b"\x28\xb5\x2f\xfd"

Index = npt.NDArray[np.uint64]


class ShardSource(Protocol):
    """Where shards are read: a store, or local copies of one. See :class:`bevkd.cache.store.Store`."""

    def place(self, key: str) -> str:
        """Return the full name of a shard, for messages."""
        ...

    def read_range(self, key: str, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset`` on."""
        ...

    def read_tail(self, key: str, size: int) -> tuple[bytes, int]:
        """Return the last ``size`` bytes, and the size of the file."""
        ...


def array_metadata(array: ArraySpec, samples: int, block: int) -> dict[str, Any]:
    """Return the content of an array's ``zarr.json``."""
    bytes_codec: dict[str, Any] = {"name": "bytes"}
    if np.dtype(array.dtype).itemsize > 1:
        bytes_codec["configuration"] = {"endian": "little"}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [samples, *array.shape],
        "data_type": array.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [block, *array.shape]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": 0.0 if array.dtype.startswith("float") else 0,
        "codecs": [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": [1, *array.shape],
                    "codecs": [bytes_codec, {"name": "zstd", "configuration": {"level": LEVEL, "checksum": True}}],
                    "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
                    "index_location": "end",
                },
            }
        ],
        "attributes": {"meaning": array.meaning},
        "dimension_names": ["sample", *array.dims],
        "storage_transformers": [],
    }


def group_metadata(header: Header) -> dict[str, Any]:
    """Return the content of the root ``zarr.json``: the header, and the metadata of all arrays in one place."""
    arrays = {array.name: array_metadata(array, len(header.tokens), header.spec.block) for array in header.arrays}
    return {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {"bevkd": header.model_dump(mode="json")},
        "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": arrays},
    }


def metadata_files(header: Header) -> dict[str, bytes]:
    """Return the content of all ``zarr.json`` files by path in the cache."""
    group = group_metadata(header)
    return {ROOT: to_json(group)} | {
        f"{name}/{ROOT}": to_json(metadata) for name, metadata in group["consolidated_metadata"]["metadata"].items()
    }


def shard_name(array: ArraySpec, block: int) -> str:
    """Return the path of a shard in the cache."""
    return f"{array.name}/c.{block}" + ".0" * len(array.shape)


def compress(sample: Array) -> bytes:
    """Return one sample as it stands in a shard."""
    data: bytes = _CODEC.encode(np.ascontiguousarray(sample))
    return data


class ShardWriter:
    """Writes one shard, sample by sample, into the local file ``path``; a context manager that closes the file."""

    def __init__(self, path: Path, slots: int) -> None:
        self._slots = slots
        self._entries: list[tuple[int, int]] = []
        self._checksum = Checksum()
        self._size = 0
        self._file = path.open("xb")

    def append(self, compressed: bytes) -> None:
        """Write one sample; raises OSError if the disk is full."""
        self._entries.append((self._size, len(compressed)))
        self._write(compressed)

    def finish(self) -> FileRecord:
        """Write the index, make the file durable, and return its size and checksum."""
        index = np.full((self._slots, 2), UNUSED, "<u8")
        index[: len(self._entries)] = self._entries
        data = index.tobytes()
        self._write(data + google_crc32c.value(data).to_bytes(_CRC_BYTES, "little"))
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._checksum.record

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._checksum.update(data)
        self._size += len(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # what finish() did not flush belongs to a failed attempt
            self._file.close()


def read_index(store: ShardSource, key: str, slots: int, used: int, size: int, sample_bytes: int) -> Index:
    """Return the checked index of a shard: offset and size of each slot.

    Args:
        slots: samples per block.
        used: samples in this block.
        size: size of the file in bytes, from the commit record.
        sample_bytes: size of one decoded sample; no compressed one can be much larger.

    Raises:
        CacheError: the shard is missing, truncated or damaged; the message names neither sample nor remedy.
    """
    tail, place = slots * 16 + _CRC_BYTES, store.place(key)
    try:
        data, found = store.read_tail(key, tail)
    except OSError as error:
        raise CacheError(f"shard {place} cannot be read: {error.strerror}") from error
    if found != size or len(data) != tail:
        raise CacheError(f"shard {place} has {found} bytes, its record says {size}")
    if google_crc32c.value(data[:-_CRC_BYTES]) != int.from_bytes(data[-_CRC_BYTES:], "little"):
        raise CacheError(f"shard {place} is damaged: the checksum of its index is wrong")
    index = np.frombuffer(data[:-_CRC_BYTES], "<u8").reshape(slots, 2)
    offsets, sizes, body = index[:used, 0], index[:used, 1], size - tail
    if (index[used:] != UNUSED).any() or (offsets > body).any() or (sizes > body - np.minimum(offsets, body)).any():
        raise CacheError(f"shard {place} is damaged: its index points outside of the file")
    if (sizes > _compressed_bound(sample_bytes)).any():
        raise CacheError(f"shard {place} is damaged: its index has samples larger than {sample_bytes} bytes can be")
    return index


def _compressed_bound(size: int) -> int:
    """Return a bound of what zstd makes of ``size`` bytes (the library's ZSTD_compressBound is below it)."""
    return size + size // 128 + 1024


def decompress(data: bytes, out: Array) -> None:
    """Decompress one sample into ``out``, which it must fill exactly.

    Raises:
        CacheError: the bytes are damaged or of another size.
    """
    if _content_bytes(data) != out.nbytes:
        raise CacheError("the compressed sample has the wrong size")
    try:
        _CODEC.decode(data, out=out)
    except (RuntimeError, ValueError) as error:
        raise CacheError(f"the compressed sample is damaged ({error})") from error


def _content_bytes(frame: bytes) -> int | None:
    """Return the uncompressed size that a zstd frame's header states (RFC 8878, 3.1.1.1), None if it states none."""
    if frame[:4] != _MAGIC or len(frame) < 5:
        return None
    descriptor = frame[4]
    single_segment = bool(descriptor & 0x20)
    width = (int(single_segment), 2, 4, 8)[descriptor >> 6]
    start = 5 + (not single_segment) + (0, 1, 2, 4)[descriptor & 3]
    if width == 0 or len(frame) < start + width:
        return None
    return int.from_bytes(frame[start : start + width], "little") + (256 if width == 2 else 0)
