"""Training runs as processes of their own, several at once: one that runs out of memory takes no other along."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from bevkd.errors import TrainingError, report
from bevkd.progress import Progress

_POLL_S, _PATIENCE_S = 0.3, 30.0
_TAIL_BYTES, _TAIL_LINES = 8192, 12


@dataclass(frozen=True)
class Job:
    """A command that trains a run.

    Attributes:
        run: folder in which it writes ``log.jsonl`` and, at the end, ``result.json``.
        log: file to which its output is appended.
        steps: of the whole run.
    """

    name: str
    command: tuple[str, ...]
    run: Path
    log: Path
    steps: int

    @property
    def step(self) -> int:
        """The last step that the run has logged, 0 before."""
        lines = _tail(self.run / "log.jsonl").splitlines()
        for line in reversed(lines):
            with contextlib.suppress(ValueError, KeyError, TypeError):  # cut off at either end
                return int(json.loads(line)["step"])
        return 0

    @property
    def finished(self) -> bool:
        """Whether the run has its result."""
        return (self.run / "result.json").is_file()

    @property
    def last_words(self) -> str:
        """The end of what the command wrote."""
        return "\n".join(_tail(self.log).splitlines()[-_TAIL_LINES:])


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def cuda_devices(device: str | None) -> list[str]:
    """Return the CUDA devices that processes of a recipe may share; none if it asks for another kind of device."""
    if device is not None and not device.startswith("cuda"):
        return []
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]


def run_jobs(
    jobs: Sequence[Job],
    at_once: int,
    devices: Sequence[str],
    progress: Progress,
    done: Callable[[Job], str] = lambda job: job.name,
) -> list[Job]:
    """Run all jobs, so many at once, and return those that failed.

    When this process is stopped (Ctrl-C, SIGTERM), it stops the jobs as Ctrl-C would. If it is killed, they train on; a
    second call then refuses to start until they have ended.

    Args:
        devices: CUDA devices to share, each job sees one of them; none leaves the choice to the jobs.
        done: what to say of a job that has finished.

    Raises:
        TrainingError: another process runs one of the jobs.
    """
    with contextlib.ExitStack() as stack:
        logs = {job.name: stack.enter_context(log) for job, log in zip(jobs, _locked(jobs), strict=True)}
        stack.enter_context(_interrupted_by_sigterm())
        running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}
        stack.callback(_stop, running)
        waiting, failed = deque(jobs), list[Job]()
        shown = sum(job.step for job in jobs)
        with progress.task("training", sum(job.steps for job in jobs), "step", done=shown) as task:
            while waiting or running:
                for slot in range(at_once):
                    if slot not in running and waiting:
                        job = waiting.popleft()
                        device = devices[slot % len(devices)] if devices else None
                        running[slot] = job, _start(job, logs[job.name], at_once, device)
                time.sleep(_POLL_S)
                for slot, (job, process) in list(running.items()):
                    if process.poll() is not None:
                        del running[slot]
                        failed += [] if job.finished and not process.returncode else [job]
                        progress.note(done(job) if job.finished else f"{job.name} failed, see {job.log}")
                steps = sum(job.step for job in jobs)
                task.advance(steps - shown, runs_left=len(waiting) + len(running))
                shown = steps
    return failed


def _locked(jobs: Sequence[Job]) -> Iterator[BinaryIO]:
    """Yield the log of each job, opened and locked; the process that writes it holds the lock until it ends.

    Raises:
        TrainingError: names all jobs that another process runs.
    """
    files, taken = [], []
    for job in jobs:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        files.append(job.log.open("ab"))
        try:
            fcntl.flock(files[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken.append(str(job.run))
    if taken:
        for file in files:
            file.close()
        advice = "Wait until they have ended, or end them, then run the same command again"
        raise report(TrainingError, f"processes of an earlier call still train these runs. {advice}:", taken)
    yield from files


def _start(job: Job, log: BinaryIO, at_once: int, device: str | None) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    if at_once > 1:
        from pipeline.overlap import usable_cores

        environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // at_once)))
    # In a session of its own, so that Ctrl-C reaches it through this process alone, and once.
    return subprocess.Popen(
        job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
    )


def _stop(running: dict[int, tuple[Job, subprocess.Popen[bytes]]]) -> None:
    """Interrupt what still runs, and kill what does not end on it."""
    processes = [process for _, process in running.values()]
    for process in processes:
        process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + _PATIENCE_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Have SIGTERM, by which clusters stop a job, do what Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
