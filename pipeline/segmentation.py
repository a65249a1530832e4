"""Metrics of a segmenter: the part that training and ``evaluate`` share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bevkd.config import parse
from bevkd.data.instances import ImageSource, InstanceDataConfig, open_images
from bevkd.errors import ConfigError, ContractError, DataError, report
from bevkd.evaluation.segmentation import SegmentationReport, evaluate_instances, predict_instances
from bevkd.models.segmenter import Segmenter
from bevkd.models.weights import load_weights
from bevkd.progress import Progress
from pipeline.parts import choose_device
from pipeline.recipe import SegmenterEvaluation, SegmenterRecipe


def open_checked(config: InstanceDataConfig) -> ImageSource:
    """Return the images of a recipe, with all their files checked.

    Raises:
        DataError: names every file that is missing or damaged.
    """
    source = open_images(config)
    faults = source.check()
    if faults:
        shown = [*faults[:20], *([f"and {len(faults) - 20} more"] if len(faults) > 20 else [])]
        raise report(DataError, f"{len(faults)} image(s) cannot be used. Restore the files:", shown)
    return source


def open_held_out(config: SegmenterEvaluation, classes: tuple[str, ...]) -> ImageSource:
    """Return the images to evaluate a segmenter of ``classes`` on.

    Raises:
        ContractError: their classes are others, so that its labels would mean other classes.
    """
    source = open_checked(config.data)
    if source.classes != classes:
        raise ContractError(
            f"evaluation.data.classes has {', '.join(source.classes)}, but the segmenter is trained on data.classes: "
            f"{', '.join(classes)}. Give both the same list, in the same order."
        )
    return source


def evaluate_segmenter(
    segmenter: Segmenter, source: ImageSource, config: SegmenterEvaluation, progress: Progress
) -> SegmentationReport:
    """Return the metrics of ``segmenter`` on the images of ``source``."""
    return evaluate_instances(source, predict_instances(segmenter, source, progress, config.batch_size))


def evaluate_segmenter_run(
    run: Path, values: Mapping[str, Any], weights: Path, progress: Progress
) -> SegmentationReport:
    """Return the metrics of a finished run whose recipe, with its overrides, is ``values``."""
    recipe = parse(SegmenterRecipe, dict(values), str(run / "recipe.yaml"))
    if recipe.evaluation is None:
        raise ConfigError(f"the recipe of {run} has no 'evaluation'. Add --set evaluation.data='{{root: ..., ...}}'.")
    segmenter = Segmenter(recipe.segmenter, recipe.data.classes).to(choose_device(recipe.device))
    load_weights(weights, segmenter)
    source = open_held_out(recipe.evaluation, recipe.data.classes)
    return evaluate_segmenter(segmenter, source, recipe.evaluation, progress)
