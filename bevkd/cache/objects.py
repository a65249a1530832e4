"""A cache in an object store: objects are whole or absent, and created on condition that they do not exist.

Shards are staged in a private folder on the local disk and uploaded one by one. Nobody can tell a slow attempt from a
dead one there, so what an attempt has published is never removed: a rerun finds it equal, or replaces it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bevkd.cache.object_process import Address, client_of
from bevkd.cache.store import SCHEMES, FileRecord
from bevkd.errors import CacheError

if TYPE_CHECKING:
    from bevkd.cache.object_client import Client

_STAGED = "bevkd-stage-"
_NEW_S = 60.0
"""A staging folder younger than this may be about to be locked by its owner."""


class _Published(NamedTuple):
    """What is known of the object under a staged file's key: the tag of its content, and whether that is equal."""

    tag: str
    equal: bool


class ObjectStore:
    """The files of a cache under ``scheme://bucket/prefix``; picklable, and usable after a fork."""

    remote = True

    def __init__(self, address: Address, prefix: str) -> None:
        self._address = address
        self._prefix = f"{prefix}/" if prefix else ""
        self.uri = f"{address[0]}://{address[1]}" + (f"/{prefix}" if prefix else "")
        self._locks: dict[Path, int] = {}
        self._known: dict[Path, _Published] = {}

    @classmethod
    def open(cls, uri: str) -> ObjectStore:
        """Return the store of an address; no request is made.

        Raises:
            CacheError: the address names no bucket, or a part of it is empty or made of dots.
        """
        scheme, _, rest = uri.partition("://")
        bucket, *parts = rest.rstrip("/").split("/")
        if scheme not in SCHEMES or not bucket or any(part in ("", ".", "..") for part in parts):
            raise CacheError(f"'{uri}' is no address of a cache. Write it as {scheme or 's3'}://bucket/folder/cache.")
        return cls((scheme, bucket), "/".join(parts))

    def __reduce__(self) -> tuple[Callable[[str], ObjectStore], tuple[str]]:
        return type(self).open, (self.uri,)

    @property
    def _client(self) -> Client:
        return client_of(self._address)

    def place(self, key: str) -> str:
        """Return the address of an object."""
        return f"{self.uri}/{key}" if key else self.uri

    def read(self, key: str, limit: int) -> bytes:
        """Return a whole object: one request."""
        return self._client.get(self._prefix + key, limit)

    def read_range(self, key: str, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset`` on, fewer at the end: one request."""
        return self._client.get_range(self._prefix + key, offset, size)

    def read_tail(self, key: str, size: int) -> tuple[bytes, int]:
        """Return the last ``size`` bytes of an object, and its size: one request."""
        return self._client.get_tail(self._prefix + key, size)

    def fetch(self, key: str, path: Path, limit: int) -> FileRecord:
        """Write an object's content to ``path`` and return its record: one request."""
        return self._client.download(self._prefix + key, path, limit)[0]

    def record(self, key: str) -> FileRecord:
        """Return size and checksum of an object, which is read for it."""
        return self._client.download(self._prefix + key, None, 2**63)[0]

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the size of each object directly under a prefix: one request per thousand."""
        return self._client.list(self._inside(folder))[0]

    def folders(self) -> list[str]:
        """Return the names of what looks like folders directly under the prefix."""
        return self._client.list(self._inside(""))[1]

    def exists(self, key: str) -> bool:
        """Return whether there is such an object."""
        return self._client.stat(self._prefix + key) is not None

    def create(self, key: str, data: bytes) -> bool:
        """Write an object that did not exist before; return False if it exists."""
        return self._client.put(self._prefix + key, data) is not None

    def replace(self, key: str, data: bytes) -> None:
        """Write an object, over one that may exist."""
        self._client.put(self._prefix + key, data, over="")

    def remove(self, key: str) -> None:
        """Remove an object if it is there."""
        self._client.delete(self._prefix + key)

    def remove_folders(self, folders: tuple[str, ...]) -> None:
        """Do nothing: there are no folders."""

    def empty(self) -> bool:
        """Return whether there is nothing under the prefix."""
        return self._client.list(self._inside("")) == ({}, [])

    def free_bytes(self) -> int | None:
        """Return None: object stores do not fill up."""
        return None

    def prepare(self, folders: tuple[str, ...]) -> None:
        """Do nothing: there are no folders."""

    def stage(self, key: str) -> Path:
        """Return a new path in a private folder on the local disk (``TMPDIR``), locked while this process lives."""
        folder = Path(tempfile.mkdtemp(prefix=_STAGED))
        lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # without locks only a killed process's folder stays behind
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path = folder / f"{secrets.token_hex(4)}-{key.rpartition('/')[2]}"
        self._locks[path] = lock
        return path

    def publish(self, staged: Mapping[str, Path], records: Mapping[str, FileRecord], seize: bool = False) -> bool:
        """Upload staged files in order, then check that nobody has replaced one of them meanwhile."""
        tags = {}
        for key, path in staged.items():
            tag = self._publish(self._prefix + key, path, records[key], seize)
            if tag is None:
                return False
            tags[self._prefix + key] = tag
        found = {key: self._client.stat(key) for key in tags}
        return all(stat is not None and stat.tag == tags[key] for key, stat in found.items())

    def _publish(self, key: str, path: Path, record: FileRecord, seize: bool) -> str | None:
        """Return the tag under which a key holds the content of ``path``, None if another attempt's is there."""
        known = self._look(key, path, record)
        if known is None:
            tag = self._client.put(key, path)
            known = _Published(tag, equal=True) if tag is not None else self._compare(key, record)
        if known is not None and not known.equal and seize:
            tag = self._client.put(key, path, over=known.tag)
            known = _Published(tag, equal=True) if tag is not None else None
        if known is None:
            self._known.pop(path, None)
            return None
        self._known[path] = known
        return known.tag if known.equal else None

    def _look(self, key: str, path: Path, record: FileRecord) -> _Published | None:
        """Return what a key holds that an earlier call has seen, so that waiting does not upload again and again."""
        known = self._known.get(path)
        if known is None:
            return None
        stat = self._client.stat(key)
        if stat is None:
            return None
        return known if stat.tag == known.tag else self._compare(key, record)

    def _compare(self, key: str, record: FileRecord) -> _Published | None:
        stat = self._client.stat(key)
        if stat is None or stat.bytes != record.bytes:
            return None if stat is None else _Published(stat.tag, equal=False)
        try:
            found, tag = self._client.download(key, None, 2**63)
        except FileNotFoundError:
            return None
        return _Published(tag, equal=found == record)

    def discard(self, staged: Mapping[str, Path], committed: bool) -> None:  # noqa: ARG002
        """Remove staged files; another attempt may rely on published objects, which therefore stay."""
        for path in staged.values():
            path.unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                path.parent.rmdir()
            self._known.pop(path, None)
            if (lock := self._locks.pop(path, None)) is not None:
                os.close(lock)

    def sweep(self, folders: tuple[str, ...], everything: bool) -> None:  # noqa: ARG002
        """Remove the staging folders that dead processes of this user have left on this machine."""
        for folder in Path(tempfile.gettempdir()).glob(f"{_STAGED}*"):
            with contextlib.suppress(OSError):
                _remove_abandoned(folder)

    def _inside(self, folder: str) -> str:
        return (self._prefix + folder).rstrip("/")


def _remove_abandoned(folder: Path) -> None:
    """Remove a staging folder; raises OSError if it is another user's or its process lives."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(lock)
        if found.st_uid != os.getuid() or time.time() - found.st_mtime < _NEW_S:
            return
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    finally:
        os.close(lock)
