"""What an encoding costs a student: the gradient of each distillation loss from stored signals and from exact ones."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bevkd import registry
from bevkd.cache import shard
from bevkd.cache.arrays import sample_shapes_of
from bevkd.cache.encoding import Encoded, Value, encode
from bevkd.cache.sample import stored_signals
from bevkd.cache.spec import CacheSpec
from bevkd.data.collate import Batch, collate
from bevkd.data.join import FrameDataset
from bevkd.data.source import FrameSource
from bevkd.distill.base import DistillContext, DistillLoss, TeacherBatch
from bevkd.errors import ConfigError
from bevkd.models.detector import Detector, DetectorOutput, view_of
from bevkd.progress import Progress
from bevkd.signals import MAPS, POINTS
from bevkd.types import BoxPoints, Signals
from pipeline.cache_teacher import Stage, prepare
from pipeline.fidelity_report import Agreement, FidelityReport, Row
from pipeline.parts import check_files, contract, open_source
from pipeline.recipe import CacheRecipe, DistillConfig, StudentRecipe
from pipeline.training import seeded_detector

_DECODE_ROUNDS = 3
_ROOT8_LEVELS = (127, 64, 32)
_INDEX_BYTES = 16  # of one sample in a shard


def fidelity(
    cache: CacheRecipe,
    student: StudentRecipe,
    frames: int,
    at_outputs: bool,
    progress: Progress,
    only_spec: bool = False,
) -> FidelityReport:
    """Return what each choice of encodings costs in bytes and in gradient; trains nothing.

    The frames are those of ``cache``, spread over its data set; the student has fresh weights of its seed.

    Args:
        at_outputs: compare gradients of the student's outputs, which is many times faster and stricter, since
            rounding errors of cells average out in the parameters.
        only_spec: measure the spec as it is, and none of its variants.

    Raises:
        ConfigError: the student's recipe has no distillation losses.
        ContractError: student, teacher and spec do not fit together; lists every fault.
    """
    stage = prepare(cache, None, progress)
    detector = seeded_detector(student).to(stage.device).train()
    distill = student.distill
    if distill is None or not distill.losses:
        raise ConfigError("the student's recipe has no distill.losses to take gradients of. Give one that distils.")
    contract("this student and this cache do not fit together:", _faults(stage, detector, distill))
    sensors = stage.teacher.view.sensors | detector.config.sensors
    source = open_source(cache.data, sensors, progress)
    tokens = _spread(source.tokens, frames)
    check_files(source, tokens, sensors)
    meter = _Meter(stage, detector, distill, at_outputs, only_spec)
    with progress.task("measuring", len(tokens), "frame") as task:
        for token in tokens:
            meter.add(*_batches(stage, source, detector, token))
            task.advance()
    return meter.report(tokens)


def _spread(tokens: tuple[str, ...], count: int) -> tuple[str, ...]:
    count = min(count, len(tokens))
    return tuple(tokens[index * len(tokens) // count] for index in range(count))


def _batches(stage: Stage, source: FrameSource, detector: Detector, token: str) -> tuple[Batch, Batch]:
    """Return a frame as the teacher and as the student see it, un-augmented."""
    views = (stage.teacher.view, view_of(detector.config))
    return tuple(collate([FrameDataset(source, [token], view)[0]]) for view in views)  # type: ignore[return-value]


def _faults(stage: Stage, detector: Detector, distill: DistillConfig) -> list[str]:
    """Return everything that keeps the student from learning from a cache of this recipe."""
    spec, faults = stage.header.spec, []
    if detector.classes != stage.header.classes:
        faults.append(f"the student has the classes {', '.join(detector.classes)}, the cache {stage.header.classes}")
    if detector.config.grid != stage.teacher.grid:
        faults.append(f"the student has the grid {detector.config.grid}, the teacher {stage.teacher.grid}")
    context = _context(stage, detector, spec)
    for loss in distill.losses:
        absent = [name for name in loss.signals() if name not in spec.signals]
        if absent:
            faults.append(
                f"loss '{loss.name}' reads {', '.join(absent)}, which spec '{spec.name}' does not store: choose "
                "another spec in the cache's recipe, or switch the term off"
            )
        else:
            faults += [f"loss '{loss.name}': {fault}" for fault in loss.misfits(context)]
    return faults


def _context(stage: Stage, detector: Detector, spec: CacheSpec) -> DistillContext:
    return DistillContext(detector, sample_shapes_of(spec, stage.teacher.shapes, stage.teacher.identity.name))


def variants(spec: CacheSpec, signed: Mapping[str, bool]) -> Iterator[tuple[str, CacheSpec]]:
    """Yield a spec and what it could have been, with a name for each; none of them refuses a sample.

    Args:
        signed: whether a BEV map or its points have negative values.
    """
    yield spec.name, _with(spec, {})
    values = [name for name in spec.signals if name in (*MAPS, *POINTS)]
    if values:
        yield "float16", _with(spec, {name: {"encoding": "float16"} for name in values})
    quantised = [name for name in spec.signals if name.startswith("bev_") or name in POINTS]
    for levels in _ROOT8_LEVELS if quantised else ():
        yield f"root8, {levels} levels", _with(spec, {n: {"encoding": "root8", "levels": levels} for n in quantised})
    even = {name: {"encoding": "int8" if signed[name] else "uint8"} for name in quantised if name in MAPS}
    even |= {"heatmap": {"encoding": "logit8"}} if "heatmap" in spec.signals else {}
    if even:
        yield "uint8 / int8, logit8", _with(spec, even)


def _with(spec: CacheSpec, changes: Mapping[str, Mapping[str, Any]]) -> CacheSpec:
    data = spec.model_dump()
    for name, signal in data["signals"].items():
        signal |= {"max_error": 1.0, **changes.get(name, {})}
    return CacheSpec.model_validate(data)


class _Meter:
    """Adds up, frame by frame, what each variant costs."""

    def __init__(
        self, stage: Stage, detector: Detector, distill: DistillConfig, at_outputs: bool, only_spec: bool
    ) -> None:
        self.stage, self.detector, self.at_outputs, self.only_spec = stage, detector, at_outputs, only_spec
        context = _context(stage, detector, stage.header.spec)
        self.losses: list[tuple[Any, DistillLoss]] = []
        for config in distill.losses:
            loss = registry.load("bevkd.distill", config.name).build(config, context)
            self.losses.append((config, loss.to(stage.device) if isinstance(loss, torch.nn.Module) else loss))
        self.rows: list[Row] = []
        self.frames = 0
        self.fp32_bytes = 0.0

    def add(self, seen_by_teacher: Batch, seen_by_student: Batch) -> None:
        """Measure one frame."""
        signals = self.stage.teacher.infer(seen_by_teacher)
        sample = self._sample(signals, seen_by_teacher, self.stage.header.spec)
        if not self.rows:
            signed = {name: _lowest(value) < 0 for name, value in sample.items()}
            rows = [Row(name, spec) for name, spec in variants(self.stage.header.spec, signed)]
            self.rows = rows[:1] if self.only_spec else rows
        self.frames += 1
        batch = seen_by_student.to(self.stage.device)
        output = self.detector(batch)
        exact = self._exact(signals, sample, batch)
        wanted = self._gradients(output, exact, batch)
        known: dict[Any, dict[str, Tensor | None]] = {}
        for row in self.rows:
            stored = self._store(
                row, self._sample(signals, seen_by_teacher, row.spec), seen_by_teacher.tokens[0], batch
            )
            self._compare(row, output, stored, batch, wanted, known)
        self.fp32_bytes += self._fp32(self.rows[0])

    def report(self, tokens: tuple[str, ...]) -> FidelityReport:
        """Return the means over the frames."""
        for row in self.rows:
            row.bytes = {name: total / self.frames for name, total in row.bytes.items()}
            row.decode_ms /= self.frames
        at = "outputs" if self.at_outputs else "parameters"
        teacher, spec = self.stage.teacher.identity.name, self.stage.header.spec.name
        return FidelityReport(teacher, spec, tokens, at, self.fp32_bytes / self.frames, tuple(self.rows))

    def _sample(self, signals: Signals, batch: Batch, spec: CacheSpec) -> dict[str, Value]:
        boxes = [each if labelled else None for each, labelled in zip(batch.boxes, batch.labelled, strict=True)]
        return stored_signals(signals, boxes, spec, self.stage.teacher.grid, 0)

    def _exact(self, signals: Signals, sample: Mapping[str, Value], batch: Batch) -> TeacherBatch:
        """Return the teacher's own signals of the frame, as float32, with exact points."""
        known: dict[str, Any] = {
            name: value.float().clone() for name in MAPS if (value := getattr(signals, name)) is not None
        }
        known |= {
            name: (value.to(self.stage.device),) for name, value in sample.items() if isinstance(value, BoxPoints)
        }
        exact = Signals(**known, boxes=signals.boxes, instances=signals.instances)
        return TeacherBatch(exact, batch.affines, self.stage.teacher.grid)

    def _store(self, row: Row, sample: Mapping[str, Value], token: str, batch: Batch) -> TeacherBatch:
        """Return what a student would read of the frame, and add its bytes, errors and time to ``row``."""
        written: dict[str, Any] = {}
        for name, spec in row.spec.signals.items():
            encoded: Encoded = encode(name, spec, sample[name], token)
            data = {array: shard.compress(values) for array, values in encoded.arrays.items()}
            row.bytes[name] = row.bytes.get(name, 0.0) + sum(len(each) + _INDEX_BYTES for each in data.values())
            row.errors[name] = max(row.errors.get(name, 0.0), encoded.error)
            written |= {array: (data[array], values) for array, values in encoded.arrays.items()}
        best = math.inf
        for _ in range(_DECODE_ROUNDS):
            started = time.perf_counter()
            stored = {}
            for array, (compressed, values) in written.items():
                shard.decompress(compressed, values)
                stored[array] = torch.from_numpy(values)[None].to(self.stage.device)
            teacher = TeacherBatch.decode(row.spec, stored, batch.affines, self.stage.teacher.grid)
            if self.stage.device.type == "cuda":
                torch.cuda.synchronize(self.stage.device)
            best = min(best, time.perf_counter() - started)
        row.decode_ms += best * 1e3
        return teacher

    def _compare(
        self,
        row: Row,
        output: DetectorOutput,
        stored: TeacherBatch,
        batch: Batch,
        wanted: Mapping[str, tuple[Tensor, Tensor]],
        known: dict[Any, Any],
    ) -> None:
        """Add the gradients from ``stored`` to ``row``; equal encodings of what a loss reads are computed once."""
        for config, loss in self.losses:
            encodings = tuple(row.spec.signals[name].model_dump_json() for name in config.signals())
            key = (config.name, encodings)
            if key not in known:
                known[key] = self._gradients_of(config.name, loss, output, stored, batch, wanted)
            for term, gradient in known[key].items():
                row.losses.setdefault(term, Agreement()).add(gradient, wanted[term][1])

    def _gradients(
        self, output: DetectorOutput, teacher: TeacherBatch, batch: Batch
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the gradient of each loss term by the outputs, and by what the report compares."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for config, loss in self.losses:
            for term, value in _terms(config.name, loss(output, teacher, batch)).items():
                at_outputs = self._gradient(value, _outputs(output))
                found[term] = (at_outputs, at_outputs if self.at_outputs else self._gradient(value, self._parameters()))
        return found

    def _gradients_of(
        self,
        name: str,
        loss: DistillLoss,
        output: DetectorOutput,
        teacher: TeacherBatch,
        batch: Batch,
        wanted: Mapping[str, tuple[Tensor, Tensor]],
    ) -> dict[str, Tensor]:
        """Return the gradient of each term of one loss; equal outputs spare the slow way back."""
        found = {}
        for term, value in _terms(name, loss(output, teacher, batch)).items():
            at_outputs = self._gradient(value, _outputs(output))
            exact_outputs, exact = wanted[term]
            if self.at_outputs:
                found[term] = at_outputs
            elif torch.equal(at_outputs, exact_outputs):
                found[term] = exact
            else:
                found[term] = self._gradient(value, self._parameters())
        return found

    def _parameters(self) -> list[Tensor]:
        return [parameter for parameter in self.detector.parameters() if parameter.requires_grad]

    def _gradient(self, value: Tensor, inputs: list[Tensor]) -> Tensor:
        if not value.requires_grad:
            return torch.zeros(sum(each.numel() for each in inputs), device=value.device)
        found = torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
        return torch.cat([gradient.flatten() for gradient in found])

    def _fp32(self, own: Row) -> float:
        """Return the float32 bytes of the maps that the signals of ``own`` are made from; other signals as stored."""
        made_from = {POINTS.get(name, name) for name in own.spec.signals}
        maps = sum(4 * math.prod(self.stage.teacher.shapes[name]) for name in made_from if name in MAPS)
        others = [name for name in own.spec.signals if name not in (*MAPS, *POINTS)]
        return maps + sum(own.bytes[name] for name in others) / self.frames


def _lowest(value: Value) -> float:
    if isinstance(value, BoxPoints):
        value = value.values
    return float(value.min()) if isinstance(value, Tensor) and value.numel() else 0.0


def _outputs(output: DetectorOutput) -> list[Tensor]:
    return [output.bev_low, output.bev_high, output.head.heatmap, output.head.box_code]


def _terms(loss: str, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the terms of a loss, those that share their first word added up, by ``loss.word``."""
    grouped: dict[str, Tensor] = {}
    for name, value in terms.items():
        key = f"{loss}.{name.partition('_')[0]}"
        grouped[key] = grouped[key] + value if key in grouped else value
    return grouped
