"""Distillation with the teacher at work within the step: what a cache saves, and what it may be compared with."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bevkd import registry
from bevkd.cache.arrays import sample_shapes_of
from bevkd.cache.sample import stored_signals
from bevkd.cache.spec import CacheSpec, SignalSpec, load_spec
from bevkd.config import PluginConfig
from bevkd.data.collate import Batch
from bevkd.data.identity import DatasetIdentity
from bevkd.data.join import View
from bevkd.distill.base import TeacherBatch, signals_of
from bevkd.errors import ConfigError
from bevkd.geometry.affine import BEVAffine
from bevkd.grid import BEVGrid
from bevkd.models.detector import view_of
from bevkd.progress import Progress
from bevkd.teachers.base import Teacher
from bevkd.types import Boxes, Signals, SparseMap
from pipeline.parts import choose_device
from pipeline.recipe import CacheRecipe, StudentRecipe, load_cache
from pipeline.train_student import train_student
from pipeline.training import RunSummary

_WHICH_FRAMES = frozenset(
    {
        *("name", "root", "version", "split", "scenes", "tokens", "index_dir"),
        *("classes", "min_points", "labels", "labels_seed", "skip_missing"),
    }
)
"""Keys of a data set that say nothing about what a sensor gives; classes are compared apart."""

_CAMERAS = frozenset({"camera", "previous_camera"})


def train_online(recipe: StudentRecipe, run: Path, resume: bool, progress: Progress) -> RunSummary:
    """Train the student of ``recipe`` with its teachers within the step; see :func:`train_student`."""
    return train_student(recipe, run, resume, progress, open_teachers(recipe))


def open_teachers(recipe: StudentRecipe) -> dict[str, OnlineTeacher]:
    """Return the teachers that ``distill.online`` names and a loss reads, on this process's device.

    Raises:
        ConfigError: the recipe has no ``distill``.
        BevkdError: a teacher cannot be built, or does not write what its spec stores.
    """
    if recipe.distill is None:
        raise ConfigError("the recipe has no 'distill': there is no loss that a teacher could teach. Add its losses.")
    device = choose_device(recipe.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    needed, named = signals_of(recipe.distill.losses), recipe.distill.online
    return {name: _open(load_cache(named[name], []), recipe, needed[name], device) for name in needed if name in named}


def _open(theirs: CacheRecipe, ours: StudentRecipe, signals: Sequence[str], device: torch.device) -> OnlineTeacher:
    plugin = registry.load("bevkd.teachers", theirs.teacher.name)
    teacher: Teacher = plugin.build(theirs.teacher, tuple(theirs.data.classes), device)
    return OnlineTeacher(
        teacher,
        load_spec(theirs.spec),
        signals,
        [*_other_images(teacher.view, view_of(ours.detector)), *_other_sensors(theirs.data, ours.data)],
    )


def _other_sensors(theirs: PluginConfig, ours: PluginConfig) -> list[str]:
    """Return in what the student's frames are not those that the teacher is meant for."""
    if theirs.name != ours.name:
        return [f"data.name: its recipe reads '{theirs.name}', the student's '{ours.name}'"]
    wanted, given = theirs.model_dump(mode="json"), ours.model_dump(mode="json")
    return [
        f"data.{key}: {wanted[key]!r} in its recipe, {given[key]!r} in the student's, whose frames both see: "
        f"add --set data.{key}={wanted[key]}"
        for key in sorted(sensor_keys(theirs))
        if wanted[key] != given[key]
    ]


def sensor_keys(data: PluginConfig) -> frozenset[str]:
    """Return the keys of a data set that say what its sensors give, and not of which frames."""
    return frozenset(type(data).model_fields) - _WHICH_FRAMES


def _other_images(theirs: View, ours: View) -> list[str]:
    """Return in what the images that the student sees are not those that the teacher wants."""
    if not _CAMERAS & theirs.sensors or not _CAMERAS & ours.sensors:
        return []
    faults = []
    wanted, given = (f"{view.image_height} x {view.image_width}" for view in (theirs, ours))
    if wanted != given:
        faults.append(
            f"images: it takes {wanted} pixels, the student {given}; both see the same images, or use a cache"
        )
    if _CAMERAS & theirs.sensors != _CAMERAS & ours.sensors:
        faults.append("key frames: one of teacher and student looks back at the key frame before: use a cache")
    return faults


class OnlineTeacher:
    """A teacher within the training step, behind the face of a cache; a ``pipeline.training.LiveTeacher``.

    It runs in eval mode, without gradient and in its own precision, on the augmented batch, so its signals lie in the
    student's frame. They are what its spec would store, but not encoded.

    Args:
        signals: that losses read; no others are kept.
        faults: in which it does not fit the student, for :meth:`require`.
    """

    def __init__(self, teacher: Teacher, spec: CacheSpec, signals: Sequence[str], faults: Sequence[str] = ()) -> None:
        absent: Mapping[str, str] | None = getattr(teacher, "absent", None)
        self.sample_shapes = sample_shapes_of(spec, teacher.shapes, teacher.identity.name, absent)
        self.fingerprint, self.view = teacher.identity.fingerprint, teacher.view
        self._teacher, self._spec, self._faults = teacher, spec, tuple(faults)
        self._read = {name: spec.signals[name] for name in signals if name in spec.signals}

    def require(
        self,
        signals: Sequence[str],
        grid: BEVGrid | None = None,
        tokens: Sequence[str] | None = None,
        classes: Sequence[str] | None = None,
        dataset: DatasetIdentity | None = None,
    ) -> list[str]:
        """Return everything in which the teacher does not fit its use; it knows every frame of every data set."""
        del tokens, dataset
        faults = [f"{name} is not in its spec '{self._spec.name}'" for name in signals if name not in self._read]
        if "instances" in signals:
            faults.append("instances lie in original images, which augmentation hides from it: use a cache")
        if grid is not None and grid != self._teacher.grid:
            faults.append(f"grid: it has {self._teacher.grid}; wanted is {grid}")
        if classes is not None and tuple(classes) != self._teacher.classes:
            own = ", ".join(self._teacher.classes)
            faults.append(f"classes: it has {own}; wanted are {', '.join(classes)}")
        return [*faults, *self._faults]

    @torch.no_grad()
    def __call__(self, batch: Batch) -> TeacherBatch:
        """Return what the losses read of an augmented batch, in the student's frame."""
        device = batch.labelled.device
        with torch.autocast(device.type, enabled=False):
            written = self._teacher.infer(batch)
        annotated = [
            boxes if known else None for boxes, known in zip(batch.boxes, batch.labelled.tolist(), strict=True)
        ]
        spec = self._spec.model_copy(update={"signals": self._read})
        grid = self._teacher.grid
        frames = [stored_signals(written, annotated, spec, grid, index, device) for index in range(len(batch))]
        values: dict[str, Any] = {}
        for name, stored in self._read.items():
            values |= _together(name, stored, [frame[name] for frame in frames])
        return TeacherBatch(Signals(**values), (BEVAffine.identity(),) * len(batch), grid)


def _together(name: str, spec: SignalSpec, frames: Sequence[Any]) -> dict[str, Any]:
    """Return one signal of all frames, by the fields that it takes in ``Signals``.

    Stacking also takes tensors out of inference mode, which no backward pass may have seen.
    """
    if isinstance(frames[0], Tensor):
        return {name: torch.stack(frames).float()}
    if isinstance(frames[0], SparseMap):
        known = torch.stack([frame.known for frame in frames])
        return {name: torch.stack([frame.values for frame in frames]).float(), f"{name}_known": known}
    if isinstance(frames[0], Boxes):
        return {name: tuple(_best(boxes, spec) for boxes in frames)}
    return {name: tuple(frames)}


def _best(boxes: Boxes, spec: SignalSpec) -> Boxes:
    """Return the boxes that a cache of ``spec`` holds, in their order."""
    kept = boxes[boxes.scores >= spec.min_score]
    best = kept.scores.argsort(descending=True, stable=True)[: spec.capacity]
    return kept[best.sort().values]
