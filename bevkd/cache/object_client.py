"""Requests to an object store over obstore: retried, with faults in words, and usable after a fork.

obstore has one runtime of threads per process, which a fork breaks: a child that uses it hangs, and makes the parent
hang or crash, because both wait on the same epoll. A forked child therefore never touches it: it asks a fresh process
of its own, which ends with it (:class:`_Helper`).
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import multiprocessing
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar, cast

from bevkd.cache.store import Checksum, FileRecord

RETRY_S = 60.0
"""How long a request is repeated; the environment variable BEVKD_STORE_RETRY_S changes it."""
TIMEOUT_S = 30.0
"""How long a store may be silent before a request counts as lost; BEVKD_STORE_TIMEOUT_S changes it."""
FIRST_CONTACT_S = 10.0
"""The same as RETRY_S for a store that this process has not reached yet, so that a wrong address shows soon."""

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 5.0
_UPLOAD_BYTES_PER_S = 2**20
_UPLOAD_STEP = 2**26
_PIECE = 2**22

Result = TypeVar("Result")
Address = tuple[str, str]
"""Scheme and bucket."""


class Stat(NamedTuple):
    """Size of an object and the tag of its present content."""

    bytes: int
    tag: str


@dataclasses.dataclass(frozen=True)
class _Fault:
    """What a failed request means; ``transient`` ones are repeated."""

    number: int
    words: str
    transient: bool = False
    unreachable: bool = False


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
        import obstore

        def request(_: int) -> bytes:
            found = obstore.get(self._store(), key)
            if found.meta["size"] > limit:
                raise _too_large(found.meta["size"], limit)
            return bytes(found.bytes())

        return self._retried(key, request)

    def get_range(self, key: str, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset`` on, fewer at the end of the object."""
        import obstore

        def request(_: int) -> bytes:
            try:
                return bytes(obstore.get_range(self._store(), key, start=offset, length=size))
            except obstore.exceptions.BaseError as error:
                if _status(error) != 416:
                    raise
                return b""

        return self._retried(key, request) if size else b""

    def get_tail(self, key: str, size: int) -> tuple[bytes, int]:
        """Return the last ``size`` bytes of an object, and its size."""
        import obstore

        def request(_: int) -> tuple[bytes, int]:
            try:
                found = obstore.get(self._store(), key, options={"range": {"suffix": size}})
                return bytes(found.bytes()), found.meta["size"]
            except obstore.exceptions.NotSupportedError:  # Azure has no suffix ranges
                total = obstore.head(self._store(), key)["size"]
                start = max(total - size, 0)
                return bytes(obstore.get_range(self._store(), key, start=start, end=total)) if total else b"", total
            except obstore.exceptions.BaseError as error:
                if _status(error) != 416 and "NotPartial" not in str(error):
                    raise
                if obstore.head(self._store(), key)["size"]:
                    raise
                return b"", 0  # an empty object has no last bytes

        return self._retried(key, request)

    def download(self, key: str, path: Path | None, limit: int) -> tuple[FileRecord, str]:
        """Write an object of at most ``limit`` bytes to ``path``, if there is one; return its record and tag."""
        import obstore

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
        import obstore

        def request(_: int) -> Stat:
            meta = obstore.head(self._store(), key)
            return Stat(meta["size"], _tag(meta))

        try:
            return self._retried(key, request)
        except FileNotFoundError:
            return None

    def list(self, prefix: str) -> tuple[dict[str, int], list[str]]:
        """Return the size of each object, and all folders, directly under ``prefix``, by name."""
        import obstore

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
        import obstore

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
        import obstore

        found = obstore.get(self._store(), key)
        data = content if isinstance(content, bytes) else content.read_bytes()
        return _tag(found.meta) if found.meta["size"] == len(data) and bytes(found.bytes()) == data else None

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is no error."""
        import obstore

        with contextlib.suppress(FileNotFoundError):
            self._retried(key, lambda _: obstore.delete(self._store(), key))

    # ------------------------------------------------------------------------------------------ how

    def _store(self, upload: int = 0) -> Any:
        """Return obstore's client for reading, or one whose time limit suits an upload of so many bytes."""
        step = -(-upload // _UPLOAD_STEP)
        if step not in self._stores:
            # A read may take long but not be silent. An upload is silent until it ends.
            upload_s = self._timeout_s + step * _UPLOAD_STEP / _UPLOAD_BYTES_PER_S
            limits = {"timeout": upload_s} if step else {"timeout": 3600.0, "read_timeout": self._timeout_s}
            limits["connect_timeout"] = min(self._timeout_s, FIRST_CONTACT_S / 2)
            self._stores[step] = _open(self._scheme, self._bucket, {k: f"{v * 1e3:.0f}ms" for k, v in limits.items()})
        return self._stores[step]

    def _retried(self, key: str, request: Callable[[int], Result]) -> Result:
        """Return what ``request`` returns; it is told how often it has failed, and repeated with growing pauses."""
        import obstore

        begin, pause, attempt = time.monotonic(), _FIRST_WAIT_S, 0
        while True:
            try:
                result = request(attempt)
            except (obstore.exceptions.BaseError, FileNotFoundError, ValueError) as error:
                fault = _fault_of(error)
                self._answered = self._answered or _status(error) is not None
                patience = self._retry_s if self._answered or not fault.unreachable else FIRST_CONTACT_S
                spent = time.monotonic() - begin
                if not fault.transient or spent + pause > min(patience, self._retry_s):
                    self._give_up(key, fault, attempt + 1, spent, error)
            else:
                self._answered = True
                return result
            time.sleep(pause * self._random.uniform(0.5, 1))
            pause, attempt = min(2 * pause, _LONGEST_WAIT_S), attempt + 1

    def _give_up(self, key: str, fault: _Fault, attempts: int, spent: float, error: Exception) -> NoReturn:
        words = fault.words.format(bucket=f"bucket '{self._bucket}'")
        if fault.transient:
            words += f" ({attempts} attempts in {spent:.0f} s; BEVKD_STORE_RETRY_S={self._retry_s:.0f} sets the limit)"
        raise OSError(fault.number, words, f"{self._scheme}://{self._bucket}/{key}") from error


def _open(scheme: str, bucket: str, limits: dict[str, str]) -> Any:
    """Return obstore's client of a bucket, configured by the usual environment variables."""
    from obstore.store import AzureStore, GCSStore, S3Store

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


# ---------------------------------------------------------------------------------------------- faults in words

_REFUSED = (
    ("NoSuchBucket", errno.ENOENT, "{bucket} does not exist; check the address, AWS_REGION and AWS_ENDPOINT_URL"),
    ("ExpiredToken", errno.EACCES, "the credentials for {bucket} have expired; renew them"),
    ("InvalidAccessKeyId", errno.EACCES, "{bucket} does not know the access key; check AWS_ACCESS_KEY_ID"),
    ("SignatureDoesNotMatch", errno.EACCES, "{bucket} refuses the secret key; check AWS_SECRET_ACCESS_KEY"),
    ("RequestTimeTooSkewed", errno.EACCES, "{bucket} refuses requests because this machine's clock is wrong; set it"),
    ("Missing AccessKeyId", errno.EACCES, "half of the credentials is missing; set AWS_ACCESS_KEY_ID"),
    ("Missing SecretAccessKey", errno.EACCES, "half of the credentials is missing; set AWS_SECRET_ACCESS_KEY"),
    ("Account must be specified", errno.EINVAL, "set AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY"),
    ("BadScheme", errno.EINVAL, "the endpoint is not https://; set AWS_ALLOW_HTTP=true if that is meant"),
    ("AuthorizationHeaderMalformed", errno.EINVAL, "{bucket} lies in another region; set AWS_REGION"),
    ("PermanentRedirect", errno.EINVAL, "{bucket} lies in another region; set AWS_REGION"),
    ("BareRedirect", errno.EINVAL, "{bucket} lies in another region; set AWS_REGION"),
    (
        "NotImplemented",
        errno.ENOTSUP,
        "{bucket} has no conditional writes (If-None-Match), which writing a cache needs",
    ),
)
_NO_CREDENTIALS = (
    "no credentials for {bucket} were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or for a public bucket "
    "AWS_SKIP_SIGNATURE=true"
)
_METADATA_SERVICES = ("169.254.169.254", "169.254.170.2", "metadata.google.internal")


def _status(error: Exception) -> int | None:
    match = re.search(r"status code: (\d{3})", str(error))
    return int(match[1]) if match else None


def _fault_of(error: Exception) -> _Fault:
    """Return what an exception of obstore means."""
    from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

    text, status = str(error), _status(error)
    for code, number, words in _REFUSED:
        if code in text:
            return _Fault(number, words)
    if any(service in text for service in _METADATA_SERVICES):
        return _Fault(errno.EACCES, _NO_CREDENTIALS, transient=status is None or status >= 500, unreachable=True)
    if isinstance(error, FileNotFoundError):
        return _Fault(errno.ENOENT, "there is no such object in {bucket}")
    if isinstance(error, (PermissionDeniedError, UnauthenticatedError)):
        return _Fault(
            errno.EACCES, "{bucket} denies access; check the credentials and their rights to read, write, list"
        )
    if status is not None:
        words = re.split(r"status code: ", text, maxsplit=1)[1].partition(":")[0].replace("{", "(").strip()
        busy = status >= 500 or status in (408, 429) or "ConditionalRequestConflict" in text
        return _Fault(
            errno.EIO, f"{{bucket}} answers {words}; {'try again later' if busy else 'check the address'}", busy
        )
    return _no_answer(text)


def _no_answer(text: str) -> _Fault:
    if "kind: Timeout" in text or "TimedOut" in text:
        return _Fault(
            errno.ETIMEDOUT, "{bucket} does not answer; check the network, or try again later", transient=True
        )
    if "kind: Connect" in text:
        cause = re.search(r'(?:message|error): "([^"{}]+)"', text)
        words = f"cannot be reached ({cause[1] if cause else 'no connection'}); check the network and the address"
        return _Fault(errno.EIO, f"{{bucket}} {words}", transient=True, unreachable=True)
    if any(f"kind: {kind}" in text for kind in ("Request", "Interrupted", "Body", "Decode")):
        return _Fault(errno.EIO, "the connection to {bucket} was cut; check the network", transient=True)
    line = text.partition("\n")[0].replace("{", "(").replace("}", ")")
    return _Fault(errno.EIO, f"{{bucket}}: {line[:300]}; check the address and the environment variables")


# ---------------------------------------------------------------------------------------------- processes

_clients: dict[tuple[object, ...], Client] = {}
_lock = threading.Lock()
_forked = False
"""Whether this process is a fork of one that had obstore loaded."""


def client_of(address: Address) -> Client:
    """Return this process's client of a bucket, as its present environment configures it."""
    settings = tuple(sorted(item for item in os.environ.items() if item[0].startswith(_SETTINGS)))
    with _lock:
        found = _clients.get((address, settings))
        if found is None:
            found = _clients[address, settings] = cast(Client, _Helper(address)) if _forked else Client(address)
        return found


_SETTINGS = ("AWS_", "AZURE_", "GOOGLE_", "BEVKD_STORE_")


class _Helper:
    """A client in a fresh process, for a forked one; has the methods of :class:`Client`."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._lock = threading.Lock()
        self._connection: Connection[Any, Any] | None = None

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *arguments: self._ask(name, arguments)

    def _ask(self, method: str, arguments: tuple[object, ...]) -> Any:
        with self._lock:
            try:
                if self._connection is None:
                    self._connection = self._start()
                self._connection.send((method, arguments))
                result, fault = self._connection.recv()
            except (EOFError, ConnectionError) as error:
                self._connection = None
                words = "the process that a forked worker reads through has ended; run again"
                raise OSError(errno.EIO, words, f"{self._address[0]}://{self._address[1]}") from error
        if fault is not None:
            raise OSError(*fault)
        return result

    def _start(self) -> Connection[Any, Any]:
        ours, theirs = multiprocessing.Pipe()
        code = f"from bevkd.cache.object_client import serve; serve({theirs.fileno()}, {self._address!r})"
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = os.environ | {"PYTHONPATH": paths}
        with theirs:
            # In a session of its own, so that Ctrl-C reaches it through its parent only.
            subprocess.Popen(
                [sys.executable, "-c", code], pass_fds=[theirs.fileno()], env=environment, start_new_session=True
            )
        return ours


def serve(handle: int, address: Address) -> None:
    """Serve the requests that come over the connection ``handle`` until it is closed."""
    client = Client(address)
    with Connection(handle) as connection, contextlib.suppress(EOFError, ConnectionError):
        while True:
            method, arguments = connection.recv()
            result = fault = None
            try:
                result = getattr(client, method)(*arguments)
            except OSError as error:
                fault = (error.errno, error.strerror, error.filename)
            connection.send((result, fault))


def _after_fork() -> None:
    """Forget what is the parent's. Its clients must never be freed here: that would close the parent's connections."""
    global _forked, _lock
    _lock = threading.Lock()
    _forked = _forked or "obstore" in sys.modules
    for client in _clients.values():
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(client))
    _clients.clear()


os.register_at_fork(after_in_child=_after_fork)
