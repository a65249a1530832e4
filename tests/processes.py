"""Real processes that train together, forked from one that has imported the slow libraries."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 120.0

_SERVER = """
import importlib, json, os, signal, sys, time, traceback, warnings
warnings.simplefilter("ignore")
import accelerate, torch, torch._dynamo, torch.distributed.fsdp, torch.utils.tensorboard
torch.set_num_threads(1)
GRACE_S, modules = json.loads(sys.stdin.readline())
for module in modules:
    importlib.import_module(module)

def ended(children):
    codes, failed = {}, None
    while len(codes) < len(children):
        for child in set(children) - set(codes):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                codes[child] = os.waitstatus_to_exitcode(status)
                failed = failed or (time.monotonic() if codes[child] else None)
        if failed and time.monotonic() > failed + GRACE_S:
            for child in set(children) - set(codes):
                os.kill(child, signal.SIGTERM)
        time.sleep(0.01)
    return [codes[child] for child in children]

def become(order, place):
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(place)
    module, _, name = order["function"].partition(":")
    getattr(importlib.import_module(module), name)(*order["arguments"])

for line in sys.stdin:
    order, children = json.loads(line), []
    for place in order["places"]:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                become(order, place)
                code = 0
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    print(json.dumps(children), flush=True)
    print(json.dumps(ended(children)), flush=True)
"""

GRACE_S = 5.0
"""That the others have when one has failed, before they are told to end; torchrun gives them less."""


class Processes:
    """Starts functions in several processes that find each other as those of torchrun do; one call at a time."""

    def __init__(self, server: subprocess.Popen[str], output: Path) -> None:
        self._server, self.output = server, output
        self._pids: list[int] = []

    def start(self, count: int, function: str, *arguments: Any) -> list[int]:
        """Start ``module:function`` in ``count`` processes and return their ids."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        group = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        places = [group | {"RANK": rank, "LOCAL_RANK": rank} if count > 1 else {} for rank in range(count)]
        self.output.write_text("")
        order = {
            "function": function,
            "arguments": [str(each) if isinstance(each, Path) else each for each in arguments],
            "places": [{name: str(value) for name, value in place.items()} for place in places],
            "output": str(self.output),
        }
        self._tell(order)
        self._pids = self._answer()
        return self._pids

    def wait(self) -> list[int]:
        """Return the exit codes of the processes that were started last, once all have ended.

        As those of torchrun they are told to end when one has failed.
        """
        return self._answer()

    def run(self, count: int, function: str, *arguments: Any) -> None:
        """Start a function in several processes, all of which must succeed."""
        self.start(count, function, *arguments)
        codes = self.wait()
        assert codes == [0] * count, self.output.read_text()

    def _tell(self, value: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(value) + "\n")
        self._server.stdin.flush()

    def _answer(self) -> list[int]:
        assert self._server.stdout is not None
        ready, _, _ = select.select([self._server.stdout], [], [], PATIENCE_S)
        if not ready:
            for pid in self._pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"the processes hang:\n{self.output.read_text()}")
        answer: list[int] = json.loads(self._server.stdout.readline())
        return answer


@contextlib.contextmanager
def processes(folder: Path, modules: Sequence[str], **environment: str) -> Iterator[Processes]:
    """Yield processes that have ``modules`` imported; what they print goes to a file in ``folder``."""
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        bufsize=1,
    ) as server:
        started = Processes(server, folder / "output.txt")
        started._tell([GRACE_S, list(modules)])
        yield started
        assert server.stdin is not None
        server.stdin.close()


def wait_for(ready: Callable[[], bool]) -> None:
    """Return once ``ready`` is true."""
    deadline = time.monotonic() + PATIENCE_S
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def alive(process: int) -> bool:
    """Return whether there is such a process."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def command(*arguments: str) -> None:
    """Run the command line in this process."""
    import cli

    sys.argv = ["bevkd", *arguments]
    cli.main()
