"""Train a detector or a segmenter from annotations alone: a teacher, or any plain detector."""

from __future__ import annotations

from pathlib import Path

from bevkd.progress import Progress
from pipeline.parts import open_source
from pipeline.recipe import SegmenterRecipe, TrainRecipe
from pipeline.train_segmenter import train_segmenter
from pipeline.training import PLAIN, RunSummary, seeded_detector, train


def train_teacher(recipe: TrainRecipe | SegmenterRecipe, run: Path, resume: bool, progress: Progress) -> RunSummary:
    """Train the detector or segmenter of ``recipe`` in the folder ``run`` and evaluate it."""
    if isinstance(recipe, SegmenterRecipe):
        return train_segmenter(recipe, run, resume, progress)
    source = open_source(recipe.data, recipe.detector.training_sensors, progress)
    return train(recipe, source, seeded_detector(recipe, progress), PLAIN, run, resume, progress)
