"""Where the files of a cache lie: one protocol for folders and object stores.

A key is a file's path in the cache, with ``/``. Methods raise OSError when storage fails, FileNotFoundError if there is
no such file; its ``strerror`` says what happened in words.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Protocol

import google_crc32c
from pydantic import Field

from bevkd.config import StrictModel
from bevkd.errors import CacheError

Bytes = Annotated[int, Field(ge=0, lt=2**63)]
SCHEMES = ("s3", "gs", "az")
"""Object stores, as ``scheme://bucket/prefix``."""


class FileRecord(StrictModel):
    """Size and CRC-32C (eight hexadecimal digits) of a file."""

    bytes: Bytes
    crc32c: str = Field(pattern="^[0-9a-f]{8}$")


class Checksum:
    """The record of a file that is seen piece by piece."""

    def __init__(self) -> None:
        self._crc = self._size = 0

    def update(self, data: bytes) -> None:
        """Take the next piece."""
        self._crc = google_crc32c.extend(self._crc, data)
        self._size += len(data)

    @property
    def record(self) -> FileRecord:
        """Size and checksum of all pieces so far."""
        return FileRecord(bytes=self._size, crc32c=f"{self._crc:08x}")


def record_of(data: bytes) -> FileRecord:
    """Return size and CRC-32C of a file's content."""
    checksum = Checksum()
    checksum.update(data)
    return checksum.record


class Store(Protocol):
    """The files of one cache.

    Attributes:
        uri: what a user calls it; in messages ``place(key)`` names one file.
        remote: every read is a request over a network, so whole blocks are better copied once.
    """

    uri: str
    remote: bool

    def place(self, key: str) -> str:
        """Return the full name of a file, for messages."""
        ...

    def read(self, key: str, limit: int) -> bytes:
        """Return a whole file; a file of more than ``limit`` bytes raises OSError and is not read."""
        ...

    def read_range(self, key: str, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset`` on, fewer at the end of the file."""
        ...

    def read_tail(self, key: str, size: int) -> tuple[bytes, int]:
        """Return the last ``size`` bytes of a file (all of a shorter one), and the size of the file."""
        ...

    def fetch(self, key: str, path: Path, limit: int) -> FileRecord:
        """Write a file's content to the local file ``path`` (created or replaced, not synced) and return its record.

        Stops with OSError as soon as there are more than ``limit`` bytes.
        """
        ...

    def record(self, key: str) -> FileRecord:
        """Return size and checksum of a file, read in pieces."""
        ...

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the size of each file that lies directly in a folder of the cache ('' is its root), by name.

        A folder that does not exist is empty. Temporary files count as files.
        """
        ...

    def folders(self) -> list[str]:
        """Return the names of the folders directly in the cache's folder or under its prefix, in order."""
        ...

    def exists(self, key: str) -> bool:
        """Return whether there is such a file."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Write a file atomically and durably unless it exists; return whether this call made it."""
        ...

    def replace(self, key: str, data: bytes) -> None:
        """Write a file atomically and durably, over one that may exist."""
        ...

    def remove(self, key: str) -> None:
        """Remove a file; one that is not there is no error."""
        ...

    def remove_folders(self, folders: tuple[str, ...]) -> None:
        """Remove those of the folders that are empty, '' being the cache's own."""
        ...

    def empty(self) -> bool:
        """Return whether there is nothing, neither file nor folder, but temporary files."""
        ...

    def free_bytes(self) -> int | None:
        """Return how many more bytes fit, None where that is unknown."""
        ...

    # ------------------------------------------------------------------------------------------ writing blocks

    def prepare(self, folders: tuple[str, ...]) -> None:
        """Make sure that files can be written to these folders."""
        ...

    def stage(self, key: str) -> Path:
        """Return a new local path; the file that the caller writes there is given to :meth:`publish`."""
        ...

    def publish(self, staged: Mapping[str, Path], records: Mapping[str, FileRecord], seize: bool = False) -> bool:
        """Give staged files (local path by key, complete and durable) their final names, in order.

        Returns True when every key holds exactly the content of ``records``, at this moment and by this call or an
        equal earlier attempt; False when another attempt has published different content under one of the keys. With
        ``seize`` such files are replaced, where the store can do so safely; otherwise CacheError says what to do.
        """
        ...

    def discard(self, staged: Mapping[str, Path], committed: bool) -> None:
        """Remove staged files; unless ``committed``, also what :meth:`publish` made of them, where that is safe."""
        ...

    def sweep(self, folders: tuple[str, ...], everything: bool) -> None:
        """Remove what abandoned attempts left in these folders; with ``everything`` what any attempt left."""
        ...


def open_store(uri: str | Path) -> Store:
    """Return the store of a plain path, a ``file://`` address, or an object store's ``s3://bucket/prefix``.

    Raises:
        CacheError: an unknown scheme, or an address that names no bucket.
    """
    from bevkd.cache.local import LocalStore, local_path

    text = str(uri)
    scheme = text.partition("://")[0] if "://" in text and not isinstance(uri, Path) else ""
    if scheme in ("", "file"):
        return LocalStore(local_path(uri))
    if scheme in SCHEMES:
        from bevkd.cache.objects import ObjectStore

        return ObjectStore.open(text)
    raise CacheError(
        f"cache '{text}': unknown scheme '{scheme}'. Give a path, a file:// address, or one of "
        f"{', '.join(f'{name}://bucket/prefix' for name in SCHEMES)}."
    )
