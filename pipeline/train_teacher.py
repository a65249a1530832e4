"""Train a detector from annotations alone: a teacher, or any plain detector."""

from __future__ import annotations

from pathlib import Path

from bevkd.progress import Progress
from pipeline.parts import open_source
from pipeline.recipe import TrainRecipe
from pipeline.training import PLAIN, RunSummary, seeded_detector, train


def train_teacher(recipe: TrainRecipe, run: Path, resume: bool, progress: Progress) -> RunSummary:
    """Train the detector of ``recipe`` in the folder ``run`` and evaluate it."""
    source = open_source(recipe.data, recipe.detector.training_sensors, progress)
    return train(recipe, source, seeded_detector(recipe), PLAIN, run, resume, progress)
