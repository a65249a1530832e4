"""Files that are either whole or absent: temporary names, exclusive creation, synchronisation, clean-up.

A temporary file is named ``.tmp-<host>-<pid>-<random>-<final name>`` and lies beside its final name. Nothing of that
name enters the content of a cache.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bevkd.errors import CacheError

STALE_S = 24 * 3600.0
"""Age after which a temporary file of another host counts as abandoned."""

_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_TEMPORARY = re.compile(
    r"\.tmp-([0-9a-f]{8})-(\d{1,9})-[0-9a-f]{8}-(c\.\d+(?:\.0)*|\d+\.json|zarr\.json|manifest\.json)"
)


def local_path(uri: str | Path) -> Path:
    """Return the folder of a plain path or a ``file://`` address.

    Raises:
        CacheError: any other scheme.
    """
    text = str(uri)
    if isinstance(uri, Path) or "://" not in text:
        return Path(text).expanduser()
    parts = urlsplit(text)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return Path(unquote(parts.path))
    raise CacheError(
        f"cache '{text}': only local folders can be used so far; S3 comes with a later version. "
        "Give a path or a file:// address."
    )


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def temporary(final: Path) -> Path:
    """Return a new temporary name beside ``final``, owned by this process."""
    return final.with_name(f".tmp-{_host()}-{os.getpid()}-{secrets.token_hex(4)}-{final.name}")


def final_of(temp: Path) -> Path | None:
    """Return the final name of a temporary file, None if ``temp`` is no temporary name."""
    match = _TEMPORARY.fullmatch(temp.name)
    return temp.with_name(match[3]) if match else None


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def link(temp: Path, final: Path) -> bool:
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
    temp = temporary(final)
    try:
        with temp.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temp.unlink(missing_ok=True)
        raise
    return temp


def create(final: Path, data: bytes) -> bool:
    """Write a file that did not exist before, atomically; return False if it exists."""
    temp = _write(final, data)
    try:
        created = link(temp, final)
    finally:
        temp.unlink(missing_ok=True)
    sync_folder(final.parent)
    return created


def replace(final: Path, data: bytes) -> None:
    """Write a file atomically, over one that may exist."""
    while True:
        temp = _write(final, data)
        try:
            temp.replace(final)
            break
        except FileNotFoundError:  # another process has removed all temporary files, to seal the cache: write it again
            continue
        finally:
            temp.unlink(missing_ok=True)
    sync_folder(final.parent)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def claim_abandoned(folder: Path, everything: bool = False) -> Iterator[Path]:
    """Yield the abandoned temporary files of ``folder``, each renamed to a name of this process.

    Abandoned are files of dead processes of this host and files older than a day; with ``everything`` all are. The
    rename makes sure that of several processes only one handles a file.
    """
    for entry in sorted(folder.iterdir()):
        match = _TEMPORARY.fullmatch(entry.name)
        if match is None:
            continue
        try:
            dead = match[1] == _host() and not _alive(int(match[2]))
            if everything or dead or time.time() - entry.stat().st_mtime > STALE_S:
                yield entry.rename(temporary(entry.with_name(match[3])))
        except FileNotFoundError:
            continue
