"""Object stores and processes: obstore does not survive a fork.

It has one runtime of threads per process. A child that uses what it inherited hangs, and makes the parent hang or
crash, because both wait on the same epoll. A forked child therefore never touches obstore: it asks a fresh process of
its own, which ends with it.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from bevkd.cache.object_client import Client

Address = tuple[str, str]
"""Scheme and bucket."""

_SETTINGS = ("AWS_", "AZURE_", "GOOGLE_", "BEVKD_STORE_")

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
            found = _clients[address, settings] = _new_client(address)
        return found


def _new_client(address: Address) -> Client:
    if _forked:
        return cast("Client", _Helper(address))
    from bevkd.cache.object_client import Client  # only now: a process that forks before has nothing to inherit

    return Client(address)


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
        code = f"from bevkd.cache.object_process import serve; serve({theirs.fileno()}, {self._address!r})"
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
    client = _new_client(address)
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
    """Forget what is the parent's."""
    global _forked, _lock
    _lock = threading.Lock()
    _forked = _forked or "obstore" in sys.modules
    _clients.clear()


os.register_at_fork(after_in_child=_after_fork)
