"""Stage 2: train a student from caches, with no teacher in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bevkd import registry
from bevkd.cache.reader import CacheReader
from bevkd.data.source import FrameSource
from bevkd.distill.base import DistillContext
from bevkd.errors import ConfigError
from bevkd.models.detector import Detector
from bevkd.progress import Progress
from pipeline.parts import block_shuffle, contract, open_caches, open_source
from pipeline.recipe import DistillConfig, StudentRecipe
from pipeline.training import PLAIN, Distillation, RunSummary, loaded_sensors, seeded_detector, train


def train_student(recipe: StudentRecipe, run: Path, resume: bool, progress: Progress) -> RunSummary:
    """Train the student of ``recipe`` in the folder ``run`` and evaluate it.

    Raises:
        ContractError: caches, data set, model and losses do not fit together; lists every fault.
    """
    readers = open_caches(recipe.distill.caches, recipe.distill.local_copy) if recipe.distill else {}
    depth = _depth_cache(recipe, readers)
    source = open_source(recipe.data, loaded_sensors(recipe.detector, depth is not None), progress)
    detector = seeded_detector(recipe, progress)
    if recipe.distill:
        faults = _faults(recipe, recipe.distill, source, detector, readers)
        advice = "Change the recipe to what the cache has, or write a cache that has what is wanted"
        contract(f"this student cannot be distilled as asked. {advice}:", faults)
    distillation = _build(recipe, recipe.distill, detector, readers) if recipe.distill else PLAIN
    return train(recipe, source, detector, distillation, run, resume, progress)


def _signals(distill: DistillConfig) -> dict[str, tuple[str, ...]]:
    """Return the signals that the losses read from each cache."""
    needed: dict[str, list[str]] = {}
    for loss in distill.losses:
        needed.setdefault(loss.teacher, []).extend(loss.signals())
    return {cache: tuple(dict.fromkeys(signals)) for cache, signals in needed.items()}


def _faults(
    recipe: StudentRecipe,
    distill: DistillConfig,
    source: FrameSource,
    detector: Detector,
    readers: Mapping[str, CacheReader],
) -> list[str]:
    """Return everything that does not fit, so that it can be mended in one go."""
    faults: list[str] = []
    tokens = [token for token in source.tokens if distill.frames == "all" or token in source.labelled]
    for cache, signals in _signals(distill).items():
        if cache not in readers:
            known = ", ".join(readers) or "none"
            faults.append(f"a loss reads the cache '{cache}', given are: {known}. Add --cache {cache}=URI.")
            continue
        misfits = readers[cache].require(
            signals, recipe.detector.grid, tokens, tuple(recipe.data.classes), source.identity
        )
        faults += [f"cache '{cache}': {fault}" for fault in misfits]
        if not misfits:
            context = DistillContext(detector, readers[cache].manifest.sample_shapes)
            losses = [loss for loss in distill.losses if loss.teacher == cache]
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
    recipe: StudentRecipe, distill: DistillConfig, detector: Detector, readers: Mapping[str, CacheReader]
) -> Distillation:
    """Return the losses, and per cache the signals that they read."""
    losses = []
    for loss in distill.losses:
        shapes = readers[loss.teacher].manifest.sample_shapes
        built = registry.load("bevkd.distill", loss.name).build(loss, DistillContext(detector, shapes))
        losses.append((loss.name, loss.teacher, built))
    caches = {cache: (readers[cache], signals) for cache, signals in _signals(distill).items()}
    depth = _depth_cache(recipe, readers)
    read = {**caches, "the depth of the LiDAR": (depth, ("lidar_depth",))} if depth else caches
    shuffle = block_shuffle(read, distill.local_copy.max_gb)
    return Distillation(caches, losses, distill.frames == "all", shuffle, depth)


def with_caches(recipe: StudentRecipe, caches: Mapping[str, str]) -> StudentRecipe:
    """Return ``recipe`` with the URIs of ``--cache NAME=URI`` in place of its own.

    Raises:
        ConfigError: the recipe has no 'distill', or neither names nor reads one of ``caches``.
    """
    if not caches:
        return recipe
    distill = recipe.distill
    if distill is None:
        raise ConfigError("--cache is given, but the recipe has no 'distill': add its losses, or leave out --cache.")
    read = {*distill.caches, *(loss.teacher for loss in distill.losses)}
    if unread := [f"{name}={uri}" for name, uri in caches.items() if name not in read]:
        raise ConfigError(
            f"--cache {', '.join(unread)}: no loss reads it. The caches that the losses read are called "
            f"{', '.join(sorted(read)) or 'nothing'}; use such a name, or give the losses another 'teacher'."
        )
    return recipe.model_copy(update={"distill": distill.model_copy(update={"caches": {**distill.caches, **caches}})})
