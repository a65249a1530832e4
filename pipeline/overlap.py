"""Writing blocks beside the teacher: it makes samples in the calling thread, others encode and write them."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from bevkd.cache.encoding import Value
from bevkd.cache.writer import CacheWriter

Stored = Mapping[str, Value]
"""The signals of one frame, on the CPU."""
Handover = Callable[[], Stored]
"""A sample that the writer's thread takes over from the teacher's: called there, it fetches the signals."""

_MOST_ENCODERS = 8
_BLOCKS_AT_ONCE = 2


def usable_cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encoding_threads() -> int:
    """Return how many threads encode: one core is left to the teacher, and a pool beyond eight has nothing to do."""
    return max(1, min(_MOST_ENCODERS, usable_cores() - 1))


class SampleQueue:
    """At most ``capacity`` samples between the teacher and the writer; each end learns at once when the other fails.

    Attributes:
        waited_s: seconds that :meth:`put` has waited for the writer.
        error: what went wrong at the writer.
    """

    def __init__(self, capacity: int) -> None:
        self.waited_s = 0.0
        self.error: BaseException | None = None
        self._capacity = capacity
        self._samples: deque[Handover] = deque()
        self._change = threading.Condition()
        self._closed = False
        self._turn = 0

    def put(self, sample: Handover) -> None:
        """Add a sample as soon as there is room; raises the writer's error instead if it has failed."""
        started = time.perf_counter()
        with self._change:
            self._change.wait_for(lambda: self.error is not None or len(self._samples) < self._capacity)
            self.check()
            self._samples.append(sample)
            self._change.notify_all()
        self.waited_s += time.perf_counter() - started

    def check(self) -> None:
        """Raise the writer's error, if it has failed."""
        if self.error is not None:
            raise self.error

    def take(self, turn: int, count: int) -> Iterator[Stored]:
        """Yield the ``count`` samples of the ``turn``-th block, when all of those of the blocks before are taken.

        Raises:
            EndOfSamples: the teacher or another block's writer has stopped before.
        """
        for taken in range(count):
            with self._change:
                self._change.wait_for(lambda: self._ended or (self._turn == turn and self._samples))
                if self._ended:
                    raise EndOfSamples
                sample = self._samples.popleft()
                self._turn += taken == count - 1
                self._change.notify_all()
            yield sample()

    @property
    def _ended(self) -> bool:
        return self.error is not None or (self._closed and not self._samples)

    def close(self, discard: bool = False) -> None:
        """Say that no more samples come; ``discard`` also drops those that wait."""
        with self._change:
            self._closed = True
            if discard:
                self._samples.clear()
            self._change.notify_all()

    def fail(self, error: BaseException) -> None:
        """Say that the writer takes no more samples."""
        with self._change:
            self.error = self.error or error
            self._samples.clear()
            self._change.notify_all()


class EndOfSamples(Exception):  # noqa: N818  the teacher's error is the one that is reported
    """The teacher stopped within a block."""


def write_overlapped(
    writer: CacheWriter, blocks: Sequence[int], samples: Iterable[Handover], queue: SampleQueue
) -> None:
    """Write ``blocks`` from ``samples``, which are made in this thread while earlier ones are encoded and written.

    A block is committed, and uploaded if the cache is remote, while the next one is being encoded. Bytes do not depend
    on the timing: a block gets exactly its own samples, in order. At any moment at most the queue's capacity waits,
    ``2 (encoding_threads() + 1)`` are being encoded, and one is being made. An error of any thread ends all of them and
    is raised here. If making samples fails, blocks whose samples are complete are still committed; an interrupt by the
    user drops them.
    """
    threads = encoding_threads()
    turns = enumerate(blocks)
    with ThreadPoolExecutor(threads, thread_name_prefix="encode") as pool:

        def write() -> None:
            try:
                while (next_block := next(turns, None)) is not None:
                    turn, block = next_block
                    own = queue.take(turn, len(writer.header.block_tokens(block)))
                    writer.write_block(block, own, pool, threads + 1)
                    deque(own, maxlen=0)  # another process has committed the block meanwhile: its samples stay unread
            except EndOfSamples:
                pass
            except BaseException as error:
                queue.fail(error)

        writers = [threading.Thread(target=write, name="write a block", daemon=True) for _ in range(_BLOCKS_AT_ONCE)]
        for thread in writers:
            thread.start()
        try:
            for sample in samples:
                queue.put(sample)
        except BaseException as error:
            queue.close(discard=not isinstance(error, Exception))
            raise
        else:
            queue.close()
        finally:
            for thread in writers:
                thread.join()
    queue.check()
