"""``bevkd bench train``: the same student plain, distilled from a cache, and with the teacher within each step."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import yaml

from bevkd.cache.spec import SignalSpec, load_spec
from bevkd.config import digest, parse
from bevkd.data.augment import draw_view
from bevkd.data.join import TrainingDataset
from bevkd.distill.base import signals_of
from bevkd.errors import ConfigError
from bevkd.models.detector import Detector
from bevkd.progress import Progress, Silent
from bevkd.training.loader import batches
from bevkd.training.objective import Objective
from pipeline.bench.memory import in_new_process
from pipeline.cache_teacher import cache_teacher
from pipeline.online import sensor_keys, train_online
from pipeline.overlap import usable_cores
from pipeline.parts import choose_device, open_source
from pipeline.recipe import CacheRecipe, StudentRecipe, load_cache, load_student
from pipeline.train_student import prepare_student, train_student
from pipeline.training import training_dataset
from pipeline.world import make_world

if TYPE_CHECKING:
    from rich.table import Table

    from bevkd.viz.image import Picture

Mode = Literal["plain", "cached", "online"]
MODES: tuple[Mode, ...] = get_args(Mode)
FIGURES = ("step_seconds", "peak_memory_bytes", "data_wait_fraction")
_SPECS = ("all_methods", "points", "instances")
_WORLD_SCENES = 4
_LOADERS = 2
_HALVINGS = 3


@dataclass(frozen=True)
class TrainSettings:
    """What is measured, and how thoroughly.

    Attributes:
        out: folder for the cache, and for the world of ``recipe`` None; kept for the next run.
        recipe: of a student with ``distill``; None takes the demo's, on a small world.
        teacher: ``cache-teacher`` recipe; None builds an untrained LiDAR detector around the student's BEV encoder and
            head, which takes as long as a trained one.
        overrides: of the student's recipe.
        frames: of the data set that are cached and trained on, again and again.
        steps: of each run, of which the median counts.
        rounds: of the three runs, one after the other, so that what disturbs the machine disturbs all of them.
    """

    out: Path
    recipe: str | None = None
    teacher: str | None = None
    overrides: Sequence[str] = ()
    frames: int = 4
    steps: int = 8
    rounds: int = 3


@dataclass(frozen=True)
class Loading:
    """How fast frames come without a student, from files that the system holds in memory.

    Attributes:
        frames_per_second: of two loader processes.
        student_frames_per_second: that the cached run took.
        image_decode_ms: of one frame, all its cameras, one process.
        cache_read_ms: of one frame, the arrays that the losses read, one process.
    """

    frames_per_second: float
    student_frames_per_second: float
    over_student: float
    image_decode_ms: float
    cache_read_ms: float


def bench_train(settings: TrainSettings, progress: Progress) -> dict[str, Any]:
    """Return the figures of each mode, ratios to plain and those of the loader, as plain values.

    Each run has a process of its own. Ratios are medians over the rounds, each within its round.

    Raises:
        ConfigError: the recipe has no ``distill``, or its data set cannot be narrowed to some frames.
    """
    settings.out.mkdir(parents=True, exist_ok=True)
    student, teacher = _prepare(settings, progress)
    in_new_process(_write_cache, teacher, _cache_of(settings.out, teacher))
    found: dict[Mode, list[dict[str, float]]] = {mode: [] for mode in MODES}
    with progress.task("training", settings.rounds * len(MODES), "run") as task:
        for _ in range(settings.rounds):
            for mode in MODES:
                found[mode].append(in_new_process(run_once, _of_mode(student, teacher, mode, settings.out), mode))
                task.advance()
    progress.note("measuring: the loader")
    medians = {
        figure: {mode: statistics.median(run[figure] for run in found[mode]) for mode in MODES} for figure in FIGURES
    }
    consumed = student.training.batch_size * student.training.accumulation / medians["step_seconds"]["cached"]
    loading = in_new_process(measure_loading, _of_mode(student, teacher, "cached", settings.out), consumed)
    return {
        **medians,
        "ratios": {
            figure: {
                mode: statistics.median(
                    run[figure] / plain[figure] for run, plain in zip(found[mode], found["plain"], strict=True)
                )
                for mode in ("cached", "online")
            }
            for figure in FIGURES[:2]
        },
        "loader": asdict(loading),
        "recipe": settings.recipe or "demo_student_distilled",
        "device": _described(student),
        "batch_size": student.training.batch_size,
        "steps": settings.steps,
        "rounds": settings.rounds,
    }


# ---------------------------------------------------------------------------------------------- what is compared


def _prepare(settings: TrainSettings, progress: Progress) -> tuple[StudentRecipe, CacheRecipe]:
    """Return the recipes of student and teacher on the same few frames, all of them labelled."""
    overrides = list(settings.overrides)
    if settings.recipe is None:
        world = settings.out / "world"
        make_world(world, "demo", _WORLD_SCENES, 0, progress)
        overrides = [f"data.root={world}", *overrides]
    student = load_student(settings.recipe or "demo_student_distilled", overrides)
    if student.distill is None or not student.distill.losses:
        raise ConfigError("the recipe has no 'distill' with losses, so there is nothing to compare. Add them.")
    given = load_cache(settings.teacher, []) if settings.teacher else None
    data = _frames(student, given, settings.frames)
    training = student.training.model_copy(
        update={
            "steps": settings.steps,
            "log_every": settings.steps,
            "checkpoint_every": 0,
            "workers": min(student.training.workers, usable_cores()),
        }
    )
    student = student.model_copy(update={"data": data, "evaluation": None, "training": training})
    if given is None:
        return student, _untrained(student, settings.out)
    return student, given.model_copy(update={"data": data, "device": student.device, "batch_size": 1, "loaders": 0})


def _frames(student: StudentRecipe, given: CacheRecipe | None, count: int) -> Any:
    """Return the student's data narrowed to its first frames, with the sensor settings of the teacher's recipe."""
    fields = type(student.data).model_fields
    if absent := [key for key in ("tokens", "labels") if key not in fields]:
        raise ConfigError(
            f"data set '{student.data.name}' has no key {' and '.join(absent)}, which chooses the frames to repeat. "
            "Measure on nuScenes or KITTI."
        )
    theirs = {} if given is None else {key: getattr(given.data, key) for key in sensor_keys(given.data) & set(fields)}
    data = student.data.model_copy(update={**theirs, "labels": 1.0})
    return data.model_copy(update={"tokens": open_source(data, frozenset()).tokens[:count]})


def _untrained(student: StudentRecipe, out: Path) -> CacheRecipe:
    """Return the recipe of a voxel detector that looks like the student but for its encoder."""
    assert student.distill is not None  # _prepare has seen to it
    detector = student.detector.scaled()
    channels = int(Detector(detector, tuple(student.data.classes)).encoder.out_channels)
    low, high = detector.grid.z_m
    edge = detector.grid.cell_m / 2**_HALVINGS
    encoder = {
        "name": "voxel",
        # Halved as often as x and y, and once more, 40 slices leave two, which share the channels.
        "voxel_m": [edge, edge, (high - low) / 40],
        "channels": [16, 32, 64, 128],
        "out_channels": channels // 2,
    }
    spec = {"name": "bench", "block": 1, "signals": _encodings(signals_of(student.distill.losses))}
    path = out / "spec.yaml"
    path.write_text(yaml.safe_dump(spec), encoding="utf-8")
    values = {
        "data": student.data.model_dump(mode="json"),
        "teacher": {"name": "detector", "detector": {**detector.model_dump(mode="json"), "encoder": encoder}},
        "spec": str(path),
        "device": student.device,
        "loaders": 0,
    }
    return parse(CacheRecipe, values, "the recipe of an untrained teacher")


def _encodings(wanted: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return how the shipped specs store the signals that losses read, however ill that suits a random teacher."""
    known: dict[str, SignalSpec] = {}
    for name in reversed(_SPECS):
        known |= load_spec(name).signals
    read = dict.fromkeys(signal for signals in wanted.values() for signal in signals)
    return {name: known[name].model_copy(update={"max_error": 1.0}).model_dump(mode="json") for name in read}


def _of_mode(student: StudentRecipe, teacher: CacheRecipe, mode: Mode, out: Path) -> StudentRecipe:
    """Return the student's recipe of one mode: they differ in nothing but ``distill``."""
    if mode == "plain" or student.distill is None:
        return student.model_copy(update={"distill": None})
    path = out / "teacher.yaml"
    path.write_text(yaml.safe_dump(teacher.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    names = signals_of(student.distill.losses)
    changes = {
        "teacher": mode,
        "caches": dict.fromkeys(names, str(_cache_of(out, teacher))),
        "online": dict.fromkeys(names, str(path)),
    }
    return student.model_copy(update={"distill": student.distill.model_copy(update=changes)})


def _cache_of(out: Path, teacher: CacheRecipe) -> Path:
    return (
        out / f"cache-{digest([teacher.model_dump(mode='json'), load_spec(teacher.spec).model_dump(mode='json')])[:8]}"
    )


def _described(student: StudentRecipe) -> str:
    device = choose_device(student.device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {student.training.threads or torch.get_num_threads()} threads"


# ---------------------------------------------------------------------------------------------- in other processes


def _write_cache(teacher: CacheRecipe, cache: Path) -> None:
    cache_teacher(teacher, str(cache), None, Silent())


def run_once(recipe: StudentRecipe, mode: Mode) -> dict[str, float]:
    """Return what one run of one mode costs."""
    folder = Path(tempfile.mkdtemp())
    try:
        story: Callable[..., Any] = train_online if mode == "online" else train_student
        cost = story(recipe, folder / "run", False, Silent()).cost
    finally:
        shutil.rmtree(folder)
    return {figure: float(getattr(cost, figure)) for figure in FIGURES}


def measure_loading(recipe: StudentRecipe, consumed: float) -> Loading:
    """Return how fast the frames of a cached run come.

    Args:
        consumed: frames per second that the student takes.
    """
    source, detector, distillation = prepare_student(recipe, Silent())
    dataset = training_dataset(recipe, source, detector, distillation)
    objective = Objective(detector, [], {})
    steps = 4 + max(8, round(10 * consumed / recipe.training.batch_size))
    training = recipe.training.model_copy(update={"workers": min(_LOADERS, usable_cores()), "steps": steps})
    loaded = batches(dataset, objective, training, 0, torch.device("cpu"), 0, 1)
    for _ in range(4):  # while the loaders start
        next(loaded)
    started = time.perf_counter()
    frames = sum(len(batch) for batch in loaded)
    rate = frames / (time.perf_counter() - started)
    return Loading(rate, consumed, rate / consumed, _decode_ms(dataset), _cache_ms(dataset))


def _decode_ms(dataset: TrainingDataset) -> float:
    source, view, config = dataset.source, dataset.view, dataset.augment.image
    if "camera" not in view.sensors:
        return 0.0
    chance = torch.Generator().manual_seed(0)

    def decode(token: str) -> None:
        sizes = source.image_sizes(token)
        views = {
            name: draw_view(size, view.image_height, view.image_width, config, chance) for name, size in sizes.items()
        }
        source.load(token, view.sensors & {"camera", "previous_camera"}, views)

    return _median_ms(decode, source.tokens)


def _cache_ms(dataset: TrainingDataset) -> float:
    def read(token: str) -> None:
        for reader, signals in dataset.caches.values():
            reader.tensors(token, signals)

    return _median_ms(read, dataset.source.tokens)


def _median_ms(work: Callable[[str], None], tokens: Sequence[str], rounds: int = 5) -> float:
    times = []
    for token in [*tokens, *(token for _ in range(rounds) for token in tokens)]:
        started = time.perf_counter()
        work(token)
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[len(tokens) :])


# ---------------------------------------------------------------------------------------------- how it is shown


def result_table(result: Mapping[str, Any]) -> Table:
    """Return the modes side by side."""
    from rich.table import Table

    columns = ("", "s per step", "to plain", "peak GB", "to plain", "data wait")
    table = Table(*columns, box=None, padding=(0, 2, 0, 0), header_style="bold", caption_justify="left")
    seconds, memory, wait = (result[figure] for figure in FIGURES)
    for mode in MODES:
        over = [result["ratios"][figure].get(mode, 1.0) for figure in FIGURES[:2]]
        table.add_row(
            *(mode, f"{seconds[mode]:.3f}", f"{over[0]:.3f}"),
            *(f"{memory[mode] / 1e9:.2f}", f"{over[1]:.3f}", f"{wait[mode]:.0%}"),
        )
    loader = result["loader"]
    table.caption = (
        f"{result['recipe']}, batch {result['batch_size']}, {result['device']}\n"
        f"loader alone: {loader['frames_per_second']:.1f} frames per second, {loader['over_student']:.1f} times what "
        f"the student takes; per frame {loader['image_decode_ms']:.1f} ms decoding images, "
        f"{loader['cache_read_ms']:.1f} ms reading the cache"
    )
    return table


def result_plot(result: Mapping[str, Any]) -> Picture:
    """Return bars of seconds per step and of peak memory of each mode."""
    from bevkd.viz.charts import draw_costs

    memory = {mode: value / 1e9 for mode, value in result["peak_memory_bytes"].items()}
    return draw_costs({"Seconds per step": result["step_seconds"], "Peak memory [GB]": memory})
