"""What a distillation loss is: a module that turns student output and teacher signals into named terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor, nn

from bevkd import registry
from bevkd.cache.encoding import decode
from bevkd.cache.spec import CacheSpec
from bevkd.config import PluginConfig
from bevkd.data.collate import Batch, StoredSignals
from bevkd.geometry.affine import BEVAffine, warp_box_codes, warp_cells, warp_maps
from bevkd.geometry.sampling import sample_at
from bevkd.grid import BEVGrid
from bevkd.models.detector import Detector, DetectorOutput
from bevkd.types import Boxes, BoxPoints, Signals, SparseMap, ViewInstances

__all__ = [
    "DistillContext",
    "DistillLoss",
    "DistillLossConfig",
    "TeacherBatch",
    "build_losses",
    "sample_at",
    "signals_of",
]


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
    """

    student: Detector | Any
    teacher_shapes: Mapping[str, tuple[int, ...]]

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

    def adapter(self, stage: str) -> nn.Module:
        """Return a 1x1 convolution from the student's to the teacher's channels of ``bev_low`` or ``bev_high``."""
        return nn.Conv2d(self.channels(stage), self.teacher_channels(stage), 1)


class DistillLossConfig(PluginConfig):
    """Base of every loss's ``Config``.

    Attributes:
        teacher: name of the cache that the loss reads.
    """

    teacher: str = "teacher"

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


def build_losses(
    losses: Sequence[DistillLossConfig], student: Detector | Any, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> list[tuple[str, str, DistillLoss]]:
    """Return of each loss its label in the log, the name of its teacher, and the loss.

    Args:
        student: see ``DistillContext``.
        shapes: per-sample shapes of the signals of each teacher.
    """
    built: list[tuple[str, str, DistillLoss]] = []
    for index, loss in enumerate(losses):
        again = sum(each.name == loss.name for each in losses[:index])
        # Terms of one name would take each other's place.
        label = f"{loss.name}-{again + 1}" if again else loss.name
        context = DistillContext(student, shapes[loss.teacher])
        built.append((label, loss.teacher, registry.load("bevkd.distill", loss.name).build(loss, context)))
    return built


@runtime_checkable
class DistillLoss(Protocol):
    """A loss; also an ``nn.Module`` when it has adapters to train, which are dropped at inference."""

    def __call__(self, student: DetectorOutput, teacher: TeacherBatch, batch: Batch) -> dict[str, Tensor]:
        """Return the weighted terms by name; their sum joins the detection loss."""
        ...
