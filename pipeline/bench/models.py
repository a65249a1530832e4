"""``bevkd bench models``: time, memory, parameters and FLOPs of detectors; lift-splat beside its naive form."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bevkd.config import digest, load, read_yaml
from bevkd.data.collate import Batch
from bevkd.data.source import FrameSource
from bevkd.errors import ConfigError
from bevkd.models.detector import Detector, DetectorConfig, channels_last, view_of
from bevkd.progress import Progress
from bevkd.testing.frames import MadeUpFrames
from bevkd.testing.tools import batch_of
from pipeline.bench import lift_splat
from pipeline.bench.memory import in_new_process, peak_mb
from pipeline.parts import check_files, choose_device, open_source
from pipeline.recipe import CacheRecipe, StudentRecipe, find, shipped

if TYPE_CHECKING:
    from rich.table import Table

POINTS_PER_SWEEP = 28_000
"""LiDAR returns in a made-up sweep: 280,000 of ten sweeps, of which 257,000 fall into the grid of nuScenes."""

CAMERAS, IMAGE_SIZE, RADAR_RETURNS = 6, (900, 1600), 900
"""Of a made-up frame, as in nuScenes."""

LARGE_BATCH = 4


@dataclass(frozen=True)
class ModelSettings:
    """What is measured, and how thoroughly.

    Attributes:
        recipes: whose detectors are measured; none means all that ship with bevkd, each detector once.
        overrides: of these recipes.
        data: take the first frames of each recipe's own data set; otherwise made-up frames of that size.
        rounds: of each timing; the median counts.
        device: None takes a GPU if there is one.
        lift_splat: measure lift-splat too, at this size.
    """

    recipes: Sequence[str] = ()
    overrides: Sequence[str] = ()
    data: bool = False
    rounds: int = 5
    device: str | None = None
    lift_splat: lift_splat.Size | None = lift_splat.FULL_SIZE


@dataclass(frozen=True)
class Job:
    """One detector to measure in a process of its own."""

    recipe: str
    overrides: tuple[str, ...]
    data: bool
    rounds: int
    device: str | None


@dataclass(frozen=True)
class Cost:
    """What a detector costs.

    Attributes:
        input: what it saw.
        forward_ms: of one frame, from the batch on the device to the head's maps; the median.
        forward_ms_batch_4: of a batch of four; None on a CPU.
        peak_mb: memory of a forward pass of one frame above that of weights and batch, 1e6 bytes; None where the system
            cannot tell.
        parameters: numbers that are trained.
        flops: additions and multiplications of a forward pass of one frame in convolutions and matrix products, sparse
            ones by the pairs of voxels that they join. Not counted: what is linear in its input.
    """

    input: str
    device: str
    forward_ms: float
    forward_ms_batch_4: float | None
    peak_mb: float | None
    parameters: int
    flops: int


def bench_models(settings: ModelSettings, progress: Progress) -> dict[str, Any]:
    """Return the cost of every detector, by recipe, and of lift-splat, as plain values.

    Raises:
        ConfigError: a recipe has no detector.
    """
    found: dict[str, Any] = {}
    names = settings.recipes or list(_with_detector())
    with progress.task("detectors", len(names), "detector") as task:
        for name in names:
            progress.note(f"measuring: {name}")
            job = Job(name, tuple(settings.overrides), settings.data, settings.rounds, settings.device)
            found[name] = asdict(in_new_process(measure, job))
            task.advance()
    result: dict[str, Any] = {"detectors": found}
    if settings.lift_splat is not None:
        progress.note("measuring: lift-splat")
        result["lift_splat"] = lift_splat.compare(settings.lift_splat, settings.rounds, choose_device(settings.device))
    return result


def _with_detector() -> Iterator[str]:
    """Yield the shipped recipes that describe a detector, one for each detector."""
    values = {name: read_yaml(find(name)) for name in shipped()}
    detectors = {name: each["detector"] for name, each in values.items() if "detector" in each}
    detectors |= {name: found for name, each in values.items() if (found := each.get("teacher", {}).get("detector"))}
    seen = set()
    for name, detector in detectors.items():
        if digest(detector) not in seen:
            seen.add(digest(detector))
            yield name


def measure(job: Job) -> Cost:
    """Return what the detector of a recipe costs, with random weights."""
    recipe = _load(job)
    device, detector_config = choose_device(job.device or recipe.device), _detector_of(recipe, job.recipe)
    torch.manual_seed(0)
    data: Any = recipe.data
    detector = Detector(detector_config, tuple(data.classes)).to(device).eval()
    channels_last(detector)
    source = _source(recipe, detector_config, job.data)
    batch, large = (
        batch_of(source, view_of(detector_config), [source.tokens[i % len(source.tokens)] for i in range(size)])
        for size in (1, LARGE_BATCH)
    )
    batch = batch.to(device)
    with torch.inference_mode():
        cuda = device.type == "cuda"
        return Cost(
            input=_described(batch, job.data),
            device=torch.cuda.get_device_name(device) if cuda else f"cpu, {torch.get_num_threads()} threads",
            peak_mb=peak_mb(lambda: detector(batch), device),
            forward_ms=median_ms(lambda: detector(batch), job.rounds, device),
            forward_ms_batch_4=_large_ms(detector, large, job.rounds, device) if cuda else None,
            parameters=sum(parameter.numel() for parameter in detector.parameters()),
            flops=count_flops(detector, batch),
        )


def _large_ms(detector: Detector, batch: Batch, rounds: int, device: torch.device) -> float:
    batch = batch.to(device)
    return median_ms(lambda: detector(batch), rounds, device)


def _load(job: Job) -> CacheRecipe | StudentRecipe:
    path = find(job.recipe)
    if not {"detector", "teacher"} & set(read_yaml(path)):
        raise _no_detector(job.recipe)
    model: type[CacheRecipe | StudentRecipe] = CacheRecipe if "teacher" in read_yaml(path) else StudentRecipe
    return load(model, path, job.overrides)


def _detector_of(recipe: CacheRecipe | StudentRecipe, name: str) -> DetectorConfig:
    config = recipe.detector if isinstance(recipe, StudentRecipe) else getattr(recipe.teacher, "detector", None)
    if config is None:
        raise _no_detector(name)
    return config


def _no_detector(name: str) -> ConfigError:
    return ConfigError(f"recipe '{name}' describes no detector. Give one with 'detector' or 'teacher.detector'.")


def _source(recipe: CacheRecipe | StudentRecipe, config: DetectorConfig, data: bool) -> FrameSource:
    """Return where the batch comes from."""
    if data:
        source = open_source(recipe.data, config.sensors)
        check_files(source, source.tokens[:LARGE_BATCH], config.sensors)
        return source
    own: Any = recipe.data
    sweeps = getattr(own, "sweeps", 1)
    return MadeUpFrames(
        tuple(own.classes),
        config.grid,
        frames=LARGE_BATCH,
        points=POINTS_PER_SWEEP * sweeps,
        sweeps=sweeps,
        radar=RADAR_RETURNS,
        cameras=CAMERAS,
        image_size=IMAGE_SIZE,
    )


def _described(batch: Batch, data: bool) -> str:
    parts = [f"sample {batch.tokens[0]}" if data else "made up"]
    if batch.points is not None:
        parts.append(f"{len(batch.points):,} points")
    if batch.images is not None:
        _, cameras, _, height, width = batch.images.shape
        parts.append(f"{cameras} images of {height} x {width}")
    if batch.radar is not None:
        parts.append(f"{len(batch.radar):,} radar returns")
    return ", ".join(parts)


def median_ms(work: Callable[[], object], rounds: int, device: torch.device) -> float:
    """Return the median wall time of ``work``, which has run before."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


# ---------------------------------------------------------------------------------------------- operations


def count_flops(model: nn.Module, batch: Any) -> int:
    """Return the additions and multiplications of a forward pass in convolutions and matrix products.

    Sparse convolutions multiply one vector by one matrix per pair of voxels that they join. spconv has some of these
    done by torch and others not, so all are counted here and none there. A product with a sparse matrix, which is how
    maps are splatted, takes less than a thousandth of the network around it and is not counted.
    """
    sparse: dict[str, int] = {}
    hooks = [
        module.register_forward_hook(lambda module, _, output, name=name: _note_pairs(sparse, name, module, output))
        for name, module in model.named_modules()
        if hasattr(module, "indice_key")
    ]
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mm: _dense_product})
    try:
        with counter:
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    counts, root = counter.get_flop_counts(), type(model).__name__
    by_torch = sum(sum(counts.get(f"{root}.{name}", {}).values()) for name in sparse)
    return int(counter.get_total_flops()) - by_torch + sum(sparse.values())


def _note_pairs(counts: dict[str, int], name: str, module: Any, output: Any) -> None:
    found = output.find_indice_pair(module.indice_key)
    if hasattr(found, "pair_fwd"):  # the algorithm of GPUs
        joined = int((found.pair_fwd >= 0).sum())
    elif module.subm:  # pairs are symmetric, of which one half is kept, and every voxel is its own neighbour
        joined = len(output.features)
        if found is not None:
            joined += 2 * int(found.indice_pair_num[: len(found.indice_pair_num) // 2].sum())
    else:
        joined = int(found.indice_pair_num.sum())
    counts[name] = counts.get(name, 0) + 2 * joined * module.in_channels * module.out_channels


def _dense_product(first: Tensor, second: Tensor, *_: Any, **__: Any) -> int:
    dense = first.layout == second.layout == torch.strided
    return 2 * first.shape[0] * first.shape[1] * second.shape[1] if dense else 0


_dense_product._get_raw = True  # type: ignore[attr-defined]  # torch then passes tensors, whose layout can be asked


def result_tables(result: dict[str, Any]) -> list[Table]:
    """Return a table of the detectors and one of lift-splat."""
    from rich.table import Table

    columns = ("detector", "forward ms", "batch 4", "peak MB", "parameters", "GFLOPs", "input")
    detectors = Table(*columns, box=None, padding=(0, 2, 0, 0), header_style="bold", caption_justify="left")
    for name, row in result["detectors"].items():
        figures = (_figure(row["forward_ms"]), _figure(row["forward_ms_batch_4"]), _figure(row["peak_mb"]))
        detectors.add_row(name, *figures, f"{row['parameters'] / 1e6:.1f} M", f"{row['flops'] / 1e9:.1f}", row["input"])
    detectors.caption = next((f"on {row['device']}" for row in result["detectors"].values()), "")
    tables = [detectors]
    if "lift_splat" in result:
        tables.append(lift_splat.table(result["lift_splat"]))
    return tables


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"
