"""Stage 1 on dask workers. dask schedules the numbers of blocks and nothing else; this module alone imports it.

A task names a recipe, a cache and a block. A worker process builds teacher, source and writer at its first task, keeps
them, and answers with a few figures: no array ever goes through the scheduler. A block is committed by the process that
made it, so lost workers, repeated tasks and a dead scheduler cost blocks in progress and nothing else.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from bevkd.cache.local import local_path
from bevkd.cache.manifest import read_header
from bevkd.cache.store import open_store
from bevkd.cache.writer import CacheWriter
from bevkd.errors import BevkdError, CacheError, report
from bevkd.progress import Progress, Silent, Task
from pipeline.cache_teacher import CacheSummary, Share, Stage, check_space, frames_of, prepare, summarise, write_blocks
from pipeline.jobs import cuda_devices
from pipeline.overlap import usable_cores
from pipeline.recipe import CacheRecipe
from pipeline.world import make_world

if TYPE_CHECKING:
    from distributed import Client, Future

RETRIES = 2
"""How often a block is tried again after an error that is not bevkd's own, e.g. one of the machine."""

_SPARE = 16
_IGNORE_INTERRUPTS = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
"""Ctrl-C reaches all processes of a terminal; the one that has started the workers ends them."""
_HOPELESS = 8
_PATIENCE_S = 30.0

# ---------------------------------------------------------------------------------------------- in a worker

_ONE_AT_A_TIME = threading.Lock()
"""A worker with several threads would otherwise run one teacher on several blocks at once."""


def cache_block(recipe: str, uri: str, teacher: str, block: int) -> dict[str, Any]:
    """Write one block in a worker process and return what it took.

    Args:
        recipe: as :func:`portable` makes it.
        uri: of the cache, whose header says the rest.
        teacher: fingerprint of the teacher that began the cache.

    Returns:
        ``block``, ``frames``, ``seconds``, ``worker`` (host and process), and ``error`` if bevkd refuses the block.
    """
    started = time.perf_counter()
    answer: dict[str, Any] = {"block": block, "frames": 0, "worker": f"{socket.gethostname()}:{os.getpid()}"}
    try:
        with _ONE_AT_A_TIME:
            stage, writer = _opened(recipe, uri, teacher)
            write_blocks(stage, writer, [block], Silent(), processes=False)
        answer["frames"] = frames_of(writer, [block])
    except BevkdError as error:  # trying again would not help
        answer["error"] = f"{type(error).__name__}: {error}"
    return answer | {"seconds": time.perf_counter() - started}


@lru_cache(maxsize=1)
def _opened(recipe: str, uri: str, teacher: str) -> tuple[Stage, CacheWriter]:
    """Return the parts and the writer of this worker process, built at its first block of a cache."""
    begun = read_header(open_store(uri))
    stage = prepare(CacheRecipe.model_validate_json(recipe), None, Silent())
    if stage.teacher.identity.fingerprint != teacher:
        raise CacheError(
            f"the teacher that {socket.gethostname()} builds is not the one that began {uri}: its weights or its "
            "architecture differ. Give all machines the same weight file and the same version of bevkd."
        )
    # A recorded config may hold paths as its recipe gave them; here they are absolute.
    header = stage.header.model_copy(update={"tokens": begun.tokens, "config": begun.config})
    stage = replace(stage, header=header)
    return stage, stage.open_writer(uri)


def greet(uri: str) -> str:
    """Return the version of bevkd in a worker that can read the header of the cache.

    Raises:
        CacheError: it cannot.
    """
    read_header(open_store(uri))
    return importlib.metadata.version("bevkd")


# ---------------------------------------------------------------------------------------------- in the command


def cache_on_workers(
    recipe: CacheRecipe,
    out: str,
    limit: int | None,
    progress: Progress,
    workers: int = 1,
    scheduler: str | None = None,
    space_check: bool = True,
) -> CacheSummary:
    """Write the cache of ``recipe`` to ``out`` with dask workers; see ``cache_teacher`` for the common arguments.

    Args:
        workers: start so many worker processes on this machine, spread over its GPUs.
        scheduler: address of a dask.distributed scheduler whose workers are used instead.

    Raises:
        CacheError: blocks failed (they are named), or workers cannot be reached or used.
    """
    # This process only needs to know what the teacher is; it may run where no GPU is.
    stage = prepare(recipe, limit, progress, device=torch.device("cpu"))
    stage.check_files(Share())
    writer = stage.open_writer(out)
    pending = writer.pending()
    if pending and space_check:
        check_space(writer, out)
    teacher, source = stage.teacher.identity.fingerprint, stage.source
    del stage
    if pending:
        uri = absolute_uri(out)
        with ExitStack() as stack:
            own = scheduler is None
            if scheduler is None:
                scheduler = stack.enter_context(local_cluster(workers, cuda_devices(recipe.device)))
            client = stack.enter_context(connect(scheduler))
            check_workers(client, uri, progress)
            work = partial(cache_block, portable(recipe), uri, teacher)
            failed = _cache_all(client, work, writer, pending, progress, 0 if own else _SPARE)
        _report(out, writer, failed)
    return summarise(source, writer, out, frames_of(writer, pending), progress)


def portable(recipe: CacheRecipe) -> str:
    """Return a recipe as JSON that means the same in every folder: its paths are absolute."""

    def absolute(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: absolute(child) for key, child in value.items()}
        if isinstance(value, list | tuple):
            return [absolute(child) for child in value]
        return str(value.absolute()) if isinstance(value, Path) else value

    values = absolute(recipe.model_dump())
    spec = Path(recipe.spec)
    if spec.suffix in (".yaml", ".yml") or len(spec.parts) > 1:
        values["spec"] = str(spec.absolute())
    if recipe.device and recipe.device.startswith("cuda"):
        values["device"] = "cuda"  # which one is for the worker's CUDA_VISIBLE_DEVICES to say
    return CacheRecipe.model_validate(values).model_dump_json()


def absolute_uri(uri: str) -> str:
    """Return the address of a cache as it is understood in every folder."""
    return uri if open_store(uri).remote else str(local_path(uri).absolute())


@contextmanager
def local_cluster(workers: int, gpus: Sequence[str] = ()) -> Iterator[str]:
    """Run a scheduler and ``workers`` worker processes of one thread on this machine; yields the address.

    Args:
        gpus: CUDA device of each worker in turn; empty for CPU workers, which share the cores evenly.
    """
    import dask
    from distributed import Nanny, Scheduler, SpecCluster

    quiet = logging.CRITICAL  # errors come back with their block
    specs = {
        index: {
            "cls": Nanny,
            "options": {
                "nthreads": 1,
                "memory_limit": 0,  # the queue of samples bounds it; what is pinned is not for dask to judge
                "env": {"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} if gpus else {},
                "resources": {"GPU": 1} if gpus else {},
                "dashboard": False,
                "silence_logs": quiet,
                "preload": [_IGNORE_INTERRUPTS],
            },
        }
        for index in range(workers)
    }
    # A forward pass may hold the interpreter for minutes, e.g. while CUDA kernels are loaded: no heartbeat then. The
    # environment still goes before the number of threads.
    settings = {
        "distributed.scheduler.worker-ttl": "1 hour",
        "distributed.nanny.pre-spawn-environ.OMP_NUM_THREADS": max(1, usable_cores() // workers),
    }
    options = {"host": "127.0.0.1", "port": 0, "dashboard": False, "dashboard_address": "127.0.0.1:0"}
    with (
        dask.config.set(settings),
        SpecCluster(workers=specs, scheduler={"cls": Scheduler, "options": options}, silence_logs=quiet) as cluster,
    ):
        yield cluster.scheduler_address


@contextmanager
def connect(address: str) -> Iterator[Client]:
    """Yield a client of the scheduler at ``address``.

    Raises:
        CacheError: none answers there.
    """
    from distributed import Client

    try:
        client = Client(address, timeout=_PATIENCE_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise CacheError(
            f"no dask scheduler answers at {address}: {error}. Start one with 'dask scheduler', or correct --scheduler."
        ) from error
    with client:
        yield client


def check_workers(client: Client, uri: str, progress: Progress) -> None:
    """Wait for a worker, and check that it runs this bevkd and sees the cache.

    Raises:
        CacheError: it does not.
    """
    future = client.submit(greet, uri, pure=False)
    while True:
        try:
            version = future.result(timeout=_PATIENCE_S)
            break
        except TimeoutError:
            progress.note(f"waiting for a worker of {client.scheduler_info(n_workers=0)['address']}")
        except BevkdError as error:
            raise CacheError(
                f"a worker cannot see the cache that this process has begun: {error} All machines must see --out "
                "under the same address: a shared file system, or an object store with credentials on each of them."
            ) from error
        except Exception as error:
            raise CacheError(
                f"a worker cannot run bevkd: {type(error).__name__}: {error}. Install the same version on all machines."
            ) from error
    own = importlib.metadata.version("bevkd")
    if version != own:
        raise CacheError(f"workers run bevkd {version}, this process {own}. Install the same version on all machines.")


def _cache_all(
    client: Client,
    work: Callable[[int], dict[str, Any]],
    writer: CacheWriter,
    pending: Sequence[int],
    progress: Progress,
    spare: int,
) -> dict[int, str]:
    """Have all ``pending`` blocks written; returns what went wrong, by block."""
    failed: dict[int, str] = {}
    frames = len(writer.header.tokens)
    with progress.task("caching", frames, "frame", done=frames - frames_of(writer, pending)) as task:
        for block, error in run_blocks(client, work, pending, task, spare):
            failed[block] = error
            progress.note(f"block {block} failed: {error}")
    return failed


def run_blocks(
    client: Client,
    work: Callable[[int], dict[str, Any]],
    blocks: Sequence[int],
    task: Task,
    spare: int = 0,
    only: Sequence[str] = (),
) -> Iterator[tuple[int, str]]:
    """Yield each block that fails, with the reason, while the workers do ``work`` on all of them.

    dask blames a lost worker on everything that it had been given. Blocks that it has given up for that are therefore
    tried once more at the end, one by one: only what kills its worker then has failed.

    Args:
        spare: blocks with the scheduler beyond one per worker; an adaptive cluster grows because of them.
        only: addresses of the workers to use; empty for all.
    """
    options: dict[str, Any] = {"pure": False, "retries": RETRIES}
    options |= {"resources": {"GPU": 1}} if _advertise_gpus(client) else {}
    options |= {"workers": list(only)} if only else {}
    blamed = []
    for block, answer in _answers(client, work, blocks, spare, options):
        if answer.get("killed"):
            blamed.append(block)
        elif "error" in answer:
            yield block, answer["error"]
        else:
            task.advance(answer["frames"], workers=_workers(client))
    for block in blamed:
        _, answer = next(_answers(client, work, [block], 0, options))
        if "error" in answer:
            yield block, answer["error"]
        else:
            task.advance(answer["frames"], workers=_workers(client))


def _answers(
    client: Client, work: Callable[[int], dict[str, Any]], blocks: Sequence[int], spare: int, options: dict[str, Any]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each block with its answer; if the first eight fail and none succeeds, the rest is not tried."""
    from distributed import as_completed

    waiting, running, succeeded, failures = deque(blocks), dict[str, int](), 0, 0

    def submit() -> list[Future[Any]]:
        hopeless = failures >= _HOPELESS and not succeeded
        room = 0 if hopeless or client.status != "running" else max(1, _workers(client)) + spare - len(running)
        taken = [waiting.popleft() for _ in range(min(room, len(waiting)))]
        futures = [client.submit(work, block, **options) for block in taken]
        running.update(zip((str(future.key) for future in futures), taken, strict=True))
        return futures

    finished = as_completed(submit(), loop=client.loop)
    for future in finished:
        block, answer = running.pop(future.key), _answer(future)
        succeeded, failures = succeeded + ("error" not in answer), failures + ("error" in answer)
        yield block, answer
        finished.update(submit())
    for block in waiting:
        yield block, {"error": "not tried"}


def _answer(future: Future[Any]) -> dict[str, Any]:
    from distributed import KilledWorker

    try:
        answer: dict[str, Any] = future.result()
    except KilledWorker as error:
        place = error.last_worker.address
        return {"error": f"every worker that tried it died (out of memory?), the last one at {place}", "killed": True}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return answer


def _workers(client: Client) -> int:
    """Return the number of workers that the scheduler has now, which an adaptive cluster changes."""
    return len(client.scheduler_info(n_workers=-1)["workers"])


def _advertise_gpus(client: Client) -> bool:
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return any("GPU" in worker["resources"] for worker in workers)


def _report(out: str, writer: CacheWriter, failed: dict[int, str]) -> None:
    missing = set(writer.pending())
    faults = [f"block {block}: {error}" for block, error in sorted(failed.items()) if block in missing]
    if faults:
        shown = [*faults[:20], *([f"and {len(faults) - 20} more"] if len(faults) > 20 else [])]
        raise report(
            CacheError,
            f"{len(faults)} of {writer.header.blocks} blocks of {out} are missing, all others are committed. Once the "
            "cause is gone, run the same command again: it writes only what is missing.",
            shown,
        )


# ---------------------------------------------------------------------------------------------- what it is worth


@dataclass(frozen=True)
class Speedup:
    """Seconds that one and several workers took for the same blocks."""

    workers: int
    one_seconds: float
    all_seconds: float

    @property
    def ratio(self) -> float:
        """How many times faster the workers are together."""
        return self.one_seconds / self.all_seconds


def dask_speedup(folder: Path, seconds_per_frame: float = 0.2, workers: int = 2, scenes: int = 16) -> Speedup:
    """Return how much faster ``workers`` local workers are than one, on a teacher that sleeps.

    Sleeping takes no core, so that this is the cost of scheduling, storing and committing, not of a small machine.
    Both runs use workers that have built their teacher already, as all but the first blocks of a real cache do;
    starting the processes is left out, sealing the cache is not.

    Args:
        folder: where a world of ``scenes`` short drives (kept for the next call) and the two caches go.
    """
    recipe = _sleeping(folder, seconds_per_frame, scenes)
    with (
        tempfile.TemporaryDirectory(dir=folder) as caches,
        local_cluster(workers) as address,
        connect(address) as client,
    ):
        client.wait_for_workers(workers)
        every = list(client.scheduler_info(n_workers=-1)["workers"])
        took = [_time_blocks(client, recipe, f"{caches}/{len(some)}", some) for some in (every[:1], every)]
    return Speedup(workers, *took)


def _time_blocks(client: Client, recipe: CacheRecipe, uri: str, workers: Sequence[str]) -> float:
    stage = prepare(recipe, None, Silent())
    writer = stage.open_writer(uri)
    given = (portable(recipe), uri, stage.teacher.identity.fingerprint)
    client.gather([client.submit(_warm_up, *given, workers=[worker], pure=False) for worker in workers])
    started = time.perf_counter()
    for block, error in run_blocks(client, partial(cache_block, *given), writer.pending(), Silent(), only=workers):
        raise CacheError(f"block {block} of the trial failed: {error}")
    writer.seal()
    return time.perf_counter() - started


def _warm_up(recipe: str, uri: str, teacher: str) -> None:
    _opened(recipe, uri, teacher)


def _sleeping(folder: Path, seconds_per_frame: float, scenes: int) -> CacheRecipe:
    """Return a recipe of small made-up maps in blocks of two frames."""
    folder.mkdir(parents=True, exist_ok=True)
    make_world(folder / "world", "tiny", scenes, 0, Silent())
    encodings = {"bev_low": "uint8", "bev_high": "uint8", "heatmap": "logit8", "boxes": "boxes"}
    spec = {"name": "trial", "block": 2, "signals": {name: {"encoding": kind} for name, kind in encodings.items()}}
    (folder / "trial.yaml").write_text(yaml.safe_dump(spec), encoding="utf-8")
    grid = {"x_m": [-25.6, 25.6], "y_m": [-25.6, 25.6], "cell_m": 1.6}
    teacher = {"name": "synthetic", "grid": grid, "bev_low": 8, "bev_high": 8, "seconds_per_frame": seconds_per_frame}
    data = {"name": "nuscenes", "root": str(folder / "world"), "version": "v1.0-world", "split": "world_train"}
    values = {"data": data, "teacher": teacher, "spec": str(folder / "trial.yaml"), "loaders": 0, "device": "cpu"}
    return CacheRecipe.model_validate(values)
