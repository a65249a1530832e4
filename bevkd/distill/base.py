"""What a distillation loss is: a module that turns student output and teacher signals into named terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from bevkd import registry
from bevkd.cache.encoding import decode
from bevkd.cache.spec import CacheSpec
from bevkd.cache.statistics import ChannelStatistics
from bevkd.config import PluginConfig, StrictModel
from bevkd.data.collate import Batch, StoredSignals
from bevkd.geometry.affine import BEVAffine, warp_box_codes, warp_cells, warp_maps
from bevkd.geometry.sampling import sample_at
from bevkd.grid import BEVGrid
from bevkd.models.detector import Detector, DetectorOutput
from bevkd.signals import POINTS
from bevkd.types import Boxes, BoxPoints, Signals, SparseMap, ViewInstances

__all__ = [
    "DistillContext",
    "DistillLoss",
    "DistillLossConfig",
    "Standardise",
    "TeacherBatch",
    "TermSchedule",
    "build_losses",
    "loss_labels",
    "sample_at",
    "signals_of",
]

_LEAST_STD = 0.05
"""Standard deviation that a channel is taken to have at least, as a part of their mean."""


@dataclass(frozen=True)
class TeacherBatch:
    """Teacher signals of a batch, and where the student's augmentation took them.

    Point and region losses sample the canonical maps at canonical positions and the student at augmented ones, which
    needs no warp. Dense losses ask for :meth:`warped` maps.

    Attributes:
        canonical: as cached: of the un-augmented frame, or of a variant that the cache holds of it.
        affines: ``augmented_from_canonical`` of each frame; of a variant, what is left of the augmentation.
        instances: of each frame, in pixels of the student's views.
    """

    canonical: Signals
    affines: tuple[BEVAffine, ...]
    grid: BEVGrid
    instances: tuple[ViewInstances, ...] | None = None

    @classmethod
    def decode(
        cls,
        spec: CacheSpec,
        stored: StoredSignals,
        affines: tuple[BEVAffine, ...],
        grid: BEVGrid,
        instances: tuple[ViewInstances, ...] | None = None,
    ) -> TeacherBatch:
        """Return the signals of a cache's encoded arrays, decoded on the device that they are on.

        Args:
            instances: which the loader has brought into the student's views.
        """
        decoded: dict[str, Any] = {}
        for name, signal in spec.signals.items():
            if name in stored:
                value = decode(name, signal, stored)
                if isinstance(value, SparseMap):
                    decoded[f"{name}_known"], value = value.known, value.values
                decoded[name] = value
        return cls(Signals(**decoded), affines, grid, instances)

    def warped(self, name: str) -> tuple[Tensor, Bool[Tensor, "B 1 Y X"]]:
        """Return the map ``name`` in the student's frame, and which of its cells the teacher covers and the cache kept.

        Values of other cells mean nothing: a loss must not read them.
        """
        if name != "box_code":
            return warp_maps(self.canonical.need(name), self.affines, self.grid)
        codes, covered = warp_box_codes(self.canonical.need(name), self.affines, self.grid)
        known = self.canonical.box_code_known
        return codes, covered if known is None else covered & warp_cells(known, self.affines, self.grid)

    @cached_property
    def boxes(self) -> tuple[Boxes, ...]:
        """The teacher's boxes in the student's frame."""
        boxes = self.canonical.boxes or ()
        return tuple(affine.apply_to_boxes(each) for affine, each in zip(self.affines, boxes, strict=True))

    def points(self, name: str) -> tuple[BoxPoints, ...]:
        """Return ``points_low`` or ``points_high``: values as cached, un-augmented boxes."""
        value: tuple[BoxPoints, ...] | None = getattr(self.canonical, name)
        if value is None:
            raise KeyError(f"signal '{name}' is not in this batch")
        return value

    def to_augmented(self, xy_m: Float[Tensor, "n p 2"], frame: int) -> Float[Tensor, "n p 2"]:
        """Return where points of the un-augmented frame went, metres."""
        matrix = self.affines[frame].matrix().to(xy_m)
        return xy_m @ matrix[:2, :2].T + matrix[:2, 3]

    def to_canonical(self, xy_m: Float[Tensor, "n p 2"], frame: int) -> Float[Tensor, "n p 2"]:
        """Return where points of the student's frame were before augmentation, metres."""
        matrix = self.affines[frame].matrix().inverse().to(xy_m)
        return xy_m @ matrix[:2, :2].T + matrix[:2, 3]


@dataclass(frozen=True)
class DistillContext:
    """What a loss may know when it is built.

    Attributes:
        student: the detector in training; a loss may call its head but must not keep its parameters. In somebody's own
            training loop, what stands for it: see ``bevkd.distiller``.
        teacher_shapes: per-sample shape of each cached map, and [9,C] of points.
        statistics: of the teacher's features, by signal, as far as the cache keeps them; None of a teacher at work
            within the step.
    """

    student: Detector | Any
    teacher_shapes: Mapping[str, tuple[int, ...]]
    statistics: Mapping[str, ChannelStatistics] | None = None

    @property
    def grid(self) -> BEVGrid:
        """The student's grid, equal to the cache's."""
        return self.student.config.grid

    def channels(self, stage: str) -> int:
        """Return the student's channels of ``bev_low`` or ``bev_high``."""
        part: Any = self.student.encoder if stage == "bev_low" else self.student.bev_encoder
        return int(part.out_channels)

    def teacher_channels(self, stage: str) -> int:
        """Return the teacher's channels of ``bev_low`` or ``bev_high``, from its map or its points."""
        shape = self.teacher_shapes.get(stage)
        return shape[0] if shape else self.teacher_shapes[stage.replace("bev", "points")][1]

    def other_tasks(self, remedy: str) -> list[str]:
        """Return that the student's box codes have other tasks than the cached ones, if so, and ``remedy``."""
        own, theirs = len(self.student.head.labels_of_task), self.teacher_shapes["box_code"][0]
        if own == theirs:
            return []
        return [
            f"box_code has {theirs} tasks in the cache and {own} in the student: give the student the teacher's "
            f"detector.head.tasks, or {remedy}"
        ]

    def finer_low(self, remedy: str) -> list[str]:
        """Return that the student's ``bev_low`` is finer than the grid that cached maps lie on, if so."""
        if getattr(self.student.encoder, "fineness", 1) == 1:
            return []
        return [f"bev_low of the student's pillars is finer than the grid: {remedy}"]

    def no_statistics(self, signal: str) -> list[str]:
        """Return that features cannot be standardised by the statistics of ``signal``, if so, and the remedy."""
        if self.statistics is None:
            return ["a teacher at work online has no statistics to standardise by: set standardise: false"]
        if signal in self.statistics:
            return []
        annotated = " and data.labels: 1, over frames with annotations" if signal in POINTS else ""
        return [
            f"the cache has no statistics of {signal} to standardise by: write it again with this version of "
            f"bevkd{annotated}, or set standardise: false"
        ]

    def standardise(self, signal: str) -> nn.Module:
        """Return what brings the teacher's features to mean 0 and standard deviation 1, by the statistics of a signal.

        Args:
            signal: ``bev_low`` or ``bev_high`` for the cells that hold something, ``points_low`` or ``points_high`` for
                the points of annotated boxes. See :meth:`no_statistics`.
        """
        assert self.statistics is not None
        return Standardise(self.statistics[signal])

    def adapter(self, stage: str) -> nn.Module:
        """Return a 1x1 convolution from the student's to the teacher's channels of ``bev_low`` or ``bev_high``."""
        return nn.Conv2d(self.channels(stage), self.teacher_channels(stage), 1)


class Standardise(nn.Module):
    """Brings each channel of a teacher's features to mean 0 and standard deviation 1.

    Channels that hardly vary are divided by a part of the mean deviation instead, so that they do not become noise.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, statistics: ChannelStatistics) -> None:
        super().__init__()
        std = torch.tensor(statistics.std)
        # Of the cache, which a checkpoint names: no weights.
        self.register_buffer("mean", torch.tensor(statistics.mean), persistent=False)
        self.register_buffer("std", std.clamp(min=_LEAST_STD * std.mean().clamp(min=1e-6)), persistent=False)

    def forward(self, features: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return maps [B,C,Y,X] or points [n,9,C], standardised."""
        shape = (-1, 1, 1) if features.dim() == 4 else (-1,)
        return (features.float() - self.mean.view(shape)) / self.std.view(shape)


class TermSchedule(StrictModel):
    """The factor by which terms change over a run: rising on a line from 0, 1, falling on a line.

    Attributes:
        warmup: share of the run until the factor is 1.
        decay_from: share of the run from which it falls.
        decay_to: what it falls to by the end.
    """

    warmup: float = Field(default=0.0, ge=0, le=1)
    decay_from: float = Field(default=1.0, ge=0, le=1)
    decay_to: float = Field(default=1.0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> TermSchedule:
        if self.warmup > self.decay_from:
            raise ValueError(f"decay_from: {self.decay_from:g} lies within warmup: {self.warmup:g}")
        return self

    def factor(self, progress: float) -> float:
        """Return the factor when the share ``progress`` of the run is done."""
        if progress < self.warmup:
            return progress / self.warmup
        if progress <= self.decay_from or self.decay_from == 1:
            return 1.0
        return 1 + (self.decay_to - 1) * min((progress - self.decay_from) / (1 - self.decay_from), 1.0)


class DistillLossConfig(PluginConfig):
    """Base of every loss's ``Config``.

    Attributes:
        weights: the fields that weigh terms of the loss, every one of which belongs to one of them by its name: the
            field's, or one that begins with the field's and ``_``. 0 switches the terms off and drops what only they
            read; twice the weight is twice the terms.
        negatives: those of ``weights`` whose terms punish objects that are not there, on frames without labels too.
        teacher: name of the cache that the loss reads.
        schedule: by weight, how its terms change over the run.
    """

    weights: ClassVar[tuple[str, ...]] = ()
    negatives: ClassVar[tuple[str, ...]] = ()
    teacher: str = "teacher"
    schedule: dict[str, TermSchedule] = Field(default={})

    @model_validator(mode="after")
    def _check_schedule(self) -> DistillLossConfig:
        if unknown := [name for name in self.schedule if name not in self.weights]:
            known = ", ".join(self.weights) or "none"
            raise ValueError(f"schedule: {', '.join(unknown)} is no weight of '{self.name}'; its weights are: {known}")
        return self

    def weight_of(self, term: str) -> str | None:
        """Return the one of ``weights`` that weighs the logged ``term``, None if none does."""
        return next((weight for weight in self.weights if term == weight or term.startswith(f"{weight}_")), None)

    def factor_of(self, term: str, progress: float) -> float:
        """Return the factor on the logged ``term`` when the share ``progress`` of the run is done."""
        schedule = self.schedule.get(self.weight_of(term) or "")
        return schedule.factor(progress) if schedule else 1.0

    def signals(self) -> tuple[str, ...]:
        """Return the signals that the loss reads; only these are read from the cache."""
        raise TypeError(f"the Config of loss '{self.name}' does not say which signals it reads: define signals()")

    def misfits(self, context: DistillContext) -> list[str]:
        """Return every reason why this student cannot learn from this cache, which holds all of ``signals()``."""
        del context
        return []


def signals_of(losses: Sequence[DistillLossConfig]) -> dict[str, tuple[str, ...]]:
    """Return the signals that the losses read of each teacher."""
    needed: dict[str, list[str]] = {}
    for loss in losses:
        needed.setdefault(loss.teacher, []).extend(loss.signals())
    return {teacher: tuple(dict.fromkeys(signals)) for teacher, signals in needed.items()}


def loss_labels(losses: Sequence[DistillLossConfig]) -> tuple[str, ...]:
    """Return the label of each loss in the log: its name, with a number from the second of that name on."""
    # Terms of one name would take each other's place.
    earlier = [sum(each.name == loss.name for each in losses[:index]) for index, loss in enumerate(losses)]
    return tuple(
        f"{loss.name}-{again + 1}" if again else loss.name for again, loss in zip(earlier, losses, strict=True)
    )


def build_losses(
    losses: Sequence[DistillLossConfig],
    student: Detector | Any,
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]],
    statistics: Mapping[str, Mapping[str, ChannelStatistics]] = MappingProxyType({}),
) -> list[tuple[str, str, DistillLoss]]:
    """Return of each loss its label in the log, the name of its teacher, and the loss.

    Args:
        student: see ``DistillContext``.
        shapes: per-sample shapes of the signals of each teacher.
        statistics: of the features of each teacher that has a cache.
    """
    built: list[tuple[str, str, DistillLoss]] = []
    for label, loss in zip(loss_labels(losses), losses, strict=True):
        context = DistillContext(student, shapes[loss.teacher], statistics.get(loss.teacher))
        built.append((label, loss.teacher, registry.load("bevkd.distill", loss.name).build(loss, context)))
    return built


@runtime_checkable
class DistillLoss(Protocol):
    """A loss; also an ``nn.Module`` when it has adapters to train, which are dropped at inference."""

    def __call__(self, student: DetectorOutput, teacher: TeacherBatch, batch: Batch) -> dict[str, Tensor]:
        """Return the weighted terms by name; their sum joins the detection loss."""
        ...
