"""A cache in a folder of a disk or network file system: files are whole or absent, and never replaced once committed.

A temporary file is named ``.tmp-<host>-<pid>-<random>-<final name>`` and lies beside its final name. Nothing of that
name enters the content of a cache. Shards are published with hard links, which replace nothing.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bevkd.cache.store import Checksum, FileRecord
from bevkd.errors import CacheError

STALE_S = 24 * 3600.0
"""Age after which a temporary file of another host counts as abandoned."""

_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_TEMPORARY = re.compile(
    r"\.tmp-([0-9a-f]{8})-(\d{1,9})-[0-9a-f]{8}-(c\.\d+(?:\.0)*|\d+\.json|zarr\.json|manifest\.json)"
)
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # the last for a named pipe, which would block
_PIECE = 2**22


def local_path(uri: str | Path) -> Path:
    """Return the folder of a plain path or a ``file://`` address.

    Raises:
        CacheError: the address names another machine.
    """
    text = str(uri)
    if isinstance(uri, Path) or "://" not in text:
        return Path(text).expanduser()
    parts = urlsplit(text)
    if parts.netloc in ("", "localhost"):
        return Path(unquote(parts.path))
    raise CacheError(f"cache '{text}' lies on machine '{parts.netloc}'. Give a file:/// address or a path.")


class LocalStore:
    """The files of a cache in ``folder``; symbolic links in it are refused."""

    remote = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.uri = str(folder)
        self._plain: set[str] = set()

    def place(self, key: str) -> str:
        """Return the path of a file."""
        return f"{self.uri}/{key}" if key else self.uri

    def read(self, key: str, limit: int) -> bytes:
        """Return a whole file."""
        with self._opened(key) as handle:
            size = _regular_size(handle)
            if size > limit:
                raise OSError(errno.EFBIG, f"the file has {size:,} bytes, more than the {limit:,} it may have")
            return os.pread(handle, size, 0)

    def read_range(self, key: str, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset`` on, fewer at the end of the file."""
        handle = os.open(self._path(key), _READ)
        try:
            return os.pread(handle, size, offset)
        finally:
            os.close(handle)

    def read_tail(self, key: str, size: int) -> tuple[bytes, int]:
        """Return the last ``size`` bytes of a file, and the size of the file."""
        with self._opened(key) as handle:
            total = _regular_size(handle)
            return os.pread(handle, min(size, total), max(total - size, 0)), total

    def fetch(self, key: str, path: Path, limit: int) -> FileRecord:
        """Copy a file to ``path`` and return its record."""
        with path.open("wb") as copy:
            return self._pieces(key, limit, copy.write)

    def record(self, key: str) -> FileRecord:
        """Return size and checksum of a file."""
        return self._pieces(key, 2**63, len)

    def _pieces(self, key: str, limit: int, take: object) -> FileRecord:
        assert callable(take)
        checksum, seen = Checksum(), 0
        with self._opened(key) as handle:
            _regular_size(handle)
            while data := os.pread(handle, _PIECE, seen):
                seen += len(data)
                if seen > limit:
                    raise OSError(errno.EFBIG, f"the file has more than the {limit:,} bytes it may have")
                checksum.update(data)
                take(data)
        return checksum.record

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the size of each file directly in a folder; symbolic links count as empty files."""
        try:
            entries = list(os.scandir(self._path(folder)))
        except FileNotFoundError:
            return {}
        return {
            entry.name: 0 if entry.is_symlink() else entry.stat(follow_symlinks=False).st_size
            for entry in entries
            if entry.is_symlink() or not entry.is_dir()
        }

    def folders(self) -> list[str]:
        """Return the names of the folders directly in this one."""
        with os.scandir(self.folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())

    def exists(self, key: str) -> bool:
        """Return whether there is such a file."""
        return os.path.lexists(self._path(key))

    def create(self, key: str, data: bytes) -> bool:
        """Write a file that did not exist before; return False if it exists."""
        final = self.folder / key
        temp = _write(final, data)
        try:
            created = _link(temp, final)
        finally:
            temp.unlink(missing_ok=True)
        _sync_folder(final.parent)
        return created

    def replace(self, key: str, data: bytes) -> None:
        """Write a file, over one that may exist."""
        final = self.folder / key
        while True:
            temp = _write(final, data)
            try:
                temp.replace(final)
                break
            except FileNotFoundError:  # another process has removed all temporary files, to seal: write it again
                continue
            finally:
                temp.unlink(missing_ok=True)
        _sync_folder(final.parent)

    def remove(self, key: str) -> None:
        """Remove a file if it is there."""
        (self.folder / key).unlink(missing_ok=True)

    def remove_folders(self, folders: tuple[str, ...]) -> None:
        """Remove those of the folders that are empty."""
        for folder in folders:
            with contextlib.suppress(FileNotFoundError):
                try:
                    (self.folder / folder).rmdir()
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise

    def empty(self) -> bool:
        """Return whether the folder holds nothing but temporary files, or does not exist."""
        return not self.folder.exists() or all(is_temporary(entry.name) for entry in self.folder.iterdir())

    def free_bytes(self) -> int | None:
        """Return the free space of the disk."""
        known = next(folder for folder in (self.folder, *self.folder.parents) if folder.exists())
        return shutil.disk_usage(known).free

    def prepare(self, folders: tuple[str, ...]) -> None:
        """Make the folders."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for folder in folders:
            (self.folder / folder).mkdir(exist_ok=True)
        _sync_folder(self.folder)

    def stage(self, key: str) -> Path:
        """Return a new temporary name beside the final one."""
        return _temporary(self.folder / key)

    def publish(self, staged: Mapping[str, Path], records: Mapping[str, FileRecord], seize: bool = False) -> bool:
        """Link staged files to their final names, in order.

        Raises:
            CacheError: with ``seize``: a link cannot replace a file, so a person has to.
        """
        for key, temp in staged.items():
            final = self.folder / key
            try:
                mine = _link(temp, final) or final.samefile(temp)
                if not mine and self.record(key) != records[key]:
                    if not seize:
                        return False
                    raise CacheError(
                        f"{self.uri} holds shards of another attempt with different content and no commit record: the "
                        "teacher is not deterministic, and that attempt hangs or was killed on another machine. Stop "
                        f"it, delete {', '.join(staged)} there, and run again."
                    )
            except FileNotFoundError:  # another process has withdrawn its shard, or sealed the cache and cleaned up
                return False
            _sync_folder(final.parent)
        return True

    def discard(self, staged: Mapping[str, Path], committed: bool) -> None:
        """Remove staged files, and their final names if they are links to them."""
        for key, temp in staged.items():
            if not committed:
                self._unlink_published(self.folder / key, temp)
            temp.unlink(missing_ok=True)

    def sweep(self, folders: tuple[str, ...], everything: bool) -> None:
        """Remove abandoned temporary files, and the shards an abandoned attempt has linked without a record."""
        for folder in folders:
            for temp in _claim_abandoned(self.folder / folder, everything):
                final = _final_of(temp)
                block = final.name.split(".")[1] if final is not None and final.name.startswith("c.") else None
                if final is not None and block is not None and not self.exists(f"commits/{block}.json"):
                    self._unlink_published(final, temp)
                temp.unlink(missing_ok=True)

    @staticmethod
    def _unlink_published(final: Path, temp: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            if final.samefile(temp):
                final.unlink()

    def _path(self, key: str) -> str:
        folder = key.rpartition("/")[0]
        if folder and folder not in self._plain:
            if (self.folder / folder).is_symlink():
                raise OSError(errno.ELOOP, "its folder is a symbolic link, which could lead anywhere")
            self._plain.add(folder)
        return f"{self.folder}/{key}"

    @contextlib.contextmanager
    def _opened(self, key: str) -> Iterator[int]:
        handle = os.open(self._path(key), _READ)
        try:
            yield handle
        finally:
            os.close(handle)


def _regular_size(handle: int) -> int:
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")
    return found.st_size


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _temporary(final: Path) -> Path:
    """Return a new temporary name beside ``final``, owned by this process."""
    return final.with_name(f".tmp-{_host()}-{os.getpid()}-{secrets.token_hex(4)}-{final.name}")


def _final_of(temp: Path) -> Path | None:
    """Return the final name of a temporary file, None if ``temp`` is no temporary name."""
    match = _TEMPORARY.fullmatch(temp.name)
    return temp.with_name(match[3]) if match else None


def is_temporary(name: str) -> bool:
    """Return whether this is the name of a temporary file."""
    return _TEMPORARY.fullmatch(name) is not None


def _sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _link(temp: Path, final: Path) -> bool:
    """Give a complete temporary file its final name as well; return False if that name is taken.

    Raises:
        CacheError: the file system has no hard links.
    """
    try:
        os.link(temp, final)
    except FileExistsError:
        return False
    except FileNotFoundError:  # another process has sealed the cache and removed all temporary files
        if final.exists():
            return False
        raise
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        raise CacheError(
            f"{final.parent} lies on a file system without hard links, on which a cache cannot be written safely. "
            "Write the cache to another file system and copy it there afterwards."
        ) from error
    return True


def _write(final: Path, data: bytes) -> Path:
    temp = _temporary(final)
    try:
        with temp.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temp.unlink(missing_ok=True)
        raise
    return temp


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _claim_abandoned(folder: Path, everything: bool = False) -> Iterator[Path]:
    """Yield the abandoned temporary files of ``folder``, each renamed to a name of this process.

    Abandoned are files of dead processes of this host and files older than a day; with ``everything`` all are. The
    rename makes sure that of several processes only one handles a file.
    """
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = _TEMPORARY.fullmatch(entry.name)
        if match is None:
            continue
        try:
            dead = match[1] == _host() and not _alive(int(match[2]))
            if everything or dead or time.time() - entry.stat().st_mtime > STALE_S:
                yield entry.rename(_temporary(entry.with_name(match[3])))
        except FileNotFoundError:
            continue
