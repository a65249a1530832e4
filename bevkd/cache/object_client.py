"""Requests to an object store over obstore: retried, and with faults in words.

Use :func:`bevkd.cache.object_process.client_of`, which knows in which processes this may be used.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import obstore
from obstore.store import AzureStore, GCSStore, S3Store

from bevkd.cache.object_faults import Fault, fault_of, status_of
from bevkd.cache.object_process import Address
from bevkd.cache.store import Checksum, FileRecord

RETRY_S = 60.0
"""How long a request is repeated; the environment variable BEVKD_STORE_RETRY_S changes it."""
TIMEOUT_S = 30.0
"""How long a store may be silent before a request counts as lost; BEVKD_STORE_TIMEOUT_S changes it."""
FIRST_CONTACT_S = 10.0
"""The same as RETRY_S for a store that this process has not reached yet, so that a wrong address shows soon."""

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 5.0
_UPLOAD_BYTES_PER_S = 2**20
_PIECE = 2**22

Result = TypeVar("Result")


class Stat(NamedTuple):
    """Size of an object and the tag of its present content."""

    bytes: int
    tag: str


class Client:
    """The requests to one bucket, by whole keys. Failures raise OSError with ``strerror`` in words."""

    def __init__(self, address: Address) -> None:
        self._scheme, self._bucket = address
        self._retry_s = _seconds("BEVKD_STORE_RETRY_S", RETRY_S)
        self._timeout_s = _seconds("BEVKD_STORE_TIMEOUT_S", TIMEOUT_S)
        self._stores: dict[int, Any] = {}
        self._answered = False
        self._random = random.Random()  # not the global one, which training seeds

    def get(self, key: str, limit: int) -> bytes:
        """Return an object of at most ``limit`` bytes."""

        def request(_: int) -> bytes:
            found = obstore.get(self._store(), key)
            if found.meta["size"] > limit:
                raise _too_large(found.meta["size"], limit)
            return bytes(found.bytes())

        return self._retried(key, request)

    def get_range(self, key: str, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset`` on, fewer at the end of the object."""

        def request(_: int) -> bytes:
            try:
                return bytes(obstore.get_range(self._store(), key, start=offset, length=size))
            except obstore.exceptions.BaseError as error:
                if status_of(error) != 416:
                    raise
                return b""

        return self._retried(key, request) if size else b""

    def get_tail(self, key: str, size: int) -> tuple[bytes, int]:
        """Return the last ``size`` bytes of an object, and its size."""

        def request(_: int) -> tuple[bytes, int]:
            try:
                found = obstore.get(self._store(), key, options={"range": {"suffix": size}})
                return bytes(found.bytes()), found.meta["size"]
            except obstore.exceptions.NotSupportedError:  # Azure has no suffix ranges
                total = obstore.head(self._store(), key)["size"]
                start = max(total - size, 0)
                return bytes(obstore.get_range(self._store(), key, start=start, end=total)) if total else b"", total
            except obstore.exceptions.BaseError as error:
                if status_of(error) != 416 and "NotPartial" not in str(error):
                    raise
                if obstore.head(self._store(), key)["size"]:
                    raise
                return b"", 0  # an empty object has no last bytes

        return self._retried(key, request)

    def download(self, key: str, path: Path | None, limit: int) -> tuple[FileRecord, str]:
        """Write an object of at most ``limit`` bytes to ``path``, if there is one; return its record and tag."""

        def request(_: int) -> tuple[FileRecord, str]:
            found, checksum = obstore.get(self._store(), key), Checksum()
            if found.meta["size"] > limit:
                raise _too_large(found.meta["size"], limit)
            with open(path or os.devnull, "wb") as file:  # noqa: PTH123
                for piece in found.stream(min_chunk_size=_PIECE):
                    data = bytes(piece)
                    checksum.update(data)
                    file.write(data)
            return checksum.record, _tag(found.meta)

        return self._retried(key, request)

    def stat(self, key: str) -> Stat | None:
        """Return size and tag of an object, None if there is none."""

        def request(_: int) -> Stat:
            meta = obstore.head(self._store(), key)
            return Stat(meta["size"], _tag(meta))

        try:
            return self._retried(key, request)
        except FileNotFoundError:
            return None

    def list(self, prefix: str) -> tuple[dict[str, int], list[str]]:
        """Return the size of each object, and all folders, directly under ``prefix``, by name."""

        def request(_: int) -> tuple[dict[str, int], list[str]]:
            found = obstore.list_with_delimiter(self._store(), prefix or None)
            sizes = {meta["path"].rpartition("/")[2]: meta["size"] for meta in found["objects"]}
            return sizes, sorted(folder.rstrip("/").rpartition("/")[2] for folder in found["common_prefixes"])

        return self._retried(prefix, request)

    def put(self, key: str, content: bytes | Path, over: str | None = None) -> str | None:
        """Write an object and return its tag; None if it is there already, or has another tag than ``over``.

        Args:
            content: bytes, or the local file that holds them.
            over: tag of the object to replace; '' replaces any, None none.
        """
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        mode: Any = "create" if over is None else {"e_tag": over} if over else "overwrite"

        def request(attempt: int) -> str | None:
            try:
                return _tag(obstore.put(self._store(size), key, content, mode=mode, use_multipart=False))
            except (obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError) as error:
                if "ConditionalRequestConflict" in str(error):
                    raise obstore.exceptions.GenericError(str(error)) from error
                return self._own(key, content) if attempt else None

        return self._retried(key, request)

    def _own(self, key: str, content: bytes | Path) -> str | None:
        """Return the tag of an object if it holds ``content``: an earlier attempt got through, its answer did not."""
        found = obstore.get(self._store(), key)
        data = content if isinstance(content, bytes) else content.read_bytes()
        return _tag(found.meta) if found.meta["size"] == len(data) and bytes(found.bytes()) == data else None

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is no error."""
        with contextlib.suppress(FileNotFoundError):
            self._retried(key, lambda _: obstore.delete(self._store(), key))

    # ------------------------------------------------------------------------------------------ how

    def _store(self, upload: int = 0) -> Any:
        """Return obstore's client for reading, or one whose time limit suits an upload of so many bytes."""
        upload_s = upload // _UPLOAD_BYTES_PER_S
        if upload_s:
            upload_s = 1 << upload_s.bit_length()
        if upload_s not in self._stores:
            # A read may take long but not be silent. An upload is silent until it ends.
            reading = {"timeout": 3600.0, "read_timeout": self._timeout_s}
            limits = {"timeout": self._timeout_s + upload_s} if upload_s else reading
            limits["connect_timeout"] = min(self._timeout_s, FIRST_CONTACT_S / 2)
            texts = {name: f"{seconds * 1e3:.0f}ms" for name, seconds in limits.items()}
            self._stores[upload_s] = _open(self._scheme, self._bucket, texts)
        return self._stores[upload_s]

    def _retried(self, key: str, request: Callable[[int], Result]) -> Result:
        """Return what ``request`` returns; it is told how often it has failed, and repeated with growing pauses."""
        begin, pause, attempt = time.monotonic(), _FIRST_WAIT_S, 0
        while True:
            try:
                result = request(attempt)
            except (obstore.exceptions.BaseError, FileNotFoundError, ValueError) as error:
                fault = fault_of(error)
                self._answered = self._answered or status_of(error) is not None
                hasty = fault.unreachable and not self._answered
                patience = min(self._retry_s, FIRST_CONTACT_S) if hasty else self._retry_s
                spent = time.monotonic() - begin
                if not fault.transient or spent >= patience:
                    self._give_up(key, fault, attempt + 1, spent, error)
            else:
                self._answered = True
                return result
            time.sleep(min(pause * self._random.uniform(0.5, 1), patience - spent))
            pause, attempt = min(2 * pause, _LONGEST_WAIT_S), attempt + 1

    def _give_up(self, key: str, fault: Fault, attempts: int, spent: float, error: Exception) -> NoReturn:
        words = fault.words.format(bucket=f"bucket '{self._bucket}'")
        if fault.transient:
            limit = f"; BEVKD_STORE_RETRY_S={self._retry_s:g} is the limit" if spent >= self._retry_s else ""
            words += f" ({attempts} {'attempt' if attempts == 1 else 'attempts'} in {spent:.1f} s{limit})"
        raise OSError(fault.number, words, f"{self._scheme}://{self._bucket}/{key}") from error


def _open(scheme: str, bucket: str, limits: dict[str, str]) -> Any:
    """Return obstore's client of a bucket, configured by the usual environment variables."""
    options: Any = {"config": limits, "retry_config": {"max_retries": 0}}
    if scheme == "s3":
        return S3Store(bucket, **options, credential_provider=_profile())
    return GCSStore(bucket, **options) if scheme == "gs" else AzureStore(bucket, **options)


def _profile() -> Any:
    """Return credentials of the AWS profile, which obstore cannot read itself, if nothing in the environment is nearer.

    Raises:
        PermissionError: a profile is named, but boto3 is not installed.
    """
    nearer = ("AWS_ACCESS_KEY_ID", "AWS_SKIP_SIGNATURE", "AWS_WEB_IDENTITY_TOKEN_FILE")
    container = ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI")
    if any(os.environ.get(name) for name in (*nearer, *container)):
        return None
    files = (("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"), ("AWS_CONFIG_FILE", "~/.aws/config"))
    kept = any(Path(os.environ.get(name, default)).expanduser().exists() for name, default in files)
    if not kept and "AWS_PROFILE" not in os.environ:
        return None
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider

        return Boto3CredentialProvider()
    except ImportError as error:
        if "AWS_PROFILE" not in os.environ:
            return None
        words = (
            f"AWS_PROFILE={os.environ['AWS_PROFILE']} needs boto3 to be read: pip install boto3, or set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
        raise PermissionError(errno.EACCES, words) from error
    except Exception as error:  # boto3 has its own tree of errors
        words = f"the AWS profile cannot be used: {error}. Log in again, or correct ~/.aws"
        raise PermissionError(errno.EACCES, words) from error


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name, "")
    try:
        value = float(text or default)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise OSError(errno.EINVAL, f"{name}={text} is no number of seconds; correct or unset it")
    return value


def _tag(meta: Any) -> str:
    return str(meta.get("e_tag") or meta.get("version") or "")


def _too_large(size: int, limit: int) -> OSError:
    return OSError(errno.EFBIG, f"the object has {size:,} bytes, more than the {limit:,} it may have")
