"""The detections of the runs against the annotations of the frames that they were evaluated on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bevkd.config import apply_overrides, parse
from bevkd.data.source import FrameSource
from bevkd.errors import BevkdError
from bevkd.evaluation.ranges import Outcome, match
from bevkd.evaluation.score import metrics_of
from bevkd.grid import BEVGrid
from bevkd.progress import Progress
from bevkd.types import Boxes
from pipeline.parts import open_source
from pipeline.recipe import EvaluationConfig, StudentRecipe
from pipeline.reporting.methods import Scene
from pipeline.runs import Run


@dataclass(frozen=True)
class Judged:
    """What a run found.

    Attributes:
        boxes: by token.
        min_score: from which on its detections reach their best F1.
    """

    boxes: Mapping[str, Boxes]
    outcome: Outcome
    min_score: float


@dataclass(frozen=True)
class Detections:
    """All runs on the same frames.

    Attributes:
        tokens: of the frames, in the order of the outcomes.
        judged: by run folder.
        limit_m: how far from the ego boxes were scored; infinite if the recipe does not say.
        missing: why some runs are not among ``judged``.
    """

    source: FrameSource
    grid: BEVGrid
    tokens: tuple[str, ...]
    truth: Mapping[str, Boxes]
    judged: Mapping[Path, Judged]
    limit_m: float
    missing: tuple[str, ...]


def read_detections(scene: Scene, overrides: Sequence[str], progress: Progress) -> Detections | str:
    """Return what the runs found on the frames of their evaluation, or why that cannot be told.

    Args:
        overrides: change the recipes, e.g. where the data lies; ``data.root`` counts for ``evaluation.data`` too.
    """
    runs = [run for shown in scene.methods for run in shown.runs]
    kept = [run for run in runs if run.detections is not None and isinstance(run.recipe, StudentRecipe)]
    if not kept:
        return "No run folder holds detections. A recipe with 'evaluation' leaves them beside the weights."
    try:
        config = evaluation_of(kept[0], overrides)
        source = open_source(config.data, frozenset())
        truth = {token: source.annotations(token) for token in source.tokens if token in source.annotated}
    except (BevkdError, OSError) as error:
        return (
            f"The data set of the evaluation cannot be opened: {error} Say where it lies with --set data.root=FOLDER."
        )
    if not truth:
        return "None of the frames of the evaluation is annotated, so there is nothing to compare detections with."
    limit_m = config.max_distance_m or math.inf
    judged, missing = {}, []
    with progress.task("matching detections", len(kept), "run") as task:
        for run in kept:
            try:
                judged[run.folder] = _judge(run, source, truth, limit_m)
            except (BevkdError, AttributeError) as error:
                missing.append(f"{run.folder}: {error}")
            task.advance()
    if not judged:
        return f"The detections of the runs cannot be read: {missing[0]}"
    recipe = kept[0].recipe
    assert isinstance(recipe, StudentRecipe)
    return Detections(source, recipe.detector.grid, tuple(truth), truth, judged, limit_m, tuple(missing))


def evaluation_of(run: Run, overrides: Sequence[str]) -> EvaluationConfig:
    """Return what a run was evaluated on.

    Raises:
        ConfigError: its recipe has no evaluation, or an override does not fit.
    """
    values = apply_overrides(run.recipe.model_dump(mode="json"), with_evaluation(overrides))
    return parse(EvaluationConfig, values.get("evaluation") or {}, f"evaluation of {run.folder / 'recipe.yaml'}")


def with_evaluation(overrides: Sequence[str]) -> list[str]:
    """Return overrides in which those of ``data.root`` and ``data.index_dir`` count for ``evaluation.data`` too."""
    places = [each for each in overrides if each.startswith(("data.root=", "data.index_dir="))]
    return [*(f"evaluation.{each}" for each in places), *overrides]


def _judge(run: Run, source: FrameSource, truth: Mapping[str, Boxes], limit_m: float) -> Judged:
    assert run.detections is not None
    metrics = metrics_of(source)
    boxes = metrics.to_boxes(source, metrics.load_detections(run.detections, source), tuple(truth))
    outcome = match(list(truth.values()), [boxes[token] for token in truth], len(source.classes), limit_m)
    return Judged(boxes, outcome, outcome.best_score())
