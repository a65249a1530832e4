"""Copies of whole remote shards on a local disk: one request per shard and machine, later reads are reads of a file.

A copy is complete and checked once it has its name. Many processes share a folder without a daemon: the file that a
shard is downloaded to is locked by the process that does it, and a dead process holds no lock. The least recently
used copies make room for new ones; a process that has a copy open goes on reading it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from bevkd.cache.manifest import Manifest
from bevkd.cache.store import FileRecord, Store
from bevkd.errors import CacheError

DEFAULT_BYTES = 100 * 10**9
PATIENCE_S = 600.0
"""How long a process waits for another's download of a shard before it downloads the shard itself."""

_MARKER = "bevkd-local-copies"
_MARKED = b"Copies of cache shards, made by bevkd, which removes the least recently used. Delete them at any time.\n"
_NAME = re.compile(r"[0-9a-f]{16}-[a-z0-9_]+-\d+-[0-9a-f]{8}-(\d+)\.shard(\.[0-9a-f]{8})?(\.part)?")
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
_USED_S = 60.0
"""How often a process notes that it uses a copy."""
_POLL_S = (0.01, 0.2)
_OLD_S = 24 * 3600.0


def default_folder() -> Path:
    """Return where local copies go: ``$BEVKD_LOCAL_COPY``, else ``bevkd`` in the user's cache folder (XDG)."""
    if chosen := os.environ.get("BEVKD_LOCAL_COPY"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bevkd" / "shards"


@dataclasses.dataclass(frozen=True)
class LocalCopies:
    """A folder of local copies, shared by all caches and processes that name it; picklable.

    Attributes:
        folder: a new or empty folder, or one that was used for copies before.
        limit_bytes: how much all copies together may take.
    """

    folder: Path = dataclasses.field(default_factory=default_folder)
    limit_bytes: int = DEFAULT_BYTES

    def over(self, store: Store, manifest: Manifest) -> CopiedShards:
        """Return the shards of a cache, each copied on first use.

        Raises:
            CacheError: the folder holds other things or cannot be written, or the limit is below one block's shards.
        """
        largest = max(sum(entry.bytes for entry in record.arrays.values()) for record in manifest.records)
        if largest > self.limit_bytes:
            raise CacheError(
                f"local copies of {store.uri}: the shards of one block take {largest:,} bytes, but the limit of "
                f"{self.folder} is {self.limit_bytes:,} bytes. Raise the limit, or read without local copies."
            )
        self.prepare()
        return CopiedShards(self, store, manifest)

    def prepare(self) -> None:
        """Make the folder, or check that it is one for local copies; raises CacheError if it is not."""
        marker = self.folder / _MARKER
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if marker.exists():
                return
            if any(self.folder.iterdir()):
                raise CacheError(
                    f"the folder for local copies, {self.folder}, holds other files. Give a new or empty folder, for "
                    "instance with BEVKD_LOCAL_COPY."
                )
            marker.write_bytes(_MARKED)
        except OSError as error:
            raise CacheError(
                f"the folder for local copies, {self.folder}, cannot be used: {error.strerror}. Give another one, for "
                "instance with BEVKD_LOCAL_COPY."
            ) from error

    def make_room(self, size: int, part: Path) -> None:
        """Remove the least recently used copies until ``size`` more bytes fit for the download to ``part``.

        Downloads of other processes are left alone. They count with the size that they will have.
        """
        copies = sorted(copy for copy in self._copies() if copy[2] != part)
        total = sum(copy[1] for copy in copies)
        for _, bytes_, path, partial in copies:
            if total + size <= self.limit_bytes:
                return
            if not partial or _abandoned(path):
                path.unlink(missing_ok=True)
                total -= bytes_

    def _copies(self) -> Iterator[tuple[float, int, Path, bool]]:
        """Yield last use, size when complete, path, and whether it is a download, for each copy."""
        with os.scandir(self.folder) as entries:
            for entry in entries:
                match = _NAME.fullmatch(entry.name)
                if match is None or not entry.is_file(follow_symlinks=False):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    yield entry.stat().st_mtime, int(match[1]), Path(entry.path), match[3] is not None


class CopiedShards:
    """The shards of one cache through local copies: a :class:`bevkd.cache.shard.ShardSource`."""

    def __init__(self, copies: LocalCopies, store: Store, manifest: Manifest) -> None:
        self._copies, self._store, self._manifest = copies, store, manifest
        self._paths: dict[str, str] = {}
        self._used: dict[str, float] = {}

    def place(self, key: str) -> str:
        """Return the shard's name in the store."""
        return self._store.place(key)

    def read_range(self, key: str, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset`` on, fewer at the end of the shard."""
        handle = self._open(key)
        try:
            return os.pread(handle, size, offset)
        finally:
            os.close(handle)

    def read_tail(self, key: str, size: int) -> tuple[bytes, int]:
        """Return the last ``size`` bytes of a shard, and its size."""
        handle = self._open(key)
        try:
            total = os.fstat(handle).st_size
            return os.pread(handle, min(size, total), max(total - size, 0)), total
        finally:
            os.close(handle)

    def drop(self, key: str) -> None:
        """Remove the copy of a shard, because it is damaged: the next read fetches it again."""
        Path(self._path(key)).unlink(missing_ok=True)

    def _open(self, key: str) -> int:
        path = self._paths.get(key) or self._path(key)
        while True:
            try:
                handle = os.open(path, _READ)
            except FileNotFoundError:
                self._fetch(key, Path(path))  # may be evicted again before it is opened
                continue
            now = time.monotonic()
            if now > self._used.get(key, 0.0):
                self._used[key] = now + _USED_S
                with contextlib.suppress(OSError):
                    os.utime(path)
            return handle

    def _path(self, key: str) -> str:
        array, block, record = self._expected(key)
        name = f"{self._manifest.name[:16]}-{array}-{block}-{record.crc32c}-{record.bytes}.shard"
        self._paths[key] = str(self._copies.folder / name)
        return self._paths[key]

    def _expected(self, key: str) -> tuple[str, int, FileRecord]:
        array, _, name = key.partition("/")
        block = int(name.split(".")[1])
        return array, block, self._manifest.records[block].arrays[array]

    def _fetch(self, key: str, path: Path) -> None:
        """Make a copy, unless another process does so first."""
        self._copies.prepare()  # somebody may have cleared the disk
        lock = _lock(path)
        if lock is None:
            return
        part, handle = lock
        try:
            self._download(key, part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)

    def _download(self, key: str, part: Path, path: Path) -> None:
        wanted = self._expected(key)[2]
        try:
            self._copies.make_room(wanted.bytes, part)
            found = self._store.fetch(key, part, wanted.bytes)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            words = (
                f"the disk of the local copies, {self._copies.folder}, is full: a shard of {wanted.bytes:,} bytes does "
                f"not fit although the limit is {self._copies.limit_bytes:,}; lower the limit or make room"
            )
            raise OSError(error.errno, words, str(part)) from error
        if found != wanted:
            words = (
                f"what was downloaded has {found.bytes:,} bytes and CRC-32C {found.crc32c}, the manifest says "
                f"{wanted.bytes:,} and {wanted.crc32c}"
            )
            raise OSError(errno.EIO, words, self.place(key))
        part.replace(path)


def _lock(path: Path) -> tuple[Path, int] | None:
    """Return the file to download to and its locked handle; None if the copy is there by now.

    Without locks, or after waiting in vain, it is a file that no other process uses: two downloads do no harm.
    """
    part, pause, deadline = path.with_name(f"{path.name}.part"), _POLL_S[0], time.monotonic() + PATIENCE_S
    while not path.exists():
        handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(handle, part):
                if not path.exists():
                    return part, handle
                part.unlink()
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(handle)
                break
            time.sleep(pause)
            pause = min(2 * pause, _POLL_S[1])
        except OSError:
            os.close(handle)
            break
        os.close(handle)
    else:
        return None
    own = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    return own, os.open(own, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def _is_at(handle: int, path: Path) -> bool:
    """Return whether an open file still has this name: whoever held the lock before may have given it another."""
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except FileNotFoundError:
        return False


def _abandoned(part: Path) -> bool:
    """Return whether nobody downloads to this file any more."""
    try:
        handle = os.open(part, _READ)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return time.time() - os.fstat(handle).st_mtime > _OLD_S
    finally:
        os.close(handle)
