"""Detection files of a trained detector, for the frames of any split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bevkd.config import parse
from bevkd.errors import ConfigError
from bevkd.evaluation.predict import predict
from bevkd.evaluation.score import metrics_of
from bevkd.progress import Progress
from pipeline.evaluate import open_evaluation
from pipeline.parts import is_main_process
from pipeline.recipe import EvaluationConfig
from pipeline.trained import WEIGHTS, detector_recipe, joined_processes, recipe_values, trained_detector


@dataclass(frozen=True)
class Predictions:
    """What was written.

    Attributes:
        path: file or folder in the format of the data set.
        split: of the data set.
        frames, boxes: how many.
        annotated: whether the frames have annotations to score the boxes with.
    """

    path: Path
    split: str
    frames: int
    boxes: int
    annotated: bool

    def to_json(self) -> dict[str, Any]:
        """Return the summary as plain values."""
        return {**asdict(self), "path": str(self.path)}

    @property
    def text(self) -> str:
        """What a person reads."""
        scores = "" if self.annotated else "; these frames have no annotations, so there are no scores"
        return f"{self.path}: {self.boxes} boxes on {self.frames} frames of {self.split}{scores}"


def predict_run(
    run: str, out: Path, split: str | None, overrides: Sequence[str], progress: Progress, weights: str = WEIGHTS
) -> Predictions | None:
    """Write the detections of a trained detector, and say what was written; None in all but the first process.

    Args:
        run: folder of a run, or a recipe by path or name.
        out: file (nuScenes) or folder (KITTI) to write; there must be nothing yet.
        split: in place of that of ``evaluation.data``.
        overrides: change the recipe, e.g. the frames.
        weights: a name within the run folder, or the path of a file.

    Raises:
        ConfigError: ``out`` exists, or the recipe names no frames to predict on.
        ContractError: the detector's classes are not those of the frames, or their format is not known.
    """
    values, where = recipe_values(run, overrides)
    recipe = detector_recipe(values, where)
    if out.exists():
        raise ConfigError(f"{out} exists. Remove it, or choose another --out.")
    evaluation = recipe.evaluation or EvaluationConfig(data=recipe.data)
    if split is not None:
        data = {**evaluation.data.model_dump(mode="json"), "split": split}
        evaluation = parse(EvaluationConfig, {**evaluation.model_dump(mode="json"), "data": data}, f"--split {split}")
    with joined_processes(recipe.device) as device:
        detector = trained_detector(recipe, run, device, weights)
        source = open_evaluation(evaluation, detector, progress)
        found = predict(detector, source, source.tokens, progress, evaluation.batch_size, evaluation.workers)
        if not is_main_process():
            return None
        out.parent.mkdir(parents=True, exist_ok=True)
        path = metrics_of(source).save_detections(out, source, found, detector.config.sensors)
    boxes = sum(map(len, found.values()))
    return Predictions(path, source.identity.split, len(found), boxes, bool(source.annotated))
