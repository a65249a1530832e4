"""``bevkd bench store``: what the cache costs, each figure as a ratio to what it is compared with in the same run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bevkd import config
from bevkd.cache.spec import load_spec
from bevkd.errors import ConfigError
from bevkd.progress import Progress
from pipeline.recipe import CacheRecipe, StudentRecipe, find, load_student
from pipeline.world import make_world

if TYPE_CHECKING:
    from rich.table import Table

    from pipeline.bench.reads import Reading

POINTS_SPEC, ALL_SPEC = "points", "all_methods"
SPECS = (ALL_SPEC, "x3kd", "unidistill", POINTS_SPEC, "boxes", "all_float16")


@dataclass(frozen=True)
class BenchSettings:
    """What is measured, and how thoroughly.

    Attributes:
        cache, student: recipes whose teacher and losses are measured; ``overrides`` are of the first.
        frames: of the data set, for bytes and gradients. Stage 1 takes ten times as many, so that its start and end
            weigh as little as in a real cache.
        rounds: of the reads, in each of which every store reads the same three samples.
        sections: any of ``SECTIONS``.
    """

    out: Path
    cache: str | None = None
    student: str = "nuscenes_student"
    overrides: Sequence[str] = ()
    frames: int = 2
    rounds: int = 15
    sections: Sequence[str] = field(default_factory=lambda: tuple(SECTIONS))


def bench_store(settings: BenchSettings, progress: Progress) -> dict[str, Any]:
    """Return the figures of every section as plain values.

    Raises:
        ConfigError: an unknown section.
    """
    if unknown := [name for name in settings.sections if name not in SECTIONS]:
        raise ConfigError(f"--only {', '.join(unknown)}: the sections are {', '.join(SECTIONS)}.")
    settings.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for name in SECTIONS:
        if name in settings.sections:
            progress.note(f"measuring: {name}")
            results |= SECTIONS[name](settings, progress)
    return results


def _reads(settings: BenchSettings, progress: Progress) -> dict[str, Any]:
    from pipeline.bench import peers, reads

    folder = _samples(settings, progress)
    readings = reads.measure(folder, settings.rounds, reads=3)
    found = {(reading.name, reading.pages, reading.processes): reading for reading in readings}
    return {
        "read_cpu_over_limit": found["bevkd", "warm", 1].cpu_over_limit,
        "peers": {
            name: found[name, "cold" if name in peers.COLD else "warm", 1].cpu_over_limit
            for name in peers.names()
            if name not in ("limit", "bevkd")
        },
        "peers_wall": {
            name: _wall_over_bevkd(found, name, "cold" if name in peers.COLD else "warm")
            for name in peers.names()
            if name not in ("limit", "bevkd")
        },
        "reads": [asdict(reading) for reading in readings],
    }


def _wall_over_bevkd(found: dict[tuple[str, str, int], Reading], name: str, pages: str) -> float:
    """Return how many times longer a store takes for a sample than bevkd does."""
    return found[name, pages, 1].wall_ms / found["bevkd", pages, 1].wall_ms


def _samples(settings: BenchSettings, progress: Progress) -> Path:
    """Return the folder of the samples that are read, written now unless this recipe's are there."""
    from pipeline.bench import reads

    recipe = _cache_recipe(settings, "x3kd", progress)
    folder = settings.out / f"samples-{config.digest(recipe)[:8]}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=settings.out) as scratch:
            (part := Path(scratch) / "samples").mkdir()
            reads.write_samples(part, recipe, 2 * settings.frames, progress)
            part.rename(folder)
    return folder


def _s3(settings: BenchSettings, progress: Progress) -> dict[str, Any]:
    from pipeline.bench import remote

    samples = _samples(settings, progress)
    with tempfile.TemporaryDirectory(dir=settings.out) as scratch:
        found = remote.measure(samples / "cache", Path(scratch))
    return {"s3_requests_per_read": found.requests_per_read, "s3": asdict(found)}


def _opening(settings: BenchSettings, progress: Progress) -> dict[str, Any]:
    from pipeline.bench import opening

    path = settings.out / "large" / "cache"
    path.parent.mkdir(exist_ok=True)
    opening.write_large_cache(path, opening.FRAMES, progress)
    found = opening.measure(path)
    return {"open_seconds": found.open_seconds, "opening": asdict(found)}


def _dask(settings: BenchSettings, progress: Progress) -> dict[str, Any]:
    from pipeline.schedule import dask_speedup

    del progress
    found = dask_speedup(settings.out / "dask")  # it writes a world of its own
    return {"dask_speedup_2": found.ratio, "dask": asdict(found)}


def _stage1(settings: BenchSettings, progress: Progress) -> dict[str, Any]:
    import torch

    from pipeline.overlap import encoding_threads, usable_cores
    from pipeline.plan import stage1_over_forward

    # A teacher on the CPU leaves the encoders' cores to them, as one on a GPU does; on all cores it could hide nothing.
    torch.set_num_threads(max(1, usable_cores() - encoding_threads()))
    recipe = _cache_recipe(settings, ALL_SPEC, progress)
    with tempfile.TemporaryDirectory(dir=settings.out) as scratch:
        found = stage1_over_forward(recipe, f"{scratch}/cache", 10 * settings.frames, progress)
    return {"stage1_over_forward": found.ratio, "stage1": asdict(found)}


def _sizes(settings: BenchSettings, progress: Progress) -> dict[str, Any]:
    from pipeline.fidelity import fidelity

    reports = {}
    for spec in SPECS:
        cache, student = _cache_recipe(settings, spec, progress), _student_recipe(settings, spec)
        at_outputs = spec not in (ALL_SPEC, POINTS_SPEC)  # the student's parameters take minutes
        reports[spec] = fidelity(cache, student, settings.frames, at_outputs, progress, only_spec=True)
    own = {spec: report.to_json()["rows"][0] for spec, report in reports.items()}
    cosines = dict(own[ALL_SPEC]["gradient_cosine"])
    cosines |= {f"{loss} (points)": value for loss, value in own[POINTS_SPEC]["gradient_cosine"].items()}
    return {
        "bytes_per_frame": {spec: row["bytes_per_frame"] for spec, row in own.items()},
        "fp32_over_stored": own[ALL_SPEC]["fp32_over_stored"],
        "gradient_cosine": cosines,
        "sizes": {spec: report.to_json() for spec, report in reports.items()},
    }


def _cache_recipe(settings: BenchSettings, spec: str, progress: Progress) -> CacheRecipe:
    """Return the recipe of the teacher; without one, the full-size CenterPoint with random weights over the world."""
    overrides = [*settings.overrides, f"spec={spec}"]
    if settings.cache is None:
        world = settings.out / "world"
        if not world.exists():
            make_world(world, "tiny", None, 0, progress)
        place = [f"data.root={world}", "data.version=v1.0-world", "data.split=world_train", "data.sweeps=1"]
        overrides = [*place, *overrides]
    return config.load(CacheRecipe, find(settings.cache or "nuscenes_cache"), overrides)


def _student_recipe(settings: BenchSettings, spec: str) -> StudentRecipe:
    """Return the student's recipe with those of our losses and terms that a cache of ``spec`` serves."""
    stored = load_spec(spec).signals
    weights = {"feature": 100, "relation": 40, "response": 10}
    needed = {"feature": ("bev_low", "points_low"), "relation": ("bev_high", "points_high"), "response": ("heatmap",)}
    terms = {term: weights[term] if any(name in stored for name in needed[term]) else 0 for term in weights}
    losses: list[dict[str, Any]] = []
    if any(terms.values()):
        source = "points" if "points_low" in stored else "maps"
        losses.append({"name": "unidistill", "source": source, **terms})
    if "boxes" in stored:
        losses.append({"name": "x3kd"})
    distill = json.dumps({"caches": {}, "losses": losses})
    return load_student(settings.student, ["evaluation=null", f"distill={distill}"])


def result_tables(result: dict[str, Any]) -> list[Table]:
    """Return the figures as tables: one of single figures, one of reads, one of sizes."""
    from rich.table import Table

    figures = Table("figure", "value", box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in FIGURES:
        if name in result:
            figures.add_row(name, f"{result[name]:.3f}")
    tables = [figures]
    if "reads" in result:
        columns = ("store", "page cache", "processes", "CPU ms", "wall ms", "CPU / limit", "wall / limit")
        reads = Table(*columns, box=None, padding=(0, 2, 0, 0), header_style="bold", title="\nreading one sample")
        for row in result["reads"]:
            times = (f"{row['cpu_ms']:.1f}", f"{row['wall_ms']:.1f}")
            ratios = (f"{row['cpu_over_limit']:.2f}", f"{row['wall_over_limit']:.2f}")
            reads.add_row(row["name"], row["pages"], str(row["processes"]), *times, *ratios)
        tables.append(reads)
    if "sizes" in result:
        losses = list(result["gradient_cosine"])
        sizes = Table("spec", "kB / frame", "fp32 / stored", "lowest gradient cosine", box=None, padding=(0, 2, 0, 0))
        sizes.title = f"\nbytes and gradients of {', '.join(losses)}"
        for spec, report in result["sizes"].items():
            row = report["rows"][0]
            lowest = min(value for value in row["gradient_cosine"].values() if value is not None)
            cosine = f"{lowest:.6f}" if report["at"] == "parameters" else ""
            sizes.add_row(spec, f"{row['bytes_per_frame'] / 1e3:.1f}", f"{row['fp32_over_stored']:.1f}", cosine)
        tables.append(sizes)
    return tables


FIGURES = (
    "read_cpu_over_limit",
    "s3_requests_per_read",
    "open_seconds",
    "dask_speedup_2",
    "fp32_over_stored",
    "stage1_over_forward",
)
"""Single figures, by key of the result."""

SECTIONS: dict[str, Callable[[BenchSettings, Progress], dict[str, Any]]] = {
    "reads": _reads,
    "s3": _s3,
    "opening": _opening,
    "dask": _dask,
    "sizes": _sizes,
    "stage1": _stage1,
}
"""What can be measured, in the order in which it is."""
