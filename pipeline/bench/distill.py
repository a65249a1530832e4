"""``bevkd bench distill``: what each distillation loss adds to a training step of a student."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bevkd import registry
from bevkd.cache.encoding import encode
from bevkd.cache.sample import stored_signals
from bevkd.cache.spec import CacheSpec, SignalSpec, load_spec
from bevkd.config import parse
from bevkd.data.collate import Batch, StoredSignals, collate
from bevkd.data.join import TrainingDataset, View
from bevkd.data.sampler import FrameOrder
from bevkd.distill.base import DistillContext, DistillLoss, DistillLossConfig, TeacherBatch
from bevkd.errors import ConfigError
from bevkd.geometry.masks import STORED
from bevkd.grid import BEVGrid
from bevkd.models.detector import Detector, DetectorOutput, channels_last, view_of
from bevkd.progress import Progress
from bevkd.signals import MAPS, POINTS
from bevkd.testing.frames import MadeUpFrames
from bevkd.testing.tools import batch_of
from bevkd.types import Boxes, Signals, ViewInstances
from pipeline.bench.memory import peak_mb
from pipeline.bench.models import CAMERAS, IMAGE_SIZE, POINTS_PER_SWEEP, RADAR_RETURNS
from pipeline.parts import choose_device
from pipeline.recipe import StudentRecipe, load_student

if TYPE_CHECKING:
    from rich.table import Table

METHODS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "unidistill": ({"name": "unidistill", "adapter": True},),
    "unidistill from points": ({"name": "unidistill", "adapter": True, "source": "points", "response": 0},),
    "x3kd": ({"name": "x3kd", "feature": 1.0, "adversarial": 0.05},),
    "x3kd with X-IS": (
        {"name": "x3kd", "feature": 1.0, "adversarial": 0.05},
        {"name": "x3kd", "output": 0, "instance": 1.0, "instance_head": {"channels": 128, "fineness": 4}},
    ),
    "itkd": ({"name": "itkd", "feature": 6},),
    "rdd": ({"name": "rdd"},),
    "soft": ({"name": "soft"},),
    "labeldistill": ({"name": "labeldistill"},),
    "tigbev": ({"name": "tigbev"},),
    "distillbev": ({"name": "distillbev"},),
    "crkd": ({"name": "crkd"},),
    "bevdistill": ({"name": "bevdistill"},),
}
"""Losses of each method, as published or with the settings of the shipped recipes."""

TARGET = 1.10
"""A step with all terms of a method over one without."""

_BOXES = 40
"""Annotations of a frame, and instances of its images: about the mean of nuScenes."""

_SPECS = ("all_methods", "points")


@dataclass(frozen=True)
class DistillSettings:
    """What is measured, and how thoroughly.

    Attributes:
        recipe: of the student; its own losses do not matter.
        overrides: of the recipe.
        methods: of ``METHODS``; none means all that the student's sensors allow.
        batch: frames of a step.
        rounds: of everything, one after the other, so that what disturbs the machine disturbs all of it.
        bev_low, bev_high: channels of the teacher.
        device: None takes a GPU if there is one.
    """

    recipe: str = "nuscenes_student"
    overrides: Sequence[str] = ()
    methods: Sequence[str] = ()
    batch: int = 1
    rounds: int = 3
    bev_low: int = 256
    bev_high: int = 512
    device: str | None = None


def bench_distill(settings: DistillSettings, progress: Progress) -> dict[str, Any]:
    """Return seconds of the student's own step, and of each method what it adds, as plain values.

    A step of the student is its forward pass, its detection loss and the backward pass of both. What a method adds is
    the decoding of the stored signals, its losses, and their backward pass as far as the student's maps, from where on
    the student's own backward pass is the same with them or without. Both are timed in turn. Beside the times stand the
    operations in convolutions and matrix products, which no other process disturbs.

    Raises:
        ConfigError: there is no such method.
    """
    if unknown := [name for name in settings.methods if name not in METHODS]:
        raise ConfigError(f"no method '{unknown[0]}'. Known: {', '.join(METHODS)}.")
    recipe = load_student(settings.recipe, settings.overrides)
    device = choose_device(settings.device or recipe.device)
    bench = _Bench(recipe, settings, device)
    progress.note(f"measuring: {settings.recipe}")
    bench.step()
    own: list[float] = []
    added: dict[str, list[float]] = {name: [] for name in bench.methods}
    memory = {name: peak_mb(partial(bench.add, each), device) for name, each in bench.methods.items()}
    flops = {name: _flops(partial(bench.add, each)) for name, each in bench.methods.items()}
    own_flops = _flops(bench.step)
    with progress.task("distillation", settings.rounds * (len(added) + 1), "run") as task:
        for _ in range(settings.rounds):
            own.append(_seconds(bench.step, device))
            task.advance()
            for name, method in bench.methods.items():
                # What follows a step finds none of its own data in the processor's caches; the second time counts.
                bench.add(method)
                added[name].append(_seconds(partial(bench.add, method), device))
                task.advance()
    return {
        "step_seconds": statistics.median(own),
        "step_flops": own_flops,
        "methods": {
            name: {
                "added_seconds": statistics.median(times),
                "ratio": statistics.median(1 + extra / step for extra, step in zip(times, own, strict=True)),
                "added_mb": memory[name],
                "flops_ratio": 1 + flops[name] / own_flops,
            }
            for name, times in added.items()
        },
        "recipe": settings.recipe,
        "batch_size": settings.batch,
        "rounds": settings.rounds,
        "grid": list(recipe.detector.grid.shape),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
    }


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _flops(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


@dataclass(frozen=True)
class Method:
    """A method's losses, the spec of the signals that they read, and these as a cache stores them."""

    losses: tuple[DistillLoss, ...]
    spec: CacheSpec
    stored: StoredSignals


class _Bench:
    """A student, a batch of made-up frames, and what a made-up teacher has stored of them.

    Raises:
        ConfigError: a method that was asked for does not suit the student.
    """

    def __init__(self, recipe: StudentRecipe, settings: DistillSettings, device: torch.device) -> None:
        torch.manual_seed(0)
        data: Any = recipe.data
        classes = tuple(data.classes)
        self.detector = Detector(recipe.detector, classes).to(device).train()
        channels_last(self.detector)
        source = _frames(recipe, classes, settings.batch)
        batch, taught = _batch(recipe, source, settings.batch), _taught(recipe, source, settings)
        annotated = [source.annotations(token) for token in batch.tokens]
        self.batch, self.instances = batch.to(device), tuple(_instances(self.detector, device) for _ in batch.tokens)
        with torch.no_grad():
            self.output = _leaves(self.detector(self.batch))
        shapes = {name: tuple(taught.need(name).shape[1:]) for name in MAPS}
        shapes |= {name: (9, shapes[source][0]) for name, source in POINTS.items()}
        context, specs = DistillContext(self.detector, shapes), _encodings()
        self.methods: dict[str, Method] = {}
        for name in settings.methods or METHODS:
            configs = [_config(values) for values in METHODS[name]]
            misfits = [fault for config in configs for fault in config.misfits(context)]
            if misfits and settings.methods:
                raise ConfigError(f"'{name}' does not suit {settings.recipe}: {misfits[0]}")
            if misfits:
                continue
            signals = dict.fromkeys(signal for config in configs for signal in config.signals() if signal in specs)
            spec = CacheSpec(name="bench", block=1, signals={signal: specs[signal] for signal in signals})
            losses = tuple(registry.load("bevkd.distill", each.name).build(each, context) for each in configs)
            for loss in losses:
                if isinstance(loss, nn.Module):
                    loss.to(device)
            stored = _stored(spec, taught, annotated, recipe.detector.grid)
            self.methods[name] = Method(losses, spec, {key: each.to(device) for key, each in stored.items()})

    def step(self) -> None:
        """Run the student's own forward and backward pass."""
        terms = self.detector.loss(self.detector(self.batch), self.batch)
        torch.stack([*terms.values()]).sum().backward()  # type: ignore[no-untyped-call]
        self.detector.zero_grad()

    def add(self, method: Method) -> None:
        """Run what a method adds to a step."""
        grid = self.detector.config.grid
        teacher = TeacherBatch.decode(method.spec, method.stored, self.batch.affines, grid, self.instances)
        terms = [term for loss in method.losses for term in loss(self.output, teacher, self.batch).values()]
        torch.stack(terms).sum().backward()  # type: ignore[no-untyped-call]
        for loss in method.losses:
            if isinstance(loss, nn.Module):
                loss.zero_grad()
        for value in _tensors(self.output):
            value.grad = None


def _config(values: Mapping[str, Any]) -> DistillLossConfig:
    module = registry.load("bevkd.distill", str(values["name"]))
    config: DistillLossConfig = parse(module.Config, dict(values), f"the losses of {values['name']}")
    return config


def _frames(recipe: StudentRecipe, classes: tuple[str, ...], batch: int) -> MadeUpFrames:
    sweeps = getattr(recipe.data, "sweeps", 1)
    return MadeUpFrames(
        classes,
        recipe.detector.grid,
        frames=3 * batch,  # of which every third has boxes
        points=POINTS_PER_SWEEP * sweeps,
        sweeps=sweeps,
        radar=RADAR_RETURNS,
        cameras=CAMERAS,
        image_size=IMAGE_SIZE,
        boxes=_BOXES,
    )


def _batch(recipe: StudentRecipe, source: MadeUpFrames, size: int) -> Batch:
    """Return annotated frames, augmented as the recipe says, so that maps have to be warped."""
    view = view_of(recipe.detector)
    view = View(recipe.detector.training_sensors, view.image_height, view.image_width)
    order = FrameOrder(source.tokens[::3], [], None, 0)
    dataset = TrainingDataset(source, view, order, recipe.augment, {}, 0)
    return collate([dataset[position] for position in range(size)])


def _taught(recipe: StudentRecipe, source: MadeUpFrames, settings: DistillSettings) -> Signals:
    """Return signals of a made-up teacher, of the frames as they are."""
    made_up = registry.load("bevkd.teachers", "synthetic")
    config = made_up.Config(
        grid=recipe.detector.grid,
        bev_low=settings.bev_low,
        bev_high=settings.bev_high,
        tasks=len(getattr(recipe.detector.head, "tasks", source.classes)),
        boxes=_BOXES,
    )
    teacher = made_up.build(config, source.classes, torch.device("cpu"))
    frames = batch_of(source, View(frozenset()), source.tokens[::3][: settings.batch])
    signals: Signals = teacher.infer(frames)
    return signals


def _encodings() -> dict[str, SignalSpec]:
    """Return how the shipped specs store each signal, however ill that suits made-up values."""
    known: dict[str, SignalSpec] = {}
    for name in _SPECS:
        known |= load_spec(name).signals
    return {name: spec.model_copy(update={"max_error": 1.0}) for name, spec in known.items()}


def _stored(spec: CacheSpec, taught: Signals, annotated: Sequence[Boxes], grid: BEVGrid) -> StoredSignals:
    """Return the arrays of a batch as a loader gives them."""
    arrays: dict[str, list[Tensor]] = {}
    for frame in range(len(annotated)):
        for name, value in stored_signals(taught, annotated, spec, grid, frame).items():
            for key, array in encode(name, spec.signals[name], value, str(frame)).arrays.items():
                arrays.setdefault(key, []).append(torch.from_numpy(array))
    return {key: torch.stack(each) for key, each in arrays.items()}


def _instances(detector: Detector, device: torch.device) -> ViewInstances:
    """Return discs all over the images of a frame."""
    encoder, chance = detector.config.encoder, torch.Generator().manual_seed(0)
    size = torch.tensor([getattr(encoder, "image_width", 1), getattr(encoder, "image_height", 1)])
    corner, extent = (torch.rand(_BOXES, 2, generator=chance) * size * share for share in (0.8, 0.2))
    boxes = torch.cat([corner, corner + extent + 4], dim=1)
    across = torch.linspace(-1, 1, STORED)
    disc = (across[:, None] ** 2 + across**2 < 1).expand(_BOXES, -1, -1)
    label = torch.arange(_BOXES)
    found = ViewInstances(label % CAMERAS, boxes, label % len(detector.classes), torch.full((_BOXES,), 0.9), disc)
    return ViewInstances(*(getattr(found, field.name).to(device) for field in fields(found)))


def _leaves(output: DetectorOutput) -> DetectorOutput:
    """Return the maps of a student cut off from it; what losses say about them can be propagated to here."""

    def leaf(value: Tensor) -> Tensor:
        return value.detach().clone().requires_grad_()

    head: Any = type(output.head)
    return DetectorOutput(
        leaf(output.bev_low),
        leaf(output.bev_high),
        head(leaf(output.head.heatmap), leaf(output.head.box_code)),
        image_features=None if output.image_features is None else leaf(output.image_features),
    )


def _tensors(output: DetectorOutput) -> list[Tensor]:
    maps = [output.bev_low, output.bev_high, output.head.heatmap, output.head.box_code, output.image_features]
    return [each for each in maps if each is not None]


def result_table(result: Mapping[str, Any]) -> Table:
    """Return the methods, the dearest last."""
    from rich.table import Table

    columns = ("method", "added s", "step with / without", "FLOPs with / without", "added MB")
    table = Table(*columns, box=None, padding=(0, 2, 0, 0), header_style="bold", caption_justify="left")
    for name, row in sorted(result["methods"].items(), key=lambda item: item[1]["ratio"]):
        memory = "-" if row["added_mb"] is None else f"{row['added_mb']:,.0f}"
        ratio = f"{row['ratio']:.3f}" + (" [red]above 1.10[/red]" if row["ratio"] > TARGET else "")
        table.add_row(name, f"{row['added_seconds']:.3f}", ratio, f"{row['flops_ratio']:.3f}", memory)
    rows, columns_ = result["grid"]
    table.caption = (
        f"{result['recipe']}, {rows} x {columns_} cells, batch {result['batch_size']}, {result['device']}; "
        f"its own step {result['step_seconds']:.3f} s"
    )
    return table
