"""An S3 server on this machine for tests and benchmarks: counts requests, delays them, and fails when told to.

It runs moto's S3 in a process of its own, so that neither its CPU time nor its threads are the caller's::

    with LocalS3(latency_s=0.02) as server:
        os.environ.update(server.environment)
        uri = server.bucket("caches") + "/my-cache"
        ...
        print(server.counts())
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Literal, Self

from bevkd.errors import BevkdError

FaultKind = Literal["slow_down", "error", "error_after", "close", "close_after", "stall", "truncate", "answer"]
FAULT_KINDS: tuple[FaultKind, ...] = (
    "slow_down",
    "error",
    "error_after",
    "close",
    "close_after",
    "stall",
    "truncate",
)
"""The faults of a healthy store under load: 503 SlowDown; 500; 500 although the request was served; connection closed
before or after serving it; no answer for ``stall_s``; half of the answer. ``answer`` gives any other refusal."""

_ERRORS = {"slow_down": (503, "SlowDown"), "error": (500, "InternalError"), "error_after": (500, "InternalError")}


@dataclasses.dataclass(frozen=True)
class Fault:
    """What goes wrong, and at which requests.

    Attributes:
        at: the number of the first failing request since :meth:`LocalS3.reset`; the first request has number 0.
        times: how many requests fail from then on; None means all.
        method: only requests of this method (``GET``) count and fail; '' means any.
        key: only requests whose path contains this text count and fail.
        stall_s: how long ``stall`` says nothing before it closes the connection.
        status: HTTP status of ``answer``.
        code: S3 error code of ``answer``.
    """

    kind: FaultKind
    at: int = 0
    times: int | None = 1
    method: str = ""
    key: str = ""
    stall_s: float = 30.0
    status: int = 500
    code: str = "InternalError"


@dataclasses.dataclass(frozen=True)
class Request:
    """One request as the server saw it; ``key`` is bucket and key, or bucket and listed prefix."""

    method: str
    key: str
    status: int

    @property
    def kind(self) -> str:
        """What the request is about: shard, record, metadata, manifest, list or other."""
        name = self.key.rpartition("/")[2]
        if self.method == "LIST":
            return "list"
        if name in ("manifest.json", "zarr.json"):
            return "manifest" if name == "manifest.json" else "metadata"
        if "/commits/" in self.key:
            return "record"
        return "shard" if name.startswith("c.") else "other"


class LocalS3:
    """A running server; a context manager.

    Args:
        latency_s: how much longer every request takes.

    Raises:
        BevkdError: moto is not installed.
    """

    def __init__(self, latency_s: float = 0.0) -> None:
        self.latency_s = latency_s

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", __name__, str(self.latency_s)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._lock = threading.Lock()
        answer = self._read()
        if "error" in answer:
            self._stop()
            raise BevkdError(answer["error"])
        self.endpoint = f"http://127.0.0.1:{answer['port']}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables that lead obstore and boto3 to this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "local",
            "AWS_SECRET_ACCESS_KEY": "local",
            "AWS_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
        }

    def bucket(self, name: str) -> str:
        """Return the address of a new bucket."""
        self._ask("bucket", name)
        return f"s3://{name}"

    def fail(self, *faults: Fault) -> None:
        """Set the faults to come, in place of earlier ones, and start to count anew."""
        self._ask("fail", [dataclasses.asdict(fault) for fault in faults])

    def reset(self) -> None:
        """Forget all faults and all counts."""
        self.fail()

    def requests(self) -> list[Request]:
        """Return the requests since the last reset, in the order of their arrival."""
        return [Request(**request) for request in self._ask("requests")]

    def counts(self) -> dict[str, int]:
        """Return how many requests there were since the last reset, by method and kind (``GET shard``)."""
        return dict(Counter(f"{request.method} {request.kind}" for request in self.requests()))

    def _ask(self, verb: str, argument: Any = None) -> Any:
        with self._lock:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps([verb, argument]) + "\n")
            self._process.stdin.flush()
            answer = self._read()
        if isinstance(answer, dict) and "error" in answer:
            raise BevkdError(answer["error"])
        return answer

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise BevkdError("the local S3 server has stopped; its own messages are above. Run again.")
        return json.loads(line)

    def _stop(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


# ---------------------------------------------------------------------------------------------- the server's process

Environ = dict[str, Any]
StartResponse = Callable[..., Any]


class _Front:
    """A WSGI application before moto's that counts, delays and fails requests."""

    def __init__(self, moto: Callable[[Environ, StartResponse], Iterable[bytes]], latency_s: float) -> None:
        self._moto = moto
        self._latency_s = latency_s
        self._lock = threading.Lock()
        self._faults: list[tuple[Fault, int]] = []
        self.seen: list[dict[str, Any]] = []

    def fail(self, faults: list[Fault]) -> None:
        with self._lock:
            self._faults = [(fault, 0) for fault in faults]
            self.seen = []

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        method, key = environ["REQUEST_METHOD"], environ["PATH_INFO"].lstrip("/")
        if method == "GET" and "list-type=" in environ["QUERY_STRING"]:
            method = "LIST"
        request = {"method": method, "key": key, "status": 0}
        fault = self._register(request)
        time.sleep(self._latency_s)
        if fault is None:
            status, headers, body = self._serve(environ)
            request["status"] = status
            return _answer(start_response, status, headers, body)
        return self._fail(fault, environ, start_response)

    def _register(self, request: dict[str, Any]) -> Fault | None:
        """Count a request and return the fault that hits it."""
        hit = None
        with self._lock:
            self.seen.append(request)
            for index, (fault, count) in enumerate(self._faults):
                if fault.method in ("", request["method"]) and fault.key in request["key"]:
                    self._faults[index] = (fault, count + 1)
                    if count >= fault.at and (fault.times is None or count < fault.at + fault.times):
                        hit = hit or fault
        return hit

    def _serve(self, environ: Environ) -> tuple[int, list[tuple[str, str]], bytes]:
        found: list[Any] = []

        def start_response(status: str, headers: list[tuple[str, str]], _: Any = None) -> None:
            found[:] = [int(status.split()[0]), headers]

        body = b"".join(self._moto(environ, start_response))
        return found[0], found[1], body

    def _fail(self, fault: Fault, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        code, name = _ERRORS.get(fault.kind, (fault.status, fault.code))
        refusal = f"<Error><Code>{name}</Code><Message>Injected.</Message></Error>".encode()
        if fault.kind in ("slow_down", "error", "answer"):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            return _answer(start_response, code, [], refusal)
        if fault.kind == "stall":
            time.sleep(fault.stall_s)
        if fault.kind in ("stall", "close"):
            return _close(environ)
        status, headers, body = self._serve(environ)
        if fault.kind == "error_after":
            return _answer(start_response, code, [], refusal)
        if fault.kind == "truncate" and body:
            return _half(environ, start_response, status, headers, body)
        return _close(environ)


def _answer(start_response: StartResponse, status: int, headers: list[tuple[str, str]], body: bytes) -> Iterable[bytes]:
    names = {name.lower() for name, _ in headers}
    start_response(
        f"{status} -", headers if "content-length" in names else [*headers, ("Content-Length", str(len(body)))]
    )
    return [body]


def _close(environ: Environ) -> Iterable[bytes]:
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionAbortedError


def _half(
    environ: Environ, start_response: StartResponse, status: int, headers: list[tuple[str, str]], body: bytes
) -> Iterator[bytes]:
    _answer(start_response, status, headers, body)
    yield body[: len(body) // 2]
    yield from _close(environ)


def _serve(latency_s: float) -> None:
    try:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server
    except ImportError as error:
        missing = f"the local S3 server needs the package '{error.name}'. Install it with: pip install 'bevkd[bench]'"
        print(json.dumps({"error": missing}), flush=True)  # noqa: T201  the protocol with the parent process
        return
    front = _Front(DomainDispatcherApplication(create_backend_app), latency_s)
    server = make_server("127.0.0.1", 0, front, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(json.dumps({"port": server.port}), flush=True)  # noqa: T201
    for line in sys.stdin:  # ends with the parent process, whichever way that dies
        verb, argument = json.loads(line)
        answer: Any = None
        if verb == "bucket":
            answer = _make_bucket(server.port, argument)
        elif verb == "fail":
            front.fail([Fault(**fault) for fault in argument])
        else:
            answer = list(front.seen)
        print(json.dumps(answer), flush=True)  # noqa: T201


def _make_bucket(port: int, name: str) -> dict[str, str] | None:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("PUT", f"/{name}", headers={"Content-Length": "0"})
    response = connection.getresponse()
    code = re.search("<Code>(.*)</Code>", response.read().decode())
    connection.close()
    if response.status == 200:
        return None
    return {"error": f"the bucket '{name}' cannot be made: {code[1] if code else response.status}. Give another name."}


if __name__ == "__main__":
    import logging

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    _serve(float(sys.argv[1]))
