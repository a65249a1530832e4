"""Stage 2: train a student from caches, with no teacher in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from bevkd.cache.reader import CacheReader
from bevkd.data.source import FrameSource
from bevkd.distill.base import DistillContext, build_losses, loss_labels, signals_of
from bevkd.errors import ConfigError
from bevkd.models.detector import Detector
from bevkd.progress import Progress
from pipeline.parts import block_shuffle, contract, open_caches, open_source
from pipeline.recipe import DistillConfig, StudentRecipe
from pipeline.training import PLAIN, Distillation, LiveTeacher, RunSummary, loaded_view, seeded_detector, train


def train_student(
    recipe: StudentRecipe,
    run: Path,
    resume: bool,
    progress: Progress,
    teachers: Mapping[str, LiveTeacher] = MappingProxyType({}),
) -> RunSummary:
    """Train the student of ``recipe`` in the folder ``run`` and evaluate it.

    Args:
        teachers: those that run within the step in place of caches, by name; see ``pipeline.online``.

    Raises:
        ContractError: caches, data set, model and losses do not fit together; lists every fault.
    """
    source, detector, distillation = prepare_student(recipe, progress, teachers)
    return train(recipe, source, detector, distillation, run, resume, progress)


def prepare_student(
    recipe: StudentRecipe, progress: Progress, teachers: Mapping[str, LiveTeacher] = MappingProxyType({})
) -> tuple[FrameSource, Detector, Distillation]:
    """Return the parts of a run, with every contract between them checked; see :func:`train_student`."""
    distill = recipe.distill
    online = distill is not None and distill.teacher == "online"
    readers = open_caches(distill.caches, distill.local_copy) if distill and not online else {}
    depth = _depth_cache(recipe, readers)
    sensors = loaded_view(recipe.detector, depth is not None, teachers.values()).sensors
    source = open_source(recipe.data, sensors, progress)
    detector = seeded_detector(recipe, progress)
    if distill:
        faults = _faults(recipe, distill, source, detector, readers, teachers)
        has = "teacher" if online else "cache"
        advice = f"Change the recipe to what the {has} has, or write a cache that has what is wanted"
        contract(f"this student cannot be distilled as asked. {advice}:", faults)
    distillation = _build(recipe, distill, detector, readers, teachers) if distill else PLAIN
    return source, detector, distillation


def _faults(
    recipe: StudentRecipe,
    distill: DistillConfig,
    source: FrameSource,
    detector: Detector,
    readers: Mapping[str, CacheReader],
    teachers: Mapping[str, LiveTeacher],
) -> list[str]:
    """Return everything that does not fit, so that it can be mended in one go."""
    faults: list[str] = []
    tokens = [token for token in source.tokens if distill.frames == "all" or token in source.labelled]
    online = distill.teacher == "online"
    kind, advice = ("teacher", "Set distill.online.{0}=RECIPE") if online else ("cache", "Add --cache {0}=URI")
    given: Mapping[str, CacheReader | LiveTeacher] = teachers if online else readers
    for name, signals in signals_of(distill.losses).items():
        if name not in given:
            known = ", ".join(given) or "none"
            faults.append(f"a loss reads the {kind} '{name}', given are: {known}. {advice.format(name)}.")
            continue
        misfits = given[name].require(
            signals, recipe.detector.grid, tokens, tuple(recipe.data.classes), source.identity
        )
        faults += [f"{kind} '{name}': {fault}" for fault in misfits]
        if not misfits:
            statistics = readers[name].manifest.statistics if name in readers else None
            context = DistillContext(detector, given[name].sample_shapes, statistics)
            losses = [loss for loss in distill.losses if loss.teacher == name]
            faults += [f"loss '{loss.name}': {fault}" for loss in losses for fault in loss.misfits(context)]
    if depth := _depth_cache(recipe, readers):
        faults += depth.require(("lidar_depth",), tokens=tokens, dataset=source.identity)
    return faults


def _depth_cache(recipe: StudentRecipe, readers: Mapping[str, CacheReader]) -> CacheReader | None:
    """Return the first cache that holds ``lidar_depth``, if the detector learns depth."""
    if "lidar_depth" not in recipe.detector.training_sensors:
        return None
    return next((reader for reader in readers.values() if "lidar_depth" in reader.manifest.spec.signals), None)


def _build(
    recipe: StudentRecipe,
    distill: DistillConfig,
    detector: Detector,
    readers: Mapping[str, CacheReader],
    teachers: Mapping[str, LiveTeacher],
) -> Distillation:
    """Return the losses, and per cache the signals that they read."""
    given: Mapping[str, CacheReader | LiveTeacher] = {**readers, **teachers}
    shapes = {name: each.sample_shapes for name, each in given.items()}
    statistics = {name: reader.manifest.statistics for name, reader in readers.items()}
    losses = build_losses(distill.losses, detector, shapes, statistics)
    caches = {name: (readers[name], signals) for name, signals in signals_of(distill.losses).items() if name in readers}
    depth = _depth_cache(recipe, readers)
    read = {**caches, "the depth of the LiDAR": (depth, ("lidar_depth",))} if depth else caches
    shuffle = block_shuffle(read, distill.local_copy.max_gb)
    configs = dict(zip(loss_labels(distill.losses), distill.losses, strict=True))
    unlabelled = distill.frames == "all"
    return Distillation(caches, losses, unlabelled, shuffle, depth, teachers, configs, distill.balance)


def with_caches(recipe: StudentRecipe, caches: Mapping[str, str]) -> StudentRecipe:
    """Return ``recipe`` with the URIs of ``--cache NAME=URI`` in place of its own.

    Raises:
        ConfigError: the recipe has no 'distill', reads no cache, or neither names nor reads one of ``caches``.
    """
    if not caches:
        return recipe
    distill = recipe.distill
    if distill is None:
        raise ConfigError("--cache is given, but the recipe has no 'distill': add its losses, or leave out --cache.")
    if distill.teacher == "online":
        raise ConfigError(
            "--cache is given, but distill.teacher is online, which reads no cache: leave out one of them."
        )
    read = {*distill.caches, *(loss.teacher for loss in distill.losses)}
    if unread := [f"{name}={uri}" for name, uri in caches.items() if name not in read]:
        raise ConfigError(
            f"--cache {', '.join(unread)}: no loss reads it. The caches that the losses read are called "
            f"{', '.join(sorted(read)) or 'nothing'}; use such a name, or give the losses another 'teacher'."
        )
    return recipe.model_copy(update={"distill": distill.model_copy(update={"caches": {**distill.caches, **caches}})})
